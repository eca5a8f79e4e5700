"""Which kernel_options for this call of FlexAttention? The nearest of those that were measured.

    options = flex_options.kernel_options(q, k, v, causal=True)
    out = torch.compile(flex_attention)(q, k, v, block_mask=mask, kernel_options=options)

Needs Python alone, and reads flex.json beside it. No options, which is {}, leave the choice to
FlexAttention: that is the answer wherever nothing near enough was measured, and for fewer than 128
query rows, whose kernel has other options.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TABLE = "flex.json"
SCHEMA_VERSION = 1
FARTHEST = 6.0
"""How far an entry reaches, in doublings of lengths; of (batch, head) pairs they count half."""
_FEWEST_ROWS = 128


def kernel_options(q: Any, k: Any, v: Any, *, causal: bool, **rest: Any) -> dict[str, Any]:
    """The options for a call of flex_attention(q, k, v).

    Args:
        q: (batch, num_heads, seqlen_q, head_dim), a tensor; where it lies decides whether the
            table is for that device.
        k: (batch, num_kv_heads, seqlen_k, head_dim).
        v: (batch, num_kv_heads, seqlen_k, head_dim_v).
        causal: as for `pick`.
        rest: likewise, by name.
    """
    if not suits(q.device):
        return {}
    batch, num_heads, seqlen_q, head_dim = q.shape
    found = pick(
        dtype=str(q.dtype).removeprefix("torch."),
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        seqlen_q=seqlen_q,
        seqlen_k=k.shape[2],
        head_dim=head_dim,
        head_dim_v=v.shape[3],
        causal=causal,
        **rest,
    )
    return dict(found)


def pick(
    *,
    dtype: str,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int | None = None,
    causal: bool,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    mask_is_only_that: bool = False,
    mask_block: int = 128,
) -> dict[str, Any]:
    """The options for sizes, as where only a model's configuration is known.

    Args:
        dtype: of q, k and v, such as "bfloat16".
        batch: sequences.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        seqlen_q: query rows.
        seqlen_k: key rows.
        head_dim: of queries and keys.
        head_dim_v: of values; None: the same.
        causal: whether the mask hides what comes after a row, aligned bottom-right.
        window: keys that a row sees before and after its own place; None is all.
        softcap: of a score_mod that caps scores; 0 is none.
        mask_is_only_that: whether the block mask is exactly what `causal` and `window` say: no
            padding, no documents, nothing else. Only then are options given that promise it.
        mask_block: BLOCK_SIZE of the block mask, which tiles must divide.
    """
    asked = {
        "dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v or head_dim,
        "causal": causal, "local": window != (None, None), "softcapped": softcap > 0.0,
    }  # fmt: skip
    if seqlen_q < _FEWEST_ROWS:
        return {}
    best: Mapping[str, Any] | None = None
    nearest = FARTHEST
    for entry in table()["entries"]:
        problem = entry["problem"]
        if _kind(problem) != asked:
            continue
        away = (
            _doublings(seqlen_q, problem["seqlen_q"])
            + _doublings(seqlen_k, problem["seqlen_k"])
            + 0.5 * _doublings(batch * num_heads, problem["batch"] * problem["num_heads"])
            + 0.5
            * _doublings(num_heads // num_kv_heads, problem["num_heads"] // problem["num_kv_heads"])
        )
        if away <= nearest and (best is None or away < nearest):
            best, nearest = entry, away
    if best is None:
        return {}
    options = dict(best["kernel_options"])
    tile = [options[name] for name in ("fwd_BLOCK_M", "fwd_BLOCK_N") if name in options]
    if any(mask_block % side for side in tile):
        return {}
    same = (seqlen_q, seqlen_k) == (best["problem"]["seqlen_q"], best["problem"]["seqlen_k"])
    if not (mask_is_only_that and same):
        for name in best["mask_promises"]:
            del options[name]
    return options


def suits(device: Any) -> bool:
    """Whether the table is for a device, a torch.device; a warning says what is not as it was."""
    measured = table()["header"]
    arch = measured["device"]["arch"]
    if device.type != "cuda":
        return bool(device.type == arch)
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if arch != f"sm{major}{minor}":
        _warn(f"{TABLE} is for {arch} and this device is sm{major}{minor}: no options are given")
        return False
    name = torch.cuda.get_device_name(device)
    if name != measured["device"]["name"]:
        _warn(f"{TABLE} was measured on {measured['device']['name']}, and this is {name}")
    then = measured["versions"].get("torch")
    if str(torch.__version__) not in ([then] if isinstance(then, str) else then or []):
        _warn(f"{TABLE} was measured with PyTorch {then}, and this is {torch.__version__}")
    return True


@cache
def table() -> Any:
    """The table beside this file.

    Raises:
        ValueError: it is of another version.
    """
    path = Path(__file__).with_name(TABLE)
    read = json.loads(path.read_text(encoding="utf-8"))
    version = read["header"]["schema_version"]
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} is of schema version {version}, and this module knows {SCHEMA_VERSION}: take "
            "both from the same export."
        )
    return read


def _kind(problem: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for an entry to say anything."""
    local = problem["window_left"] is not None or problem["window_right"] is not None
    kind = {name: problem[name] for name in ("dtype", "head_dim", "head_dim_v", "causal")}
    return {**kind, "local": local, "softcapped": problem["softcap"] > 0.0}


def _doublings(one: int, two: int) -> float:
    return abs(math.log2((one or 1) / (two or 1)))


@cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
