"""Evaluate: one trial inside the worker: build, check, race, time; and the finals."""

from __future__ import annotations

import contextlib
import gc
import math
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autoflash import build
from autoflash.build.kernel import Kernel
from autoflash.codegen import ops
from autoflash.device import Device
from autoflash.errors import CacheError, ToolchainMissing
from autoflash.problem import Problem
from autoflash.record import Measurement
from autoflash.tuning import memory, wire
from autoflash.tuning.environment import environment
from autoflash.tuning.inputs import make_inputs
from autoflash.tuning.timing import Timer

if TYPE_CHECKING:
    from autoflash.tuning.expected import Check

FIRST_RUNG_CALLS, FIRST_RUNG_RATIO = 3, 3.0
"""After so few calls, a config so much slower than the best so far is dropped."""
SECOND_RUNG_SHARE, SECOND_RUNG_RATIO = 0.25, 1.3
"""Likewise after that share of the full timing."""
_STARVED = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


class Measuring(Protocol):
    """What `race` asks of a timer; a replay puts a recorded one here."""

    def measure(
        self, call: Callable[[], object], *, budget_ms: float = ..., min_calls: int = ...
    ) -> Measurement:
        """Time one call alone."""


class Evaluator:
    """Runs candidates on the device of this process. Keeps the inputs of the last problem."""

    def __init__(self) -> None:
        self._bench: _Bench | None = None
        self._used = False  # whether a candidate has run in this process

    def hello(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Whether the device works: run something known to be good on it.

        Args:
            request: "device".

        Returns:
            "outcome", and "environment" as it will stand in records.
        """
        device = Device.from_dict(request["device"])
        if not _canary(device):
            reason = f"{device.name} does not run the simplest kernel of PyTorch"
            return {"outcome": "runtime_error", "reason": reason, "exiting": True}
        return {"outcome": "ok", "environment": dict(environment(device))}

    def evaluate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Check one candidate, then time it.

        Args:
            request: "source", "problem", "device", "seed", "timing_ms", and "best_us" of the best
                config so far, or None.

        Returns:
            "outcome" with "reason", "measurement" and "error_ratio" as far as it came; "exiting"
            if this process can no longer be used; "again" if what went wrong may be the fault of
            those that ran in it before; "raise" as a compile worker answers it.
        """
        reply = self._guarded(request, partial(self._evaluate, request))
        self._used = True
        return reply

    def finals(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Time several candidates in turns, and PyTorch's best with them.

        Args:
            request: "sources" (name -> source), "problem", "device", "seed", "rounds", "finals_ms";
                "torch": False leaves PyTorch out.

        Returns:
            "outcome", "measurements" and "rounds" (name -> medians in microseconds), and
            "provider": the name under which PyTorch's best is among them, or None. If one was no
            longer right after it was timed, "outcome" "wrong_result" and "wrong", name -> why.
        """
        self._used = True
        return self._guarded(request, partial(self._finals, request))

    def survey(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What `evaluate` does, telling how long each step took: for tables to replay.

        Args:
            request: as for `evaluate`; "check" says whether the check is made, "do_bench" whether
                the kernel is also timed as triton.autotune would.

        Returns:
            "outcome", "reason", "load_s" (the inputs of a new problem included), "check_s",
            "rungs" (median, p20, p80, count, seconds) and "do_bench" (microseconds, seconds), as
            far as it came.
        """
        return self._guarded(request, partial(self._survey, request))

    def _guarded(
        self, request: Mapping[str, Any], run: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        try:
            return run()
        except (CacheError, ToolchainMissing) as error:  # no candidate's fault
            return {"outcome": "runtime_error", "raise": type(error).__name__, "reason": str(error)}
        except Exception as error:
            with contextlib.suppress(OSError):  # no space left for what is said
                traceback.print_exc()
            reason = f"{type(error).__name__}: {_first_line(error)}"
            starved = _is_starved(error)
        # The traceback held the tensors; without it an out-of-memory error can be survived.
        self._bench = None
        gc.collect()
        device = Device.from_dict(request["device"])
        reply: dict[str, Any] = {"outcome": "runtime_error", "reason": reason}
        if not _canary(device):
            # An illegal access poisons the context of the whole process, whatever is run next.
            reply["exiting"] = True
        if starved:
            # What a kernel has taken and not given back ends with its process.
            reply |= {"exiting": True, "again": self._used}
        return reply

    def _evaluate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from autoflash.tuning import reference

        bench = self._bench_for(request)
        reference.prepare(bench.problem, bench.device, seed=request["seed"])
        before = memory.held_bytes(bench.device)
        reply = self._tried(bench, request)
        kept = memory.kept(bench.device, before)
        if kept is not None:
            reply["exiting"] = True
            if reply["outcome"] != "wrong_result":
                # Perhaps another process took it: then it comes through on its second try.
                return {"outcome": "runtime_error", "reason": kept, "exiting": True,
                        "again": self._used}  # fmt: skip
        return reply

    def _tried(self, bench: _Bench, request: Mapping[str, Any]) -> dict[str, Any]:
        """Check, race, and check once more."""
        from autoflash.tuning import reference

        kernel = bench.build(request["source"])
        check = reference.check(kernel, bench.problem, bench.device, seed=request["seed"])
        ratio = check.error_ratio
        error_ratio = ratio if ratio is not None and math.isfinite(ratio) else None
        if not check.ok:
            return _wrong(check, error_ratio)
        call = bench.call(kernel)
        outcome, reason, measurement = race(
            bench.timer, call, request["timing_ms"], request["best_us"]
        )
        if outcome == "ok":
            still = reference.check_timed(call, bench.inputs, bench.device, seed=request["seed"])
            if not still.ok:
                return _wrong(still, error_ratio)
        return {
            "outcome": outcome,
            "reason": reason,
            "measurement": measurement.to_dict(),
            "error_ratio": error_ratio,
        }

    def _survey(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from autoflash.tuning import reference

        began = time.perf_counter()
        bench = self._bench_for(request)
        kernel = bench.build(request["source"])
        reply: dict[str, Any] = {"load_s": time.perf_counter() - began}
        if request["check"]:
            began = time.perf_counter()
            check = reference.check(kernel, bench.problem, bench.device, seed=request["seed"])
            reply["check_s"] = time.perf_counter() - began
            if not check.ok:
                return {**reply, **_wrong(check, None)}
        call, stopwatch = bench.call(kernel), _Stopwatch(bench.timer)
        outcome, reason, _ = race(stopwatch, call, request["timing_ms"], request["best_us"])
        reply |= {"outcome": outcome, "reason": reason, "rungs": stopwatch.rungs}
        if request["check"] and outcome == "ok":
            began = time.perf_counter()
            still = reference.check_timed(call, bench.inputs, bench.device, seed=request["seed"])
            reply["check_s"] += time.perf_counter() - began
            if not still.ok:
                return {**reply, **_wrong(still, None)}
        if request["do_bench"]:
            from autoflash.build.triton import do_bench_us

            began = time.perf_counter()
            median_us = do_bench_us(call)
            reply["do_bench"] = [median_us, time.perf_counter() - began]
        return reply

    def _finals(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from autoflash.tuning import reference

        bench = self._bench_for(request)
        ours = {name: bench.call(bench.build(s)) for name, s in request["sources"].items()}
        calls: dict[str, Callable[[], object]] = dict(ours)
        provider, peer = bench.best_of_torch() if request.get("torch", True) else (None, None)
        if provider is not None and peer is not None:
            calls[provider] = peer
        timed = bench.timer.interleave(
            calls, rounds=request["rounds"], budget_ms=request["finals_ms"], min_calls=1
        )
        wrong = {}
        for name, call in ours.items():
            still = reference.check_timed(call, bench.inputs, bench.device, seed=request["seed"])
            if not still.ok:
                wrong[name] = still.reason
        if wrong:
            reason = "; ".join(wrong.values())
            return {"outcome": "wrong_result", "reason": reason, "wrong": wrong, "exiting": True}
        return {
            "outcome": "ok",
            "measurements": {name: timed[name].to_dict() for name in timed},
            "rounds": {name: list(timed.rounds[name]) for name in timed},
            "provider": provider,
        }

    def _bench_for(self, request: Mapping[str, Any]) -> _Bench:
        problem = Problem.from_dict(request["problem"])
        device = Device.from_dict(request["device"])
        wanted = (problem, device, request["seed"])
        if self._bench is None or self._bench.key != wanted:
            self._bench = None  # first free what the last problem held
            self._bench = _Bench(*wanted)
        return self._bench


class _Bench:
    """The inputs of one problem and what times kernels on them."""

    def __init__(self, problem: Problem, device: Device, seed: int) -> None:
        self.key = (problem, device, seed)
        self.problem, self.device = problem, device
        self.timer = Timer(device, seed=seed)
        self.inputs = make_inputs(problem, device, seed)

    def build(self, source: Mapping[str, Any]) -> Kernel:
        """The kernel of a source: found compiled, or compiled now, or built elsewhere."""
        return _kernel(source, self.device)

    def call(self, kernel: Kernel) -> Callable[[], None]:
        """One launch on the inputs, without LSE, as `attention()` makes it by default."""
        import torch

        inputs = self.inputs
        tensors = (inputs.q, inputs.k, inputs.v, inputs.out)
        launch = kernel.prepare(ops.fwd_scalars(tensors, inputs.layout, self.problem))
        pointers = [tensor.data_ptr() for tensor in tensors]
        descales = [descale.data_ptr() for descale in inputs.descales]
        if self.device.is_cuda:
            last = torch.cuda.current_stream().cuda_stream
        else:
            last = torch.get_num_threads()
        # An address keeps no tensor alive: self does, for as long as calls are made.
        return partial(launch, *pointers, 0, *descales, inputs.softmax_scale, last)

    def best_of_torch(self) -> tuple[str | None, Callable[[], object] | None]:
        """The fastest of PyTorch's own implementations that run here, by a few calls of each."""
        from autoflash.tuning.peers import PEERS, TORCH_PEERS

        inputs = self.inputs
        found: dict[str, tuple[float, Callable[[], object]]] = {}
        # The math backend only where none of the others can run: it stores all scores.
        for names in ([name for name in TORCH_PEERS if name != "math"], ["math"]):
            usable = [n for n in names if not PEERS[n].unavailable(self.problem, self.device)]
            for name in usable:
                try:
                    call = PEERS[name].make(
                        inputs.q, inputs.k, inputs.v, self.problem, inputs.descales
                    )
                    few = self.timer.measure(call, budget_ms=5.0, min_calls=1)
                except RuntimeError:  # no backend for this shape, or out of memory: not a rival
                    traceback.print_exc()
                    continue
                found[name] = (few.latency_us, call)
            if found:
                name = min(found, key=lambda name: found[name][0])
                return name, found[name][1]
        return None, None


def _kernel(source: Mapping[str, Any], device: Device) -> Kernel:
    """What a source on the wire becomes; "built_in" names the folder of a library that is there."""
    rendered, folder = wire.source_from_dict(source), source.get(wire.BUILT_IN)
    if folder is None:
        return build.build(rendered, device)
    unknown = build.Resources(compile_s=0.0, binary_bytes=0)
    built = build.Artifact(rendered, device.arch, rendered.digest, Path(folder), unknown)
    return build.load(built)


class _Stopwatch:
    """A timer that notes what it measured and how long that took, warm-up included."""

    def __init__(self, timer: Timer) -> None:
        self.rungs: list[list[float]] = []
        self._timer = timer

    def measure(
        self, call: Callable[[], object], *, budget_ms: float = 25.0, min_calls: int = 3
    ) -> Measurement:
        began = time.perf_counter()
        taken = self._timer.measure(call, budget_ms=budget_ms, min_calls=min_calls)
        seconds = time.perf_counter() - began
        self.rungs.append([taken.latency_us, taken.p20_us, taken.p80_us, taken.count, seconds])
        return taken


def race(
    timer: Measuring, call: Callable[[], object], timing_ms: float, best_us: float | None
) -> tuple[str, str, Measurement]:
    """Time a call in three rungs, each longer than the one before, and stop when it has lost.

    Args:
        timer: of the device.
        call: what to time.
        timing_ms: of the last rung.
        best_us: the time to compare with; None: there is none, go to the last rung.

    Returns:
        Outcome ("ok" or "slow"), reason, and the time of the last rung run.
    """
    few = timer.measure(call, budget_ms=0.001, min_calls=FIRST_RUNG_CALLS)
    if best_us is not None and few.latency_us > FIRST_RUNG_RATIO * best_us:
        return "slow", _lost(few, best_us), few
    # Long calls: those few have taken longer than a later rung would.
    if few.latency_us * few.count < 1000 * SECOND_RUNG_SHARE * timing_ms:
        few = timer.measure(call, budget_ms=SECOND_RUNG_SHARE * timing_ms)
    if best_us is not None and few.latency_us > SECOND_RUNG_RATIO * best_us:
        return "slow", _lost(few, best_us), few
    if few.latency_us * few.count < 1000 * timing_ms:
        few = timer.measure(call, budget_ms=timing_ms)
    return "ok", "", few


def _lost(few: Measurement, best_us: float) -> str:
    ratio = few.latency_us / best_us
    return f"{ratio:.2f}x the best so far after {few.count} calls"


def _canary(device: Device) -> bool:
    """Whether the device still computes."""
    if not device.is_cuda:
        return True
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.arange(64, device="cuda").sum().item()
    except RuntimeError:
        return False
    return total == 2016


def _wrong(check: Check, error_ratio: float | None) -> dict[str, Any]:
    """The reply of a kernel that is not right."""
    reply = {"outcome": "wrong_result", "reason": check.reason, "error_ratio": error_ratio}
    if check.harmed:
        # What else it has written over in this process nobody knows.
        reply["exiting"] = True
    return reply


def _is_starved(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of this process."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in said for sign in _STARVED)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"
