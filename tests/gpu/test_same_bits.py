"""Does every kernel give the same bits, run after run, whatever else runs on the device?

A race, a barrier passed too early or a sum whose order is left to chance changes bits now and then,
and rarely on a quiet device. So another stream takes multiprocessors and memory bandwidth away in
amounts that differ from run to run: blocks start in another order, and drawn tiles go elsewhere.
"""

from __future__ import annotations

import concurrent.futures
import os
import random
from collections.abc import Callable, Iterator

import pytest

from autoflash import build, device
from autoflash.codegen.catalog import installed
from autoflash.codegen.template import Source
from autoflash.config import Config
from autoflash.problem import Problem
from autoflash.tuning.inputs import make_inputs

pytestmark = pytest.mark.gpu

TEMPLATES = [name for name, template in installed().templates.items() if template.language != "cpp"]
PROBLEMS = [
    "b4s1024h8d128c", "b2s2048h8/2d64f-float16", "b1s777x2100h6/2d128cw300",
    "b1s1000x1333h6/2d96f", "b2s1023h8d64c", "b1s900x1500h4/2d256ccap30-float16",
    "b2s5x4000h16/2d128c", "b2s1100h4d128c-float8_e4m3fn",
]  # fmt: skip
RUNS = 8


def configs_of(template: str, name: str) -> list[Config]:
    """The default and each seed; a skip where the template does not serve the problem."""
    found, here, problem = installed().get(template), device.native(), Problem.parse(name)
    if (reason := found.refusal(problem, here)) is not None:
        pytest.skip(f"{template} does not serve {name}: {reason}")
    return found.seed_configs(problem, here)


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """Everything that the selected tests need, compiled side by side: one takes some 10 s."""
    here, sources = device.native(), {}
    for item in request.session.items:
        params = item.callspec.params if item.module is request.module else {}
        if "name" not in params:
            continue
        try:
            configs = configs_of(params["template"], params["name"])
        except pytest.skip.Exception:
            continue
        template, problem = installed().get(params["template"]), Problem.parse(params["name"])
        rendered = [template.render(config, problem, here) for config in configs]
        sources |= {source.digest: source for source in rendered}

    def compile_it(source: Source) -> None:
        try:
            build.compile_source(source, here)
        except Exception:  # the test that needs it says so
            return

    languages = {source.language for source in sources.values()}
    jobs = build.jobs_within_memory(os.cpu_count() or 1, languages, here)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_it, sources.values()))


@pytest.fixture(scope="module")
def disturb() -> Iterator[Callable[[random.Random], None]]:
    """Puts work on another stream: products that fill a part of the device, and copies."""
    import torch

    stream = torch.cuda.Stream()
    matrices = [
        torch.randn(size, 1024, device="cuda", dtype=torch.bfloat16) for size in (128, 512, 2048)
    ]
    source = torch.empty(32 << 20, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    torch.cuda.synchronize()

    def work(some: random.Random) -> None:
        with torch.cuda.stream(stream):
            for _ in range(some.randint(4, 24)):
                matrix = some.choice([*matrices, None])
                if matrix is None:
                    target.copy_(source, non_blocking=True)
                else:
                    matrix @ matrix.T

    yield work
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_runs_agree_to_the_bit(
    template: str, name: str, disturb: Callable[[random.Random], None]
) -> None:
    import torch

    here, problem = device.native(), Problem.parse(name)
    inputs = make_inputs(problem, here, seed=len(name))
    found, some = installed().get(template), random.Random(name)

    def bits(kernel: build.Kernel, *, busy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        inputs.poison()
        torch.cuda.synchronize()
        if busy:
            disturb(some)
        kernel(
            inputs.q, inputs.k, inputs.v, inputs.out, inputs.lse, inputs.softmax_scale,
            problem=problem, descales=inputs.descales,
        )  # fmt: skip
        torch.cuda.synchronize()
        assert inputs.damage() is None
        # As integers: NaN is not equal to itself, and 0 is to -0.
        return inputs.out.view(torch.int16).clone(), inputs.lse.view(torch.int32).clone()

    for config in configs_of(template, name):
        kernel = build.build(found.render(config, problem, here), here)
        out, lse = bits(kernel, busy=False)
        for run in range(RUNS):
            out_again, lse_again = bits(kernel, busy=True)
            for what, first, again in (("out", out, out_again), ("lse", lse, lse_again)):
                wrong = (first != again).nonzero()
                assert not len(wrong), (
                    f"{config}: {what} of run {run} differs from that on a quiet device in "
                    f"{len(wrong)} of {first.numel()} elements, first at {wrong[0].tolist()}"
                )
