"""What is asked of HTTP itself: old versions, kinds of bodies, their size."""

import http.client
import json
from typing import Any

import pytest

from tests.server.running import RunningServer

BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}).encode()


def answer(
    server: RunningServer, method: str, path: str, *rest: Any
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = server.connect()
    connection.request(method, path, *rest)
    response = connection.getresponse()
    return response, response.read()


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_head(server: RunningServer, path: str) -> None:
    head, nothing = answer(server, "HEAD", path)
    assert (head.status, nothing) == (200, b"")
    assert head.headers["Content-Type"] == answer(server, "GET", path)[0].headers["Content-Type"]


def test_an_old_client_gets_a_stream_without_chunks(server: RunningServer) -> None:
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    old = server.bare(head + BODY, to_end=True)
    headers, _, events = old.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in headers.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ],
)
def test_content_types(server: RunningServer, kind: str | None, status: int) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert answer(server, "POST", "/v1/completions", BODY, headers)[0].status == status
