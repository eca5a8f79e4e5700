"""Does every CUDA template compile for every arch that it accepts, into what it is meant to be?

One config per branch of its declaration: every choice of every tunable, and as many pairs of
choices of the switches (tunables of at most three choices) as fit a limit, over problems that
differ in all that a kernel is compiled for. Other archs get their default. `AUTOFLASH_JOBS`
compilers run at once. A kernel takes 10 to 19 s of a core; the whole test suite with
this file took 20 minutes on two cores.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from support.sass import opcodes

from autoflash import build, settings
from autoflash.build import nvcc
from autoflash.codegen.catalog import Catalog, installed
from autoflash.codegen.template import Template
from autoflash.config import Config
from autoflash.device import KNOWN_GPUS
from autoflash.errors import AutoflashError
from autoflash.problem import TRAITS, Problem
from autoflash.tuning.predict import over_resources

_absent = nvcc.unavailable()
pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.skipif(_absent is not None, reason=f"it needs {_absent}"),
]

LIMIT = 12
"""Most configs of one template on its home arch for the sake of pairs: some 15 s of a core each."""

# What a kernel may be compiled for, each value of it once. The first is the most usual one.
PROBLEMS = tuple(
    Problem.parse(name)
    for name in (
        "b1s4096h16d128c-bfloat16",
        "b1s4096h16d64f-float16",
        "b1s4096h16d64c-bfloat16",
        "b1s4096h16/2d256f-bfloat16",
        "b1s4096h16d256c-float16",
        "b1s4096h16/4d80cw1023cap50-float16",
        "b1s4096h16d128fw512x128-bfloat16",
        "b1s4096h16d192x128c-bfloat16",
        "b1s1x4096h16/2d128c-float16",
        "b1s4096h16d40fcap30-bfloat16-unaligned",
        "b1s4096h16d16x24c-float16",
        "b1s4096h16d128f-float8_e4m3fn",
        "b1s4096h16/4d64cw1023-float8_e4m3fn",
        "b1s4096h16d256ccap50-float8_e4m3fn",
    )
)
CLEAN = ("d64c", "d128f", "d128c", "d256c")
"""Problems whose default must not touch local memory."""

NAMES = sorted(name for name, t in installed().templates.items() if t.language == "cuda")


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to compile."""

    arch: str
    problem: Problem
    config: Config

    def __str__(self) -> str:
        return f"{self.arch} {self.problem.name} {self.config}"


# Which configs ----------------------------------------------------------------------------------


def accepted(template: Template) -> dict[str, list[Problem]]:
    """Arch -> the problems that a template takes there."""
    found = {
        arch: [p for p in problems(template) if template.refusal(p, gpu) is None]
        for arch, gpu in KNOWN_GPUS.items()
    }
    return {arch: taken for arch, taken in found.items() if taken}


def problems(template: Template) -> Iterator[Problem]:
    for problem in PROBLEMS:
        if problem.op == template.op:
            yield problem


def branches(template: Template, case: Case) -> tuple[set[object], set[object]]:
    """What a case shows: choices and traits, each of which is needed; and pairs of switches."""
    traits = case.problem.traits
    needed: set[object] = {(trait, traits[trait]) for trait in TRAITS}
    needed.add(("mask", case.problem.causal, case.problem.local))
    needed |= set(case.config.pairs)
    switches = [
        (name, case.config[name])
        for name, choices in template.tunables.items()
        if 1 < len(choices) <= 3
    ]
    return needed, set(itertools.combinations(switches, 2))


def candidates(template: Template, arch: str, taken: Iterable[Problem]) -> Iterator[Case]:
    """Every default, then a sample of what is feasible."""
    chance = random.Random(template.name)
    gpu = KNOWN_GPUS[arch]
    feasible = {problem: template.space(problem, gpu).configs for problem in taken}
    for problem in feasible:
        yield Case(arch, problem, template.default_config(problem, gpu))
    for problem, configs in feasible.items():
        for config in chance.sample(configs, min(len(configs), 250)):
            yield Case(arch, problem, config)


def cover(template: Template, cases: Sequence[Case], limit: int) -> list[Case]:
    """Cases that show all that is needed, and as many pairs as fit; greedily, first come first."""
    shown = {case: branches(template, case) for case in cases}
    needed = set().union(*(one for one, _ in shown.values()))
    pairs = set().union(*(two for _, two in shown.values()))
    chosen: list[Case] = []
    while needed or (pairs and len(chosen) < limit):
        best = max(
            shown, key=lambda case: 4 * len(shown[case][0] & needed) + len(shown[case][1] & pairs)
        )
        chosen.append(best)
        needed -= shown[best][0]
        pairs -= shown[best][1]
    return chosen


@cache
def cases_of(template: Template) -> list[Case]:
    """Everything that is compiled of a template."""
    every = accepted(template)
    home, *others = sorted(every, key=lambda arch: (arch not in template.name, arch))
    chosen = cover(template, list(candidates(template, home, every[home])), LIMIT)
    for arch in others:
        problem = every[arch][0]
        chosen.append(Case(arch, problem, template.default_config(problem, KNOWN_GPUS[arch])))
    return chosen


@cache
def clean_cases(template: Template) -> list[Case]:
    """Defaults of the plainest problems, on the arch that a template is made for."""
    every = accepted(template)
    home = min(every, key=lambda arch: (arch not in template.name, arch))
    gpu = KNOWN_GPUS[home]
    dtype = every[home][0].dtype
    plain = [Problem.parse(f"b1s4096h16{name}", dtype=dtype) for name in CLEAN]
    return [
        Case(home, problem, template.default_config(problem, gpu))
        for problem in plain
        if template.refusal(problem, gpu) is None
    ]


# Compiling --------------------------------------------------------------------------------------


def compile_all(template: Template, cases: Sequence[Case]) -> dict[Case, build.Artifact | str]:
    """Each case's artifact, or why there is none."""

    def compile_one(case: Case) -> build.Artifact | str:
        gpu = KNOWN_GPUS[case.arch]
        try:
            return build.compile_source(template.render(case.config, case.problem, gpu), gpu)
        except AutoflashError as error:
            return str(error)

    jobs = build.jobs_within_memory(settings.get().jobs, {"cuda"}, KNOWN_GPUS["sm90"])
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(cases, pool.map(compile_one, cases), strict=True))


def matrix_and_copy(template: Template, problem: Problem) -> tuple[set[str], set[str]]:
    """Of each set a kernel must have an instruction: products, and copies that run on their own."""
    if "sm90" in template.name:
        return {"HGMMA", "QGMMA"}, {"UTMALDG"}
    # 16 bytes at a time, which rows that are not aligned do not allow.
    return {"HMMA", "QMMA"}, {"LDGSTS"} if problem.aligned else set()


@pytest.mark.parametrize("name", NAMES)
def test_every_branch_compiles(name: str) -> None:
    template = installed().get(name)
    cases = cases_of(template)
    wrong = []
    for case, made in compile_all(template, cases).items():
        if isinstance(made, str):
            wrong.append(f"{case}: {made}")
            continue
        gpu, used = KNOWN_GPUS[case.arch], made.resources
        if reason := over_resources(used.to_dict(), gpu):
            wrong.append(f"{case}: {reason}")
        expected = template.derive(case.config, case.problem, gpu)["smem_bytes"]
        if used.smem_bytes is None or not expected <= used.smem_bytes <= expected + 1024:
            wrong.append(f"{case}: {used.smem_bytes} bytes of shared memory, {expected} declared")
        facts = json.loads((made.directory / "meta.json").read_text(encoding="utf-8"))
        warnings = [text for text in facts["warnings"] if "spilled" not in text]
        if warnings:
            wrong.append(f"{case}: {warnings[0]}")
        found = opcodes(made.directory / "kernel.so")
        wrong += [
            f"{case}: none of {', '.join(sorted(wanted))} in its code"
            for wanted in matrix_and_copy(template, case.problem)
            if wanted and not wanted & set(found)
        ]
    assert not wrong, f"{len(wrong)} findings in {len(cases)} kernels:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_keep_to_their_registers(name: str) -> None:
    template = installed().get(name)
    wrong = []
    for case, made in compile_all(template, clean_cases(template)).items():
        if isinstance(made, str):
            wrong.append(f"{case}: {made}")
            continue
        used, found = made.resources, opcodes(made.directory / "kernel.so")
        local = found["LDL"] + found["STL"]
        if local or used.spill_bytes or used.stack_bytes:
            wrong.append(
                f"{case}: {local} loads and stores of local memory, {used.spill_bytes} bytes "
                f"spilled, stack of {used.stack_bytes}"
            )
    assert not wrong, "\n".join(wrong)


# The cover itself -------------------------------------------------------------------------------


def test_the_cover_shows_every_choice_and_fits_the_limit() -> None:
    template = Catalog.load(Path(__file__).parents[1] / "data" / "naive").get("cuda/row")
    every = accepted(template)
    assert list(every) == list(KNOWN_GPUS)
    home = list(candidates(template, "sm80", every["sm80"]))
    chosen = cover(template, home, LIMIT)
    assert len(chosen) <= LIMIT
    for tunable, choices in template.tunables.items():
        assert {case.config[tunable] for case in chosen} == set(choices), tunable
    assert {case.problem.dtype for case in chosen} == {"float16", "bfloat16"}
    assert {case.problem.head_dim for case in chosen} == {p.head_dim for p in every["sm80"]}
    both = {(case.config["num_warps"], case.config["spread"]) for case in chosen}
    assert both == set(itertools.product((1, 2, 4), (False, True)))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compiled_names_every_arch(name: str) -> None:
    template = installed().get(name)
    assert {case.arch for case in cases_of(template)} == set(accepted(template))
    assert clean_cases(template)
