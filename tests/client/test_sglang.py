"""The client of an SGLang server: requests, streams, and a batch that is kept at its size."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from adaptive_spec.client.server import HeldBatch, Output
from adaptive_spec.client.sglang import ServerApi
from adaptive_spec.errors import BadInput
from tests.client.canned_server import CannedServer

ANSWER = b'{"output_ids": [5, 6], "meta_info": {"completion_tokens": 2}}'
STREAM = b"".join(b'data: {"meta_info": {"completion_tokens": %d}}\n\n' % n for n in (1, 2, 3)) + b"data: [DONE]\n\n"


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with CannedServer({"GET /server_info": (200, b'{"version": "1"}'), "POST /generate": (200, ANSWER)}).running() as made:
        yield made


def test_generate_asks_for_exactly_so_many_greedy_tokens(server: CannedServer) -> None:
    assert ServerApi(server.url, "key").generate("hello", 2) == Output([5, 6], {"completion_tokens": 2})
    (seen,) = server.requests
    sampling = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
    assert json.loads(seen.body) == {"text": "hello", "sampling_params": sampling, "stream": False}
    assert seen.headers["Authorization"] == "Bearer key"


def test_info_is_also_found_at_the_older_path(server: CannedServer) -> None:
    api = ServerApi(server.url.removeprefix("http://"))
    assert api.info() == {"version": "1"}
    server.answers["GET /get_server_info"] = server.answers.pop("GET /server_info")
    assert api.info() == {"version": "1"}
    server.answers.clear()
    with pytest.raises(
        BadInput, match=rf"^--url: '{server.url}': status 404 for /get_server_info; must be a running SGLang server$"
    ):
        api.info()


def test_a_stream_tells_the_tokens_so_far(server: CannedServer) -> None:
    server.answers["POST /generate"] = (200, STREAM)
    with ServerApi(server.url).stream("hello", 3) as tokens:
        assert list(tokens) == [1, 2, 3]
    assert json.loads(server.requests[0].body)["stream"] is True


@pytest.mark.parametrize(
    ("answer", "words"), [((503, b"full"), "status 503: full"), ((200, b'data: {"error": "gone"}\n'), "gone")]
)
def test_a_failed_request_is_an_os_error(server: CannedServer, answer: tuple[int, bytes], words: str) -> None:
    server.answers["POST /generate"] = answer
    with pytest.raises(OSError, match=words), ServerApi(server.url).stream("hello", 3) as tokens:
        list(tokens)


def test_a_batch_is_kept_at_its_size(server: CannedServer) -> None:
    server.answers["POST /generate"] = (200, STREAM)
    with HeldBatch(ServerApi(server.url), 3, ["a", "b"], 3) as batch:
        assert batch.wait(30.0)
        assert batch.failure is None
    texts = [json.loads(seen.body)["text"] for seen in server.requests]
    assert len(texts) >= 3
    assert set(texts) == {"a", "b"}


def test_a_batch_that_fails_says_why_in_one_line(server: CannedServer) -> None:
    server.answers["POST /generate"] = (503, b"no\nroom")
    with HeldBatch(ServerApi(server.url), 2, ["a"], 3) as batch:
        assert not batch.wait(30.0)
    assert batch.failure == "status 503: no room"


@pytest.mark.parametrize("most", ["many", None, [], {}, 0, -1, 1e3])
def test_a_number_of_requests_that_is_none_is_unknown(server: CannedServer, most: object) -> None:
    server.answers["GET /server_info"] = (200, json.dumps({"max_running_requests": most}).encode())
    assert ServerApi(server.url).max_running_requests() is None
    server.answers["GET /server_info"] = (200, b'{"max_running_requests": 48}')
    assert ServerApi(server.url).max_running_requests() == 48


def test_an_answer_that_is_too_deep_or_too_long_is_one_line(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers |= dict.fromkeys(("GET /server_info", "GET /get_server_info"), (200, b"[" * 100_000))
    with pytest.raises(BadInput, match=r"; must be a running SGLang server$"):
        ServerApi(server.url).info()
    monkeypatch.setattr("adaptive_spec.client.server.LARGEST_ANSWER", 1000)
    with pytest.raises(BadInput, match=r"the answer is longer than 1000 bytes; must be a running SGLang server$"):
        ServerApi(server.url).info()


@pytest.mark.parametrize("line", [b"{}", b'{"meta_info": []}', b'{"meta_info": {"completion_tokens": null}}', b"{" * 100_000])
def test_a_stream_of_something_else_is_a_failure_of_the_batch(server: CannedServer, line: bytes) -> None:
    server.answers["POST /generate"] = (200, b"data: " + line + b"\n\n")
    with HeldBatch(ServerApi(server.url), 1, ["a"], 3) as batch:
        assert not batch.wait(30.0)
    assert batch.failure


@pytest.mark.parametrize("url", ["ftp://x", "http://", "//"])
def test_a_url_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(BadInput, match=r"^--url: must be like http://HOST:PORT, got "):
        ServerApi(url)
