"""Worker: the process that compiles candidates or runs them; it may be killed at any moment.

Started as `python -m autoflash.tuning.worker compile|device`; reads requests from standard input
and answers on what was standard output. Kernels and compilers that print reach standard error.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from autoflash.tuning import wire

_PR_SET_PDEATHSIG = 1
Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


def main(role: str) -> None:
    """Answer requests until standard input is closed."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    faulthandler.enable()
    _die_with_parent(role, requests.fileno())
    handlers = _handlers(role)
    while (request := wire.read(requests)) is not None:
        reply = _answer(handlers, request)
        data = wire.pack(reply)
        while data:
            data = data[os.write(replies, data) :]
        if reply.get("exiting"):
            return


def _answer(handlers: Mapping[str, Handler], request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return handlers[request["kind"]](request)
    except Exception as error:
        traceback.print_exc()
        return {"outcome": "runtime_error", "reason": f"{type(error).__name__}: {error}"}


def _handlers(role: str) -> dict[str, Handler]:
    if role == "compile":
        os.nice(5)  # what is being timed meanwhile goes first
        return {"compile": compile_candidate}
    from autoflash.tuning.evaluate import Evaluator

    evaluator = Evaluator()
    return {
        "hello": evaluator.hello,
        "evaluate": evaluator.evaluate,
        "survey": evaluator.survey,
        "finals": evaluator.finals,
    }


def compile_candidate(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one source into the cache.

    Args:
        request: "source" and "device".

    Returns:
        "outcome" "ok" with "resources", or "compile_error" with "reason"; "raise" names the
        error instead where every other candidate would meet it too.
    """
    from autoflash import build
    from autoflash.device import Device
    from autoflash.errors import BuildError, CacheError, CompileError, ToolchainMissing

    source = wire.source_from_dict(request["source"])
    try:
        artifact = build.compile_source(source, Device.from_dict(request["device"]))
    except CompileError as error:
        return {"outcome": "compile_error", "reason": str(error), "stderr": error.log[-4096:]}
    except (ToolchainMissing, CacheError) as error:
        return {"outcome": "compile_error", "raise": type(error).__name__, "reason": str(error)}
    except BuildError as error:
        return {"outcome": "compile_error", "reason": str(error)}
    return {"outcome": "ok", "resources": artifact.resources.to_dict()}


def _die_with_parent(role: str, requests: int) -> None:
    """End this process, and all it started, when the tuner is gone, however it went.

    The tuner's end of the pipe closes even if it was killed. A signal at its death would come
    first and leave the compilers that ninja started; only the device worker, which starts none,
    asks for one, since a launch that hangs may hold the interpreter and stop the thread below.
    """
    if role == "device" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        from autoflash.tuning.process import session_members

        poll = select.poll()
        poll.register(requests, 0)  # POLLHUP alone, which needs no asking
        poll.poll()
        for pid in session_members(os.getpid()):
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
