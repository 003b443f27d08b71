# grace_ds for a machine with an NVIDIA GPU (CUDA 12).
#
# NOT TESTED: this file has never been built, and nothing of it has run. docs/install.md says what that leaves open.
#
#   docker build -t grace_ds .
#   docker run --rm --gpus all --shm-size 8g grace_ds grace-ds doctor
#
# DeepSpeed compiles some CUDA operators when a job first uses them, which takes nvcc. Runtime images have none: for such
# a job give a devel image of the same version with --build-arg BASE=...
ARG BASE=nvidia/cuda:12.6.3-cudnn-runtime-ubuntu24.04
FROM ${BASE}

# A torch for the CUDA of the base image: torch, CuPy and cuVS of two CUDA versions do not go into one process.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG EXTRAS=gpu-cu12,mpi,dask,report

# gcc and Python's headers: DeepSpeed and Triton compile small pieces at run time. ssh: the launchers start other hosts by it.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ gcc git openssh-client python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/grace_ds
ENV PATH=/opt/grace_ds/bin:$PATH

# Before the source is copied: a change of the code then downloads no torch again.
RUN pip install --no-cache-dir torch --index-url ${TORCH_INDEX}

COPY . /src/grace_ds
RUN pip install --no-cache-dir "/src/grace_ds[${EXTRAS}]"

# Rank processes started by root under mpirun are refused otherwise.
ENV OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
WORKDIR /workspace
CMD ["grace-ds", "--help"]
