#!/usr/bin/env bash
# From particles to RELION class averages of the best of them, in the poses and classes that cryo_svae found.
#
#   pipelines/end_to_end.sh particles.star WORK_FOLDER [options of cryo-svae run]
#
# Run it from the project's folder, so that RELION finds the stacks. It needs relion_refine.
#   SELECT              options of cryo-svae select [--top 80%]
#   PARTICLE_DIAMETER   of RELION's mask, in Å [200]
set -euo pipefail
particles=$1 work=$2
shift 2

cryo-svae run "$particles" --out "$work/job" "$@"

read -ra select <<<"${SELECT:---top 80%}"
cryo-svae select "$work/job" --out "$work/selected.star" "${select[@]}"

# RELION averages without aligning: it keeps our psi and origins and only re-assigns classes.
mkdir -p "$work/Class2D"
classes=$(grep -c '@' "$work/job/classes.star")
relion_refine --i "$work/selected.star" --o "$work/Class2D/run" --K "$classes" --iter 5 \
  --skip_align --pad 1 --particle_diameter "${PARTICLE_DIAMETER:-200}" --flatten_solvent --zero_mask \
  --norm --scale --random_seed 1

# RELION exits with 0 when it fails: what it wrote is the proof.
test -s "$work/Class2D/run_it005_classes.mrcs"
echo "RELION's averages are in $work/Class2D/run_it005_classes.mrcs"
