"""Errors as answers, with the codes of Function Compute."""

from __future__ import annotations

import json
import re

import pytest

from agent.core import errors as core
from agent.http.errors import error_answer, status_and_code
from agent.http.request_ids import RequestIds


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (core.InvalidArgumentError("UNSUPPORTED", "x"), 400, "InvalidArgument"),
        (core.UnauthenticatedError("ACCESS_DENIED", "x"), 401, "AccessDenied"),
        (core.PermissionDeniedError("ACCESS_DENIED", "x"), 403, "AccessDenied"),
        (core.NotFoundError("FUNCTION_NOT_FOUND", "x"), 404, "FunctionNotFound"),
        (core.NotFoundError("INSTANCE_NOT_FOUND", "x"), 404, "InstanceNotFound"),
        (core.ConflictError("OTHER_SPEC", "x"), 409, "OtherSpec"),
        (core.PreconditionError("HOST_MEMORY_SHORT", "x"), 409, "HostMemoryShort"),
        (core.ExhaustedError("QUEUE_FULL", "x"), 429, "ResourceExhausted"),
        (core.UnsupportedError("IMAGE_RUNTIME_UNAVAILABLE", "x"), 501, "ImageRuntimeUnavailable"),
        (core.InstanceError("INSTANCE_CRASHED", "x"), 502, "InstanceCrashed"),
        (core.InstanceError("FUNCTION_NOT_STARTED", "x"), 502, "FunctionNotStarted"),
        (core.InstanceError("INITIALIZATION_ERROR", "x"), 502, "InitializationError"),
        (core.UnavailableError("NO_CAPACITY", "x"), 503, "NoCapacity"),
        (core.DeadlineError("QUEUE_TIMEOUT", "x"), 504, "QueueTimeout"),
        (core.DeadlineError("FUNCTION_TIMEOUT", "x"), 504, "FunctionTimeout"),
        (KeyError("x"), 500, "InternalServerError"),
    ],
)
def test_status_and_code(error: Exception, status: int, code: str) -> None:
    assert status_and_code(error) == (status, code)


def test_every_error_class_has_a_status() -> None:
    for kind in core.HibernodeError.__subclasses__():
        if kind.__module__ == core.__name__:
            assert status_and_code(kind("SOME_REASON", "x"))[0] < 600
            assert status_and_code(kind("SOME_REASON", "x"))[0] != 500, kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (core.InstanceError("INITIALIZATION_ERROR", "x"), b"InitializationError"),
        (core.InstanceError("FUNCTION_NOT_STARTED", "x"), b"FunctionNotStarted"),
        (core.UnavailableError("NO_CAPACITY", "x"), None),
        (core.ExhaustedError("QUEUE_FULL", "x"), None),
    ],
)
def test_functions_own_fault_has_an_error_type(error: Exception, kind: bytes | None) -> None:
    assert dict(error_answer(error, "1-a").headers).get(b"x-fc-error-type") == kind


def test_the_answer() -> None:
    made = error_answer(core.ExhaustedError("QUEUE_FULL", "The queue is full."), "1-a", retry_after_s=7)
    assert made.status == 429
    assert json.loads(made.body) == {
        "RequestId": "1-a",
        "Code": "ResourceExhausted",
        "Message": "The queue is full.",
    }
    assert made.headers == [
        (b"content-type", b"application/json"),
        (b"x-fc-request-id", b"1-a"),
        (b"retry-after", b"7"),
    ]


def test_text_of_an_unknown_error_is_not_sent() -> None:
    assert b"password" not in error_answer(ValueError("password=hunter2"), "1-a").body


def test_request_ids() -> None:
    make = RequestIds(wall_s=lambda: 0x67A59F35, random_bits=lambda bits: 0x150C1267F381BA1C085C)
    assert make() == "1-67a59f35-150c1267-f381ba1c085c"
    small = RequestIds(wall_s=lambda: 1, random_bits=lambda bits: 1)
    assert re.fullmatch("1-[0-9a-f]{8}-[0-9a-f]{8}-[0-9a-f]{12}", small())
