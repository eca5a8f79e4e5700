"""Launches kernels once each, for a tool that watches: `python -m support.launch < jobs.json`.

A job is [template, problem's name, tunables that differ from the default].
"""

from __future__ import annotations

import json
import sys

from autoflash import build, device
from autoflash.codegen.catalog import installed
from autoflash.codegen.template import Source
from autoflash.config import Config, Value
from autoflash.problem import Problem
from autoflash.tuning.inputs import make_inputs

Job = tuple[str, str, dict[str, Value]]


def source_of(job: Job) -> Source:
    """What a job runs; the config must be of the template's space."""
    template, name, changes = job
    found, here, problem = installed().get(template), device.native(), Problem.parse(name)
    config = Config.of(template, {**found.default_config(problem, here), **changes})
    assert config in found.space(problem, here).configs, f"{config} is not feasible for {name}"
    return found.render(config, problem, here)


def main() -> None:
    """Run the jobs on standard input, and say of each that it ran."""
    import torch

    here = device.native()
    for job in json.load(sys.stdin):
        problem = Problem.parse(job[1])
        inputs = make_inputs(problem, here, seed=0)
        build.build(source_of(job), here)(
            inputs.q, inputs.k, inputs.v, inputs.out, inputs.lse, inputs.softmax_scale,
            problem=problem, descales=inputs.descales,
        )  # fmt: skip
        torch.cuda.synchronize()
        print("ran", *job, flush=True)


if __name__ == "__main__":
    main()
