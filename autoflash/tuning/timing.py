"""How long does a call take, and is one call faster than another beyond the noise?

On a GPU the time is the device's alone: events around each call, many calls queued before the host
waits, so that launch overhead does not show; the L2 cache is flushed before each call, outside the
events. On a CPU it is the wall clock. Both report the median with the 20th and 80th percentile.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from autoflash.device import Device
from autoflash.errors import InvalidInput
from autoflash.record import Measurement
from autoflash.tuning.telemetry import Readings, Telemetry

Call = Callable[[], object]

CONFIDENCE = 0.95
"""One-sided: two equal calls are told apart in at most one comparison of twenty."""
MARGIN = 0.005
"""A difference under half a per cent is never a win: a rerun moves by as much."""
ROUNDS = 10
"""Default rounds of `interleave`: the fewest in which one bad round, however bad, is outvoted. Five
are the fewest from which anything follows."""

_MAX_CALLS = 1000  # of one measurement: more does not move the median of a microsecond kernel
_WARM_FIRST_MS, _WARM_IDLE_MS = 300.0, 100.0  # an H200 idles at 345 MHz and runs at 1980
_LONG_US = 5000.0  # a call that brings its own data into the caches
_IDLE_S = 0.5  # a pause after which clocks have fallen


@dataclass(frozen=True, slots=True)
class Policy:
    """How times are taken. Part of a record's identity: other policies are never compared.

    Attributes:
        id: short and stable; changes whenever the meaning of a time changes.
        summary: what is timed, in which cache state, and which statistic is reported.
    """

    id: str
    summary: str


_GPU = Policy(
    "gpu-events-coldl2-median-1",
    "device events around each call of a queue; L2 overwritten before each; median, p20, p80",
)
_CPU = Policy("cpu-wall-warm-median-1", "wall clock of each call, caches warm; median, p20, p80")
METHODS: Mapping[str, str] = {policy.id: policy.summary for policy in (_GPU, _CPU)}
"""Policy, as records name it -> how times are taken under it."""


def policy_for(device: Device) -> Policy:
    """The policy under which `device` is timed."""
    return _GPU if device.is_cuda else _CPU


@dataclass(frozen=True, slots=True)
class Comparison:
    """Time of one call over the time of another, from paired rounds.

    Attributes:
        ratio: the estimate; under 1 means the first is faster.
        low: lower end of the interval.
        high: upper end; infinite where there are too few rounds to say.
        rounds: pairs that it rests on.
    """

    ratio: float
    low: float
    high: float
    rounds: int


def compare(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> Comparison:
    """Compare two calls that were timed in the same rounds.

    Each round gives one ratio, so what disturbs a whole round cancels. The estimate is the
    Hodges-Lehmann median of the log ratios and the interval that of Wilcoxon's signed-rank test:
    exact for few rounds, free of any assumed distribution, and little moved by one bad round.
    Each end is exceeded with a probability of at most 1 - confidence.

    Args:
        first: median of each round, any unit.
        second: likewise, as many.
        confidence: one-sided.
    """
    logs = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    walsh = sorted((x + y) / 2 for i, x in enumerate(logs) for y in logs[i:])
    rank = _signed_rank_quantile(len(logs), confidence)
    low, high = (walsh[rank - 1], walsh[-rank]) if rank else (-math.inf, math.inf)
    middle = statistics.median(walsh) if walsh else 0.0
    return Comparison(math.exp(middle), math.exp(low), math.exp(high), len(logs))


_EXACT_ROUNDS = 100
"""Beyond, the signed-rank sum is taken for normal: counting takes the cube of their number."""


@cache
def _signed_rank_quantile(count: int, confidence: float = CONFIDENCE) -> int:
    """Largest k with P(signed-rank sum < k) <= 1 - confidence; 0 where even k = 1 is too likely."""
    if count > _EXACT_ROUNDS:
        mean, variance = count * (count + 1) / 4, count * (count + 1) * (2 * count + 1) / 24
        return math.floor(statistics.NormalDist(mean, math.sqrt(variance)).inv_cdf(1 - confidence))
    ways = [1]  # ways[s]: subsets of the ranks 1..n that sum to s
    for rank in range(1, count + 1):
        longer = ways + [0] * rank
        for total, number in enumerate(ways):
            longer[total + rank] += number
        ways = longer
    below, k = 0, 0
    while k < len(ways) and below + ways[k] <= (1 - confidence) * 2**count + 1e-9:
        below += ways[k]
        k += 1
    return k


class Interleaved(Mapping[str, Measurement]):
    """What came of timing several calls in the same rounds: name -> Measurement, and the rounds.

    Attributes:
        rounds: name -> median of each round in microseconds; the same index is the same round.
    """

    def __init__(
        self, measurements: Mapping[str, Measurement], rounds: Mapping[str, Sequence[float]]
    ) -> None:
        self._measurements = dict(measurements)
        self.rounds = {name: tuple(medians) for name, medians in rounds.items()}

    def __getitem__(self, name: str) -> Measurement:
        return self._measurements[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measurements)

    def __len__(self) -> int:
        return len(self._measurements)

    def compare(self, first: str, second: str, rivals: int = 1) -> Comparison:
        """Time of `first` over time of `second`, with its interval.

        Args:
            first: name of a call.
            second: likewise.
            rivals: from how many `first` was picked for being the fastest. The luckiest of eight
                equal calls looks faster than it is: the interval widens, so that for any number
                of them two equal calls are told apart in at most one run of twenty.
        """
        confidence = 1 - (1 - CONFIDENCE) / rivals
        return compare(self.rounds[first], self.rounds[second], confidence)

    def beats(self, first: str, second: str, *, margin: float = MARGIN, rivals: int = 1) -> bool:
        """Whether `first` is faster than `second` by more than the noise and by `margin`."""
        return self.compare(first, second, rivals).high < 1 - margin


class _Clock(Protocol):
    """Takes times on one kind of device."""

    def warm(self, call: Call) -> None:
        """Run at least once untimed, and until clocks are steady."""

    def sample(
        self, call: Call, budget_ms: float, least: int, most: int, readings: Readings
    ) -> list[float]:
        """Microseconds of each call, for about `budget_ms`, but `least` to `most` of them."""


class Timer:
    """Times calls on one device, under `policy_for(device)`.

    Attributes:
        device: where the calls run; for a GPU, PyTorch's current one.
        policy: how.
    """

    def __init__(self, device: Device, *, seed: int = 0) -> None:
        """Prepare to time calls on `device`, which must be present.

        Args:
            device: where the calls run.
            seed: decides the order of calls within each round of `interleave`.
        """
        self.device = device
        self.policy = policy_for(device)
        self._random = random.Random(seed)
        self._clock: _Clock = _GpuClock() if device.is_cuda else _CpuClock()

    def measure(
        self,
        call: Call,
        *,
        budget_ms: float = 25.0,
        min_calls: int = 3,
        max_calls: int = _MAX_CALLS,
    ) -> Measurement:
        """Time one call alone.

        Args:
            call: what to time; runs at least once before, untimed.
            budget_ms: about how long to go on.
            min_calls: timed calls, however long they take.
            max_calls: likewise at most.
        """
        _check(budget_ms, min_calls)
        readings = Readings()
        self._clock.warm(call)
        samples = self._clock.sample(call, budget_ms, min_calls, max_calls, readings)
        return _measurement(samples, readings)

    def interleave(
        self,
        calls: Mapping[str, Call],
        *,
        rounds: int = ROUNDS,
        budget_ms: float = 300.0,
        min_calls: int = 1,
    ) -> Interleaved:
        """Time several calls under the same conditions, in rounds of shuffled order.

        Args:
            calls: name -> what to time.
            rounds: in each, every call has its turn; at least 5 for `beats` ever to hold.
            budget_ms: about how long to time each call, over all rounds.
            min_calls: timed calls of each turn, however long they take.

        Returns:
            A Measurement of each, its samples pooled over the rounds.
        """
        _check(budget_ms, min_calls)
        if rounds < 1:
            raise InvalidInput(f"rounds={rounds}: at least one round is needed.")
        readings = {name: Readings() for name in calls}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        medians: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            self._clock.warm(call)
        order = list(calls)
        for _ in range(rounds):
            self._random.shuffle(order)
            for name in order:
                if samples[name] and samples[name][-1] < _LONG_US:
                    self._clock.warm(calls[name])
                turn = self._clock.sample(
                    calls[name], budget_ms / rounds, min_calls, _MAX_CALLS, readings[name]
                )
                samples[name] += turn
                medians[name].append(statistics.median(turn))
        measurements = {name: _measurement(samples[name], readings[name]) for name in calls}
        return Interleaved(measurements, medians)


def _check(budget_ms: float, min_calls: int) -> None:
    if not budget_ms > 0 or min_calls < 1:
        raise InvalidInput(
            f"budget_ms={budget_ms}, min_calls={min_calls}: both must be greater than 0."
        )


def _measurement(samples: Sequence[float], readings: Readings) -> Measurement:
    ordered = sorted(samples)

    def at(share: float) -> float:
        """The percentile, interpolated between neighbours."""
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Measurement(
        latency_us=at(0.5), p20_us=at(0.2), p80_us=at(0.8), count=len(ordered), **readings.summary()
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection held off: a pause of milliseconds would land in one sample."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _CpuClock:
    """The wall clock."""

    def warm(self, call: Call) -> None:
        call()

    def sample(
        self, call: Call, budget_ms: float, least: int, most: int, readings: Readings
    ) -> list[float]:
        now = time.perf_counter_ns
        samples: list[float] = []
        fewest_us = math.inf
        with _no_collection():
            began = now()
            while len(samples) < most:
                spent_us = (now() - began) / 1000
                # When another process takes the cores, go on for longer: a thread that waits for
                # one that was preempted makes a call a thousand times slower.
                enough = spent_us / (4 if len(samples) * fewest_us < 1000 * budget_ms else 1)
                if len(samples) >= least and enough >= 1000 * budget_ms:
                    break
                start = now()
                call()
                samples.append((now() - start) / 1000)
                fewest_us = min(fewest_us, samples[-1])
        return samples


class _GpuClock:
    """Device events, with the L2 cache overwritten before each call.

    The host stays ahead of the device: a queue of calls begins with enough extra flushes to keep
    the device busy while the host launches them all. Without that, a call whose Python takes longer
    than its kernel would be timed with its Python. Whether it held is checked on each queue, which
    is timed again with more flushes in front if not.
    """

    _QUEUE = 32  # calls; with flushes and events well under the 1024 launches a stream holds
    _QUEUE_HOST_US = 8000.0  # host time of one queue, so that the flushes in front stay few
    _MOST_PADDING = 400  # flushes in front of a queue
    _TRIES = 3

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        size = max(2 * properties.L2_cache_size, 32 << 20)
        self._flush_buffer = torch.empty(size, dtype=torch.int8, device=f"cuda:{index}")
        self._telemetry = Telemetry(str(getattr(properties, "uuid", "")) or None)
        event: Any = torch.cuda.Event
        self._starts = [event(enable_timing=True) for _ in range(self._QUEUE)]
        self._ends = [event(enable_timing=True) for _ in range(self._QUEUE)]
        self._busy_until: float | None = None
        self._flush_us = 0.0

    def warm(self, call: Call) -> None:
        torch = self._torch
        call()  # may compile or load: not part of the warm-up time
        torch.cuda.synchronize()
        if self._busy_until is None:
            lasting_ms = _WARM_FIRST_MS
        elif time.perf_counter() - self._busy_until > _IDLE_S:
            lasting_ms = _WARM_IDLE_MS
        else:
            return
        until = time.perf_counter() + lasting_ms / 1000
        while time.perf_counter() < until:
            call()
            torch.cuda.synchronize()
        if not self._flush_us:
            self._flush_us = self._time_flush()
        self._busy_until = time.perf_counter()

    def sample(
        self, call: Call, budget_ms: float, least: int, most: int, readings: Readings
    ) -> list[float]:
        samples: list[float] = []
        readings.begin()
        queue, padding, count = min(2, least), 4, least
        while len(samples) < count:
            queue = min(queue, count - len(samples))
            for _ in range(self._TRIES):
                taken, host_us, ahead = self._run_queue(call, queue, padding, readings)
                if ahead:
                    break
                padding = min(self._MOST_PADDING, 2 * padding + 8)
            samples += taken
            count = max(
                least, min(most, int(budget_ms * 1000 / max(statistics.median(taken), 1.0)))
            )
            # What the host needs for a call beyond what the device does meanwhile must be made up.
            each_us = host_us / len(taken)
            queue = max(1, min(self._QUEUE, int(self._QUEUE_HOST_US / each_us)))
            behind_us = max(0.0, each_us - self._flush_us - min(taken))
            needed = int(1.5 * queue * behind_us / max(self._flush_us, 1.0)) + 4
            padding = min(self._MOST_PADDING, max(padding, needed))
        self._busy_until = time.perf_counter()
        return samples

    def _run_queue(
        self, call: Call, count: int, padding: int, readings: Readings
    ) -> tuple[list[float], float, bool]:
        """Times of `count` calls, the host's time to launch them, whether the host kept ahead."""
        flush = self._flush_buffer.zero_
        starts, ends = self._starts[:count], self._ends[:count]
        with _no_collection():
            for _ in range(padding):
                flush()
            began = time.perf_counter()
            for start, end in zip(starts, ends, strict=True):
                flush()
                start.record()
                call()
                end.record()
            host_us = (time.perf_counter() - began) * 1e6
            # Not yet at the last call when all were launched: none waited for the host.
            ahead = not bool(starts[-1].query())
            if self._telemetry.available and readings.is_due():
                # Well into the queue, and before its end: while the device is at these calls.
                while not starts[3 * count // 4].query():
                    time.sleep(2e-4)
                self._telemetry.read(readings)
            self._torch.cuda.synchronize()
        times = [s.elapsed_time(e) * 1000 for s, e in zip(starts, ends, strict=True)]
        return times, host_us, ahead

    def _time_flush(self) -> float:
        start, end = self._starts[0], self._ends[0]
        for _ in range(3):
            self._flush_buffer.zero_()
        start.record()
        for _ in range(8):
            self._flush_buffer.zero_()
        end.record()
        self._torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1000 / 8
