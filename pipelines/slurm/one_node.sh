#!/usr/bin/env bash
# cryo-svae on the GPUs of one node; goes on by itself after the time limit, until it is done.
#
#   sbatch one_node.sh run particles.star --out SVAE/run1 --mask-diameter 180 --z-dim 4
#
#SBATCH --job-name=cryo-svae
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# USR1 reaches this script 120 s before the time limit.
set -euo pipefail

# A process a GPU; on nodes without GPUs: sbatch --export=ALL,PROCESSES=2 …
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}

# By default torchrun gives restarted processes the addresses of the dead (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} / processes))}

stopped=
stop() {
  stopped=yes
  kill -TERM "$job"
}
trap stop USR1

torchrun --standalone --nproc-per-node="$processes" --max-restarts=3 \
  -m cryo_svae "$@" --resume &
job=$!

code=0
wait "$job" || code=$?
if [ -n "$stopped" ]; then
  wait "$job" || true # the first wait ended with the signal
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
