#!/usr/bin/env bash
# The plug-in through the real Pipeliner, in an environment of its own (the folder $1, else a temporary one).
#
#   pipelines/ccpem_pipeliner/test.sh [FOLDER]
#
# Run it from the repository's root with an environment active that passes the repository's tests.
set -euo pipefail
environment=${1:-$(mktemp -d)}
[ $# -eq 1 ] || trap 'rm -r "$environment"' EXIT

python -m venv "$environment"
"$environment/bin/pip" install --quiet ./pipelines/ccpem_pipeliner
CRYO_SVAE_PIPELINER=$environment python -m pytest -rs tests/test_ccpem_pipeliner.py
