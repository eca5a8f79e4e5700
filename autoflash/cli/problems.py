"""Which problems a command line asks for: from its options to a list of Problem."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoflash.device import Device
from autoflash.dispatch_table import DispatchTable, Family
from autoflash.errors import InvalidInput, UnknownName
from autoflash.problem import ELEMENT_SIZES, FOREIGN_OPS, Problem
from autoflash.record import Record
from autoflash.workload import listing

if TYPE_CHECKING:
    from autoflash.tuning.cost import Cost
    from autoflash.workload.presets import Preset

_PANEL = "Which problems"
_USUAL: tuple[int | None, ...] = (None,)
"""A size that was not given: the usual one."""
_GPU_TOKENS = 16384
"""Rows of q in one call where only the sequence length is given, as attention papers plot it."""
_GPU_HIDDEN = 2048
"""num_heads * head_dim where only head_dim is given, likewise."""

_OPS = ("fwd", *FOREIGN_OPS)
"""What --op takes; of 8 bits "fwd" is fwd_fp8."""
_LONG = 1 << 20
"""Rows that no model's sliding window covers."""


def _option(name: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(name, help=text, metavar=metavar, rich_help_panel=_PANEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The problem options of a command line; `takes_problems` gives a command all of them.

    Sizes are comma lists and every combination of them is meant. Beside --grid or --problems
    they choose among the problems named there; beside --shape only --dtype has a meaning. Beside
    --preset, --batch, --seqlen, --seqlen-k and --dtype give the sizes, the others choose. Whatever
    is named, --op makes problems of that op of it.
    """

    grid: Annotated[str | None, _option("--grid", "A named set of problems.", "NAME")] = None
    preset: Annotated[
        list[str] | None,
        _option("--preset", "The problems of a model; `autoflash presets` lists them.", "NAME,..."),
    ] = None
    file: Annotated[
        Path | None,
        _option(
            "--problems",
            "A file with a problem's name, and perhaps its number of calls, per line; # starts a "
            "comment. With calls, what takes most time comes first.",
            "FILE",
        ),
    ] = None
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            metavar="N",
            min=1,
            rich_help_panel=_PANEL,
            help="Only the N problems that take most time, by calls and the static model.",
        ),
    ] = None
    shape: Annotated[
        list[str] | None,
        _option("--shape", "A problem by name, such as b4s4096h32/8d128c; repeatable.", "NAME"),
    ] = None
    batch: Annotated[str | None, _option("--batch", "Sequences.", "N,N...")] = None
    seqlen: Annotated[str | None, _option("--seqlen", "Query rows.", "N,N...")] = None
    seqlen_k: Annotated[
        str | None, _option("--seqlen-k", "Key rows, if not as many.", "N,N...")
    ] = None
    heads: Annotated[str | None, _option("--heads", "Query heads.", "N,N...")] = None
    kv_heads: Annotated[
        str | None, _option("--kv-heads", "Key/value heads, if not as many.", "N,N...")
    ] = None
    head_dim: Annotated[
        str | None, _option("--head-dim", "Elements of a query or key row.", "N,N...")
    ] = None
    head_dim_v: Annotated[
        str | None, _option("--head-dim-v", "Elements of a value row, if not as many.", "N,N...")
    ] = None
    dtype: Annotated[
        str | None, _option("--dtype", f"Of {', '.join(ELEMENT_SIZES)}.", "TYPE,TYPE...")
    ] = None
    causal: Annotated[
        bool | None, _option("--causal/--full", "One mask only; both if neither is given.")
    ] = None
    window: Annotated[
        str | None,
        _option(
            "--window",
            "Keys seen before a row's own, and after it where it is not causal; inf is all.",
            "LEFT[,RIGHT]",
        ),
    ] = None
    softcap: Annotated[
        str | None, _option("--softcap", "Scores are capped to this; 0 is off.", "X,X...")
    ] = None
    op: Annotated[
        str | None,
        _option(
            "--op",
            "Whose kernels: fwd is autoflash's own, flex PyTorch's FlexAttention. Without it, as "
            "the problems' names say.",
            "fwd|flex",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.op not in (None, *_OPS):
            raise UnknownName.of("op", self.op, _OPS)

    def problems(self, device: Device) -> list[Problem]:
        """The problems asked for, without repeats, in the order of the options.

        Those of a file with calls, and those of --top, come by the time that they take.

        Raises:
            InvalidInput: an option has no meaning, or no problem is left.
        """
        calls = self._calls(device)
        return [cost.problem for cost in self._costs(calls, device)] or list(calls)

    def costs(self, device: Device) -> list[Cost]:
        """What the problems asked for take, in order; nothing where order says nothing of time."""
        return self._costs(self._calls(device), device)

    def _costs(self, calls: Mapping[Problem, int | None], device: Device) -> list[Cost]:
        if self.top is None and not any(calls.values()):
            return []
        from autoflash.tuning.cost import costliest_first

        return costliest_first(calls, device)[: self.top]

    def _calls(self, device: Device) -> dict[Problem, int | None]:
        """The problems asked for, with their number of calls where a file tells it."""
        named: dict[Problem, int | None] = dict.fromkeys(_of_grid(self.grid))
        for preset in self._presets:
            named.update(dict.fromkeys(self._expanded(preset, device)))
        named.update(_of_file(self.file))
        named = {self._of_op(problem): count for problem, count in named.items()}
        if self._named:
            chosen = {p: count for p, count in named.items() if self.admits(p)}
            if not chosen:
                raise InvalidInput(
                    f"none of the {len(named)} problems of {self._named} has the sizes asked for; "
                    "leave the size options away to see what it holds (`autoflash plan`)."
                )
        elif self._sizes_given and not self.shape:
            chosen = dict.fromkeys(self._product(device))
        elif not self.shape:
            chosen = dict.fromkeys(map(self._of_op, _of_grid(default_grid(device))))
        else:
            chosen = {}
        return {**chosen, **{p: chosen.get(p) for p in self._shapes()}}

    def matching(self, records: Iterable[Record]) -> list[Record]:
        """Those of the records whose problems are among what was asked for."""
        if self.top is not None:
            raise InvalidInput(f"--top {self.top} says nothing of records; leave it out.")
        if not (self._named or self.shape):
            return [record for record in records if self.admits(record.problem)]
        models = self._presets
        named = map(self._of_op, {*_of_grid(self.grid), *_of_file(self.file)})
        wanted = {*filter(self.admits, named), *self._shapes()}
        return [
            record
            for record in records
            if record.problem in wanted
            or (
                self.admits(record.problem)
                and any(model.asks_for(record.problem.forward) for model in models)
            )
        ]

    def concerning(self, tables: Iterable[DispatchTable]) -> list[DispatchTable]:
        """Those of the tables that are for a family of what was asked for."""
        if not (self._named or self.shape):
            return [t for t in tables if self._admits_probe(t)]
        named = {*_of_grid(self.grid), *_of_file(self.file)}
        families = {Family.of(p) for p in (*filter(self.admits, named), *self._shapes())}
        models = self._presets
        return [
            table
            for table in tables
            if table.family in families
            or (
                self._admits_probe(table)
                and any(table.family in _families(model, table.family.dtype) for model in models)
            )
        ]

    def _admits_probe(self, table: DispatchTable) -> bool:
        return any(self.admits(probe.problem) for probe in table.probes)

    def admits(self, problem: Problem) -> bool:
        """Whether the size options, those that were given, hold for `problem`."""
        return (
            all(
                not self._given(option) or getattr(problem, name) in self._numbers(option)
                for option, name in _FIELDS.items()
            )
            and self._of_op(problem) == problem
            and (self.dtype is None or problem.dtype in words(self.dtype))
            and (self.causal is None or problem.causal == self.causal)
            and (self.window is None or self._has_window(problem))
            and (self.softcap is None or problem.softcap in self._softcaps)
        )

    def _of_op(self, problem: Problem) -> Problem:
        """The problem as one of --op."""
        return problem if self.op is None else dataclasses.replace(problem, op=self.op)

    def _has_window(self, problem: Problem) -> bool:
        left, right = self._window
        if right and problem.causal:
            return False
        asked = dataclasses.replace(problem, window_left=left, window_right=right)
        return asked == problem

    def _shapes(self) -> list[Problem]:
        sizes = [option for option in (*_FIELDS, "window", "softcap") if self._given(option)]
        if self.shape and sizes and not self._named:
            raise InvalidInput(
                f"--{sizes[0].replace('_', '-')} says nothing beside --shape {self.shape[0]}, "
                "which gives every size; use one or the other."
            )
        dtypes = words(self.dtype) if self.dtype else ["bfloat16"]
        named = (Problem.parse(text, dtype) for text in self.shape or () for dtype in dtypes)
        return [self._of_op(problem) for problem in named]

    def _product(self, device: Device) -> list[Problem]:
        gpu = device.is_cuda
        masks = (True, False) if self.causal is None else (self.causal,)
        left, right = self._window
        if right:  # a row that sees keys after its own is not causal
            if self.causal:
                raise InvalidInput(
                    f"--window {self.window} sees {right} keys after a row's own and --causal "
                    "none: leave one of them away."
                )
            masks = (False,)
        dtypes = words(self.dtype or ("bfloat16" if gpu else "float32,bfloat16"))
        chosen = []
        combinations = itertools.product(
            dtypes,
            self._numbers("head_dim") or [64],
            self._numbers("head_dim_v") or [0],
            self._numbers("seqlen") or [4096 if gpu else 1024],
            self._numbers("seqlen_k") or _USUAL,
            self._numbers("batch") or _USUAL,
            self._numbers("heads") or _USUAL,
            self._numbers("kv_heads") or _USUAL,
            masks,
            self._softcaps or [0.0],
        )
        for (
            dtype, dim, dim_v, rows, keys, batch, heads, kv_heads, causal, softcap
        ) in combinations:  # fmt: skip
            usual_batch = max(1, _GPU_TOKENS // max(rows, 1)) if gpu else 1
            usual_heads = max(1, _GPU_HIDDEN // max(dim, 1)) if gpu else 8
            if kv_heads:  # a multiple of what was asked for
                usual_heads = kv_heads * max(1, usual_heads // kv_heads)
            num_heads = usual_heads if heads is None else heads
            problem = Problem(
                op=self.op or "fwd",
                dtype=dtype,
                batch=usual_batch if batch is None else batch,
                seqlen_q=rows,
                seqlen_k=rows if keys is None else keys,
                num_heads=num_heads,
                num_kv_heads=num_heads if kv_heads is None else kv_heads,
                head_dim=dim,
                head_dim_v=dim_v,
                causal=causal,
                window_left=left,
                window_right=right,
                softcap=softcap,
            )
            chosen.append(problem)
        return chosen

    def _expanded(self, preset: Preset, device: Device) -> list[Problem]:
        """The problems of a model at the sizes asked for."""
        from autoflash.workload import presets

        return preset.problems(
            presets.GPU if device.is_cuda else presets.CPU,
            dtypes=words(self.dtype or "bfloat16"),
            batches=self._numbers("batch"),
            seqlens=self._numbers("seqlen"),
            seqlens_k=self._numbers("seqlen_k"),
        )

    @property
    def _presets(self) -> list[Preset]:
        """The models asked for."""
        from autoflash.workload import presets

        return [presets.get(name) for text in self.preset or () for name in words(text)]

    @property
    def _named(self) -> str:
        """Where problems are named, as an error says it; "" where they are not."""
        names = [word for text in self.preset or () for word in words(text)]
        places = (
            self.grid and f"grid {self.grid!r}",
            names and f"preset {', '.join(names)}",
            self.file and str(self.file),
        )
        return " and ".join(place for place in places if place)

    @property
    def _sizes_given(self) -> bool:
        names = (*_FIELDS, "dtype", "causal", "window", "softcap")
        return any(self._given(name) for name in names)

    def _given(self, name: str) -> bool:
        return getattr(self, name) not in (None, [], ())

    def _numbers(self, option: str) -> list[int]:
        text = getattr(self, option)
        return [_whole(option, word) for word in words(text)] if text is not None else []

    @property
    def _window(self) -> tuple[int | None, int | None]:
        if self.window is None:
            return None, None
        ends = words(self.window)
        if len(ends) not in (1, 2):
            raise InvalidInput(
                f"--window {self.window!r} is not LEFT or LEFT,RIGHT, such as 1023 or 512,128."
            )
        left, right = (_end(word) for word in (*ends, "inf")[:2])
        return left, right

    @property
    def _softcaps(self) -> list[float]:
        found = []
        for word in words(self.softcap or ""):
            try:
                found.append(float(word))
            except ValueError:
                raise InvalidInput(
                    f"--softcap {word!r} is not a number; several are separated by commas."
                ) from None
        return found


_FIELDS = {
    "batch": "batch",
    "seqlen": "seqlen_q",
    "seqlen_k": "seqlen_k",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "head_dim_v": "head_dim_v",
}
"""Size option -> the Problem's field that it gives."""


def takes_problems(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is a Selection, all the problem options.

    Typer reads a command's signature: the options are spliced in there, so that each is written
    once and not once per command.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    own = list(inspect.signature(command).parameters.values())[1:]
    fields = typing.get_type_hints(Selection, include_extras=True)
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
        for field in dataclasses.fields(Selection)
    ]
    parameters = [
        parameter.replace(
            kind=inspect.Parameter.KEYWORD_ONLY,
            annotation={**fields, **hints}[parameter.name],
        )
        for parameter in (*options, *own)
    ]
    names = {field.name for field in dataclasses.fields(Selection)}

    @functools.wraps(command)
    def spliced(**values: Any) -> None:
        selection = Selection(**{name: values.pop(name) for name in names})
        command(selection, **values)

    spliced.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spliced.__annotations__ = {p.name: p.annotation for p in parameters}
    return spliced


def default_grid(device: Device) -> str:
    """The grid that is meant where nothing is asked for."""
    return "fwd" if device.is_cuda else "cpu"


def _of_grid(name: str | None) -> tuple[Problem, ...]:
    """The problems of a named grid, or of a file in its place."""
    if name is None:
        return ()
    from autoflash import benchmark

    return benchmark.grid(name)


def _of_file(path: Path | None) -> dict[Problem, int | None]:
    """The problems of a file, with their calls where it gives any."""
    return {} if path is None else listing.read(path)


def _families(model: Preset, dtype: str) -> set[Family]:
    """Whose dispatch tables serve a model: with its windows, and where a window covers all keys."""
    return {
        Family.of(kind.problem(dtype, 1, length, length))
        for kind in model.attention
        for length in (1, _LONG)
    }


def words(text: str) -> list[str]:
    """The parts of a comma list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _end(word: str) -> int | None:
    """One side of a window: None is unbounded, which FlashAttention's users write as -1."""
    return None if word in ("inf", "-1") else _whole("window", word)


def _whole(option: str, word: str) -> int:
    if not word.isdecimal():
        raise InvalidInput(
            f"--{option.replace('_', '-')} {word!r} is not a whole number; "
            "several are separated by commas."
        )
    return int(word)
