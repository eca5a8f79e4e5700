"""What AUTOFLASH_RECORD counts on the CUDA device found here: calls, and captures of graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autoflash
from autoflash import settings
from autoflash.problem import Problem
from autoflash.runtime import serving
from autoflash.workload import listing

pytestmark = pytest.mark.gpu


def test_a_graph_is_counted_when_it_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ran.txt"
    monkeypatch.setenv("AUTOFLASH_RECORD", str(file))
    settings.get.cache_clear()
    serving.reset()
    q = torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.float16)
    for _ in range(3):
        expected = autoflash.attention(q, q, q, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = autoflash.attention(q, q, q, causal=True)
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    serving.reset()  # writes what there is
    monkeypatch.undo()
    settings.get.cache_clear()
    assert listing.read(file) == {Problem.parse("b2s300h4d64c-float16"): 4}
