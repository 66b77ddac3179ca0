#!/bin/sh
# Remakes the example set beside this script; the same version of torch gives the same bytes.
set -eu
cryo-svae simulate --out "$(dirname "$0")" --overwrite --molecule hinge --n-particles 2000 --box 32 \
  --snr 0.2 --shift-std-px 1 --seed 1
