"""Worker: the process that compiles candidates or runs them; it may be killed at any moment.

Started as `python -m autoflash.tuning.worker compile|device BYTES`, BYTES being the memory that it
may take, or 0. Reads requests from standard input and answers on what was standard output.
Kernels and compilers that print reach standard error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from autoflash.tuning import guard, wire

Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


def main(role: str, memory_bytes: int | None = None) -> None:
    """Answer requests until standard input is closed."""
    guard.set_limits(memory_bytes)
    guard.enter(role)
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    faulthandler.enable()
    handlers = _handlers(role)
    while (request := wire.read(requests)) is not None:
        reply = {**_answer(handlers, request), "id": request.get("id")}
        data = wire.pack(reply)
        while data:
            data = data[os.write(replies, data) :]
        if reply.get("exiting"):
            return


def _answer(handlers: Mapping[str, Handler], request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return handlers[request["kind"]](request)
    except Exception as error:
        with contextlib.suppress(OSError):  # no space left for the file behind standard error
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
    except OSError as error:  # a disk or a directory, not the source
        reason = f"a kernel cannot be built: {error}"
        return {"outcome": "compile_error", "raise": "CacheError", "reason": reason}
    return {"outcome": "ok", "resources": artifact.resources.to_dict()}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) or None)
