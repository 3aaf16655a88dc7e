#!/usr/bin/env bash
# From a bare machine with Python and git to a hybrid Linear-Llama3, trained on two processes that each hold half of
# every sequence, saved, reloaded and generating. Everything it makes is in .venv and runs/quickstart.
#
# Arguments change the recipe: bash scripts/quickstart.sh sequence_parallel.linear=lasp1 sequence_parallel.softmax=ring
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh "."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_DATASETS_CACHE="$PWD/runs/quickstart/cache"
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 # two ranks on one machine

two_processes() {
  accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 \
    --mixed_precision no --dynamo_backend no "$@"
}

echo "== 1. Long documents: the sources of Python's standard library; a byte-level BPE tokenizer trained on them"
python scripts/quickstart_data.py runs/quickstart

echo "== 2. The same batch on one process and on two"
python scripts/compare_loss.py scripts/recipes/quickstart.yaml "$@"
two_processes scripts/compare_loss.py scripts/recipes/quickstart.yaml "$@"

echo "== 3. Training on two processes"
linear-llama3 train scripts/recipes/quickstart.yaml "$@"

echo "== 4. A new process loads the checkpoint through the Auto classes and writes Python"
python scripts/quickstart_generate.py runs/quickstart/model
