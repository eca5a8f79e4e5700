"""Presets: which problems does a well-known model ask for? Its layers are in presets.toml."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from autoflash.errors import UnknownName
from autoflash.problem import Problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("presets.toml")


@dataclass(frozen=True, slots=True)
class Usual:
    """The sizes of a preset's calls where none are asked for.

    Attributes:
        seqlens: rows of a prompt, for models that do not fix them.
        tokens: rows of one call of all sequences together, about: gives the batch.
        decode_batch: sequences that one more token is generated for at once.
        decode_keys: tokens that each of them has already.
    """

    seqlens: tuple[int, ...]
    tokens: int
    decode_batch: int
    decode_keys: int

    def batch(self, seqlen: int) -> int:
        """The power of two with at most `tokens` rows, and at least 1."""
        return 1 << (max(1, self.tokens // max(seqlen, 1)).bit_length() - 1)


GPU = Usual(seqlens=(1024, 4096, 16384), tokens=16384, decode_batch=8, decode_keys=8192)
"""As attention papers plot prompts; decoding as a server does it."""
CPU = Usual(seqlens=(1024,), tokens=1, decode_batch=1, decode_keys=1024)
"""One sequence, as long as the grid `cpu` has them: a call of the other takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One kind of attention layer of a model; the head of presets.toml explains the fields."""

    layers: int
    heads: int
    head_dim: int
    causal: bool
    kv_heads: int = 0
    head_dim_v: int = 0
    sliding_window: int | None = None
    softcap: float = 0.0
    seqlen: tuple[int, ...] = ()
    seqlen_k: int | None = None
    decode: bool = True

    def problem(self, dtype: str, batch: int, seqlen_q: int, seqlen_k: int) -> Problem:
        """What these layers ask for at a size."""
        # A sliding window counts the row's own key, a Problem those before it.
        left = None if self.sliding_window is None else self.sliding_window - 1
        return Problem(
            dtype=dtype,
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            causal=self.causal,
            window_left=left,
            window_right=None,
            softcap=self.softcap,
        )

    def asks_for(self, problem: Problem) -> bool:
        """Whether `problem` is one of these layers, at whatever size."""
        sizes = problem.dtype, problem.batch, problem.seqlen_q, problem.seqlen_k
        return self.problem(*sizes) == problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model, as far as attention goes.

    Attributes:
        name: what `--preset` takes.
        source: where its dimensions stand.
        context: positions it was made for; None: far more than any usual length.
        attention: its kinds of layers.
    """

    name: str
    source: str
    context: int | None
    attention: tuple[Attention, ...]

    def problems(
        self,
        usual: Usual,
        *,
        dtypes: Sequence[str] = ("bfloat16",),
        batches: Sequence[int] = (),
        seqlens: Sequence[int] = (),
        seqlens_k: Sequence[int] = (),
    ) -> list[Problem]:
        """The problems of this model, without repeats: for each dtype, kind of layer and size.

        Without sizes: prompts of the usual lengths that the context allows (its own length where
        that allows none), then, where tokens are generated, one token for each of `decode_batch`
        sequences of `decode_keys` tokens. Layers whose length the model fixes have that.

        Args:
            usual: the sizes where none are given.
            dtypes: of q, k and v.
            batches: numbers of sequences, in place of the usual ones.
            seqlens: query rows of every layer, in place of the usual and the fixed ones; there is
                then no decoding but what they say.
            seqlens_k: key rows, in place of those that follow.
        """
        found = [
            kind.problem(dtype, *size)
            for dtype, kind in itertools.product(dtypes, self.attention)
            for batch, rows, keys in self._sizes(kind, usual, seqlens)
            for size in itertools.product(batches or [batch], [rows], seqlens_k or [keys])
        ]
        return list(dict.fromkeys(found))

    def _sizes(
        self, kind: Attention, usual: Usual, seqlens: Sequence[int]
    ) -> list[tuple[int, int, int]]:
        """Batch, query rows and key rows of a kind of layer."""
        longest = self.context or max(usual.seqlens)
        fitting = [length for length in usual.seqlens if length <= longest] or [longest]
        lengths = seqlens or kind.seqlen or fitting
        sizes = [(usual.batch(rows), rows, kind.seqlen_k or rows) for rows in lengths]
        if kind.causal and kind.decode and not kind.seqlen and not seqlens:
            sizes.append((usual.decode_batch, 1, min(usual.decode_keys, longest)))
        return sizes

    def asks_for(self, problem: Problem) -> bool:
        """Whether a layer of this model asks for `problem`, at whatever size."""
        return any(kind.asks_for(problem) for kind in self.attention)


@cache
def installed() -> Mapping[str, Preset]:
    """Every preset, by name, in the order of the file."""
    return {
        name: Preset(
            name=name,
            source=table["source"],
            context=table.get("context"),
            attention=tuple(_attention(entry) for entry in table["attention"]),
        )
        for name, table in tomllib.loads(FILE.read_text(encoding="utf-8")).items()
    }


def get(name: str) -> Preset:
    """The preset of that name, or UnknownName with the nearest ones."""
    known = installed()
    if name not in known:
        raise UnknownName.of("preset", name, known)
    return known[name]


def _attention(entry: Mapping[str, Any]) -> Attention:
    return Attention(**{**entry, "seqlen": tuple(entry.get("seqlen", ()))})
