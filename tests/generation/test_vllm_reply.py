"""Replies of an inference server that are not what was asked for, and servers that are none."""

import itertools
import json
import math
import re
import time
import traceback
from copy import deepcopy

import pytest
import torch

from moslim.generation.vllm_client import Client, ServerError
from moslim.generation.vllm_engine import VLLMEngine
from moslim.generation.vllm_server import CompletionRequest, SamplingLimits, completions_of, largest_reply, models_of
from moslim.utils.errors import UsageError
from tests.helpers.policy_runs import data, make, trainer, weights
from tests.helpers.raw_server import RawServer, reply
from tests.helpers.small_server import SmallServer

REQUEST, LIMITS = CompletionRequest([5, 6, 7], 2, 0), SamplingLimits(4, 1.0, [2], 10)
CLIENT = Client("http://127.0.0.1:9", "NO_KEY", 1.0, 0.0)
SECRET = "sk-a/b&c-0123456789"


def choice(index, tokens, logprobs=None, reason=None, **more):
    logprobs = [-0.5] * len(tokens) if logprobs is None else logprobs
    reason = reason or ("stop" if tokens[-1:] == [2] else "length")
    parts = {"token_ids": tokens, "prompt_token_ids": [5, 6, 7], "logprobs": {"token_logprobs": logprobs}}
    return {"index": index, **parts, "finish_reason": reason, **more}


def test_completions_come_in_the_order_of_their_seeds():
    good = {"choices": [choice(1, [3, 4, 2]), choice(0, [1, 1, 1, 1], [-1, 0.0, -2.5, 1e-6])]}
    first, second = completions_of(good, REQUEST, LIMITS, CLIENT)
    assert first.tokens == [1, 1, 1, 1] and first.logprobs == [-1.0, 0.0, -2.5, 1e-6]
    assert second.tokens == [3, 4, 2]
    at_the_limit = {"choices": [choice(i, [1, 1, 1, 2], reason=reason) for i, reason in enumerate(["stop", "length"])]}
    assert len(completions_of(at_the_limit, REQUEST, LIMITS, CLIENT)) == 2


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([choice(0, [2])], "gave 1 completions"),
        ([choice(i, [2]) for i in range(3)], "gave 3 completions"),
        ([], "gave 0 completions"),
        ([choice(0, [2]), choice(0, [2])], "a completion of index 0, twice"),
        ([choice(0, [2]), choice(2, [2])], "a completion of index 2, which was not requested"),
        ([choice(0, [2]), choice(-1, [2])], "index -1"),
        ([choice(False, [2]), choice(True, [2])], "index False"),
        ([choice("0", [2]), choice(1, [2])], "index 0"),
        ([choice(None, [2]), choice(1, [2])], "index None"),
        ([choice(0, [2]), None], "sent"),
        (None, "sent"),
        ({"0": choice(0, [2])}, "sent"),
        ([choice(0, [2]), choice(1, [2], prompt_token_ids=[5, 6])], "completion 1 is of another prompt"),
        ([choice(0, [2], prompt_token_ids=None), choice(1, [2])], "does not return the prompt"),
        ([choice(0, [2]), choice(1, [])], "completion 1 has no token ids"),
        ([choice(0, [2]), choice(1, [2], token_ids=None)], "completion 1 has no token ids, but None"),
        ([choice(0, [2]), choice(1, [2], token_ids="2")], "completion 1 has no token ids, but 2"),
        ([choice(0, [2]), choice(1, [10, 2])], "the token 10, which is not in the vocabulary of 10"),
        ([choice(0, [2]), choice(1, [-1, 2])], "the token -1"),
        ([choice(0, [2]), choice(1, [1.0, 2])], r"the token 1\.0"),
        ([choice(0, [2]), choice(1, [None, 2])], "the token None"),
        ([choice(0, [2]), choice(1, [True, 2])], "the token True"),
        ([choice(0, [2]), choice(1, [1, 1, 1, 1, 2])], "completion 1 has 5 tokens"),
        ([choice(0, [2]), choice(1, [1, 2, 1, 1])], "continues after the token 2 at position 1"),
        ([choice(0, [2]), choice(1, [2, 2])], "continues after the token 2 at position 0"),
        ([choice(0, [2]), choice(1, [1, 2], [-0.5])], "has 1 log-probabilities for 2 tokens"),
        ([choice(0, [2]), choice(1, [2], logprobs=None) | {"logprobs": None}], "has no log-probabilities"),
        ([choice(0, [2]), choice(1, [2], [math.nan])], "log-probability of nan"),
        ([choice(0, [2]), choice(1, [2], [-math.inf])], "log-probability of -inf"),
        ([choice(0, [2]), choice(1, [2], [-1e300])], "log-probability of -1e"),
        ([choice(0, [2]), choice(1, [2], [0.1])], r"log-probability of 0\.1"),
        ([choice(0, [2]), choice(1, [2], [None])], "log-probability of None"),
        ([choice(0, [2]), choice(1, [2], ["-1"])], "log-probability of -1"),
        ([choice(0, [2]), choice(1, [2], [10**400])], "log-probability of 1000"),
        ([choice(0, [2]), choice(1, [1, 1], reason="stop")], "without a token that ends"),
        ([choice(0, [2]), choice(1, [1, 1], reason="length")], "cut after 2 tokens .* --max-model-len of at least 7"),
        ([choice(0, [2]), choice(1, [2], reason="repetition")], "unknown reason .*repetition"),
        ([choice(0, [2]), choice(1, [2]) | {"finish_reason": None}], "unknown reason .*None"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_is_refused(choices, message):
    asked = (
        r"http://127.0.0.1:9/v1/completions was asked for 2 completions of at most 4 tokens of one prompt of 3 tokens"
    )
    with pytest.raises(ServerError, match=f"{asked}, and .*{message}"):
        completions_of({"choices": choices}, REQUEST, LIMITS, CLIENT)


@pytest.mark.parametrize(
    "found", [None, [], "x", 1, {}, {"data": []}, {"data": [1]}, {"data": [{"id": 5}]}, {"data": {}}]
)
def test_a_list_of_models_that_is_none_is_refused(found):
    with pytest.raises(ServerError, match="/v1/models was asked for the list of models, and sent"):
        models_of(found, CLIENT)


def test_adapters_without_their_model_are_refused():
    with pytest.raises(ServerError, match="lists adapters only"):
        models_of({"data": [{"id": "a", "parent": "b"}]}, CLIENT)


@pytest.fixture(scope="module")
def server(lm):
    server = SmallServer(lm)
    yield server
    server.stop()


def test_more_answers_to_one_prompt_and_fewer_to_the_next_train_nothing(server, preferences, lm, classifier, tmp_path):
    counts = itertools.cycle([1, -1])

    def uneven(route, found):
        if route == "/v1/completions" and next(counts) > 0:
            found["choices"].append(found["choices"][0] | {"index": len(found["choices"])})
        elif route == "/v1/completions":
            found["choices"].pop()
        return found

    assert_nothing_is_trained(server, uneven, r"gave [24] completions", preferences, lm, classifier, tmp_path)


def test_log_probabilities_that_are_none_train_nothing(server, preferences, lm, classifier, tmp_path):
    def spoilt(route, found):
        if route == "/v1/completions":
            found["choices"][1]["logprobs"]["token_logprobs"][-1] = math.nan
        return found

    assert_nothing_is_trained(
        server, spoilt, "completion 1 has a log-probability of nan", preferences, lm, classifier, tmp_path
    )


def assert_nothing_is_trained(server, change, message, preferences, lm, classifier, folder):
    module = make(preferences, lm, classifier, engine=VLLMEngine(6, urls=[server.url], folder=str(folder / "w")))
    before = deepcopy(weights(module))
    server.change = change
    try:
        with pytest.raises(ServerError, match=message):
            trainer(folder, max_steps=1).fit(module, data(preferences))
    finally:
        server.change = None
    assert all(torch.equal(before[name], weight) for name, weight in weights(module).items())


def client(server, timeout=5.0, patience=0.0, url=""):
    return Client(url or server.url, "MY_KEY", timeout, patience)


def refused(parts, timeout=5.0, limit=1000, pause=0.0):
    """What is said of a server that answers so."""
    server = RawServer(parts, pause)
    try:
        with pytest.raises(ServerError) as error:
            one = client(server, timeout)
            one.patiently(lambda: one.post("/v1/completions", {}, limit))
    finally:
        server.stop()
    assert server.url in str(error.value) and len(str(error.value)) < 1000
    return error, server


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (reply(b"<html>log in</html>", kind="text/html"), "not JSON, but text/html: <html>log in"),
        (reply(b"{}", kind="text/plain"), "not JSON, but text/plain"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"], "not JSON, but nothing"),
        (reply(b'{"choices": ['), "not complete JSON"),
        (reply(b""), "not complete JSON"),
        (reply(b"\xff\xfe{}"), "not complete JSON"),
        (reply(b"[" * 900), "not complete JSON"),
        (reply(b'{"error": {"message": "out of memory"}}'), "reports an error: .*out of memory"),
        (
            reply(b"", "302 Found", more="Location: http://evil.example/?key=1\r\n"),
            "redirects to evil.example, which is not",
        ),
        (reply(b"", "307 Temporary", more="Location: http://[bad\r\n"), "status 307, it redirects, which is not"),
        (reply(b"", "301 Moved"), "status 301, it redirects, which is not"),
        (reply(b"", "204 No Content"), "status 204"),
        (reply(b"no such route", "404 Not Found"), "status 404: no such route"),
        (reply(b"\x1b[31m\x07red\r\nline", "400 Bad"), r"status 400: \[31m red line"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], "no inference server at .*BadStatusLine"),
        (
            [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"],
            "1 bytes instead of 100",
        ),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}"], "no inference server at"),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"], "no inference server at"),
        ([], "no inference server at"),
    ],
)
def test_what_is_no_answer_is_one_kind_of_error(parts, message):
    error, _ = refused(parts)
    assert re.search(message, str(error.value)), str(error.value)


def test_a_redirection_is_not_followed():
    other = RawServer(reply(b"{}"))
    error, first = refused(reply(b"", "307 Temporary", more=f"Location: {other.url}/v1/completions\r\n"))
    assert len(first.requests) == 1 and other.requests == [] and "give that address" in str(error.value)


def test_an_answer_larger_than_what_was_asked_for_is_not_read_to_its_end():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
    error, server = refused([head, *[b" " * (1 << 16)] * 800], limit=1 << 17)
    assert "longer than 131072 bytes" in str(error.value)
    time.sleep(0.05)
    assert server.sent < 20 << 20  # of 50 MB: what fits between two sockets
    many = largest_reply(CompletionRequest([1] * 1000, 8, 0), SamplingLimits(256, 1.0, [], 10))
    assert 1 << 20 < many < 10 << 20


@pytest.mark.parametrize("where", ["headers", "body", "chunks", "interim"])
def test_a_server_that_drips_is_given_up_in_time(where):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    parts = {
        "headers": itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"y")),
        "body": itertools.chain([head + b"\r\n"], itertools.repeat(b" ")),
        "chunks": itertools.chain([head + b"Transfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\n \r\n")),
        "interim": itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),
    }
    start = time.monotonic()
    error, _ = refused(parts[where], timeout=0.4, pause=0.02)
    assert "no complete response within engine.timeout = 0.4 s" in str(error.value)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    "parts",
    [
        reply(b"you sent: {request}", "400 Bad Request"),
        reply(b"{request}", kind="text/html"),
        reply(b"{request}"),
        reply(json.dumps({"error": SECRET, "as": SECRET.replace("/", "\\/")}).encode()),
        reply("".join(f"\\\\u{ord(c):04X}" if c in "/&" else c for c in SECRET).encode(), "400 Bad"),
        reply(b" " * 5000 + SECRET.encode(), "500 Error"),
        reply(b"{}", "503 " + SECRET),
        reply(b"sk-a%2Fb%26c-0123456789 sk-a/b&amp;c-0123456789", "503 Busy"),
        [f"{SECRET} is no status\r\n".encode()],
        reply(b"", "302 Found", more=f"Location: http://user:{SECRET}@evil.example/{SECRET}\r\n"),
    ],
)
def test_a_key_that_a_server_repeats_is_taken_out(parts, monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {SECRET}\n")  # as a file gives it
    error, server = refused([re.sub(rb"Content-Length: \d+\r\n", b"", part) for part in parts])
    assert f"Authorization: Bearer {SECRET}\r\n".encode() in server.requests[0]
    assert "0123456789" not in "".join(traceback.format_exception(error.value)) + repr(error.value)


def test_a_key_in_a_reply_is_taken_out(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    one = Client("http://127.0.0.1:9", "MY_KEY", 1.0, 0.0)
    with pytest.raises(ServerError) as error:
        completions_of({"headers": {"Authorization": f"Bearer {SECRET}"}}, REQUEST, LIMITS, one)
    assert "[the key]" in str(error.value) and SECRET not in str(error.value)
    assert SECRET not in repr(vars(one))


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "tab\tbed", "umlaut-ä", "nul\x7f"])
def test_a_key_that_cannot_be_sent_is_refused_without_repeating_it(key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UsageError, match="the key in the environment variable MY_KEY holds") as error:
        VLLMEngine(6, api_key_env="MY_KEY")
    assert key not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:hunter2@127.0.0.1:8000", "a name or password before `@`"),
        ("http://hunter2@127.0.0.1:8000", "a name or password before `@`"),
        ("http://127.0.0.1:8000/?api_key=hunter2", r"with `\?` or `#`"),
        ("http://127.0.0.1:8000#hunter2", r"with `\?` or `#`"),
        ("http://127.0.0.1:99999999", "no address of a server"),
        ("http://127.0.0.1:port", "no address of a server"),
        ("http://[::1", "no address of a server"),
        ("http://127.0.0.1:8000/a b", "no address of a server"),
        ("http://127.0.0.1:8000/\r\nX-Key: 1", "no address of a server"),
        ("ftp://127.0.0.1", "no address of a server"),
        ("http://", "no address of a server"),
    ],
)
def test_addresses_that_hold_secrets_or_are_none_are_refused(url, message):
    with pytest.raises(UsageError, match=f"engine.urls.*{message}") as error:
        VLLMEngine(6, urls=[url])
    assert "hunter2" not in "".join(traceback.format_exception(error.value))


def test_a_key_in_place_of_its_variable_s_name_is_refused_without_repeating_it():
    with pytest.raises(UsageError, match="api_key_env is no name of an environment variable") as error:
        VLLMEngine(6, api_key_env=SECRET)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("route", ["/v1/load_lora_adapter", "/collective_rpc", "/reset_prefix_cache"])
def test_weights_count_as_pushed_only_where_the_server_says_so(route):
    for parts in (reply(b"Success", kind="text/plain"), reply(b""), reply(b'{"results": [null]}')):
        server = RawServer(parts)
        client(server).order(route, {})
        server.stop()
    for parts, message in (
        (reply(b"<html>", kind="text/html"), "not JSON, but text/html"),
        (reply(b'{"error": "no"}'), "reports an error"),
        (reply(b"{"), "not complete JSON"),
        (reply(b"", "202 Accepted"), "status 202"),
    ):
        server = RawServer(parts)
        with pytest.raises(ServerError, match=message):
            client(server).order(route, {})
        server.stop()
