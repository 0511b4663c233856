"""`hibernode invoke`: the request, the answer on stdout, the status as exit code."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_an_event_is_an_invocation(at_home: Run) -> None:
    done = at_home("invoke", "echo", "--event", "Nice to meet you")
    assert (done.code, done.err) == (0, "")
    assert done.json["method"] == "POST"
    assert done.json["path"] == "/2023-03-30/functions/echo/invocations"
    assert done.json["body"] == "Nice to meet you"


def test_a_path_goes_to_the_functions_own_server(at_home: Run, tmp_path: Path) -> None:
    assert at_home("invoke", "echo", "--path", "v1/models?x=1").json["path"] == "/fn/echo/v1/models?x=1"
    assert at_home("invoke", "echo", "--path", "/").json["method"] == "GET"
    event = tmp_path / "page.json"
    event.write_text('{"page": 1}')
    asked = at_home("invoke", "echo", "--path", "/ocr", "-f", event, "-H", "Content-Type: application/json").json
    assert (asked["method"], asked["body"]) == ("POST", '{"page": 1}')
    assert [value for name, value in asked["headers"].items() if name.lower() == "content-type"] == ["application/json"]


@pytest.mark.parametrize(("function", "code"), [("nowhere", 3), ("full", 5), ("none", 5)])
def test_gateway_error_is_a_message(at_home: Run, function: str, code: int) -> None:
    done = at_home("invoke", function)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"hibernode: {function} is refused (")
    assert done.err.endswith(", request 1-67a59f35)\n")


def test_function_error_is_its_answer(at_home: Run) -> None:
    done = at_home("invoke", "sick")
    assert (done.code, done.out, done.err) == (1, "Traceback\n", "hibernode: the function answered HTTP 500\n")


def test_the_head_can_be_shown(at_home: Run) -> None:
    done = at_home("invoke", "echo", "--include")
    assert done.err.startswith("HTTP 200 OK (")
    assert "x-fc-instance-id: i-run" in done.err
    assert json.loads(done.out)


def test_the_log_of_the_request_can_be_shown(at_home: Run) -> None:
    done = at_home("invoke", "echo", "--log")
    assert done.err == "FC Invoke Start RequestId: 1-67a59f35\n?]0;owned?page 1\n"
    assert done.json["headers"]["x-fc-log-type"] == "Tail"
    assert at_home("invoke", "echo").err == ""


def test_truncated_answer_is_a_failure(at_home: Run) -> None:
    done = at_home("invoke", "cut")
    assert (done.code, done.out) == (5, "half")
    assert "(ANSWER_CUT)" in done.err


def test_gateway_that_answers_before_reading_the_body(at_home: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is used; a broken pipe to the gateway is not a closed stdout."""
    real = http.client.HTTPConnection.request

    def cut_off(connection: http.client.HTTPConnection, verb: str, target: str, **_: object) -> None:
        real(connection, verb, target)
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(http.client.HTTPConnection, "request", cut_off)
    done = at_home("invoke", "full", "--event", "a large body")
    assert done.code == 5
    assert "full is refused (ResourceExhausted" in done.err


def test_no_gateway(run: Run) -> None:
    done = run("invoke", "echo", "--gateway", "127.0.0.1:1")
    assert done.code == 5
    assert "no gateway answers at 127.0.0.1:1" in done.err


def test_header_with_a_line_end_is_refused(at_home: Run) -> None:
    done = at_home("invoke", "echo", "-H", "a: b\r\nx-fc-account-id: 1")
    assert done.code == 2
    assert "not a valid HTTP request" in done.err
