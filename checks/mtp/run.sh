#!/usr/bin/env bash
# Heads of checkpoints against reference values, published to a stand-in Hub.
#
#   run.sh PYTHON SKULK_WEIGHTS SHARED
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$1" "$3/cases/mtp/check.py" --bin "$2" --ignore-names
"$1" "$here/check.py" --bin "$2" --kit "$3/cases/swp" --fp8 "$3/goldens/fp8" --models "$3/goldens/models"
