"""The cost of a decision of the dispatcher, in function calls."""

from __future__ import annotations

import sys

from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.events import FunctionSet, InstanceReported, LeaseEnded, NodeReported, RequestArrived
from agent.core.types import InstanceState


def test_a_decision_costs_the_same_with_10_and_10000_instances() -> None:
    small, large = _steps_per_request(10), _steps_per_request(10_000)
    assert large <= small * 1.5


def _steps_per_request(instances: int) -> float:
    dispatcher = Dispatcher()
    dispatcher.step(FunctionSet("ocr"), 1)
    dispatcher.step(NodeReported("n1"), 1)
    for n in range(instances):
        state = InstanceState.RUNNING if n % 2 else InstanceState.FROZEN
        dispatcher.step(InstanceReported(f"i{n}", "ocr", f"n{n % 7}", state, 4), 1)
        dispatcher.step(NodeReported(f"n{n % 7}"), 1)
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for request in range(200):
            dispatcher.step(RequestArrived(request, "ocr", 10**15), request + 2)
            if request >= 3:
                dispatcher.step(LeaseEnded(request - 3), request + 2)
    finally:
        sys.setprofile(None)
    return calls / 200
