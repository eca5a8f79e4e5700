"""Building ahead of the first call: for servers, CUDA graphs and container images."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from autoflash.errors import InvalidInput
from autoflash.problem import Problem
from autoflash.runtime import serving
from autoflash.runtime.dispatch import Served


@dataclass(frozen=True, slots=True)
class Warmed:
    """What warming up did for one problem.

    Attributes:
        served: the rule, kernel, config and record that now serve the problem.
        elapsed_s: how long choosing and building took; near 0 if it was built before.
    """

    served: Served
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        config = self.served.config
        return {
            "problem": self.served.problem.name,
            "rule": self.served.rule,
            "config": config.to_dict() if config else None,
            "reason": self.served.reason,
            "elapsed_s": self.elapsed_s,
        }


def warmup(
    problems: Problem | str | Iterable[Problem | str],
    *,
    device: str | int | torch.device | None = None,
) -> list[Warmed]:
    """Choose and build the kernels for `problems` now, so that no call waits for a compiler.

    The tuning database is read again first: what was tuned since this process started counts.
    Calls whose tensors are not aligned to 16 bytes need another kernel; name such a problem with
    "-unaligned" at its end.

    Args:
        problems: Problems or their names, such as "b1s4096h32/8d128c-bfloat16".
        device: where, as PyTorch names it; None is the current CUDA device, else the CPU.

    Returns:
        What serves each problem, in the order given; a kernel that cannot be built is a warning,
        and the rule then served by ("default" or "torch") is in the result.

    Raises:
        InvalidInput: a name is not one of a problem, or the device has no kernels.
    """
    if isinstance(problems, Problem | str):
        problems = [problems]
    asked = [Problem.parse(each) if isinstance(each, str) else each for each in problems]
    require_ours(asked)
    place = _place(device)
    serving.reload()
    return [_warm(problem, place) for problem in asked]


def require_ours(problems: Iterable[Problem]) -> None:
    """Raise InvalidInput for a problem whose kernels are another library's to build."""
    for problem in problems:
        if problem.is_foreign:
            raise InvalidInput(
                f"{problem.name}: attention() serves no problem of op {problem.op}, and PyTorch "
                "compiles that when it is first called, so that there is nothing to build; "
                f"{problem.forward.name} is the same call of attention()."
            )


def _warm(problem: Problem, place: torch.device) -> Warmed:
    started = time.perf_counter()
    served = serving.dispatcher(place.type, place.index).serve(problem)
    return Warmed(served, time.perf_counter() - started)


def _place(device: str | int | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"device={device!r} is not one that PyTorch knows: {error}") from None
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidInput(
                f"device={device!r}: PyTorch finds no CUDA device here. Leave `device` out to "
                "warm up for the CPU."
            )
        index = torch.cuda.current_device() if place.index is None else place.index
        if index >= torch.cuda.device_count():
            raise InvalidInput(
                f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices here, "
                "counted from 0."
            )
        return torch.device("cuda", index)
    return place
