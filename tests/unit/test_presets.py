"""What the presets of models expand to."""

from __future__ import annotations

import pytest

from autoflash.errors import UnknownName
from autoflash.problem import ELEMENT_SIZES, Problem
from autoflash.workload import presets
from autoflash.workload.presets import CPU, GPU


@pytest.mark.parametrize("name", presets.installed())
def test_every_preset_expands(name: str) -> None:
    preset = presets.get(name)
    assert preset.source
    assert preset.attention
    for usual in (GPU, CPU):
        found = preset.problems(usual, dtypes=list(ELEMENT_SIZES))
        assert len(found) == len(set(found)) >= len(ELEMENT_SIZES)
        assert all(problem.flops for problem in found)
        assert all(preset.asks_for(problem) for problem in found)
        for problem in found:
            assert problem.seqlen_k <= (preset.context or problem.seqlen_k) or not problem.causal


def test_the_models_that_were_promised_are_there() -> None:
    promised = (
        "llama3-8b llama3-70b llama3-405b qwen3-8b qwen2.5-7b mistral-7b gemma2-9b gemma3-27b "
        "gpt2 deepseek-v3 phi-3-mini phi-4 vit-l sd3 flux-dev"
    )
    assert set(promised.split()) <= set(presets.installed())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The window of 4096 keys holds a row's own: 4095 before it.
        ("mistral-7b", "b4s8192h32/8d128cw4095"),
        ("gemma2-9b", "b4s8192h16/8d256cw4095cap50 b4s8192h16/8d256ccap50"),
        ("gemma3-27b", "b4s8192h32/16d128cw1023 b4s8192h32/16d128c"),
        ("deepseek-v3", "b4s8192h128d192x128c"),
        ("gpt2-xl", "b4s8192h25d64c"),
        ("phi-3-mini", "b4s8192h32d96cw2046"),
    ],
)
def test_the_layers_of_a_model(name: str, expected: str) -> None:
    found = presets.get(name).problems(GPU, batches=[4], seqlens=[8192])
    assert found == [Problem.parse(each) for each in expected.split()]


def test_lengths_end_where_the_context_does() -> None:
    def lengths(name: str) -> list[tuple[int, int, int]]:
        found = presets.get(name).problems(GPU)
        return [(p.batch, p.seqlen_q, p.seqlen_k) for p in found]

    assert lengths("gpt2") == [(16, 1024, 1024), (8, 1, 1024)]
    assert lengths("bert-large") == [(32, 512, 512)]  # shorter than any usual length
    assert lengths("llama3.1-8b") == [
        (16, 1024, 1024), (4, 4096, 4096), (1, 16384, 16384), (8, 1, 8192)
    ]  # fmt: skip
    assert (8, 1, 8192) not in lengths("deepseek-v3")  # it decodes otherwise


def test_layers_of_fixed_lengths_keep_them() -> None:
    found = [p.name for p in presets.get("sdxl").problems(GPU)]
    assert found == [
        "b4s4096h10/10d64f-bfloat16", "b4s4096x77h10/10d64f-bfloat16",
        "b16s1024h20/20d64f-bfloat16", "b16s1024x77h20/20d64f-bfloat16",
    ]  # fmt: skip


def test_equal_layers_are_one_problem() -> None:
    # A window of 1024 hides nothing of 1024 keys.
    assert len(presets.get("gemma3-4b").problems(GPU, seqlens=[1024])) == 1
    assert len(presets.get("gemma3-4b").problems(GPU, seqlens=[1025])) == 2


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown preset 'quen3-8b'\. Did you mean 'qwen3-8b'"):
        presets.get("quen3-8b")
