#!/usr/bin/env bash
# Heads of checkpoints against reference values, published to a stand-in Hub; and a trained one at work.
#
#   run.sh PYTHON DIR_OF_PROGRAMS SHARED
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$1" "$3/cases/mtp/check.py" --bin "$2/skulk-weights" --ignore-names
"$1" "$here/check.py" --bin "$2/skulk-weights" --larql "$2/larql" --kit "$3/cases/swp" \
    --fp8 "$3/goldens/fp8" --models "$3/goldens/models" --trained "$3/models/kjv"
