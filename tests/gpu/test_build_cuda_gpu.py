"""Does a library that nvcc made run here: on streams, in graphs, beside others, without nvcc?"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoflash import build, device
from autoflash.build import nvcc
from autoflash.codegen import ops
from autoflash.codegen.catalog import Catalog
from autoflash.errors import BuildError
from autoflash.problem import Problem

_absent = nvcc.unavailable()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_absent is not None, reason=f"it needs {_absent}"),
]

DATA = Path(__file__).parents[1] / "data" / "naive"
PROBLEMS = ["b2s77x130h4/2d64c-float16", "b1s130x77h2d40x72c-bfloat16", "b2s5x0h2d64f-float16"]


def kernel_for(problem: Problem, **values):
    template, here = Catalog.load(DATA).get("cuda/row"), device.native()
    config = template.default_config(problem, here)
    config = type(config).of(config.template, {**dict(config.pairs), **values})
    return build.build(template.render(config, problem, here), here)


def tensors(problem: Problem):
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, problem.dtype)

    def made(rows, heads, dim):
        return torch.randn(problem.batch, rows, heads, dim, device="cuda").to(dtype)

    q = made(problem.seqlen_q, problem.num_heads, problem.head_dim)
    k = made(problem.seqlen_k, problem.num_kv_heads, problem.head_dim)
    v = made(problem.seqlen_k, problem.num_kv_heads, problem.head_dim_v)
    out = made(problem.seqlen_q, problem.num_heads, problem.head_dim_v).fill_(math.nan)
    lse = torch.full((problem.batch, problem.num_heads, problem.seqlen_q), math.nan, device="cuda")
    return q, k, v, out, lse


def expected(problem: Problem, q, k, v, scale):
    import torch

    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(problem.group_size, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if problem.causal:
        seen = torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool, device="cuda")
        seen = seen.tril(problem.seqlen_k - problem.seqlen_q)
        scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0) if problem.seqlen_k else scores
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


def assert_right(problem: Problem, q, k, v, out, lse, scale) -> None:
    import torch

    wanted, wanted_lse = expected(problem, q, k, v, scale)
    torch.testing.assert_close(out.double(), wanted, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("values", [{}, {"num_warps": 1, "keys": 128, "spread": True}])
def test_it_is_right(name, values):
    problem = Problem.parse(name)
    q, k, v, out, lse = tensors(problem)
    kernel_for(problem, **values)(q, k, v, out, lse, 0.2)
    assert_right(problem, q, k, v, out, lse, 0.2)


def test_the_first_launch_may_be_captured_and_replayed():
    import torch

    problem = Problem.parse("b2s64h4/2d64c-bfloat16")
    q, k, v, out, lse = tensors(problem)
    kernel = kernel_for(problem)  # no launch before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(q, k, v, out, lse, 0.125)
    assert out.isnan().all()
    graph.replay()
    torch.cuda.synchronize()
    assert_right(problem, q, k, v, out, lse, 0.125)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert_right(problem, q, k, v, out, lse, 0.125)


def test_it_runs_on_the_stream_it_is_given():
    import torch

    problem = Problem.parse("b1s64h4d64f-bfloat16")
    q, k, v, out, lse = tensors(problem)
    launch = kernel_for(problem).prepare(ops.fwd_scalars((q, k, v, out), problem=problem))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
    addresses = [tensor.data_ptr() for tensor in (q, k, v, out, lse)]
    launch(*addresses, 0.125, stream.cuda_stream)
    assert not stream.query()  # the launch waited for nothing
    torch.cuda.synchronize()
    assert_right(problem, q, k, v, out, lse, 0.125)


def test_two_libraries_and_triton_live_together():
    problem = Problem.parse("b1s64h4d64f-bfloat16")
    kernels = [kernel_for(problem), kernel_for(problem, num_warps=2)]
    for kernel in (*kernels, *kernels):
        q, k, v, out, lse = tensors(problem)
        kernel(q, k, v, out, lse, 0.125)
        assert_right(problem, q, k, v, out, lse, 0.125)


def test_a_second_device_has_its_own_kernel():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device here")
    problem = Problem.parse("b1s64h4d64f-bfloat16")
    with torch.cuda.device(1):
        q, k, v, out, lse = tensors(problem)
        kernel_for(problem)(q, k, v, out, lse, 0.125)
        assert_right(problem, q, k, v, out, lse, 0.125)
    q, k, v, out, lse = tensors(problem)
    kernel_for(problem)(q, k, v, out, lse, 0.125)
    assert_right(problem, q, k, v, out, lse, 0.125)


def test_a_refused_launch_says_what_cuda_says():
    problem = Problem.parse("b1s64h4d64f-bfloat16")
    q, k, v, out, _lse = tensors(problem)
    scalars = list(ops.fwd_scalars((q, k, v, out), problem=problem))
    scalars[3] = 70_000  # more heads than a grid may be high
    launch = kernel_for(problem).prepare(tuple(scalars))
    with pytest.raises(BuildError, match=r"cuda/row: launch returned .*: invalid"):
        launch(0, 0, 0, 0, 0, 0.125, 0)


SCRIPT = """
from autoflash.build import nvcc
assert nvcc.unavailable(), "the test needs a process that finds no nvcc"
from test_build_cuda_gpu import Problem, assert_right, kernel_for, tensors
problem = Problem.parse("b1s64h4d64f-bfloat16")
q, k, v, out, lse = tensors(problem)
kernel_for(problem)(q, k, v, out, lse, 0.125)
assert_right(problem, q, k, v, out, lse, 0.125)
"""


def test_it_runs_where_there_is_no_nvcc(tmp_path):
    kernel_for(Problem.parse("b1s64h4d64f-bfloat16"))
    (tmp_path / "cutlass").mkdir()
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "AUTOFLASH_NVCC": str(tmp_path / "no-nvcc"),
            "AUTOFLASH_CUTLASS": str(tmp_path / "cutlass"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
