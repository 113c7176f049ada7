#!/usr/bin/env bash
# Real weights in GGUF: imported, published, served split and asked, and their perplexity against llama.cpp on the same file.
#
#   run.sh PYTHON DIR_OF_PROGRAMS DIR_OF_LLAMA_CPP WORK
#
# WORK keeps what was fetched (500 MB). The registry that the check publishes to is on this machine and ends with it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
files=$("$here/fetch.sh" "$1" "$4")
{ read -r smollm; read -r gemma; } <<<"$files"
"$1" "$here/check.py" --bin "$2" --llama-cpp "$3" --smollm "$smollm" --gemma "$gemma" --text "$here/../../models/kjv/heldout.txt"
