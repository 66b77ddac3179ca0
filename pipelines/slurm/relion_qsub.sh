#!/usr/bin/env bash
# RELION's submission template: "Submit to queue?" Yes, queue submit command "sbatch", this file as script.
# RELION fills in the words between XXX. The command runs as it stands, in one process with one GPU.
#SBATCH --job-name=XXXnameXXX
#SBATCH --partition=XXXqueueXXX
#SBATCH --nodes=1
#SBATCH --ntasks=XXXmpinodesXXX
#SBATCH --cpus-per-task=XXXthreadsXXX
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=XXXoutfileXXX
#SBATCH --error=XXXerrfileXXX
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# TERM reaches this script 120 s before the time limit and is handed on; "Continue!" goes on from there.
set -m # the command gets a process group, to be signalled as a whole

run() {
# RELION leaves nothing else on the command's line.
XXXcommandXXX
}

run &
job=$!
trap 'kill -TERM -- "-$job"' TERM
wait "$job"
wait "$job" # the first wait ends with the signal
