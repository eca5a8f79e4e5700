"""Does triton/fwd compile for every architecture, without spilling and as its model says?

The model is what decides, before anything is compiled, which configs are worth it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import pytest

from autoflash import build, settings
from autoflash.codegen.catalog import installed
from autoflash.config import Config
from autoflash.device import KNOWN_GPUS
from autoflash.errors import AutoflashError
from autoflash.problem import Problem

pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytestmark = pytest.mark.compile

SLIGHT_SPILL_BYTES = 64
"""What a default may spill per thread: a few values outside the loop."""

# Every arch, dtype, padded and split head_dim, mask, softcap, decoding, unaligned: no product.
DEFAULTS = [
    ("sm80", "b1s4096h16d128c"),
    ("sm80", "b1s4096h16d96f-float16"),
    ("sm80", "b1s4096h16d256c"),
    ("sm80", "b1s4096h16d128c-float32"),
    ("sm86", "b1s4096h16d64c"),
    ("sm86", "b1s1x4096h16/2d128c-float16"),
    ("sm86", "b1s4096h16d256f-float32"),
    ("sm89", "b1s4096h16d80c"),
    ("sm89", "b1s4096h16d192x128c-float16"),
    ("sm90", "b1s4096h16d64f-float16"),
    ("sm90", "b1s4096h16d128c"),
    ("sm90", "b1s4096h16d256c"),
    ("sm90", "b1s4096h16d192x128c"),
    ("sm90", "b1s4096h16d40c"),
    ("sm90", "b1s4096h16d128c-bfloat16-unaligned"),
    ("sm90", "b1s1x4096h16/2d256c"),
    ("sm90", "b1s4096h16d64c-float32"),
    ("sm100", "b1s4096h16d128c"),
    ("sm100", "b1s4096h16d256f-float16"),
    ("sm100", "b1s4096h16d16c-float32"),
    ("sm120", "b1s4096h16d128f"),
    ("sm120", "b1s4096h16d152c-float16"),
    ("sm80", "b1s4096h16d128cw1023cap50-float16"),
    ("sm80", "b1s4096h16d64fw512x128-float32"),
    ("sm86", "b1s1x4096h16/2d128cw1023cap50"),
    ("sm89", "b1s4096h16d80fw512x128cap30"),
    ("sm90", "b1s4096h16d64fw512x128cap30"),
    ("sm90", "b1s4096h16d128cw1023cap50"),
    ("sm90", "b1s4096h16d128fwinfx512"),
    ("sm90", "b1s4096h16d256cw1023cap50"),
    ("sm90", "b1s4096h16d128cw1023cap50-float32"),
    ("sm90", "b1s4096h16d128cw1023-bfloat16-unaligned"),
    ("sm100", "b1s4096h16d128ccap50"),
    ("sm120", "b1s4096h16d128fw512x128cap30"),
    # Few tiles, whose keys are shared out.
    ("sm80", "b1s8x8192h32/8d128c"),
    ("sm80", "b1s9x8192h8/2d64c-float32"),
    ("sm86", "b1s256x8192h8/1d128f"),
    ("sm90", "b1s8x8192h32/8d128c"),
    ("sm90", "b1s1x8192h8d128f-float16"),
    ("sm90", "b4s1x8192h32/8d64c"),
    ("sm90", "b1s2x8192h32/8d128cw1023cap50"),
    ("sm90", "b1s2x8192h32/8d128cw1023"),
    ("sm90", "b1s2x8192h32/8d96c"),
    ("sm90", "b4s1x8192h16/2d256c"),
    ("sm90", "b1s8x8192h32/8d256cw1023cap50"),
    ("sm90", "b1s256x8192h8/1d128c"),
    ("sm90", "b2s256x8192h8/2d64fcap50"),
    ("sm90", "b1s256x8192h8/1d256c"),
    ("sm90", "b1s1x8192h8d96f-bfloat16-unaligned"),
    ("sm100", "b1s8x8192h32/8d128c"),
    ("sm120", "b1s256x8192h8/1d64fw512x128"),
]


TEMPLATE = installed().get("triton/fwd")
Case = tuple[str, Problem, Config]


def default(arch: str, name: str) -> Case:
    problem = Problem.parse(name)
    return arch, problem, TEMPLATE.default_config(problem, KNOWN_GPUS[arch])


def masked(head_dim: int, mask: str) -> Case:
    return default("sm90", f"b1s4096h16d{head_dim}{mask}")


@cache
def admitted(arch: str, name: str) -> list[Case]:
    """Three of the configs that the model lets through."""
    problem = Problem.parse(name)
    space = TEMPLATE.space(problem, KNOWN_GPUS[arch])
    return [(arch, problem, config) for config in random.Random(name).sample(space.configs, 3)]


def made(arch: str, problem: Problem, config: Config) -> build.Artifact:
    device = KNOWN_GPUS[arch]
    return build.compile_source(TEMPLATE.render(config, problem, device), device)


@pytest.fixture(scope="module", autouse=True)
def _made_ahead(request: pytest.FixtureRequest) -> None:
    """Compile what the chosen tests need, as much at once as there are cores; they find it then.

    A compiler is a process of its own on one core: one after the other, they leave the rest idle.
    """
    cases: list[Case] = []
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            cases += COMPILED.get(item.originalname, lambda **_: [])(**given)

    def make(case: Case) -> None:
        with suppress(AutoflashError):  # its test meets it again
            made(*case)

    with ThreadPoolExecutor(settings.get().jobs) as pool:
        list(pool.map(make, cases))


@pytest.mark.parametrize(("arch", "name"), DEFAULTS)
def test_the_default_compiles_and_fits(arch, name):
    device, (_, problem, config) = KNOWN_GPUS[arch], default(arch, name)
    resources = made(arch, problem, config).resources
    assert resources.spill_bytes <= SLIGHT_SPILL_BYTES, config
    assert resources.smem_bytes <= device.smem_bytes_per_block, config
    assert resources.registers * resources.num_threads <= device.registers_per_sm, config


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["c", "f", "cw1023", "fw512x128cap30"])
def test_ptxas_overlaps_the_matrix_products_of_the_default(head_dim, mask):
    artifact = made(*masked(head_dim, mask))
    assert json.loads((artifact.directory / "meta.json").read_text())["warnings"] == []


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("sm80", "b1s4096h16/4d64c"),
        ("sm80", "b1s4096h16d128f"),
        ("sm90", "b1s4096h16d64f"),
        ("sm90", "b1s4096h16/4d128c"),
        ("sm90", "b1s4096h16d256c"),
        ("sm90", "b1s4096h16d96f"),
        ("sm80", "b1s4096h16/4d128cw1023cap50"),
        ("sm90", "b1s4096h16/4d128cw1023cap50"),
        ("sm90", "b1s4096h16d64fw512x128"),
        ("sm90", "b1s1x8192h32/8d128c"),
        ("sm90", "b1s8x8192h32/8d64c"),
    ],
)
def test_what_the_model_admits_compiles_and_fits(arch, name):
    for _, problem, config in admitted(arch, name):
        resources = made(arch, problem, config).resources
        predicted = TEMPLATE.derive(config, problem, KNOWN_GPUS[arch])["smem_bytes"]
        assert resources.smem_bytes <= predicted <= resources.smem_bytes * 1.2 + 4096, config
        assert resources.spill_bytes <= 512, config


COMPILED: dict[str, Callable[..., list[Case]]] = {
    "test_the_default_compiles_and_fits": lambda arch, name: [default(arch, name)],
    "test_ptxas_overlaps_the_matrix_products_of_the_default": lambda head_dim, mask: [
        masked(head_dim, mask)
    ],
    "test_what_the_model_admits_compiles_and_fits": admitted,
}
"""Test -> what it compiles, by its parameters."""


@pytest.mark.parametrize("arch", KNOWN_GPUS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_head_dim_has_a_feasible_default(arch, dtype):
    device = KNOWN_GPUS[arch]
    for head_dim in range(16, 257, 8):
        for head_dim_v in {head_dim, 64, 256}:
            for seqlen_q, group in ((1, 1), (1, 8), (8, 8), (4096, 1)):
                for aligned in (True, False):
                    problem = Problem(
                        dtype=dtype, batch=1, seqlen_q=seqlen_q, seqlen_k=4096, num_heads=8,
                        num_kv_heads=8 // group, head_dim=head_dim, head_dim_v=head_dim_v,
                        causal=True, aligned=aligned,
                    )  # fmt: skip
                    config = TEMPLATE.default_config(problem, device)
                    assert TEMPLATE.broken(config, problem, device) is None, (problem, config)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("sm90", "b4s4096h16d128c"),
        ("sm90", "b4s4096h32d64f"),
        ("sm90", "b4s4096h16d128cw1023cap50"),
        ("sm80", "b4s4096h16d128c"),
        ("sm90", "b1s256x131072h8/1d128c"),
        ("sm90", "b1s1x32768h32/8d128c"),
        ("sm90", "b4s1x8192h16/2d256c"),
        ("sm80", "b1s1x32768h32/8d128c"),
    ],
)
def test_the_space_can_be_swept(arch, name):
    space = TEMPLATE.space(Problem.parse(name), KNOWN_GPUS[arch])
    assert 20 <= len(space) <= 300
