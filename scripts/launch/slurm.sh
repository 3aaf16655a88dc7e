#!/usr/bin/env bash
# SLURM: sbatch [--nodes 4 ...] scripts/launch/slurm.sh RECIPE.yaml [section.key=value ...]
#
# One torchrun on every node. Five minutes before the time is over the ranks get SIGTERM, and the job goes back into the
# queue. The recipe's output_dir must lie on a file system that all nodes see.
#SBATCH --job-name=linear-llama3
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${1:?usage: sbatch scripts/launch/slurm.sh RECIPE.yaml [section.key=value ...]}"

# Activate your environment here, unless sbatch hands on the one that has torchrun.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}" # to save in; torchrun's own are 30 s
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # torch 2.13: a restart would meet at the addresses of the ranks that died
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# In the background: bash runs a trap only between commands.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" --max_restarts 3 \
  --rdzv_backend c10d --rdzv_endpoint "$first:$((29500 + SLURM_JOB_ID % 1000))" --rdzv_id "$SLURM_JOB_ID" \
  -m linear_llama3.trainer "$@" training.resume_from_checkpoint=latest &
step=$!
stopped=no
trap 'stopped=yes; kill -TERM "$step"' TERM # srun hands it on

status=0
wait "$step" || status=$?
if [ "$stopped" = yes ]; then # that wait ended with the signal, this one ends with the step
  status=0
  wait "$step" || status=$?
  [ "$status" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
