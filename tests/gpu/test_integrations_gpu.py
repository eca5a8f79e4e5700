"""Integrations on the CUDA device found here: models of transformers, code for flash-attn 2.

Kernels are those of templates/triton, which are built in seconds: what is asked here is whether
calls reach kernels, and the right ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from autoflash import device as devices
from autoflash.codegen.catalog import Catalog, installed
from autoflash.compat import flash_attn
from autoflash.errors import UnsupportedProblem
from autoflash.runtime import fallback, serving
from autoflash.runtime.dispatch import Dispatcher

pytestmark = pytest.mark.gpu

PLACE, DTYPE = "cuda", torch.bfloat16
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's kernels serve, and PyTorch does not."""

    def no_torch(*_: Any, **__: Any) -> None:
        raise AssertionError("PyTorch served")

    monkeypatch.setattr(fallback, "attention", no_torch)
    serving.reset()
    catalog = installed()
    triton = {name: t for name, t in catalog.templates.items() if name.startswith("triton/")}
    serving.use(PLACE, 0, Dispatcher(devices.native(), [], Catalog(catalog.root, triton)))
    yield
    serving.reset()


@pytest.mark.parametrize("padding", [0, 37])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_model_in_bfloat16(monkeypatch: pytest.MonkeyPatch, kind: str, padding: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs autoflash[frameworks]")
    from autoflash.integrations import transformers_attention
    from autoflash.integrations.transformers import register_transformers

    calls: list[tuple[int, int, Any]] = []
    attention = transformers_attention.attention

    def count(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        calls.append((q.shape[0], q.shape[1], options["window_size"]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(transformers_attention, "attention", count)
    torch.manual_seed(0)
    config = (
        transformers.LlamaConfig(**SIZES)
        if kind == "llama"
        else transformers.MistralConfig(**SIZES, sliding_window=50)
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(PLACE, DTYPE).eval()
    tokens = torch.randint(3, 128, (3, 150), device=PLACE)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0

    def logits(implementation: str, ids: Tensor, seen: Tensor) -> Tensor:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(ids, attention_mask=seen).logits.double()

    counted = mask.bool()
    with register_transformers():
        model.to(torch.float32)
        exact = logits("eager", tokens, mask)[counted]
        model.to(DTYPE)
        theirs, ours = (logits(name, tokens, mask)[counted] for name in ("sdpa", "auto_fa"))
        window = None if kind == "llama" else (49, 0)
        rows = [(3, 150)] if not padding else [(1, 150 - padding), (2, 150)]
        assert calls == [(*each, window) for each in rows] * 2
        limit = 2 * (theirs - exact).abs().max() + 1e-3
        assert (ours - exact).abs().max() <= limit
        calls.clear()
        made = model.generate(
            tokens, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False
        )
        assert len(calls) >= 2 * (len(rows) + (0 if padding else 11))
        # Each token is one that PyTorch, too, finds best, or as good as rounding can tell.
        seen = torch.nn.functional.pad(mask, (0, 12), value=1)
        scores = logits("sdpa", made, seen)[:, 149:-1]
        scores[..., 2] = -torch.inf  # the end was not allowed
        chosen = scores.gather(2, made[:, 150:, None])[..., 0]
        assert (scores.max(dim=2).values - chosen).max() <= 2 * limit


def test_packed_sequences() -> None:
    torch.manual_seed(0)
    lengths = [200, 200, 0, 33, 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q = torch.randn(sum(lengths), 4, 64, device=PLACE, dtype=DTYPE)
    k, v = (torch.randn(sum(lengths), 2, 64, device=PLACE, dtype=DTYPE) for _ in range(2))
    cu = bounds.to(PLACE, torch.int32)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, cu, cu, 200, 200, causal=True, return_attn_probs=True
    )
    assert lse.shape == (4, len(q))
    for start, stop in itertools.pairwise(bounds.tolist()):
        if start == stop:
            continue
        one = [x[None, start:stop].float().transpose(1, 2) for x in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *one, is_causal=True, enable_gqa=True
        )
        found = out[start:stop].float().transpose(0, 1)
        torch.testing.assert_close(found, wanted[0], atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_packed_sequences_are_not_captured() -> None:
    x = torch.randn(8, 2, 64, device=PLACE, dtype=DTYPE)
    cu = torch.tensor([0, 8], device=PLACE, dtype=torch.int32)
    flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, 8, 8)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(UnsupportedProblem, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(graph),
    ):
        flash_attn.flash_attn_varlen_func(x, x, x, cu, cu, 8, 8)
    batch = x[None]
    flash_attn.flash_attn_func(batch, batch, batch)  # chooses and builds
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        out = flash_attn.flash_attn_func(batch, batch, batch)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, flash_attn.flash_attn_func(batch, batch, batch))
