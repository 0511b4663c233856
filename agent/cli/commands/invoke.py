"""`hibernode invoke`: sends one request to a function through the gateway and prints the response."""

from __future__ import annotations

import base64
import http.client
import json
import sys
import time
import urllib.parse
from contextlib import suppress
from typing import BinaryIO

import click

from agent.cli.console.output import clean_log, note
from agent.cli.console.progress import blocking_progress
from agent.cli.daemon_locator import find_gateway
from agent.cli.options import cli_options, gateway_option, home_option, timeout_option
from agent.core.errors import DeadlineError, InvalidArgumentError, UnavailableError
from agent.exit_codes import exit_of_http

_CHUNK_BYTES = 64 * 1024
_MAX_ERROR_BYTES = 64 * 1024
_MAX_BODY_BYTES = 256 << 20
"""Above the gateway's own limit (32 MiB by default), which answers 413."""


@click.command()
@click.argument("function")
@click.option("--event", "-e", metavar="TEXT", help="Request body.")
@click.option(
    "--event-file", "-f", type=click.File("rb"), metavar="FILE", help="File with the request body; - = stdin."
)
@click.option("--header", "-H", "headers", multiple=True, metavar="NAME:VALUE", help="A header; may be repeated.")
@click.option("--method", "-X", metavar="METHOD", help="For --path (default: /); default: GET, or POST with a body.")
@click.option("--path", metavar="PATH", help="Call this path of the function's HTTP server instead of POST /invoke.")
@click.option("--include", "-i", is_flag=True, help="Print the response's status and headers on stderr.")
@click.option("--log", "with_log", is_flag=True, help="Print the instance's output for this request on stderr.")
@timeout_option("1h")
@gateway_option
@home_option
def invoke(
    function: str,
    event: str | None,
    event_file: BinaryIO | None,
    headers: tuple[str, ...],
    method: str | None,
    path: str | None,
    include: bool,
    with_log: bool,
    timeout_s: float,
) -> None:
    """Send one request to a function and print the response as it arrives.

    Without --path and --method the request is an invocation (`POST /invoke` with the event), as with InvokeFunction.
    The exit code follows the HTTP status: 0 for 2xx and 3xx, 2 for 400, 3 for 404, 4 for 401, 403 and 409, 5 for 429,
    503 and 504, 1 for 500 and 502.

    --log prints at most 4 KB between the lines `FC Invoke Start RequestId: ID` and `FC Invoke End RequestId: ID`, which
    the function's server must print (`x-fc-log-type: Tail`).

    \b
    Examples:
      hibernode invoke ocr --event-file page.png > answer.json
      hibernode invoke chat --path /v1/models
      echo hello | hibernode invoke echo -f - -H 'content-type: text/plain'
    """
    if event is not None and event_file is not None:
        raise click.UsageError("give --event or --event-file, not both")
    body = _body(event, event_file)
    name = urllib.parse.quote(function, safe="")
    if path is None and method is None:
        verb, target = "POST", f"/2023-03-30/functions/{name}/invocations"
    else:
        verb, target = (method or ("POST" if body else "GET")).upper(), f"/fn/{name}{_path(path)}"
    fields = dict(map(_header, headers))
    if body and not any(key.lower() == "content-type" for key in fields):
        fields["content-type"] = "application/octet-stream"
    if with_log:
        fields["x-fc-log-type"] = "Tail"
    click.get_current_context().exit(_send(verb, target, body, fields, timeout_s, include))


def _body(event: str | None, file: BinaryIO | None) -> bytes:
    if file is None:
        return (event or "").encode()
    body = file.read(_MAX_BODY_BYTES + 1)
    if len(body) > _MAX_BODY_BYTES:
        raise click.UsageError(f"{file.name} is larger than {_MAX_BODY_BYTES >> 20} MiB, more than a gateway accepts")
    return body


def _path(path: str | None) -> str:
    path = path or "/"
    return path if path.startswith("/") else f"/{path}"


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise click.UsageError(f"a header is NAME:VALUE, got {name!r}")
    return name.strip(), value.strip()


def _send(verb: str, target: str, body: bytes, fields: dict[str, str], timeout_s: float, include: bool) -> int:
    """Sends the request, copies the response to stdout and returns the exit code."""
    gateway = find_gateway(cli_options())
    connection = http.client.HTTPConnection(gateway, timeout=timeout_s)
    started = time.monotonic()
    try:
        with blocking_progress("waiting for the response"):
            # A gateway that refuses a body may answer and close before it has read all of it.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(verb, target, body=body or None, headers=fields)
            answer = connection.getresponse()
        _print_head(answer, include, time.monotonic() - started)
        _print_log(answer)
        if answer.getheader("x-fc-request-id") and answer.status >= 400 and not answer.getheader("x-fc-instance-id"):
            _print_gateway_error(answer)
        else:
            _copy(answer)
            if answer.status >= 400:
                note(f"hibernode: the function answered HTTP {answer.status}")
    except BrokenPipeError:  # of stdout: its reader has closed it
        raise
    except TimeoutError as error:
        message = f"the gateway at {gateway} sent nothing for {timeout_s:g} s; try a longer --timeout"
        raise DeadlineError("INVOKE_TIMEOUT", message) from error
    except OSError as error:
        message = f"no gateway answers at {gateway} ({error.strerror or error}); check that the scheduler runs"
        raise UnavailableError("GATEWAY_UNREACHABLE", message) from error
    except http.client.HTTPException as error:
        raise UnavailableError("ANSWER_CUT", f"the response ended early ({type(error).__name__})") from error
    except ValueError as error:
        raise InvalidArgumentError("REQUEST_INVALID", f"not a valid HTTP request: {error}") from error
    finally:
        connection.close()
    return exit_of_http(answer.status)


def _print_head(answer: http.client.HTTPResponse, include: bool, waited_s: float) -> None:
    if include:
        note(f"HTTP {answer.status} {answer.reason} ({waited_s * 1000:.0f} ms)")
        for name, value in answer.getheaders():
            note(f"{name}: {value}")


def _print_log(answer: http.client.HTTPResponse) -> None:
    log = answer.getheader("x-fc-log-result")
    if log is not None:
        with suppress(ValueError):  # a header of the function itself
            click.echo(
                clean_log(base64.b64decode(log)) or "(the instance printed no FC Invoke lines for this request)\n",
                err=True,
                nl=False,
            )


def _print_gateway_error(answer: http.client.HTTPResponse) -> None:
    """Prints the gateway's own error: {"RequestId", "Code", "Message"}."""
    content = answer.read(_MAX_ERROR_BYTES)
    try:
        error = json.loads(content)
        note(f"hibernode: {error['Message']} ({error['Code']}, request {error['RequestId']})")
    except (ValueError, KeyError, TypeError):
        sys.stdout.buffer.write(content)
        note(f"hibernode: HTTP {answer.status}")


def _copy(answer: http.client.HTTPResponse) -> None:
    while chunk := answer.read1(_CHUNK_BYTES):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    if answer.length:  # read1 does not report an early end
        raise http.client.IncompleteRead(b"", answer.length)
