#!/usr/bin/env bash
# Train a small hybrid on two processes that each hold half of every sequence, save it, reload it and generate text.
# Needs Python and git. All files are written to .venv and runs/quickstart.
#
#   bash scripts/quickstart.sh [--fast] [section.key=value ...]
#
# --fast uses fewer documents, shorter rows, a smaller model and fewer steps: under 2 minutes after the installation.
# Other arguments override recipe keys: sequence_parallel.linear=lasp1 sequence_parallel.softmax=ring
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
times=("15 seconds" "1 minute" "4 minutes" "15 seconds") # on two cores
if [ "${1:-}" = --fast ]; then
  shift
  times=("15 seconds" "30 seconds" "20 seconds" "10 seconds")
  set -- "data.files=runs/quickstart/corpus/a*" sequence_length=1024 model.hidden_size=96 model.intermediate_size=256 \
    training.max_steps=40 training.warmup_steps=4 training.logging_steps=8 "$@"
fi
source scripts/environment.sh "."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_DATASETS_CACHE="$PWD/runs/quickstart/cache"
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 # two ranks on one machine

two_processes() {
  accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 \
    --mixed_precision no --dynamo_backend no "$@"
}

step() { echo "== $1 of 4. $2 (about ${times[$1 - 1]})"; }

step 1 "Long documents: the sources of Python's standard library; a byte-level BPE tokenizer trained on them"
python scripts/quickstart_data.py runs/quickstart

step 2 "The same batch on one process and on two"
python scripts/compare_loss.py scripts/recipes/quickstart.yaml "$@"
two_processes scripts/compare_loss.py scripts/recipes/quickstart.yaml "$@"

step 3 "Training on two processes"
linear-llama3 train scripts/recipes/quickstart.yaml training.overwrite_output_dir=true "$@"

step 4 "A new process loads the checkpoint through the Auto classes and writes Python"
python scripts/quickstart_generate.py runs/quickstart/model
