from __future__ import annotations

import gc
import math
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from autoflash import device as devices
from autoflash.device import KNOWN_GPUS
from autoflash.errors import InvalidInput
from autoflash.tuning import timing
from autoflash.tuning.environment import environment
from autoflash.tuning.telemetry import Readings, Telemetry
from autoflash.tuning.timing import Timer, compare, policy_for


class FakeTime:
    """A clock that only calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.now_ns)

    def call(self, *times_us: float) -> Callable[[], None]:
        """A call that takes these times in turn, then the last one for ever."""
        left = list(times_us)

        def run() -> None:
            self.now_ns += int(1000 * (left.pop(0) if len(left) > 1 else left[0]))

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


@pytest.fixture
def timer() -> Timer:
    return Timer(devices.for_arch("cpu"))


def test_policies_differ_where_times_mean_something_else() -> None:
    cpu, gpu = policy_for(devices.for_arch("cpu")), policy_for(KNOWN_GPUS["sm90"])
    assert cpu.id != gpu.id
    assert policy_for(KNOWN_GPUS["sm80"]) == gpu
    assert "L2" in gpu.summary
    assert "wall clock" in cpu.summary


def test_measure_gives_median_and_percentiles_without_the_first_call(
    clock: FakeTime, timer: Timer
) -> None:
    found = timer.measure(
        clock.call(90000, 10, 50, 20, 40, 30), budget_ms=0.001, min_calls=5, max_calls=5
    )
    assert (found.latency_us, found.count) == (30, 5)
    assert (found.p20_us, found.p80_us) == pytest.approx((18, 42))
    assert found.clock_mhz is None


def test_measure_keeps_to_its_budget_and_to_the_fewest_calls(clock: FakeTime, timer: Timer) -> None:
    assert timer.measure(clock.call(100), budget_ms=5).count == 50
    assert timer.measure(clock.call(1e6), budget_ms=5, min_calls=3).count == 3
    assert timer.measure(clock.call(0.1), budget_ms=1000, max_calls=70).count == 70


def test_measure_goes_on_where_another_process_took_the_cores(
    clock: FakeTime, timer: Timer
) -> None:
    # One call of the usual 10 us, then stalls of 4 ms: more than the two that fill the budget.
    stalled = timer.measure(clock.call(10, 10, 4000), budget_ms=5, min_calls=1)
    assert stalled.count > 4
    assert clock.now_ns < 30e6


@pytest.mark.parametrize(("budget_ms", "min_calls"), [(0, 3), (-1, 3), (math.nan, 3), (5, 0)])
def test_budgets_that_measure_nothing_are_refused(
    timer: Timer, budget_ms: float, min_calls: int
) -> None:
    with pytest.raises(InvalidInput, match="greater than 0"):
        timer.measure(int, budget_ms=budget_ms, min_calls=min_calls)
    with pytest.raises(InvalidInput, match="rounds=0"):
        timer.interleave({"a": int}, rounds=0)


def test_collection_is_off_while_timing_and_on_again_after(timer: Timer) -> None:
    seen = []

    def call() -> None:
        seen.append(gc.isenabled())

    timer.measure(call, min_calls=2, max_calls=2)
    assert seen == [True, False, False]  # the first is the warm-up
    assert gc.isenabled()


def _turns(seed: int, rounds: int) -> list[str]:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    timer = Timer(devices.for_arch("cpu"), seed=seed)
    timer.interleave({name: call(name) for name in "abc"}, rounds=rounds, budget_ms=0.0001)
    squeezed = [name for i, name in enumerate(order[3:]) if i == 0 or order[3:][i - 1] != name]
    return squeezed


def test_rounds_are_shuffled_by_the_seed() -> None:
    assert _turns(1, 8) == _turns(1, 8)
    assert _turns(1, 8) != _turns(2, 8)


def test_interleave_pools_samples_and_keeps_rounds(clock: FakeTime, timer: Timer) -> None:
    calls = {"a": clock.call(100), "b": clock.call(200), "slow": clock.call(50000)}
    found = timer.interleave(calls, rounds=6, budget_ms=6)
    assert list(found) == ["a", "b", "slow"]
    assert len(found) == 3
    assert (found["a"].latency_us, found["a"].count) == (100, 60)
    assert (found["b"].latency_us, found["b"].count) == (200, 30)
    assert found["slow"].count == 6
    assert found.rounds == {"a": (100,) * 6, "b": (200,) * 6, "slow": (50000,) * 6}
    assert found.beats("a", "b")
    assert not found.beats("b", "a")
    assert found.compare("a", "b").ratio == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("count", "critical"), [(5, 0), (6, 2), (7, 3), (8, 5), (9, 8), (10, 10), (20, 60)]
)
def test_quantiles_are_those_of_the_signed_rank_tables(count: int, critical: int) -> None:
    # Critical values of Wilcoxon's test, one-sided, 5%: W <= critical is significant.
    assert timing._signed_rank_quantile(count) == critical + 1


@pytest.mark.parametrize("count", [60, 80, 100])
def test_quantiles_of_many_rounds_go_on_from_those_that_are_counted(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = timing._signed_rank_quantile.__wrapped__(count)
    monkeypatch.setattr(timing, "_EXACT_ROUNDS", 0)
    assert timing._signed_rank_quantile.__wrapped__(count) == pytest.approx(counted, abs=1)
    assert 0 < timing._signed_rank_quantile.__wrapped__(2000) < 2000 * 2001 / 4


def test_too_few_rounds_say_nothing() -> None:
    few = compare([1.0] * 4, [2.0] * 4)
    assert few.ratio == pytest.approx(0.5)
    assert (few.low, few.high) == (0.0, math.inf)
    assert compare([1.0] * 5, [2.0] * 5).high == pytest.approx(0.5)


def test_one_bad_round_changes_no_verdict() -> None:
    first = [1.00, 1.01, 0.99, 1.00, 9.00, 1.01, 1.00, 0.99, 1.00, 1.01]
    second = [1.10, 1.11, 1.09, 1.10, 1.10, 1.11, 1.10, 1.09, 1.10, 1.10]
    assert len(first) == timing.ROUNDS
    found = compare(first, second)
    assert found.ratio == pytest.approx(1 / 1.1, rel=0.02)
    assert found.high < 1


@pytest.mark.parametrize("rounds", [5, 10])
def test_equal_calls_tie_and_unequal_ones_do_not(rounds: int) -> None:
    draw = random.Random(0)

    def wins(speed: float, noise: float) -> int:
        found = 0
        for _ in range(400):
            # What disturbs a round disturbs both; the rest is each call's own.
            shared = [draw.lognormvariate(0, 0.3) for _ in range(rounds)]
            a = [s * speed * draw.lognormvariate(0, noise) for s in shared]
            b = [s * draw.lognormvariate(0, noise) for s in shared]
            found += compare(a, b).high < 1
        return found

    assert wins(1.0, 0.03) <= 0.05 * 400 + 2 * math.sqrt(400 * 0.05 * 0.95)
    assert wins(0.9, 0.01) == 400


class FakeNvml:
    """As much of pynvml as is used."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_FI_DEV_POWER_INSTANT = 1, 0, 186

    class NVMLError(Exception):
        pass

    def __init__(self, reasons: int = 0, milliwatts: int | None = None) -> None:
        self.reasons, self.milliwatts = reasons, milliwatts
        self.clock_mhz = 1830
        self.asked = ""

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked = uuid
        return uuid

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self.clock_mhz

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[SimpleNamespace]:
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        failed = int(self.milliwatts is None)
        value = SimpleNamespace(uiVal=self.milliwatts)
        return [SimpleNamespace(nvmlReturn=failed, value=value)]

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 51

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons


@pytest.mark.parametrize(("reasons", "throttled"), [(0x0, False), (0x1, False), (0x44, True)])
def test_telemetry_reads_what_the_board_reports(
    monkeypatch: pytest.MonkeyPatch, reasons: int, throttled: bool
) -> None:
    nvml = FakeNvml(reasons)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    telemetry, readings = Telemetry("1234-abcd"), Readings()
    telemetry.read(readings)
    assert nvml.asked == "GPU-1234-abcd"
    assert readings.summary() == {
        "clock_mhz": 1830, "power_w": None, "temperature_c": 51, "throttled": throttled,
    }  # fmt: skip


def test_a_call_has_the_clock_and_power_of_its_own_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml, now = FakeNvml(), [100.0]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("autoflash.tuning.telemetry.time.perf_counter", lambda: now[0])
    telemetry, readings = Telemetry("1234-abcd"), Readings()

    def turn(*ages_and_states: tuple[float, int, int]) -> list[bool]:
        """Offers a reading at each age of a turn; which of them were due."""
        readings.begin()
        began, due = now[0], []
        for age_s, nvml.clock_mhz, nvml.milliwatts in ages_and_states:
            now[0] = began + age_s
            due.append(readings.is_due())
            if due[-1]:
                telemetry.read(readings)
        return due

    # Of the call before: the first clock; all power of a turn that ends before the board renews it.
    assert turn((0.001, 1980, 300_000), (0.006, 1500, 300_000)) == [True, True]
    assert readings.summary()["clock_mhz"] == 1500
    assert readings.summary()["power_w"] is None
    # A turn that comes soon after the last still gets a reading, and one every 20 ms after it.
    assert turn((0.004, 1980, 1), (0.007, 1510, 1), (0.02, 9, 9), (0.2, 1505, 690_000)) == [
        False, True, False, True,
    ]  # fmt: skip
    assert readings.summary()["clock_mhz"] == 1505
    assert readings.summary()["power_w"] == 690


def test_telemetry_is_silent_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import fails
    for telemetry in (Telemetry("1234"), Telemetry(None)):
        readings = Readings()
        telemetry.read(readings)
        assert not telemetry.available
        assert set(readings.summary().values()) == {None}
        assert telemetry.driver is None


def test_environment_names_versions_and_the_machine() -> None:
    import torch

    import autoflash

    here = environment(devices.for_arch("cpu"))
    assert here["autoflash"] == autoflash.__version__
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert here["device"] == devices.for_arch("cpu").name
    assert "cuda" not in here
    assert "threads" not in environment(KNOWN_GPUS["sm100"])


def test_a_missing_compiler_leaves_the_environment_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from autoflash.tuning import environment as module

    monkeypatch.setattr(
        module.settings, "get", lambda: SimpleNamespace(cxx="/nowhere/to-be-found-c++")
    )
    module._versions.cache_clear()
    assert "cxx" not in module.environment(devices.for_arch("cpu"))
    module._versions.cache_clear()
