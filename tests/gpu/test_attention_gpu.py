"""autoflash.attention on the CUDA device found here, by whatever kernels the templates give.

Warnings are errors in this suite, so a call that PyTorch had to serve fails its test unless that
is what the test expects.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import autoflash
from autoflash.codegen import catalog
from autoflash.problem import Problem
from autoflash.runtime import request, serving
from autoflash.tuning import formula

pytestmark = pytest.mark.gpu

# Inductor imports parts of PyTorch that warn of themselves.
IMPORTS_TORCHSCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    serving.reset()
    yield
    serving.reset()


def tensors(
    seqlen_q: int = 200,
    seqlen_k: int = 333,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    dim_v: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
    device: str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeded q, k, v in layout "bshd"."""
    torch.manual_seed(0)
    shapes = ((seqlen_q, heads, dim), (seqlen_k, kv_heads, dim), (seqlen_k, kv_heads, dim_v or dim))
    q, k, v = (torch.randn(batch, *shape, device=device).to(dtype) for shape in shapes)
    return q, k, v


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    dtype: torch.dtype,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (batch, seqlen, heads, dim) and lse (batch, heads, seqlen), computed in `dtype`."""
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    columns = torch.arange(k.shape[1], device=q.device)
    left, right = window[0], 0 if causal else window[1]
    if left is not None:
        scores = scores.masked_fill(columns < places - left, -math.inf)
    if right is not None:
        scores = scores.masked_fill(columns > places + right, -math.inf)
    lse = torch.logsumexp(scores.float() if dtype.itemsize < 4 else scores, -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def assert_agrees(
    got: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
) -> None:
    """The FlashAttention rule: at most twice the error of PyTorch in the same precision."""
    exact, exact_lse = by_definition(q, k, v, causal=causal, dtype=torch.float64)
    same, _ = by_definition(q, k, v, causal=causal, dtype=q.dtype)
    error = (got[0].double() - exact).abs().max()
    limit = 2 * (same.double() - exact).abs().max() + 8 * torch.finfo(q.dtype).eps
    assert error <= limit, f"error {error:.3g} above {limit:.3g}"
    torch.testing.assert_close(got[1].double(), exact_lse.double(), atol=1e-4, rtol=1e-4)


def rule_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, **options: Any
) -> str:
    problem = request.problem_of(q, k, v, causal=causal, layout="bshd", **options)
    return serving.dispatcher("cuda", q.device.index).serve(problem).rule


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim", "dim_v"),
    [
        (torch.bfloat16, 64, 64),
        (torch.bfloat16, 128, 128),
        (torch.float16, 128, 128),
        (torch.float16, 96, 64),
        (torch.bfloat16, 256, 256),
        (torch.float32, 64, 64),
    ],
)
def test_dtypes_and_head_dims(
    dtype: torch.dtype, dim: int, dim_v: int, causal: bool, layout: str
) -> None:
    q, k, v = tensors(dim=dim, dim_v=dim_v, dtype=dtype)
    given = (q, k, v)
    if layout == "bhsd":
        given = tuple(tensor.transpose(1, 2).contiguous() for tensor in given)  # type: ignore[assignment]
    for _ in range(2):
        out, lse = autoflash.attention(*given, causal=causal, return_lse=True, layout=layout)
        assert out.is_contiguous()
        assert out.dtype == dtype
        out = out.transpose(1, 2) if layout == "bhsd" else out
        assert_agrees((out, lse), q, k, v, causal=causal)
    assert rule_of(q, k, v, causal) in ("exact", "bucket", "default")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [(1, 1), (1, 4097), (97, 1), (113, 203), (203, 113), (1024, 1023), (512, 512)],
)
def test_lengths_and_masked_rows(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    q, k, v = tensors(seqlen_q, seqlen_k)
    out, lse = autoflash.attention(q, k, v, causal=causal, return_lse=True)
    assert_agrees((out, lse), q, k, v, causal=causal)
    hidden = max(seqlen_q - seqlen_k, 0) if causal else 0
    assert torch.equal(out[:, :hidden], torch.zeros_like(out[:, :hidden]))
    assert torch.isneginf(lse[:, :, :hidden]).all()


def assert_exact(
    got: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> None:
    """The FlashAttention rule, at three times the error with a softcap, against the formula."""
    exact, exact_lse = formula.exact(
        q, k, v, causal=causal, window_left=window[0], window_right=window[1], softcap=softcap
    )
    same, _ = by_definition(q, k, v, causal=causal, dtype=q.dtype, window=window, softcap=softcap)
    error = (got[0].double() - exact).abs().max()
    limit = (3 if softcap else 2) * (same.double() - exact).abs().max()
    limit += 8 * torch.finfo(q.dtype).eps
    assert error <= limit, f"error {error:.3g} above {limit:.3g}"
    # The hardware's tanh is good to 2**-11 of its value.
    tolerance = 1e-4 + softcap * 2.0**-11
    torch.testing.assert_close(got[1].double(), exact_lse, atol=tolerance, rtol=1e-4)


WINDOWS = [(None, None), (0, 0), (65, 0), (100, 31), (None, 7), (40, None), (3000, 3000)]


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 64)])
def test_windows_and_softcaps(
    dtype: torch.dtype, dim: int, window: tuple[int | None, int | None], softcap: float
) -> None:
    for seqlen_q, seqlen_k in ((200, 333), (333, 200), (1, 500), (512, 512)):
        q, k, v = tensors(seqlen_q, seqlen_k, dim=dim, dtype=dtype)
        q = q * 4  # scores that a softcap bends
        for causal in (False, True):
            options: dict[str, Any] = {"window_size": window, "softcap": softcap}
            for _ in range(2):
                result = autoflash.attention(q, k, v, causal=causal, **options, return_lse=True)
                assert_exact(result, q, k, v, causal=causal, window=window, softcap=softcap)
            assert rule_of(q, k, v, causal, **options) != "torch"


def test_a_window_in_a_cuda_graph() -> None:
    q, k, v = tensors(300, 300)
    options: dict[str, Any] = {"causal": True, "window_size": (77, 0), "softcap": 20.0}
    autoflash.attention(q, k, v, **options, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = autoflash.attention(q, k, v, **options, return_lse=True)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert_exact(result, q, k, v, causal=True, window=(77, 0), softcap=20.0)


@pytest.mark.parametrize("window", [(None, None), (40, 0), (9, 17)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_gradients_under_windows_and_softcaps(
    window: tuple[int | None, int | None], softcap: float
) -> None:
    inputs = tensors(90, 130, dtype=torch.float32)
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
    with pytest.warns(RuntimeWarning, match="no backward kernels yet"):
        out = autoflash.attention(q, k, v, window_size=window, softcap=softcap)
    into = torch.randn_like(out)
    out.backward(into)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    wanted, _ = by_definition(
        exact[0], exact[1], exact[2],
        causal=False, dtype=torch.float64, window=window, softcap=softcap,
    )  # fmt: skip
    wanted.backward(into.double())
    for got, reference in zip((q, k, v), exact, strict=True):
        assert got.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(got.grad.double(), reference.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options", [{"softcap": 20.0}, {"window_size": (255, 0)}, {"window_size": (None, 100)}]
)
def test_what_pytorch_serves_takes_bounded_memory(options: dict[str, Any]) -> None:
    # All scores of float32 would be 8 GiB, and there would be several arrays of them.
    q, k, v = (
        x.requires_grad_()
        for x in tensors(16384, 16384, heads=8, kv_heads=2, dtype=torch.float32, batch=1)
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with pytest.warns(RuntimeWarning, match="no backward kernels yet"):
        out, lse = autoflash.attention(q, k, v, **options, return_lse=True)
    (out.sum() + lse.sum()).backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 3 << 30
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


EIGHT_BITS = torch.float8_e4m3fn


def eight_bits(
    seqlen_q: int, seqlen_k: int, dim: int = 128
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    """q, k, v of 8 bits and their descales, up to 2 as in FlashAttention's tests."""
    given = tensors(seqlen_q, seqlen_k, dim=dim, dtype=EIGHT_BITS)
    names = ("q_descale", "k_descale", "v_descale")
    return given, {name: torch.rand(2, 2, device="cuda") * 2 for name in names}


def assert_exact_of_eight_bits(
    got: Any,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    descales: dict[str, torch.Tensor],
    causal: bool,
) -> None:
    """At most three times the error of weights that are rounded to 8 bits, of the same scores."""
    names = ("q_descale", "k_descale", "v_descale")
    factors = [descales.get(name) for name in names]
    exact, exact_lse = formula.exact(*given, causal=causal, descales=factors)
    wide = [x.double() for x in given]
    for index, factor in enumerate(factors):
        if factor is not None:
            per_head = factor.double().repeat_interleave(given[index].shape[2] // 2, 1)
            wide[index] = wide[index] * per_head[:, None, :, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", wide[0], wide[1].repeat_interleave(2, 2)) / math.sqrt(
        wide[0].shape[3]
    )
    if causal:
        ones = torch.ones_like(scores, dtype=torch.bool)
        scores = scores.masked_fill(ones.triu(1 + scores.shape[3] - scores.shape[2]), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    rounded = weights.float().to(EIGHT_BITS).double()
    sums = weights.sum(-1, keepdim=True).clamp_min(1e-300)
    same = torch.einsum("bhqk,bkhd->bqhd", rounded / sums, wide[2].repeat_interleave(2, 2))
    error = (got[0].double() - exact).abs().max()
    limit = 3 * (same - exact).abs().max() + 8 * torch.finfo(torch.bfloat16).eps
    assert error <= limit, f"error {error:.3g} above {limit:.3g}"
    torch.testing.assert_close(got[1].double(), exact_lse, atol=5e-2, rtol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("names", [(), ("q_descale", "k_descale", "v_descale"), ("v_descale",)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(200, 333), (333, 200), (1, 97), (512, 512)])
@pytest.mark.filterwarnings("default:PyTorch serves attention with op fwd_fp8:RuntimeWarning")
def test_eight_bits(seqlen_q: int, seqlen_k: int, names: tuple[str, ...], causal: bool) -> None:
    given, descales = eight_bits(seqlen_q, seqlen_k)
    descales = {name: descales[name] for name in names}
    for _ in range(2):
        got = autoflash.attention(*given, **descales, causal=causal, return_lse=True)
        assert got[0].dtype == torch.bfloat16
        assert_exact_of_eight_bits(got, given, descales, causal)
    # Whether a template takes 8 bits depends on the device; where one does, it must serve.
    problem = request.problem_of(*given, causal=causal, layout="bshd")
    dispatcher = serving.dispatcher("cuda", given[0].device.index)
    accepted = catalog.installed().serving(problem, dispatcher.device)
    assert (rule_of(*given, causal) != "torch") == bool(accepted)


@pytest.mark.filterwarnings("default:PyTorch serves attention with op fwd_fp8:RuntimeWarning")
def test_descales_are_read_when_a_graph_replays() -> None:
    given, descales = eight_bits(256, 256)
    autoflash.attention(*given, **descales, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = autoflash.attention(*given, **descales, return_lse=True)
    for factor in descales.values():
        factor.copy_(torch.rand_like(factor) + 0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_exact_of_eight_bits(result, given, descales, False)


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_zero_sizes(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = tensors(seqlen_q, seqlen_k, batch=batch)
    out, lse = autoflash.attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.isneginf(lse).all()
    assert lse.shape == (batch, 4, seqlen_q)


def test_views_and_tensors_off_their_alignment() -> None:
    q, k, v = tensors()
    both = torch.stack([k, v], dim=3)
    assert_agrees(
        autoflash.attention(q, both[:, :, :, 0], both[:, :, :, 1], return_lse=True), q, k, v
    )
    shifted = torch.cat([k.flatten()[:1], k.flatten()])[1:].view(k.shape)
    assert shifted.data_ptr() % 16 != 0
    assert_agrees(autoflash.attention(q, shifted, v, return_lse=True), q, k, v)
    one_head = k[:, :, :1].expand(-1, -1, 2, -1)
    assert_agrees(autoflash.attention(q, one_head, v, return_lse=True), q, one_head, v)


def test_it_runs_on_the_current_stream() -> None:
    q, k, v = tensors()
    autoflash.attention(q, k, v)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        late.copy_(q)
        result = autoflash.attention(late, k, v, return_lse=True)
    side.synchronize()
    assert_agrees(result, q, k, v)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_it_runs_on_the_tensors_device_not_the_current_one() -> None:
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        with torch.cuda.device(0):
            q, k, v = tensors(device=device)
            result = autoflash.attention(q, k, v, return_lse=True)
            assert torch.cuda.current_device() == 0
        assert result[0].device == q.device
        assert_agrees(result, q, k, v)
    [warmed] = autoflash.warmup("b1s64h4/2d64f-bfloat16", device="cuda:1")
    assert warmed.served.rule != "torch"


def test_threads_with_streams_of_their_own() -> None:
    q, k, v = tensors()
    results: list[Any] = []

    def ask() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.extend(autoflash.attention(q, k, v, return_lse=True) for _ in range(20))
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        assert torch.equal(result[0], results[0][0])
    assert_agrees(results[0], q, k, v)


def test_a_cuda_graph_replays_on_new_data() -> None:
    q, k, v = tensors()
    autoflash.attention(q, k, v, causal=True, return_lse=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = autoflash.attention(q, k, v, causal=True, return_lse=True)
    for scale in (1.0, -0.5):
        q.copy_(torch.randn_like(q) * scale)
        graph.replay()
        torch.cuda.synchronize()
        assert_agrees((out, lse), q, k, v, causal=True)


def test_after_warming_up_the_first_call_may_be_captured() -> None:
    q, k, v = tensors()
    [warmed] = autoflash.warmup("b2s200x333h4/2d64f-bfloat16")
    assert warmed.served.rule != "torch"
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = autoflash.attention(q, k, v, return_lse=True)  # a warning would be an error
    graph.replay()
    torch.cuda.synchronize()
    assert_agrees(result, q, k, v)


def test_what_was_never_built_is_pytorchs_in_a_capture_and_ours_after_it() -> None:
    q, k, v = tensors()
    torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, q, q)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.warns(RuntimeWarning, match="call autoflash.warmup before"),
        torch.cuda.graph(graph),
    ):
        out = autoflash.attention(q, k, v, causal=True)
    graph.replay()
    torch.cuda.synchronize()
    _, lse = by_definition(q, k, v, causal=True, dtype=torch.float64)
    assert_agrees((out, lse), q, k, v, causal=True)
    assert_agrees(autoflash.attention(q, k, v, causal=True, return_lse=True), q, k, v, causal=True)
    assert rule_of(q, k, v, True) != "torch"


@IMPORTS_TORCHSCRIPT
@pytest.mark.slow
# PyTorch records an empty graph of its own to hold the memory pool.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode: str) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return autoflash.attention(q * 2, k, v, causal=True, return_lse=True)

    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for _ in range(4):  # reduce-overhead records a CUDA graph after its first calls
            q, k, v = tensors()
            out, lse = compiled(q, k, v)
            assert_agrees((out.clone(), lse.clone()), q * 2, k, v, causal=True)
    torch.compiler.reset()


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_operator_keeps_pytorchs_rules(return_lse: bool) -> None:
    q, k, v = tensors()
    autoflash.attention(q, k, v)  # registers it
    torch.library.opcheck(
        torch.ops.autoflash.fwd.default, (q, k, v, True, None, return_lse, "bshd")
    )
    torch.library.opcheck(
        torch.ops.autoflash.fwd.default,
        (q, k, v, False, None, return_lse, "bshd", 31, 5, 20.0),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(64, 64), (33, 70), (70, 33)])
def test_gradients_are_right(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    inputs = tensors(seqlen_q, seqlen_k, dtype=torch.float32)
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
    with pytest.warns(RuntimeWarning, match="no backward kernels yet"):
        out = autoflash.attention(q, k, v, causal=causal)
    into = torch.randn_like(out)
    out.backward(into)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    hidden = max(seqlen_q - seqlen_k, 0) if causal else 0
    wanted, _ = by_definition(
        exact[0][:, hidden:], exact[1], exact[2], causal=causal, dtype=torch.float64
    )
    wanted.backward(into[:, hidden:].double())
    for got, reference in zip((q, k, v), exact, strict=True):
        assert got.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(got.grad.double(), reference.grad, atol=1e-3, rtol=1e-3)


def test_autocast() -> None:
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out, lse = autoflash.attention(q, k, v, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert_agrees((out, lse), q.bfloat16(), k.bfloat16(), v.bfloat16())


@pytest.mark.parametrize("causal", [False, True])
def test_what_no_template_takes_is_served_by_pytorch(causal: bool) -> None:
    for dtype, dim, message in (
        (torch.float64, 64, "dtype float64"),
        (torch.float32, 300, "PyTorch serves"),
    ):
        for seqlen_q, seqlen_k in ((40, 70), (70, 40)):
            serving.reset()
            q, k, v = tensors(seqlen_q, seqlen_k, dim=dim, dtype=dtype)
            with pytest.warns(RuntimeWarning, match=message):
                result = autoflash.attention(q, k, v, causal=causal, return_lse=True)
            assert_agrees(result, q, k, v, causal=causal)


def test_decoding_with_every_length_builds_once() -> None:
    q, k, v = tensors(1, 300)
    for seqlen_k in range(1, 301, 13):
        views = k[:, :seqlen_k], v[:, :seqlen_k]
        result = autoflash.attention(q, *views, causal=True, return_lse=True)
        assert_agrees(result, q, *views, causal=True)
    dispatcher = serving.dispatcher("cuda", q.device.index)
    configs = {served.config for served in map(dispatcher.serve, _decoding())}
    assert len(dispatcher._kernels) == len(configs)


def _decoding() -> list[Problem]:
    return [Problem.parse(f"b2s1x{n}h4/2d64c-bfloat16") for n in range(1, 301, 13)]
