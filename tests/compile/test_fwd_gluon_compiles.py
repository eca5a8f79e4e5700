"""Does gluon/fwd_sm90 compile in every branch of its declaration, and into what it is meant to be?

Without a GPU, by Triton and ptxas: eighteen kernels, as many at once as there are cores, each 2.4 s
of a core with Triton 3.6 and 3.5 s with 3.9.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.sass import opcodes

from autoflash import build
from autoflash.codegen.catalog import installed
from autoflash.config import Config, Value
from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem
from autoflash.tuning.predict import over_resources

pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytestmark = [pytest.mark.compile, pytest.mark.slow]

TEMPLATE, H100 = installed().get("gluon/fwd_sm90"), KNOWN_GPUS["sm90"]
LONE: dict[str, Value] = {"num_consumer_warpgroups": 1, "pingpong": False, "block_n": 64}
CASES: list[tuple[str, dict[str, Value]]] = [
    # (problem, what differs from the default); every choice of every tunable, see below
    ("b1s900h16d64c", LONE | {"overlap": False}),
    ("b1s4096h16d64f-float16", {"num_consumer_warpgroups": 2, "rescale_slack": 8}),
    ("b1s4096h16d64f", {"num_stages": 3}),
    ("b1s4096h16d64c", {"num_consumer_warpgroups": 3}),
    ("b1s4096h16d64fw512x128", {"schedule": "static", "head_order": "rows", "num_stages": 3}),
    ("b1s4096h16/4d96cw1023cap50-float16", {"block_n": 64}),
    ("b1s4096h16d80fcap30", {"rescale_slack": 8, "late_wait": True}),
    ("b1s4096h16/4d128c", {"pack_gqa": True, "schedule": "tiles"}),
    ("b1s4096h16d128c", {"producer_registers": 40}),
    ("b1s16x4096h16/4d128c-float16", {}),
    ("b1s4096h16d192x128c", {"overlap": False, "late_wait": False}),
    ("b1s4096h16d40x256f", {}),
]
CLEAN = {"d64c": 0, "d96c": 80, "d128c": 40, "d128f": 0, "d192c": 60, "d256f": 24}
"""Problem -> bytes that its default may spill, most with 3.9: no loop of whole tiles reads them."""


def made(
    cases: list[tuple[str, dict[str, Value]]],
) -> list[tuple[Problem, Config, build.Artifact]]:
    """Each case compiled, as many at once as there are cores."""

    def compile_one(case: tuple[str, dict[str, Value]]) -> tuple[Problem, Config, build.Artifact]:
        problem = Problem.parse(case[0])
        assert TEMPLATE.refusal(problem, H100) is None
        config = changed(problem, case[1])
        return problem, config, build.compile_source(TEMPLATE.render(config, problem, H100), H100)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, cases))


def changed(problem: Problem, values: dict[str, Value]) -> Config:
    default = dict(TEMPLATE.default_config(problem, H100).pairs)
    return Config.of(TEMPLATE.name, default | values)


def test_the_cases_have_every_choice():
    chosen = [changed(Problem.parse(name), values) for name, values in CASES]
    for tunable, choices in TEMPLATE.tunables.items():
        assert {config[tunable] for config in chosen} == set(choices), tunable


def test_every_branch_compiles():
    for problem, config, artifact in made(CASES):
        used, what = artifact.resources, f"{problem.name} {config}"
        derived = TEMPLATE.derive(config, problem, H100)
        assert over_resources(used.to_dict(), H100) is None, what
        assert used.num_threads == derived["num_threads"], what
        # The declaration allows for barriers and what Triton keeps in shared memory besides.
        assert used.smem_bytes <= derived["smem_bytes"] <= used.smem_bytes + 2048, what
        assert used.spill_bytes <= 288, what  # three consumers, pairs, Triton 3.9: 272
        facts = json.loads((artifact.directory / "meta.json").read_text(encoding="utf-8"))
        assert facts["warnings"] == [], what
        found = opcodes(artifact.directory / "kernel.cubin")
        assert {"HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"} <= set(found), what


def test_defaults_keep_to_their_registers():
    defaults = made([(f"b1s4096h16{name}", {}) for name in CLEAN])
    for (problem, config, artifact), most in zip(defaults, CLEAN.values(), strict=True):
        spilled, found = (
            artifact.resources.spill_bytes,
            opcodes(artifact.directory / "kernel.cubin"),
        )
        assert spilled <= most, f"{problem.name} {config}"
        assert spilled or not found["LDL"] + found["STL"], f"{problem.name} {config}"


def test_every_head_dim_has_a_feasible_default():
    for head_dim in range(40, 257, 8):
        for head_dim_v in {head_dim, 64, 256}:
            for mask in ("c", "f", "cw1023"):
                for sizes in ("s1x4096h8", "s1x4096h8/1", "s4096h8", "s4096h6/2"):
                    problem = Problem.parse(f"b1{sizes}d{head_dim}x{head_dim_v}{mask}")
                    config = TEMPLATE.default_config(problem, H100)
                    assert TEMPLATE.broken(config, problem, H100) is None, (problem.name, config)
