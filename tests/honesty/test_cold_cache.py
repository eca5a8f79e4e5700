"""Who is fast only while the L2 cache is warm does not win under a policy of cold caches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from autoflash import device as devices
from autoflash.device import KNOWN_GPUS
from autoflash.tuning import timing
from autoflash.tuning.timing import Timer


class Pretended:
    """As much of torch as takes times on a GPU, with a cache and a clock that calls move."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.warm = False
        properties = SimpleNamespace(L2_cache_size=50 << 20, uuid="")
        self.cuda = SimpleNamespace(
            current_device=lambda: 0,
            get_device_properties=lambda index: properties,
            Event=self._event,
            synchronize=lambda: None,
        )
        self.int8 = "int8"

    def empty(self, size: int, *, dtype: str, device: str) -> SimpleNamespace:
        assert size >= 2 * (50 << 20)
        return SimpleNamespace(zero_=self._flush)

    def call(self, warm_us: float, cold_us: float) -> Callable[[], None]:
        """A call that is faster if it was the last to fill the cache."""

        def run() -> None:
            self.now_us += warm_us if self.warm else cold_us
            self.warm = True

        return run

    def _flush(self) -> None:
        self.now_us += 20.0
        self.warm = False

    def _event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0, query=lambda: False)
        event.record = lambda: setattr(event, "at", self.now_us)
        event.elapsed_time = lambda later: (later.at - event.at) / 1000
        return event


def test_a_warm_cache_wins_nothing_on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended()
    monkeypatch.setitem(sys.modules, "torch", pretended)
    monkeypatch.setattr(timing, "_WARM_FIRST_MS", 1.0)
    lucky, steady = pretended.call(5.0, 10.0), pretended.call(7.0, 7.0)
    began = pretended.now_us
    for _ in range(50):
        lucky()
    assert (pretended.now_us - began) / 50 < 7  # called over and over it would win
    timer = Timer(KNOWN_GPUS["sm90"])
    assert "coldl2" in timer.policy.id
    assert timer.measure(lucky, budget_ms=0.1).latency_us == pytest.approx(10)
    timed = timer.interleave({"lucky": lucky, "steady": steady}, rounds=6, budget_ms=1.0)
    assert timed["lucky"].latency_us == pytest.approx(10)
    assert timed.beats("steady", "lucky")


@pytest.mark.gpu
def test_a_warm_cache_wins_nothing_on_this_gpu() -> None:
    import torch
    from support.chase import chase

    timer = Timer(devices.native())
    lines, steps = 1 << 14, 400
    order = torch.randperm(lines - 1) + 1
    order = torch.cat([torch.zeros(1, dtype=order.dtype), order]) * 32  # one per line of 128 bytes
    follow = torch.zeros(lines * 32, dtype=torch.int32)
    follow[order] = order.roll(-1).int()
    follow = follow.cuda()
    found = torch.zeros(1, dtype=torch.int32, device="cuda")

    def lucky() -> None:
        chase[(1,)](follow, found, steps)

    def sleep(cycles: int) -> Callable[[], None]:
        return lambda: torch.cuda._sleep(cycles)

    cold_us = timer.measure(lucky, budget_ms=10.0).latency_us
    warm_us = _over_and_over(lucky)
    assert warm_us < 0.8 * cold_us
    short, long = (timer.measure(sleep(n), budget_ms=5.0).latency_us for n in (50_000, 250_000))
    between_us = math.sqrt(warm_us * cold_us)
    cycles = 50_000 + int((between_us - short) * 200_000 / (long - short))
    steady = sleep(cycles)
    assert warm_us < _over_and_over(steady) < cold_us  # called over and over the lucky one wins
    timed = timer.interleave({"lucky": lucky, "steady": steady}, rounds=7, budget_ms=30.0)
    assert timed.beats("steady", "lucky")


def _over_and_over(call: Callable[[], None]) -> float:
    """Microseconds of a call among many of its own, the caches as the last one left them."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # so that the host is ahead
    start.record()
    for _ in range(100):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 10


@pytest.mark.gpu
def test_default_against_default_has_no_winner_on_this_gpu() -> None:
    import torch

    timer = Timer(devices.native())
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    names = ("default", "one", "two")
    runs, winners = 40, 0
    for _ in range(runs):
        timed = timer.interleave({name: lambda: a @ a for name in names}, rounds=6, budget_ms=20.0)
        fastest = min(names, key=lambda name: timed[name].latency_us)
        winners += fastest != "default" and timed.beats(fastest, "default", rivals=2)
    assert winners <= 0.05 * runs + 2 * math.sqrt(runs * 0.05 * 0.95)
