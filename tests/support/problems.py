"""What do GPU tests of several kernels run on? Problems by chance, and tensors for one of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from autoflash.problem import Problem


def drawn(seed: int, count: int, head_dims: Sequence[int]) -> list[str]:
    """Names of random problems of 16 bits: every trait may meet every other."""
    some = random.Random(seed)
    names = []
    for _ in range(count):
        seqlen_q, seqlen_k = some.randint(1, 1500), some.randint(1, 1500)
        kv_heads, group = some.choice([1, 2, 3]), some.choice([1, 1, 2, 5])
        dim = some.choice(head_dims)
        dim_v = some.choice([dim, dim, 64, 128])
        mask = some.choice(["c", "f", f"cw{some.randint(0, 900)}",
                            f"fw{some.randint(0, 900)}x{some.randint(1, 900)}"])  # fmt: skip
        cap = some.choice(["", "", "cap30"])
        dtype = some.choice(["bfloat16", "float16"])
        names.append(
            f"b{some.randint(1, 3)}s{seqlen_q}x{seqlen_k}h{kv_heads * group}/{kv_heads}"
            f"d{dim}x{dim_v}{mask}{cap}-{dtype}"
        )
    return names


def tensors(problem: Problem):
    """Random q, k and v on the device, and out and lse full of NaN."""
    import torch

    p, kind = problem, {"device": "cuda", "dtype": getattr(torch, problem.dtype)}
    q = torch.randn(p.batch, p.seqlen_q, p.num_heads, p.head_dim, **kind)
    k = torch.randn(p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim, **kind)
    v = torch.randn(p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim_v, **kind)
    out = torch.full((p.batch, p.seqlen_q, p.num_heads, p.head_dim_v), math.nan, **kind)
    lse = torch.full((p.batch, p.num_heads, p.seqlen_q), math.nan, device="cuda")
    return q, k, v, out, lse
