#!/usr/bin/env bash
# RELION's "External executable" for cryo_svae on this site: prepares the environment, then becomes the job.
# Mend the lines between the rules, keep the file executable, and name it in the External job.
set -eu

# A job that leaves no marker file runs for ever in RELION's eyes, so what fails before the program
# starts leaves one too. RELION's first two arguments are: --o External/jobNNN/
if [ "${1-}" = --o ]; then trap 'touch "$2/RELION_JOB_EXIT_FAILURE"' EXIT; fi

# ------------------------------------------------------------------------------------------------
environment=${CRYO_SVAE_ENVIRONMENT:-/opt/cryo_svae/.venv}
source "$environment/bin/activate"
# conda: source /opt/conda/etc/profile.d/conda.sh; conda activate cryo_svae
# A cluster's module, where the driver needs one: module load cuda
# ------------------------------------------------------------------------------------------------

exec cryo-svae-relion "$@"
