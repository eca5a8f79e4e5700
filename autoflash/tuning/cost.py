"""Cost: on which problems of a workload does the time go? Those are tuned first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoflash.codegen.catalog import Catalog, installed
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.tuning.predict import predict


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a problem's calls take, by the static model: to order problems, not to promise times.

    Attributes:
        problem: which.
        calls: how often it was asked for.
        call_us: estimated time of one call, before tuning.
        share: of the time of the whole workload, from 0 to 1.
    """

    problem: Problem
    calls: int
    call_us: float
    share: float


def costliest_first(
    calls: Mapping[Problem, int | None], device: Device, catalog: Catalog | None = None
) -> list[Cost]:
    """What each problem's calls take, the most time-consuming problem first.

    Args:
        calls: problem -> number of calls; None is one.
        device: where.
        catalog: of templates; None is the installed one.
    """
    catalog = catalog or installed()
    counts = {problem: 1 if count is None else count for problem, count in calls.items()}
    each_us = {problem: call_us(problem, device, catalog) for problem in counts}
    total_us = sum(count * each_us[problem] for problem, count in counts.items()) or 1.0
    costs = [
        Cost(
            problem=problem,
            calls=count,
            call_us=each_us[problem],
            share=count * each_us[problem] / total_us,
        )
        for problem, count in counts.items()
    ]
    return sorted(costs, key=lambda cost: -cost.share)  # equal ones stay in their order


def call_us(problem: Problem, device: Device, catalog: Catalog) -> float:
    """One call with the fastest default, as the static model predicts it before compilation.

    On a CPU, and where no template takes the problem, it is what half of the peak rate of the
    device, or of its memory, allows. The model knows our kernels: they stand for foreign ones.
    """
    problem = problem.forward
    if device.is_cuda:
        predicted = min(_predicted_us(problem, device, catalog), default=math.inf)
        if math.isfinite(predicted):
            return predicted
    peak_flops_per_us = max(device.tflops_peak(problem.dtype), 0.01) * 1e6
    peak_bytes_per_us = max(device.memory_gbps, 1.0) * 1e3
    return 2.0 * max(problem.flops / peak_flops_per_us, problem.bytes / peak_bytes_per_us)


def _predicted_us(problem: Problem, device: Device, catalog: Catalog) -> list[float]:
    found = []
    for template in catalog.serving(problem, device):
        config = template.default_config(problem, device)
        if template.broken(config, problem, device) is None:
            derived = template.derive(config, problem, device)
            found.append(predict(problem, config, device, derived, None))
    return found
