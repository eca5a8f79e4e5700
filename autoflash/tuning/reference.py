"""Is a kernel right? Runs it where kernels tend to be wrong, then on the problem itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from autoflash.build.kernel import Call, Kernel
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.tuning.expected import Case, Check, make_case, usual_q_factor
from autoflash.tuning.formula import exact, naive
from autoflash.tuning.inputs import Inputs, first_index, make_inputs, negate

if TYPE_CHECKING:
    import torch

__all__ = [
    "Case",
    "Check",
    "Inputs",
    "check",
    "check_timed",
    "exact",
    "forget",
    "make_case",
    "make_inputs",
    "naive",
    "prepare",
]


class Stress(NamedTuple):
    """A small case that is hard on a kernel.

    Attributes:
        problem: with the traits of the problem in question.
        layout: of its tensors.
        q_factor: factor of q beyond what is usual; large logits need a true running maximum.
        lse: whether lse is asked for.
    """

    problem: Problem
    layout: str = "bshd"
    q_factor: float = 1.0
    lse: bool = True


def stress_cases(problem: Problem) -> list[Stress]:
    """The small cases for a problem: same traits, other sizes and windows.

    A window is known to kernels only when they are launched, so that small ones say as much of a
    kernel as the problem's own; where they hide nothing, a case has none.

    A foreign kernel has none: it is compiled for the sizes of its problem alone.
    """
    if problem.is_foreign:
        return []
    heads = min(problem.num_kv_heads, 2)

    def shaped(
        seqlen_q: int, seqlen_k: int, window: tuple[int, int] = (0, 1), batch: int = 1
    ) -> Problem:
        left, right = window
        return dataclasses.replace(
            problem,
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads=heads * problem.group_size,
            num_kv_heads=heads,
            window_left=left if problem.local else None,
            window_right=right if problem.local and not problem.causal else None,
        )

    cases = [
        Stress(shaped(1, 1)),
        Stress(shaped(1, 203, (20, 5))),
        Stress(shaped(113, 203, (50, 30), batch=2), layout="bhsd"),
        Stress(shaped(203, 67, (10, 40))),  # causal: 136 rows see nothing; 96 with the window
        Stress(shaped(257, 257, (0, 70)), q_factor=8.0),  # logits up to 40
        Stress(shaped(64, 128, (37, 1)), layout="bhsd", lse=False),
        Stress(shaped(5, 0)),
    ]
    if problem.local:
        cases += [
            Stress(shaped(70, 700, (129, 3))),  # tiles of keys that no row sees come first
            Stress(shaped(300, 300, (100, 130))),  # and here last; between them whole ones
            Stress(shaped(400, 70, (5, 20))),  # tiles of rows that see nothing
        ]
    return cases


def check(kernel: Kernel, problem: Problem, device: Device, *, seed: int = 0) -> Check:
    """Whether a kernel computes what `problem` asks for.

    First the small cases of `stress_cases`, then the problem itself, twice: results that differ
    between runs on the same inputs are a race. What the kernel raises passes through.

    Args:
        kernel: as autoflash.build loads it.
        problem: what it will be asked.
        device: where it runs.
        seed: of the inputs. What is expected of the last problem is kept for the next kernel.

    Returns:
        The first thing that is wrong, naming template, problem, index and both values; else the
        verdict on the problem itself.
    """
    with _one_thread() as as_before:
        for stress in stress_cases(problem):
            case = _intact(_make_small, stress, device, seed)
            verdict = _check(kernel, case, as_before, lse=stress.lse, twice=False)
            if not verdict.ok:
                return verdict
        case = _intact(_make_last, Stress(problem), device, seed)
        return _check(kernel, case, as_before, lse=True, twice=True)


def prepare(problem: Problem, device: Device, *, seed: int = 0) -> None:
    """Make what `check` needs for a problem, unless it is there."""
    with _one_thread():
        for stress in stress_cases(problem):
            _make_small(stress, device, seed)
        _make_last(Stress(problem), device, seed)


def check_timed(call: Call, inputs: Inputs, device: Device, *, seed: int = 0) -> Check:
    """Whether a call is still right after it was timed, on values that it was not timed on.

    The tensors stay where they are and get other values for one more call. Whoever answers from
    memory is found out: one that works only when it is first called, finds its output from before
    in place, remembers results by addresses, or is right on one set of inputs.

    Args:
        call: writes inputs.out, or returns what it made in its place; without LSE.
        inputs: what it was timed on; they are as before afterwards.
        device: where it runs.
        seed: as given to `check`, whose reference is used.
    """
    case = _intact(_make_last, Stress(inputs.problem), device, seed)
    with _one_thread(), inputs.holding(case.inputs):
        inputs.poison()
        made = call()
        if made is not None:
            inputs.out.copy_(made)
        reason = inputs.damage(lse=False)
        verdict = Check(False, reason=reason, harmed=inputs.overrun()) if reason else Check(True)
        if verdict.ok:
            negate(inputs.out)
            verdict = case.compare(inputs.out)
    if verdict.ok:
        return verdict
    said = f"{inputs.problem.name}, called once more on other values after timing, V negated"
    return verdict._replace(reason=f"{said}: {verdict.reason}")


@contextmanager
def _one_thread() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Check with one thread; gives a context in which there are as many as before, for kernels.

    Checking is hundreds of small operations. With compilers running beside it, each of them may
    wait a time slice for a second thread that was preempted: seconds for what takes 0.1 s.
    """
    import torch

    threads = torch.get_num_threads()

    @contextmanager
    def as_before() -> Iterator[None]:
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    torch.set_num_threads(1)
    try:
        yield as_before
    finally:
        torch.set_num_threads(threads)


def forget() -> None:
    """Drop the inputs and references that `check` keeps for the next kernel."""
    _make_small.cache_clear()
    _make_last.cache_clear()


def _make(stress: Stress, device: Device, seed: int) -> tuple[Case, tuple[int, ...]]:
    q_factor = stress.q_factor * usual_q_factor(stress.problem)
    case = make_case(stress.problem, device, seed, stress.layout, q_factor=q_factor)
    return case, case.fingerprint()


_make_small = lru_cache(maxsize=32)(_make)
_make_last = lru_cache(maxsize=1)(_make)  # gigabytes, at 16384 rows


def _intact(
    make: Callable[[Stress, Device, int], tuple[Case, tuple[int, ...]]],
    stress: Stress,
    device: Device,
    seed: int,
) -> Case:
    """The case as kept, made anew where an earlier kernel has written into it."""
    case, fingerprint = make(stress, device, seed)
    if case.fingerprint() != fingerprint:
        forget()
        case, _ = make(stress, device, seed)
    return case


def _check(
    kernel: Kernel,
    case: Case,
    as_before: Callable[[], AbstractContextManager[None]],
    *,
    lse: bool,
    twice: bool,
) -> Check:
    inputs = case.inputs
    lse = lse and kernel.gives_lse
    before = inputs.fingerprint()

    def run() -> str | None:
        inputs.poison()
        tensors = (inputs.q, inputs.k, inputs.v, inputs.out, inputs.lse if lse else None)
        with as_before():
            kernel(
                *tensors,
                inputs.softmax_scale,
                inputs.layout,
                problem=inputs.problem,
                descales=inputs.descales,
            )
        return inputs.damage(lse=lse)

    verdict = Check(False, reason=run() or "")
    if verdict.reason:
        verdict = verdict._replace(harmed=inputs.overrun())
    elif inputs.fingerprint() != before:
        verdict = Check(False, reason="it changed its inputs", harmed=True)
    if not verdict.reason:
        verdict = case.compare(inputs.out, inputs.lse if lse else None)
    if verdict.ok and twice:
        written = (inputs.out, inputs.lse) if lse else (inputs.out,)
        once = tuple(tensor.clone() for tensor in written)
        reason = run() or _moved(once, written)
        verdict = verdict._replace(ok=not reason, reason=reason or "")
    if verdict.ok:
        return verdict
    place = f"{kernel.artifact.source.template}, {inputs.problem.name}, layout {inputs.layout}"
    return verdict._replace(reason=f"{place}: {verdict.reason}")


def _moved(once: tuple[torch.Tensor, ...], again: tuple[torch.Tensor, ...]) -> str | None:
    """Where two runs on the same inputs differ in a bit."""
    import torch

    for name, one, two in zip(("out", "lse"), once, again, strict=False):
        words = getattr(torch, f"int{8 * one.element_size()}")
        differs = one.view(words) != two.view(words)
        if bool(differs.any()):
            where = first_index(differs)
            return (
                f"{name}{where} was {float(one[tuple(where)]):.8g} and on a second run "
                f"{float(two[tuple(where)]):.8g}: a race"
            )
    return None
