"""How is a comparison made? Outputs are checked first, then all are timed in the same rounds."""

from __future__ import annotations

import datetime
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from autoflash.benchmark.ahead import build_ahead
from autoflash.benchmark.report import OURS, Report, Row
from autoflash.device import Device
from autoflash.errors import InvalidInput, UnknownName
from autoflash.problem import Problem, require_work
from autoflash.record import Measurement
from autoflash.tuning.environment import environment
from autoflash.tuning.expected import make_case
from autoflash.tuning.inputs import Inputs
from autoflash.tuning.peers import PEERS, available, first_line
from autoflash.tuning.timing import ROUNDS, Comparison, Timer

if TYPE_CHECKING:
    import torch

    from autoflash.runtime.dispatch import Served

PROVIDERS = (OURS, *PEERS)
"""All that can be compared, in the order of the table's columns."""

_HOPELESS = 4.0
"""A provider so many times slower than the fastest takes no part in the rounds: a few calls of it
say enough, and on a CPU they take seconds each."""
_LONG_US = 5e4
"""A call that takes less is in the rounds anyway; one that takes longer is looked at once more."""
_FEW_CALLS = 3
_FLOOR = 10.0
"""A fused provider so many times slower than the fastest has fallen back to something unfused."""


def run(
    problems: Iterable[Problem],
    device: Device,
    providers: Sequence[str] | None = None,
    *,
    rounds: int = ROUNDS,
    budget_ms: float = 300.0,
    seed: int = 0,
    on_build: Callable[[int], None] | None = None,
    on_start: Callable[[Problem, int, int], None] | None = None,
    on_row: Callable[[Row], None] | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Report:
    """Time autoflash and its peers on each problem, side by side, after building what that takes.

    Args:
        problems: what to compare on.
        device: where; it must be present.
        providers: some of PROVIDERS; None means all. Those that cannot run get a row saying why.
        rounds: in each, every provider has its turn, in shuffled order.
        budget_ms: about how long to time each provider on each problem.
        seed: of the inputs and the order.
        on_build: called with the number of builds, before all problems.
        on_start: called with (problem, index, total) before each problem.
        on_row: called with each row.
        on_report: called after each problem with the report so far, which a run that is stopped
            leaves behind.

    Raises:
        UnknownName: a provider is unknown.
        InvalidInput: there is no problem, one has no work in it, or the device is not present.
    """
    chosen = list(dict.fromkeys(PROVIDERS if providers is None else providers))
    for name in chosen:
        if name not in PROVIDERS:
            raise UnknownName.of("provider", name, PROVIDERS)
    wanted = list(problems)
    if not wanted or not chosen:
        raise InvalidInput("there is nothing to compare: no problem or no provider was given.")
    require_work(wanted)
    _require(device)
    build_ahead(wanted, device, chosen, on_start=on_build)
    timer = Timer(device, seed=seed)
    rows: list[Row] = []
    for index, problem in enumerate(wanted):
        if on_start:
            on_start(problem, index, len(wanted))
        for row in _Comparison(problem, device, chosen, seed).rows(timer, rounds, budget_ms):
            rows.append(row)
            if on_row:
                on_row(row)
        _free(device)
        now = datetime.datetime.now(datetime.timezone.utc)
        report = Report(
            device=device,
            policy=timer.policy.id,
            date=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            environment=environment(device),
            settings={"rounds": rounds, "budget_ms": budget_ms, "seed": seed},
            rows=tuple(rows),
        )
        if on_report:
            on_report(report)
    return report


def attention_options(inputs: Inputs) -> dict[str, Any]:
    """The keyword arguments of autoflash.attention for inputs of a problem in layout "bshd"."""
    problem = inputs.problem
    options: dict[str, Any] = {"causal": problem.causal}
    if problem.local:
        options["window_size"] = (problem.window_left, problem.window_right)
    if problem.softcapped:
        options["softcap"] = problem.softcap
    names = ("q_descale", "k_descale", "v_descale")
    return options | dict(zip(names, inputs.descales, strict=False))


def _require(device: Device) -> None:
    import torch

    if device.is_cuda and not torch.cuda.is_available():
        raise InvalidInput(
            f"{device.name} ({device.arch}) is not present, so nothing can be timed on it; "
            "leave --arch away, or run this where there is one."
        )


def _free(device: Device) -> None:
    if device.is_cuda:
        import torch

        torch.cuda.empty_cache()


class _Comparison:
    """The providers of one problem: prepared, checked, and with reasons for those that fell out."""

    def __init__(
        self, problem: Problem, device: Device, providers: Sequence[str], seed: int
    ) -> None:
        self.problem, self.device, self.providers = problem, device, providers
        # Scores as models have them, not as large as they are to check a softcap: softmax over
        # few keys takes less power, and the board's limit is what these kernels run into.
        self.case = make_case(problem, device, seed, q_factor=1.0)
        self.calls: dict[str, Callable[[], torch.Tensor]] = {}
        self.served: Served | None = None
        self.failed: dict[str, tuple[str, str]] = {}  # provider -> (outcome, reason)
        self.error_ratios: dict[str, float | None] = {}
        self._prepare()
        self.first_us = {name: self._check(name) for name in list(self.calls)}

    def _prepare(self) -> None:
        inputs = self.case.inputs
        tensors = (inputs.q, inputs.k, inputs.v)
        if OURS in self.providers and self.problem.is_foreign:
            self._prepare_foreign(*tensors)
        elif OURS in self.providers:
            self._prepare_ours(*tensors)
        peers = [name for name in self.providers if name != OURS]
        calls, reasons = available(
            self.problem, self.device, *tensors, peers, descales=inputs.descales
        )
        self.calls |= calls
        self.failed |= {name: ("unavailable", reason) for name, reason in reasons.items()}

    def _prepare_ours(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        from autoflash.errors import AutoflashError
        from autoflash.runtime import serving
        from autoflash.runtime.attention import attention

        options = attention_options(self.case.inputs)

        def call() -> torch.Tensor:
            out = attention(q, k, v, **options)
            assert not isinstance(out, tuple)
            return out

        try:
            call()  # builds
            dispatcher = serving.dispatcher(q.device.type, q.device.index)
            self.served = dispatcher.serve(self.problem)
        except AutoflashError as error:
            self.failed[OURS] = ("unavailable", str(error))
        else:
            self.calls[OURS] = call

    def _prepare_foreign(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """The other library's kernel with the options that were tuned, or those of its default."""
        from autoflash.runtime import serving

        inputs = self.case.inputs
        self.served = serving.dispatcher(q.device.type, q.device.index).serve(self.problem)
        kernel = self.served.kernel
        if kernel is None:
            self.failed[OURS] = ("unavailable", self.served.reason)
            return
        try:
            bound = kernel.bind(
                q, k, v, inputs.out, None, inputs.softmax_scale, inputs.layout, problem=self.problem
            )
        except Exception as error:  # what the other library raises where it cannot compile
            self.failed[OURS] = ("unavailable", first_line(error))
            return

        def call() -> torch.Tensor:
            out = bound()
            return inputs.out if out is None else out

        self.calls[OURS] = call

    def _check(self, name: str) -> float:
        """Compare one output with the reference; how long a call takes, roughly."""
        try:
            for _ in range(2):
                start = time.perf_counter()
                out = self._run(name)
                took_us = (time.perf_counter() - start) * 1e6
                if took_us < _LONG_US:
                    break  # what took longer may have been compiled meanwhile
        except Exception as error:  # whatever a library raises: the others are compared
            del self.calls[name]
            self.failed[name] = ("unavailable", first_line(error))
            return math.inf
        layout = "bshd" if name == OURS else PEERS[name].layout
        verdict = self.case.compare(out, layout=layout)
        self.error_ratios[name] = verdict.error_ratio
        if not verdict.ok:
            del self.calls[name]
            self.failed[name] = ("wrong_result", verdict.reason)
        return took_us

    def _run(self, name: str) -> torch.Tensor:
        import torch

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            out = self.calls[name]()
            if self.device.is_cuda:
                torch.cuda.synchronize()
        return out

    def rows(self, timer: Timer, rounds: int, budget_ms: float) -> list[Row]:
        """Time what is left, and say for each provider what came of it."""
        import torch

        measured: dict[str, Measurement] = {}
        comparisons: dict[str, Comparison] = {}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            quick = self._quick()
            if quick:
                timed = timer.interleave(quick, rounds=rounds, budget_ms=budget_ms)
                measured.update(timed)
                if OURS in timed:
                    comparisons = {n: timed.compare(n, OURS) for n in timed if n != OURS}
            for name, call in self.calls.items():
                if name not in measured:
                    measured[name] = timer.measure(
                        call, budget_ms=budget_ms / 10, min_calls=_FEW_CALLS
                    )
        fastest = min((m.latency_us for m in measured.values()), default=math.inf)
        for name in list(measured):
            times = measured[name].latency_us / fastest
            if name != OURS and PEERS[name].is_fused and times > _FLOOR:
                reason = f"{times:.0f} times slower than the fastest: an unfused fallback"
                self.failed[name] = ("implausible", reason)
                del measured[name]
        return [self._row(n, measured.get(n), comparisons.get(n)) for n in self.providers]

    def _quick(self) -> dict[str, Callable[[], torch.Tensor]]:
        """The calls that are worth the rounds."""
        fastest = min((self.first_us[name] for name in self.calls), default=0.0)
        return {
            name: call
            for name, call in self.calls.items()
            if name == OURS or self.first_us[name] < max(_HOPELESS * fastest, _LONG_US)
        }

    def _row(self, name: str, measurement: Measurement | None, paired: Comparison | None) -> Row:
        outcome, reason = self.failed.get(name, ("ok", ""))
        extra: dict[str, Any] = {}
        if name == OURS and self.served is not None:
            config = self.served.config
            extra = {
                "rule": self.served.rule,
                "template": config.template if config else None,
                "config": dict(config.pairs) if config else None,
            }
            reason = reason or self.served.reason
        if measurement is not None:
            extra |= measurement.to_dict()
            extra["tflops"] = self.problem.tflops(measurement.latency_us)
        if paired is not None and measurement is not None:
            extra |= {
                "speedup": paired.ratio,
                "speedup_low": paired.low or None,
                "speedup_high": paired.high if math.isfinite(paired.high) else None,
            }
        return Row(
            problem=self.problem.name,
            provider=name,
            outcome=outcome,
            reason=reason,
            error_ratio=self.error_ratios.get(name),
            **extra,
        )
