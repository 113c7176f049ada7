"""The official OpenAI client against `skulk serve`: every feature that the API page promises, as users call it.

Extracts a model, serves it on a free port, asks through the `openai` package, and counts what held. Ends with a status
other than 0 when anything did not; the last line is `N passed, M failed`.

Usage: check.py --bin DIR_OF_PROGRAMS --model CHECKPOINT [--only PART_OF_A_NAME]
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse

import jsonschema
import openai

KEY = "check-key-0123456789"
CHATML = (
    "{% if tools %}<|im_start|>system\nTools, called as <tool_call>{\"name\": …, \"arguments\": …}</tool_call>:\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = "And God said unto"
USER = [{"role": "user", "content": "Who made the heaven?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


class Node:
    """What the checks ask."""

    def __init__(self, url, name, process=None):
        self.url, self.name, self.process = url, name, process
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def chat(self, **kwargs):
        kwargs.setdefault("messages", USER)
        kwargs.setdefault("max_tokens", 12)
        return self.client.chat.completions.create(model=self.name, **kwargs)

    def text(self, prompt=PROMPT, **kwargs):
        kwargs.setdefault("max_tokens", 12)
        return self.client.completions.create(model=self.name, prompt=prompt, **kwargs)

    def raw(self, body, path="/v1/chat/completions", key=KEY, method="POST", headers=None):
        """Status, headers and JSON (or text) of a request that the client would not send."""
        address = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        all_headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, body=data, headers=all_headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        try:
            return response.status, response.headers, json.loads(text)
        except ValueError:
            return response.status, response.headers, text.decode(errors="replace")

    def metric(self, name, **labels):
        _, _, text = self.raw(None, "/metrics", method="GET")
        total = 0.0
        for line in text.splitlines():
            if line.startswith(name) and line[len(name)] in "{ " and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total


def refuses(kind, call, param=None, code=None):
    """`call` raises the client's exception `kind`, about this field, with this code."""
    try:
        call()
    except kind as error:
        assert param is None or error.param == param, (error.param, param, str(error))
        assert code is None or error.code == code, (error.code, code, str(error))
        return error
    raise AssertionError(f"not refused: {kind.__name__} {param}")


def joined(stream):
    """The deltas of a chat stream put together: text, finish reasons, usage, chunks."""
    text, finish, usage, chunks = {}, {}, None, []
    for chunk in stream:
        chunks.append(chunk)
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            text.setdefault(choice.index, "")
            text[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                assert choice.index not in finish, "two ends"
                finish[choice.index] = choice.finish_reason
    return text, finish, usage, chunks


@check
def models(node):
    listed = node.client.models.list().data
    assert [m.id for m in listed] == [node.name] and listed[0].object == "model"
    assert node.client.models.retrieve(node.name).id == node.name
    refuses(openai.NotFoundError, lambda: node.client.models.retrieve("nobody/nothing"), code="model_not_found")


@check
def chat(node):
    answer = node.chat(temperature=0)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.completion_tokens <= 12 and usage.prompt_tokens > 5
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    assert answer._request_id.startswith("req_")


@check
def roles_and_parts(node):
    node.chat(messages=[
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "made it?"}], "name": "anna"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "God"},
        {"role": "user", "content": "So?"},
    ])
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]
    refuses(openai.BadRequestError, lambda: node.chat(messages=image), "messages[0].content[0].type", "unsupported_parameter")


@check
def an_answer_goes_back_as_a_message(node):
    message = node.chat(temperature=0).choices[0].message
    node.chat(messages=USER + [message, {"role": "user", "content": "And then?"}])


@check
def chat_stream(node):
    whole = node.chat(temperature=0, max_tokens=20)
    text, finish, usage, chunks = joined(node.chat(temperature=0, max_tokens=20, stream=True))
    assert text[0] == whole.choices[0].message.content, (text, whole)
    assert finish == {0: whole.choices[0].finish_reason} and usage is None
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.object == "chat.completion.chunk" and c.id == chunks[0].id for c in chunks)
    assert all(c.choices for c in chunks), "no empty choices without include_usage"


@check
def stream_usage(node):
    _, _, usage, chunks = joined(node.chat(stream=True, stream_options={"include_usage": True}))
    assert usage.completion_tokens > 0 and chunks[-1].choices == [] and chunks[-1].usage is usage
    assert all(c.usage is None for c in chunks[:-1])


@check
def stream_helper(node):
    settings = dict(max_tokens=60, temperature=0, stop=["e", "a"])
    with node.client.chat.completions.stream(model=node.name, messages=USER, **settings) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds, kinds
    assert final.choices[0].message.content == node.chat(**settings).choices[0].message.content


@check
def stream_bytes(node):
    _, headers, text = node.raw({"model": node.name, "messages": USER, "max_tokens": 3, "stream": True})
    assert headers["content-type"].startswith("text/event-stream") and headers["x-request-id"].startswith("req_")
    events = text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]", events[-3:]
    assert all(e.startswith("data: {") or e.startswith(":") for e in events[:-2]), events
    for event in events[:-2]:
        if event.startswith("data"):
            json.loads(event[6:])


@check
def completions(node):
    answer = node.text(temperature=0)
    assert answer.object == "text_completion" and answer.choices[0].text and answer.choices[0].finish_reason == "length"
    pieces = [c.choices[0].text for c in node.text(temperature=0, stream=True) if c.choices]
    assert "".join(pieces) == answer.choices[0].text and len(pieces) > 3
    assert node.text(max_tokens=None).usage.completion_tokens <= 16, "OpenAI's default"


@check
def completions_of_several_prompts(node):
    prompts = [PROMPT, "In the beginning", "Thou shalt not"]
    one_by_one = [node.text(p, temperature=0).choices[0].text for p in prompts]
    together = node.text(prompts, temperature=0, n=2)
    assert [c.index for c in together.choices] == list(range(6))
    assert [c.text for c in together.choices] == [t for t in one_by_one for _ in range(2)]
    assert together.usage.completion_tokens == 6 * 12


@check
def completions_of_tokens(node):
    answer = node.text([5, 6, 7], echo=True, temperature=0)
    assert answer.usage.prompt_tokens == 3
    assert len(node.text([[5, 6], [7]]).choices) == 2
    refuses(openai.BadRequestError, lambda: node.text([10**6]), "prompt", "invalid_value")


@check
def echo(node):
    plain, echoed = node.text(temperature=0), node.text(temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    pieces = [c.choices[0].text for c in node.text(temperature=0, echo=True, stream=True) if c.choices]
    assert "".join(pieces) == echoed.choices[0].text
    refuses(openai.BadRequestError, lambda: node.text(echo=True, logprobs=1), "echo", "unsupported_parameter")


@check
def several_answers(node):
    answer = node.chat(n=4, temperature=1.5, seed=3)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert len({c.message.content for c in answer.choices}) > 1, "answers of one request differ"
    text, finish, _, _ = joined(node.chat(n=4, temperature=1.5, seed=3, stream=True))
    assert text == {c.index: c.message.content for c in answer.choices} and len(finish) == 4
    refuses(openai.BadRequestError, lambda: node.chat(n=9), "n")


@check
def stop_texts(node):
    whole = node.text(temperature=0, max_tokens=40).choices[0].text
    word = whole.split()[3]
    for stop in (word, ["never", word]):
        answer = node.text(temperature=0, max_tokens=40, stop=stop).choices[0]
        assert answer.text == whole[: whole.index(word)] and answer.finish_reason == "stop", (answer, whole)
    pieces = [c.choices[0] for c in node.text(temperature=0, max_tokens=40, stop=word, stream=True) if c.choices]
    assert "".join(p.text for p in pieces) == whole[: whole.index(word)] and pieces[-1].finish_reason == "stop"
    refuses(openai.BadRequestError, lambda: node.text(stop=["a", "b", "c", "d", "e"]), "stop")


@check
def seeds(node):
    draw = lambda seed: node.chat(temperature=1, seed=seed, max_tokens=20).choices[0].message.content
    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert len({node.chat(temperature=1, max_tokens=20).choices[0].message.content for _ in range(4)}) > 1, "no seed: another each time"


@check
def sampling_fields(node):
    greedy = node.text(temperature=0).choices[0].text
    assert node.text(temperature=1, extra_body={"top_k": 1}).choices[0].text == greedy
    assert node.text(temperature=1, top_p=0).choices[0].text == greedy
    assert node.text(temperature=1, extra_body={"min_p": 1}).choices[0].text == greedy
    assert node.text(temperature=0, extra_body={"repetition_penalty": 1.0, "top_k": -1}).choices[0].text == greedy
    long = dict(temperature=0, max_tokens=120)
    assert node.text(**long, frequency_penalty=2).choices[0].text != node.text(**long).choices[0].text
    assert node.text(**long, presence_penalty=2).choices[0].text != node.text(**long).choices[0].text


@check
def bias(node):
    forced = node.text(temperature=0, max_tokens=3, logit_bias={"20": 100}).choices[0].text
    assert forced == node.text([20, 20, 20], echo=True, max_tokens=1, logit_bias={"20": 100}, temperature=0).choices[0].text[: len(forced)]
    refuses(openai.BadRequestError, lambda: node.text(logit_bias={"20": 101}), "logit_bias.20")
    refuses(openai.BadRequestError, lambda: node.text(logit_bias={"999999": 1}), "logit_bias.999999")


@check
def eos(node):
    # The token that ends a text is 0 here; a bias makes it certain.
    ended = node.text(temperature=0, logit_bias={"0": 100}).choices[0]
    assert ended.finish_reason == "stop" and ended.text == "", ended
    went_on = node.text(temperature=0, logit_bias={"0": 100}, extra_body={"ignore_eos": True})
    assert went_on.choices[0].finish_reason == "length" and went_on.usage.completion_tokens == 12


@check
def chat_logprobs(node):
    answer = node.chat(temperature=0, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) in (answer.usage.completion_tokens, answer.usage.completion_tokens - 1)
    assert b"".join(bytes(t.bytes) for t in content).decode(errors="replace").strip() == answer.choices[0].message.content.strip()
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        tops = [t.logprob for t in token.top_logprobs]
        assert tops == sorted(tops, reverse=True) and token.token == token.top_logprobs[0].token, "greedy takes the likeliest"
    streamed = []
    for chunk in node.chat(temperature=0, logprobs=True, top_logprobs=3, stream=True):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert [t.token for t in streamed] == [t.token for t in content]
    assert node.chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    refuses(openai.BadRequestError, lambda: node.chat(top_logprobs=3), "top_logprobs")


@check
def completion_logprobs(node):
    choice = node.text(temperature=0, logprobs=2).choices[0]
    lists = choice.logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == 12
    assert "".join(lists.tokens) == choice.text and lists.text_offset[0] == 0 and lists.text_offset[1] == len(lists.tokens[0])
    assert all(len(top) == 2 and max(top.values()) == lp for top, lp in zip(lists.top_logprobs, lists.token_logprobs))
    tokens = [t for c in node.text(temperature=0, logprobs=2, stream=True) if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert tokens == lists.tokens


@check
def json_object(node):
    answer = node.chat(response_format={"type": "json_object"}, max_tokens=200, seed=1, frequency_penalty=1)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


@check
def json_schema(node):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["king", "prophet", "priest"]},
            "sons": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
        },
        "required": ["name", "age", "kind", "sons"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    for seed in range(4):
        answer = node.chat(response_format=form, max_tokens=400, seed=seed, temperature=1)
        assert answer.choices[0].finish_reason == "stop", answer
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    text, finish, _, _ = joined(node.chat(response_format=form, max_tokens=400, seed=0, temperature=1, stream=True))
    jsonschema.validate(json.loads(text[0]), schema)
    assert finish[0] == "stop"
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}
    refuses(openai.BadRequestError, lambda: node.chat(response_format=bad), "response_format")


@check
def parsed_by_the_client(node):
    import pydantic

    class Verse(pydantic.BaseModel):
        book: str = pydantic.Field(max_length=8)
        number: int = pydantic.Field(ge=1, le=150)

    answer = node.client.chat.completions.parse(model=node.name, messages=USER, response_format=Verse, max_tokens=300, seed=2)
    assert isinstance(answer.choices[0].message.parsed, Verse)


@check
def tools_required(node):
    answer = node.chat(tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=500, seed=5)
    choice = answer.choices[0]
    # A small model may go on calling until its limit; whole calls count then too.
    assert choice.finish_reason in ("tool_calls", "length") and choice.message.content is None, answer
    for call in choice.message.tool_calls:
        assert call.type == "function" and call.id.startswith("call_")
        tool = {"weather": WEATHER, "clock": CLOCK}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), tool["function"]["parameters"])
    one = node.chat(tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=500, seed=5, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1 and one.choices[0].finish_reason == "tool_calls", one


@check
def tools_named(node):
    named = {"type": "function", "function": {"name": "weather"}}
    answer = node.chat(tools=[WEATHER, CLOCK], tool_choice=named, max_tokens=300, seed=6)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    name, arguments, ids = "", "", []
    for chunk in node.chat(tools=[WEATHER, CLOCK], tool_choice=named, max_tokens=300, seed=6, stream=True):
        for choice in chunk.choices:
            for delta in choice.delta.tool_calls or []:
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
                ids += [delta.id] if delta.id else []
    assert (name, arguments, len(ids)) == ("weather", call.function.arguments, 1)
    refuses(openai.BadRequestError, lambda: node.chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "x"}}), "tool_choice.function.name")


@check
def tools_stream_helper(node):
    with node.client.chat.completions.stream(
        model=node.name, messages=USER, tools=[WEATHER], tool_choice="required", max_tokens=500, seed=5, parallel_tool_calls=False
    ) as stream:
        for _ in stream:
            pass
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


@check
def tools_auto_and_none(node):
    assert node.chat(tools=[WEATHER], temperature=0).choices[0].message.content
    shown = node.chat(tools=[WEATHER], temperature=0).usage.prompt_tokens
    hidden = node.chat(tools=[WEATHER], tool_choice="none", temperature=0).usage.prompt_tokens
    assert shown > hidden, "tools are part of the prompt unless they may not be called"
    refuses(openai.BadRequestError, lambda: node.chat(tool_choice="required"), "tool_choice")
    refuses(openai.BadRequestError, lambda: node.chat(tools=[{"type": "custom", "custom": {"name": "x"}}]), "tools[0].type")


@check
def fields_without_effect(node):
    plain = node.chat(temperature=0).choices[0].message.content
    answer = node.chat(
        temperature=0, user="u", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="s",
        prompt_cache_key="k", modalities=["text"],
    )
    assert answer.choices[0].message.content == plain


@check
def fields_that_are_refused(node):
    for name, value in {
        "audio": {"format": "wav", "voice": "alloy"}, "functions": [{"name": "f"}], "function_call": "auto",
        "prediction": {"type": "content", "content": "x"}, "web_search_options": {}, "store": True, "service_tier": "flex",
        "modalities": ["text", "audio"], "reasoning_effort": "low", "verbosity": "low",
    }.items():
        refuses(openai.BadRequestError, lambda: node.chat(extra_body={name: value}), name, "unsupported_parameter")
    refuses(openai.BadRequestError, lambda: node.chat(extra_body={"foo": 1}), "foo", "unknown_parameter")
    refuses(openai.BadRequestError, lambda: node.text(best_of=3), "best_of", "unsupported_parameter")
    refuses(openai.BadRequestError, lambda: node.text(suffix="x"), "suffix", "unsupported_parameter")


@check
def values_that_are_refused(node):
    for name, value in {"temperature": 3, "top_p": -1, "max_tokens": 0, "presence_penalty": 5, "seed": "x", "stream": "y", "n": 1.5}.items():
        error = refuses(openai.BadRequestError, lambda: node.chat(extra_body={name: value}), name)
        assert error.type == "invalid_request_error" and error.status_code == 400
    refuses(openai.BadRequestError, lambda: node.chat(messages=[]), "messages")
    refuses(openai.NotFoundError, lambda: node.client.chat.completions.create(model="other", messages=USER), "model", "model_not_found")
    refuses(openai.BadRequestError, lambda: node.chat(stream_options={"include_usage": True}), "stream_options")


@check
def context_length(node):
    error = refuses(openai.BadRequestError, lambda: node.text("word " * 3000), "prompt", "context_length_exceeded")
    assert "maximum context length" in str(error)
    refuses(openai.BadRequestError, lambda: node.chat(messages=[{"role": "user", "content": "word " * 3000}]), "messages", "context_length_exceeded")
    # A limit beyond the context is a limit all the same; the context ends the answer.
    answer = node.text(max_tokens=10**9, temperature=0, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 1024, answer.usage


@check
def keys(node):
    for key in ("", "wrong", KEY[:-1], KEY + "x"):
        status, headers, body = node.raw(None, "/v1/models", key=key, method="GET")
        assert status == 401 and body["error"]["code"] == "invalid_api_key", (key, status, body)
    other = openai.OpenAI(base_url=f"{node.url}/v1", api_key="wrong-key-000000", max_retries=0)
    refuses(openai.AuthenticationError, lambda: other.models.list(), code="invalid_api_key")
    assert node.raw(None, "/health", key=None, method="GET")[0] == 200
    assert node.raw(None, "/ready", key=None, method="GET")[0] == 200
    assert node.raw(None, "/metrics", key=None, method="GET")[0] == 401


@check
def bodies_that_are_none(node):
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"model": "\xc3\x28"}', b"[" * 200_000, b'{"a":' * 50_000, b'{"model": 1e999}'):
        status, _, answer = node.raw(body)
        assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}, (body[:20], status, answer)
    status, _, answer = node.raw(b" " * (9 << 20))
    assert status == 413 and answer["error"]["code"] == "request_too_large", (status, answer)
    assert node.raw(None, "/v1/nothing", method="GET")[0] == 404
    assert node.raw(None, method="GET")[0] == 405


@check
def cancellation(node):
    before = node.metric("vllm:request_success_total", finished_reason="abort")
    stream = node.text(max_tokens=900, stream=True, temperature=0, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert node.metric("vllm:num_requests_running") >= 1
    stream.close()
    # A client that waits for a whole answer and goes away.
    address = urllib.parse.urlsplit(node.url)
    body = json.dumps({"model": node.name, "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}).encode()
    with socket.create_connection((address.hostname, address.port)) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        until = time.time() + 10
        while node.metric("vllm:num_requests_running") < 1 and time.time() < until:
            time.sleep(0.01)
    until = time.time() + 10
    while node.metric("vllm:num_requests_running") + node.metric("vllm:num_requests_waiting") > 0:
        assert time.time() < until, "a request runs on without its client"
        time.sleep(0.02)
    assert node.metric("vllm:request_success_total", finished_reason="abort") >= before + 1


@check
def thirty_two_streams(node):
    prompts = [f"{PROMPT} {name}" for name in "Adam Noah Moses David Saul Ruth Job Paul".split()] * 4

    def read(i):
        settings = dict(temperature=0) if i % 2 else dict(temperature=1, seed=i)
        stream = node.text(prompts[i], max_tokens=24, stream=True, stream_options={"include_usage": True}, **settings)
        text, usage = "", None
        for chunk in stream:
            text += "".join(c.text for c in chunk.choices)
            usage = chunk.usage or usage
        return text, usage.completion_tokens

    one_by_one = [read(i) for i in range(32)]
    began = threading.Barrier(32)

    def at_once(i):
        began.wait(30)
        return read(i)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(at_once, range(32)))
    assert together == one_by_one, [(i, a, b) for i, (a, b) in enumerate(zip(one_by_one, together)) if a != b][:2]


@check
def cached_prompts(node):
    prompt = "The words of the preacher, the son of David, king in Jerusalem. " * 12
    node.text(prompt, max_tokens=1)
    usage = node.text(prompt, max_tokens=1).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


@check
def numbers(node):
    assert node.metric("vllm:generation_tokens_total") > 100
    assert node.metric("vllm:time_to_first_token_seconds_count") > 10
    assert node.metric("vllm:inter_token_latency_seconds_count") > 100
    assert node.metric("vllm:e2e_request_latency_seconds_count") > 10
    assert node.metric("vllm:request_success_total", finished_reason="length") > 10
    assert node.metric("vllm:prompt_tokens_total") > node.metric("vllm:prefix_cache_hits_total") > 0
    assert 0 <= node.metric("vllm:kv_cache_usage_perc") <= 1
    assert node.metric("skulk_requests_refused_total", status="401") >= 5


@check
def asynchronous(node):
    import asyncio

    async def run():
        client = openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key=KEY, max_retries=0)
        answers = await asyncio.gather(*(client.completions.create(model=node.name, prompt=PROMPT, max_tokens=5, temperature=0) for _ in range(8)))
        assert len({a.choices[0].text for a in answers}) == 1
        stream = await client.chat.completions.create(model=node.name, messages=USER, max_tokens=5, stream=True)
        return [c async for c in stream]

    assert len(asyncio.run(run())) > 1


def start(programs, model, scratch):
    """A node of the model on a free port."""
    vindex, template, keys = (os.path.join(scratch, name) for name in ("kjv.vindex", "chatml.jinja", "keys"))
    subprocess.run([os.path.join(programs, "larql"), "extract", model, "-o", vindex, "--quant", "q4k"], check=True, stdout=subprocess.DEVNULL)
    for path, text in ((template, CHATML), (keys, f"# keys\nanother-key-000\n{KEY}\n")):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    command = [os.path.join(programs, "skulk"), "--json", "serve", vindex, "--listen", "127.0.0.1:0", "--name", "kjv"]
    process = subprocess.Popen(command + ["--chat-template", template, "--api-key-file", keys], stdout=subprocess.PIPE, text=True)
    ready = json.loads(process.stdout.readline() or '{"error": "it did not come up"}')
    if "error" in ready:
        sys.exit(f"skulk serve: {ready}")
    return Node(ready["url"], ready["model"], process)


def drain(node):
    """A request to terminate lets a stream under way finish, and the node then ends well."""
    stream = node.text(max_tokens=400, stream=True, temperature=0, extra_body={"ignore_eos": True})
    chunks = iter(stream)
    next(chunks)
    node.process.terminate()
    finish = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
    assert finish == "length", finish
    assert node.process.wait(30) == 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", help="a part of a check's name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        node = start(arguments.bin, arguments.model, scratch)
        n_passed, n_failed = 0, 0
        try:
            for function in CHECKS + [drain]:
                name = function.__name__.replace("_", " ")
                if arguments.only and arguments.only not in name:
                    continue
                began = time.time()
                try:
                    function(node)
                    n_passed += 1
                    print(f"ok      {name} ({time.time() - began:.1f} s)", flush=True)
                except Exception:
                    n_failed += 1
                    print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
        finally:
            node.process.kill()
            node.process.wait()
    print(f"{n_passed} passed, {n_failed} failed")
    sys.exit(n_failed > 0 or n_passed == 0)


main()
