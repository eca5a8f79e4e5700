"""Does the context manager serve what it can, leave the rest to PyTorch, and leave no trace?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoflash.integrations import route_sdpa, sdpa
from autoflash.runtime import fallback, serving

# Parts of PyTorch warn of themselves when they are imported.
IMPORTS_TORCHSCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
PLAIN = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What autoflash serves is served by its kernels, or the test fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("PyTorch served a call that was to be autoflash's")

    serving.reset()
    monkeypatch.setattr(fallback, "attention", refuse)
    yield
    serving.reset()
    assert F.scaled_dot_product_attention is PLAIN
    assert mha.get_fastpath_enabled()


_numbers = torch.Generator().manual_seed(0)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_numbers)


def qkv(
    *sizes: int, seqlen_k: int = 0, kv_heads: int = 0, dim_v: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; sizes are (..., num_heads, seqlen, head_dim)."""
    *batch, heads, seqlen, dim = sizes
    keys = (*batch, kv_heads or heads, seqlen_k or seqlen)
    return some(*sizes), some(*keys, dim), some(*keys, dim_v or dim)


# Calls ------------------------------------------------------------------------------------------

SERVED = {
    "plain": (qkv(2, 3, 17, 16), {}),
    "causal": (qkv(2, 3, 17, 16), {"is_causal": True}),
    "more keys, top-left": (qkv(1, 2, 9, 16, seqlen_k=25), {"is_causal": True}),
    "more rows, top-left": (qkv(1, 2, 25, 16, seqlen_k=9), {"is_causal": True}),
    "cross": (qkv(1, 2, 9, 16, seqlen_k=25), {}),
    "grouped": (qkv(2, 6, 17, 16, kv_heads=2), {"enable_gqa": True}),
    "scale": (qkv(2, 3, 17, 16), {"scale": 0.5, "attn_mask": None, "dropout_p": 0.0}),
    "other values": (qkv(2, 3, 17, 16, dim_v=24), {}),
    "two dimensions": (tuple(x[0, 0] for x in qkv(1, 1, 17, 16)), {"is_causal": True}),
    "three dimensions": (tuple(x[0] for x in qkv(1, 3, 17, 16)), {}),
    "five dimensions": (qkv(2, 2, 3, 17, 16), {"is_causal": True}),
    "packed, five dimensions": (some(2, 2, 17, 3, 3, 16).permute(3, 0, 1, 4, 2, 5).unbind(0), {}),
    "packed": (some(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0), {"is_causal": True}),
}


@pytest.mark.parametrize("name", SERVED)
def test_calls_that_autoflash_serves(name: str) -> None:
    tensors, options = SERVED[name]
    expected = PLAIN(*tensors, **options)
    with route_sdpa() as routed:
        got = F.scaled_dot_product_attention(*tensors, **options)
    assert (routed.served, routed.left) == (1, {})
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    if name.startswith("packed"):  # rows in memory as in the query's, so that no copy is needed
        assert got.transpose(-3, -2).is_contiguous()


def test_autocast_decides_the_dtype_as_it_does_for_pytorch() -> None:
    tensors = qkv(1, 2, 17, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = PLAIN(*tensors)
        with route_sdpa() as routed:
            got = F.scaled_dot_product_attention(*tensors)
    assert routed.served == 1
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)


def grown() -> tuple[Tensor, ...]:
    return tuple(x.requires_grad_() for x in qkv(1, 2, 17, 16))


LEFT = {
    "attn_mask": (qkv(1, 2, 9, 16), {"attn_mask": torch.ones(9, 9).tril().bool()}),
    "dropout_p": (qkv(1, 2, 9, 16), {"dropout_p": 0.5}),
    "scale": (qkv(1, 2, 9, 16), {"scale": torch.tensor(0.5)}),
    "gradients": (grown(), {"is_causal": True}),
    "dtype": (tuple(x.double() for x in qkv(1, 2, 9, 16)), {}),
    "shapes": (qkv(1, 4, 9, 16, kv_heads=1), {}),
    "strides": (tuple(x.mT for x in qkv(1, 2, 16, 9)), {}),
    "device": (tuple(x.to("meta") for x in qkv(1, 2, 9, 16)), {}),
}


@pytest.mark.parametrize("reason", LEFT)
def test_calls_that_stay_with_pytorch(reason: str) -> None:
    tensors, options = LEFT[reason]
    torch.manual_seed(0)
    expected = PLAIN(*tensors, **options)
    torch.manual_seed(0)
    with route_sdpa() as routed:
        got = F.scaled_dot_product_attention(*tensors, **options)
    assert (routed.served, routed.left) == (0, {reason: 1})
    assert got.is_meta or torch.equal(got, expected)
    assert got.requires_grad == (reason == "gradients")


@IMPORTS_TORCHSCRIPT
def test_forward_mode_gradients_stay_with_pytorch() -> None:
    q, k, v = qkv(1, 2, 9, 16)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), route_sdpa() as routed:
        got = F.scaled_dot_product_attention(forward_ad.make_dual(q, some(1, 2, 9, 16)), k, v)
        assert forward_ad.unpack_dual(got).tangent is not None
    assert (routed.served, routed.left) == (0, {"gradients or tracing": 1})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_and_subclasses_stay_with_pytorch() -> None:
    nested = torch.nested.nested_tensor([some(2, 5, 16), some(2, 9, 16)])

    class Own(Tensor):
        pass

    own = some(1, 2, 9, 16).as_subclass(Own)
    with torch.inference_mode(), route_sdpa() as routed:
        got = F.scaled_dot_product_attention(nested, nested, nested)
        assert type(F.scaled_dot_product_attention(own, own, own)) is Own
    assert (routed.served, routed.left) == (0, {"nested tensor or subclass": 2})
    assert got.is_nested


def test_mistakes_get_pytorchs_own_words() -> None:
    q, k, v = qkv(1, 4, 9, 16)
    for bad in ((q, k[..., :8], v), (q, k[:, :3], v), (q, k.bfloat16(), v), (q, k, None)):
        with pytest.raises((RuntimeError, TypeError)) as plain:
            PLAIN(*bad)
        with route_sdpa(), pytest.raises((RuntimeError, TypeError)) as ours:
            F.scaled_dot_product_attention(*bad)
        assert type(ours.value) is type(plain.value)
        assert str(ours.value) == str(plain.value)


# Models -----------------------------------------------------------------------------------------


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@torch.inference_mode()
def test_a_transformer_encoder_runs_through_it_although_it_has_a_fast_path() -> None:
    model, x = encoder(), some(2, 17, 32)
    expected = model(x)
    with route_sdpa() as routed:
        got = model(x)
        assert (routed.served, routed.left) == (2, {})
        causal = nn.Transformer.generate_square_subsequent_mask(17)
        model(x, mask=causal, is_causal=True)
        assert (routed.served, routed.left) == (4, {})
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_padded_batch_is_masked_and_so_stays_with_pytorch() -> None:
    model, x = encoder(), some(2, 17, 32)
    padded = torch.zeros(2, 17, dtype=torch.bool)
    padded[0, 11:] = True
    expected = model(x, src_key_padding_mask=padded)
    with route_sdpa() as routed:
        got = model(x, src_key_padding_mask=padded)
    assert (routed.served, routed.left) == (0, {"attn_mask": 2})
    torch.testing.assert_close(got[~padded], expected[~padded], rtol=0, atol=1e-5)


def test_training_stays_with_pytorch() -> None:
    model, x = encoder().train(), some(2, 17, 32)
    with route_sdpa() as routed:
        model(x).sum().backward()
    assert (routed.served, routed.left) == (0, {"dropout_p": 2})


@torch.inference_mode()
def test_multihead_attention_runs_through_it_unless_it_returns_weights() -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(32, 2, batch_first=True).eval(), some(2, 17, 32)
    expected, _ = layer(x, x, x, need_weights=False)
    with route_sdpa() as routed:
        got, _ = layer(x, x, x, need_weights=False)
        assert routed.served == 1
        layer(x, x, x, need_weights=True)  # is computed without F.scaled_dot_product_attention
        assert (routed.served, routed.left) == (1, {})
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


class Vision(nn.Module):
    """Attention as vision transformers have it: one projection, permuted views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, rows, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.proj(out.transpose(1, 2).reshape(batch, rows, width))


@IMPORTS_TORCHSCRIPT
@torch.inference_mode()
def test_compiled_code_follows_the_context() -> None:
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    model, x = Vision().eval(), some(2, 17, 32)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = model(x)
    with route_sdpa():
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
        assert any("autoflash.fwd" in target for target in graphs[-1])
        compiled(x)
        assert len(graphs) == 1
        with route_sdpa():
            compiled(x)
    assert len(graphs) == 1
    assert torch.equal(compiled(x), expected)
    assert len(graphs) == 2
    assert not any("autoflash" in target for target in graphs[-1])


@IMPORTS_TORCHSCRIPT
@torch.inference_mode()
def test_what_compilers_keep_as_one_call_stays_with_pytorch() -> None:
    # Their caches know such a call by its name, so that inside it nothing may depend on a context.
    torch._dynamo.reset()
    model, x = encoder(), some(2, 17, 32)
    expected = model(x)
    anew = torch._functorch.config.patch(enable_autograd_cache=False)
    with anew, route_sdpa() as routed:
        got = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert routed.served == 0
    assert not serving.prepared


# The context ------------------------------------------------------------------------------------


def test_contexts_nest_and_an_exception_closes_one() -> None:
    q = some(1, 2, 9, 16)
    with route_sdpa() as outer:
        F.scaled_dot_product_attention(q, q, q)
        with pytest.raises(RuntimeError), route_sdpa() as inner:
            F.scaled_dot_product_attention(q, q[..., :8], q)
        assert F.scaled_dot_product_attention is not PLAIN
        F.scaled_dot_product_attention(q, q, q)
    assert (outer.served, outer.left) == (2, {"shapes": 1})
    assert (inner.served, inner.left) == (0, {"shapes": 1})
    assert F.scaled_dot_product_attention is PLAIN


def test_contexts_may_close_in_the_order_in_which_they_opened() -> None:
    q, first, second = some(1, 2, 9, 16), route_sdpa(), route_sdpa()
    first.__enter__()
    routed = second.__enter__()
    first.__exit__(None, None, None)
    F.scaled_dot_product_attention(q, q, q)
    second.__exit__(None, None, None)
    assert routed.served == 1
    assert F.scaled_dot_product_attention is PLAIN
    assert not sdpa._here.active


def test_it_decorates() -> None:
    seen = []

    @route_sdpa()
    def call() -> None:
        seen.append(F.scaled_dot_product_attention is not PLAIN)

    call()
    call()
    assert seen == [True, True]


def test_only_threads_that_opened_a_context_are_routed() -> None:
    q = some(1, 2, 9, 16)
    ready, opened, done = threading.Event(), threading.Event(), threading.Event()
    of_thread = []

    def other() -> None:
        with route_sdpa() as routed:
            F.scaled_dot_product_attention(q, q, q)
            opened.set()
            assert ready.wait(30)
            F.scaled_dot_product_attention(q, q, q)
        of_thread.append(routed.served)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert opened.wait(30)
    assert F.scaled_dot_product_attention is not PLAIN
    expected = PLAIN(q, q, q)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)  # not routed here
    with route_sdpa() as routed:
        ready.set()
        assert done.wait(30)
        assert F.scaled_dot_product_attention is not PLAIN  # though the other has left
        F.scaled_dot_product_attention(q, q, q)
    thread.join()
    assert (routed.served, of_thread) == (1, [2])


def test_what_others_put_in_the_same_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    q, calls = some(1, 2, 9, 16), []

    def below(*arguments: Any, **options: Any) -> Tensor:
        calls.append("below")
        return PLAIN(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", below)
        with route_sdpa() as routed:
            F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(9, 9).bool())
            ours = F.scaled_dot_product_attention

            def above(*arguments: Any, **options: Any) -> Tensor:
                calls.append("above")
                return ours(*arguments, **options)

            F.scaled_dot_product_attention = above
            F.scaled_dot_product_attention(q, q, q)
        assert F.scaled_dot_product_attention is above
        F.scaled_dot_product_attention(q, q, q)
        assert (routed.served, routed.left) == (1, {"attn_mask": 1})
        assert calls == ["below", "above", "above", "below"]
        with route_sdpa() as again:  # reached through what is above it
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
        assert (again.left, calls[4:]) == ({"dropout_p": 1}, ["above", "below"])
        F.scaled_dot_product_attention = below
        with route_sdpa() as last:
            F.scaled_dot_product_attention(q, q, q)
        assert (last.served, calls[6:]) == (1, [])
