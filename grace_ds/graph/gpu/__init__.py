"""What the k-NN graph needs of RAPIDS: memory, NCCL and RAFT.  Not yet run on a GPU.

Written against RAPIDS 26.10 and checked against its real signatures on machines without a GPU (tests/contract); the tests
that compute (tests/gpu) wait for a machine that has one.  Nothing here is imported unless ``graph.leaf`` is ``cuvs``.
"""
