#!/usr/bin/env bash
# Checks the registry and what our tools publish with the real huggingface_hub client: the registry once open and once
# with a token, then larql and the client against each other.
#
#   checks/huggingface_hub/run.sh PYTHON PROGRAMS
#
# PYTHON    has what requirements.txt names
# PROGRAMS  the folder of larql and skulk-weights
#
# Fails when anything is missing: Python, the client, a program, or an answer.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$1
programs=$2
for program in "$python" "$programs/skulk-weights" "$programs/larql"; do
    if ! command -v "$program" >/dev/null; then
        echo "no program at $program; build ours with: cargo build --release" >&2
        exit 1
    fi
done

work=$(mktemp -d)
pid=
stop() {
    if [ -n "$pid" ]; then
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
        pid=
    fi
}
trap 'stop; rm -rf "$work"' EXIT

serve() { # NAME [TOKEN]
    local port log="$work/$1.log" args=() tries=0
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    url=http://127.0.0.1:$port
    if [ -n "${2:-}" ]; then
        printf '%s\n' "$2" >"$work/secret"
        chmod 600 "$work/secret"
        args=(--token-file "$work/secret")
    fi
    "$programs/skulk-weights" registry serve --root "$work/$1" --listen "127.0.0.1:$port" "${args[@]}" >"$log" 2>&1 &
    pid=$!
    until "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "$url/api/agent-harnesses" 2>/dev/null; do
        tries=$((tries + 1))
        if [ $tries -ge 100 ] || ! kill -0 "$pid" 2>/dev/null; then
            echo "the server does not answer; it said:" >&2
            cat "$log" >&2
            exit 1
        fi
        sleep 0.1
    done
}

check() { # NAME COMMAND...
    local log="$work/$1.log"
    shift
    if ! "$@"; then
        echo "the server said:" >&2
        cat "$log" >&2
        exit 1
    fi
    stop
}

secret=hf_check_token
serve open
check open "$python" checks/huggingface_hub/check.py "$url"
serve token "$secret"
check token "$python" checks/huggingface_hub/check.py "$url" "$secret"
serve published "$secret"
check published "$python" checks/huggingface_hub/published.py "$url" "$secret" "$programs/larql" fixtures/models/qwen3_moe
