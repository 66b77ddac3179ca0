#!/usr/bin/env bash
# cryo-svae on the GPUs of several nodes; goes on by itself after the time limit, until it is done.
#
#   sbatch --nodes=4 several_nodes.sh run particles.star --out SVAE/run1 --mask-diameter 180 --z-dim 4
#
#SBATCH --job-name=cryo-svae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# USR1 reaches this script, which runs on the first node, 120 s before the time limit.
set -euo pipefail

# A process a GPU; on nodes without GPUs: sbatch --export=ALL,PROCESSES=2 …
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}

# By default torchrun gives restarted processes the addresses of the dead (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} / processes))}

stopped=
stop() {
  stopped=yes
  scancel --signal=TERM "$SLURM_JOB_ID.0"
}
trap stop USR1

# The processes meet at a port of the first node that other jobs are unlikely to use.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" \
  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
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
