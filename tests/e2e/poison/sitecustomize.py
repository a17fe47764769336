"""Lets processes of a server die or hang when they meet a certain prompt.

Python imports this at its start if the folder is in PYTHONPATH; the product knows nothing of it. OCTAVO_TEST_POISON
says who is killed: ``worker`` when such a request enters a slot, ``core`` when the engine core takes it in.
"""

from __future__ import annotations

import os
import signal
import sys
from array import array
from collections.abc import Callable, Iterable
from typing import Any

POISON = (9, 8, 9, 7, 9, 6)
"""What such a prompt begins with."""


def _before(owner: Any, method: str, prompts: Callable[[Any], Iterable[bytes]], happens: Callable[[], None]) -> None:
    original = getattr(owner, method)

    def wrapped(self: Any, message: Any) -> Any:
        if any(prompt.startswith(array("i", POISON).tobytes()) for prompt in prompts(message)):
            happens()
        return original(self, message)

    setattr(owner, method, wrapped)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


_what = os.environ.get("OCTAVO_TEST_POISON", "")
if _what == "worker" and "executor" in sys.orig_argv:
    from executor.request_states import RequestStates

    _before(
        RequestStates,
        "apply",
        lambda plan: [request.token_ids for request in plan.new_reqs],
        _die,
    )
elif _what == "core" and "engine_core" in sys.orig_argv:
    from engine_core.request import Request

    _before(Request, "__init__", lambda message: [message.prompt_token_ids], _die)
