"""On which problems of a workload the time goes."""

from __future__ import annotations

import pytest

from autoflash.codegen import catalog
from autoflash.device import KNOWN_GPUS, Device
from autoflash.problem import Problem
from autoflash.tuning.cost import call_us, costliest_first

CPU = Device(name="test cpu", arch="cpu", num_sms=2, tflops_fp32=0.4, memory_gbps=40.0)
PROMPT = Problem.parse("b1s4096h32/8d128c-bfloat16")
TOKEN = Problem.parse("b8s1x8192h32/8d128c-bfloat16")
UNSERVED = Problem.parse("b1s4096h2d1024c-bfloat16")


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_calls_weigh_as_much_as_time(arch: str) -> None:
    device = KNOWN_GPUS[arch]
    prompt_us = call_us(PROMPT, device, catalog.installed())
    token_us = call_us(TOKEN, device, catalog.installed())
    assert 0.0 < token_us < prompt_us
    turn = round(prompt_us / token_us)
    often, rarely = {PROMPT: 1, TOKEN: 2 * turn}, {TOKEN: turn // 2, PROMPT: 1}
    assert [cost.problem for cost in costliest_first(often, device)] == [TOKEN, PROMPT]
    assert [cost.problem for cost in costliest_first(rarely, device)] == [PROMPT, TOKEN]


def test_reading_keys_costs_what_it_does_on_a_cpu() -> None:
    # By its arithmetic alone one token would cost next to nothing.
    fewest_us = TOKEN.bytes / (CPU.memory_gbps * 1e3)
    assert call_us(TOKEN, CPU, catalog.installed()) >= fewest_us


def test_what_no_template_takes_has_its_place_too() -> None:
    costs = costliest_first({TOKEN: 1, UNSERVED: 1000}, KNOWN_GPUS["sm80"])
    assert [cost.problem for cost in costs] == [UNSERVED, TOKEN]
    assert sum(cost.share for cost in costs) == pytest.approx(1.0)


def test_problems_without_a_count_are_called_once() -> None:
    [cost] = costliest_first({PROMPT: None}, CPU)
    assert (cost.calls, cost.share) == (1, 1.0)
