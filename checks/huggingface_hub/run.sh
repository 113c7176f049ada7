#!/usr/bin/env bash
# Checks the registry with the real huggingface_hub client, once open and once with a token.
#
#   checks/huggingface_hub/run.sh [VENV_DIR [SERVER_COMMAND...]]
#
# VENV_DIR        where the client is installed (default target/venv); kept between runs
# SERVER_COMMAND  takes --root DIR --listen ADDRESS [--token-file FILE]
#                 (default target/release/skulk-weights registry serve)
#
# Fails when anything is missing: Python, the client, the server, or an answer.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${1:-target/venv}
shift || true
server=("$@")
if [ ${#server[@]} -eq 0 ]; then
    server=(target/release/skulk-weights registry serve)
fi
if ! command -v "${server[0]}" >/dev/null; then
    echo "no server: ${server[0]} is not there; build it with: cargo build --release" >&2
    exit 1
fi

if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r checks/huggingface_hub/requirements.txt

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

check() { # NAME [TOKEN]
    local port url log="$work/$1.log" args=()
    port=$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    url=http://127.0.0.1:$port
    if [ -n "${2:-}" ]; then
        printf '%s\n' "$2" >"$work/secret"
        chmod 600 "$work/secret"
        args=(--token-file "$work/secret")
    fi
    "${server[@]}" --root "$work/$1" --listen "127.0.0.1:$port" "${args[@]}" >"$log" 2>&1 &
    pid=$!
    local tries=0
    until "$venv/bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
        "$url/api/agent-harnesses" 2>/dev/null; do
        tries=$((tries + 1))
        if [ $tries -ge 100 ] || ! kill -0 "$pid" 2>/dev/null; then
            echo "the server does not answer; it said:" >&2
            cat "$log" >&2
            exit 1
        fi
        sleep 0.1
    done
    if ! "$venv/bin/python" checks/huggingface_hub/check.py "$url" ${2:+"$2"}; then
        echo "the server said:" >&2
        cat "$log" >&2
        exit 1
    fi
    stop
}

check open
check token hf_check_token
