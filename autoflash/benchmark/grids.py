"""Which problems are compared: named grids, and grids in files."""

from __future__ import annotations

from pathlib import Path

from autoflash.errors import UnknownName
from autoflash.problem import Problem
from autoflash.workload import listing


def _parse(names: str, *dtypes: str) -> tuple[Problem, ...]:
    return tuple(Problem.parse(name, dtype) for dtype in dtypes for name in names.split())


GRIDS = {
    # A few seconds on anything: masks, groups, one query row, lengths that fit no tile.
    "smoke": _parse(
        "b2s128h4d64c b2s128h4d64f b1s113x203h4/2d40c b1s1x512h8/2d128f", "float32", "bfloat16"
    ),
    "cpu": _parse(
        "b1s1024h8d64c b1s1024h8d64f b1s4096h8d64c b1s4096h8d64f b1s2048h8d128c b1s2048h8d128f",
        "float32",
        "bfloat16",
    ),
    # The FlashAttention papers' shape: 16384 tokens, num_heads * head_dim = 2048, and 32/8 heads.
    "fwd": _parse(
        "b16s1024h32d64c b4s4096h32d64c b1s16384h32d64c"
        " b16s1024h32d64f b4s4096h32d64f b1s16384h32d64f"
        " b16s1024h16d128c b4s4096h16d128c b1s16384h16d128c"
        " b16s1024h16d128f b4s4096h16d128f b1s16384h16d128f"
        " b16s1024h8d256c b4s4096h8d256c b1s16384h8d256c"
        " b16s1024h8d256f b4s4096h8d256f b1s16384h8d256f"
        " b4s4096h32/8d128c b1s16384h32/8d128c",
        "bfloat16",
    ),
    # The same lengths at head dims between: 96 (Phi-3 mini) and 192 (DeepSeek's queries).
    "fwd-dims": _parse(
        " ".join(
            f"{size}h{1536 // head_dim}d{head_dim}{mask}"
            for head_dim in (96, 192)
            for mask in "cf"
            for size in ("b16s1024", "b4s4096", "b1s16384")
        ),
        "bfloat16",
    ),
    # Shapes that nobody tunes, between and beyond those of other grids: what a bucket serves.
    "fwd-heldout": _parse(
        " ".join(
            f"b3s{seqlen}h24/6d{head_dim}{mask}"
            for head_dim in (64, 96, 128, 192)
            for mask in "cf"
            for seqlen in (1536, 3000, 5000, 12288)
        ),
        "bfloat16",
    ),
    # Few rows against many keys: prompts taken in chunks of 256 rows, single tokens, drafts of 2 to
    # 16 tokens to verify.
    "fwd-split": _parse(
        "b1s256x131072h8/1d128c b2s256x65536h8/2d64c"
        " b1s1x32768h32/8d128c b1s1x32768h32d128c b4s1x8192h32/8d64c b4s1x8192h16/2d256c"
        " b1s2x8192h32/8d128c b8s2x32768h32/8d128c b8s4x8192h32/8d128c b1s8x32768h32/8d128c"
        " b1s16x8192h32/8d128c b8s16x32768h32/8d128c",
        "bfloat16",
    ),
    # Sliding windows from 1/128 of the keys to a quarter; the last two as models have them: Mistral
    # 7B, and local blocks of an encoder.
    "fwd-window": _parse(
        "b4s4096h32d64cw128 b4s4096h32d64cw1024 b1s16384h32d64cw1024 b1s16384h32d64cw4096"
        " b4s4096h16d128cw128 b4s4096h16d128cw1024 b1s16384h16d128cw1024 b1s16384h16d128cw4096"
        " b1s16384h32/8d128cw4095 b2s8192h16d64fw128x128",
        "bfloat16",
    ),
    # Gemma 2: softcap 50 in every layer, a window of 4096 in every other one; 9B has head_dim 256,
    # 27B 128.
    "fwd-softcap": _parse(
        "b4s4096h16/8d256ccap50 b1s16384h16/8d256ccap50 b1s16384h16/8d256cw4095cap50"
        " b4s4096h32/16d128ccap50 b1s16384h32/16d128ccap50",
        "bfloat16",
    ),
    # The papers' shape again, in 8 bits.
    "fwd-fp8": _parse(
        "b4s4096h32d64c b1s16384h32d64c b4s4096h32d64f b1s16384h32d64f"
        " b4s4096h16d128c b1s16384h16d128c b4s4096h16d128f b1s16384h16d128f"
        " b4s4096h8d256c b1s16384h8d256c b4s4096h8d256f b1s16384h8d256f",
        "float8_e4m3fn",
    ),
}
"""Name -> problems."""


def grid(name: str, dtype: str = "bfloat16") -> tuple[Problem, ...]:
    """The problems of a named grid, or of a file with one Problem.name per line.

    Args:
        name: a key of GRIDS, or the path of a listing (autoflash/workload/listing.py).
        dtype: of names in a file that give none.

    Raises:
        UnknownName: neither a grid nor a file.
        InvalidInput: the file cannot be read, names no problem, or has a line that is none.
    """
    if name in GRIDS:
        return GRIDS[name]
    path = Path(name)
    if not path.is_file():
        raise UnknownName.of("grid or file", name, GRIDS)
    return tuple(listing.read(path, dtype))
