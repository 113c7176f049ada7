#!/usr/bin/env python3
"""Takes two real models from GGUF to an answer over two processes, and compares their perplexity with llama.cpp's.

    check.py --bin DIR --llama-cpp DIR --smollm FILE --gemma FILE --text FILE

For each: `larql extract` keeps the blocks, `larql publish` sends the vindex to a registry of ours, a weight server and a node
fetch their halves from there, the OpenAI API is asked, and a node that holds everything gives the same text. BIN has larql,
skulk and skulk-weights; LLAMA_CPP has llama-perplexity. Ends with 'N passed, N failed'.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from contextlib import ExitStack
from pathlib import Path

WINDOW = 512
TEXT_BYTES = 24_000
PERPLEXITY_RATIO_MAX = 0.005
ATTEMPT_S = 600


class Model:
    def __init__(self, name, file, questions):
        self.name, self.file, self.questions = name, file, questions


def models(args):
    """What each model has to know: a path of the API, a request, words of which one must come."""
    def chat(text):
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 40}

    def go_on(text):
        return "/v1/completions", {"prompt": text, "max_tokens": 12}

    yield Model("smollm2-135m-instruct", args.smollm, [
        (chat("How many days are in a week?"), ["7", "seven"]),
        (chat("What is the opposite of hot?"), ["cold"]),
    ])
    # The base model: it has no template for chats, so it goes on with texts.
    yield Model("gemma-3-270m", args.gemma, [
        (go_on("Monday, Tuesday, Wednesday,"), ["Thursday"]),
        (go_on("One, two, three, four,"), ["five"]),
    ])


def run(command, env, **kwargs):
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=ATTEMPT_S, **kwargs)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


class Process:
    """A server that tells one line of JSON when it is ready."""

    def __init__(self, command, env):
        self.process = subprocess.Popen([str(word) for word in command], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        self.told = json.loads(line) if line else {"error": "it said nothing"}
        if "error" in self.told:
            self.close()
            raise AssertionError(f"{command[0]}: {self.told}")

    def close(self):
        self.process.kill()
        self.process.wait()


def registry(programs, folder, env):
    """A registry of ours; its address."""
    log = open(folder / "registry.log", "w")
    command = [programs / "skulk-weights", "registry", "serve", "--root", folder / "registry", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen([str(word) for word in command], env=env, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(100):
        found = re.search(r"http://127\.0\.0\.1:\d+", (folder / "registry.log").read_text())
        if found:
            return process, found[0]
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the registry did not come up: {(folder / 'registry.log').read_text()}")


def ask(node, path, request):
    body = json.dumps({"model": node.told["model"], "temperature": 0, **request}).encode()
    request = urllib.request.Request(node.told["url"].removesuffix("/v1") + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ATTEMPT_S) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def perplexity_here(larql, vindex, text, env):
    told = subprocess.run([str(larql), "perplexity", "--json", str(vindex), "--text", str(text), "--window", str(WINDOW)],
                          env=env, capture_output=True, text=True, timeout=ATTEMPT_S, check=True)
    return json.loads(told.stdout)["perplexity"]


def perplexity_there(peer, file, text, env):
    command = [peer / "llama-perplexity", "--model", file, "--file", text, "--ctx-size", WINDOW, "--threads", 2, "--no-warmup"]
    # What llama-perplexity writes last, its figure, is sometimes lost when it ends.
    for _ in range(5):
        said = run(command, env)
        found = re.search(r"PPL = ([0-9.]+)", said)
        if found:
            return float(found[1])
    raise AssertionError(f"llama-perplexity gave no figure:\n{said}")


def checks(model, args, folder, env):
    """Yields what was shown, step by step."""
    larql, skulk = args.bin / "larql", args.bin / "skulk"
    vindex, repo = folder / f"{model.name}.vindex", f"check/{model.name}"
    run([larql, "extract", model.file, "-o", vindex], env)
    run([larql, "verify", vindex], env)
    yield f"{model.name}: {model.file.name} is a vindex, and it verifies"
    run([larql, "publish", vindex, "--repo", repo, "--slices", "full"], env)
    with ExitStack() as stack:
        start = lambda *command: stack.enter_context(closing(Process(command, env)))
        server = start(larql, "serve", "--json", repo, "--listen", "127.0.0.1:0", "--cache", folder / "server")
        split = start(skulk, "--json", "serve", repo, "--ffn", server.told["listen"], "--listen", "127.0.0.1:0",
                      "--cache", folder / "node", "--context", 1024)
        whole = start(skulk, "--json", "serve", vindex, "--listen", "127.0.0.1:0", "--context", 1024, "--name", split.told["model"])
        for (path, request), words in model.questions:
            answer = ask(split, path, request)
            assert any(word in answer for word in words), f"{request} is answered with {answer!r}; one of {words} is expected"
            alone = ask(whole, path, request)
            assert answer == alone, f"split: {answer!r}, whole: {alone!r}"
            yield f"{model.name}, split and whole: {answer.strip()[:70]!r}"
    text = folder / "text.txt"
    text.write_bytes(args.text.read_bytes()[:TEXT_BYTES])
    here, there = perplexity_here(larql, vindex, text, env), perplexity_there(args.llama_cpp, model.file, text, env)
    off = here / there - 1
    assert abs(off) <= PERPLEXITY_RATIO_MAX, f"perplexity {here:.4f} here, {there:.4f} in llama.cpp ({100 * off:+.2f} %)"
    yield f"{model.name}: perplexity {here:.4f} here, {there:.4f} in llama.cpp ({100 * off:+.2f} %)"


class closing:
    def __init__(self, process):
        self.process = process

    def __enter__(self):
        return self.process

    def __exit__(self, *_):
        self.process.close()


def main():
    parser = argparse.ArgumentParser()
    for name in ("bin", "llama-cpp", "smollm", "gemma", "text"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    args = parser.parse_args()
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        env = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
        process, url = registry(args.bin, folder, env)
        env |= {"HF_ENDPOINT": url, "HF_TOKEN": "hf_check"}
        try:
            for model in models(args):
                try:
                    for shown in checks(model, args, folder, env):
                        passed += 1
                        print(f"ok {shown}", flush=True)
                except Exception:
                    failed += 1
                    print(f"FAILED {model.name}\n{traceback.format_exc()}", flush=True)
        finally:
            process.kill()
            process.wait()
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
