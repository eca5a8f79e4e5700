"""The `cuda-header` target: the tiles of the CUDA kernels as constexpr lookups in a header."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from autoflash.config import Value
from autoflash.errors import InvalidInput
from autoflash.export.header import comment, evidence
from autoflash.export.selection import Entry, Selection
from autoflash.export.target import Options, Target

_TILE = ("block_m", "block_n")
"""Derived values that belong to a tile where they are not chosen themselves."""

_RULE = "letters, digits and underscores make a namespace, no digit first and no word of C++"
# Of C++20, and std.
_WORDS = (
    "alignas|alignof|and|and_eq|asm|auto|bitand|bitor|bool|break|case|catch|char|char16_t|"
    "char32_t|char8_t|class|co_await|co_return|co_yield|compl|concept|const|const_cast|"
    "consteval|constexpr|constinit|continue|decltype|default|delete|do|double|dynamic_cast|"
    "else|enum|explicit|export|extern|false|float|for|friend|goto|if|inline|int|long|mutable|"
    "namespace|new|noexcept|not|not_eq|nullptr|operator|or|or_eq|private|protected|public|"
    "register|reinterpret_cast|requires|return|short|signed|sizeof|static|static_assert|"
    "static_cast|std|struct|switch|template|this|thread_local|throw|true|try|typedef|typeid|"
    "typename|union|unsigned|using|virtual|void|volatile|wchar_t|while|xor|xor_eq"
)
_NAMES = rf"(?!(?:{_WORDS})\Z)[A-Za-z]\w*"

_HEAD = """
// Tiles of the CUDA kernels that autoflash tuned: a namespace per device and kernel, for a tile is
// worth its time only in the kernel that it was measured in. `tile` may be called in constant
// expressions and, under nvcc, on the device. Where `found` is false nothing alike was tuned, and
// the other members are zero; elsewhere lengths between those that were tuned have the tile of the
// nearer one, in doublings.
#pragma once

#if defined(__CUDACC__)
#define AUTOFLASH_HOST_DEVICE __host__ __device__
#else
#define AUTOFLASH_HOST_DEVICE
#endif
"""


class Family(NamedTuple):
    """What `tile` is asked for besides the length."""

    head_dim: int
    head_dim_v: int
    causal: bool
    local: bool
    element_size: int
    softcapped: bool


def _files(selection: Selection, options: Options) -> Mapping[str, str]:
    name, device = options.named("autoflash", _NAMES, _RULE), selection.device
    here = f"{name}::{_identifier(device.slug)}"
    kernels: dict[str, list[Entry]] = {}
    for entry in selection.entries:
        if entry.problem.aligned:  # a table of tiles has no place for how a caller aligns
            kernels.setdefault(entry.template.name, []).append(entry)
    if not kernels:
        raise InvalidInput("all winners are for unaligned tensors, which this header leaves out.")
    parts = [comment(selection, "//"), _HEAD, f"\nnamespace {here} {{\n\n"]
    parts += [f"constexpr int sm = {device.capability}, num_sms = {device.num_sms};\n"]
    parts += [_kernel(entries) for _, entries in sorted(kernels.items())]
    parts += [f"\n}}  // namespace {here}\n\n#undef AUTOFLASH_HOST_DEVICE\n"]
    return {f"{name}_{_identifier(device.slug)}.h": "".join(parts)}


def _kernel(entries: Sequence[Entry]) -> str:
    """The namespace of a kernel: its enums, struct Tile, and the lookup."""
    template = entries[0].template
    kernel = _identifier(template.name.partition("/")[2])
    enums = {
        name: sorted({str(choice) for choice in choices})
        for name, choices in template.tunables.items()
        if any(isinstance(choice, str) for choice in choices)
    }
    lines = [
        "",
        f"namespace {kernel} {{",
        "",
        f'constexpr char digest[] = "{template.digest}";  // of {template.name}',
        "",
        *(
            f"enum class {_enum(name)} {{ {', '.join(map(_word, enums[name]))} }};"
            for name in enums
        ),
        "",
        "struct Tile {",
        "    bool found;",
        *(
            f"    {_type(name, value, enums)} {name};"
            for name, value in _members(entries[0]).items()
        ),
        "};",
        "",
        "// seqlen: rows of q. local: a sliding window. element_size: bytes of q, k and v.",
        "AUTOFLASH_HOST_DEVICE constexpr Tile tile(",
        "    int head_dim, int head_dim_v, bool causal, bool local, int element_size,",
        "    [[maybe_unused]] int seqlen, bool softcapped = false) {",
    ]
    families: dict[Family, list[Entry]] = {}
    for entry in entries:
        families.setdefault(_family(entry), []).append(entry)
    for family, some in sorted(families.items()):
        lines += _branch(family, some, enums)
    lines += ["    return {};", "}", "", f"}}  // namespace {kernel}", ""]
    return "\n".join(lines)


def _family(entry: Entry) -> Family:
    problem = entry.problem
    return Family(*(getattr(problem, name) for name in Family._fields))


def _branch(
    family: Family,
    entries: Iterable[Entry],
    enums: Mapping[str, Sequence[str]],
) -> list[str]:
    """The `if` of a family: a tile for each length, up to half-way to the next in doublings."""
    by_length: dict[int, list[Entry]] = {}
    for entry in entries:
        by_length.setdefault(entry.problem.seqlen_q, []).append(entry)
    lengths = sorted(by_length)
    tests = [
        f"{name} == {value}" if not isinstance(value, bool) else name if value else f"!{name}"
        for name, value in family._asdict().items()
    ]
    lines = [f"    if ({' && '.join(tests)}) {{"]
    ends = [math.isqrt(max(one, 1) * two) for one, two in pairwise(lengths)]
    for length, end in zip(lengths, [*ends, None], strict=True):
        chosen, *others = _by_work(by_length[length])
        lines.append(f"        // {chosen.problem.name}: {evidence(chosen)}")
        lines += [f"        // not here: {other.problem.name}, {other.config}" for other in others]
        values = ", ".join(_literal(n, v, enums) for n, v in _members(chosen).items())
        row = f"return {{true, {values}}};"
        lines.append(f"        {row}" if end is None else f"        if (seqlen <= {end}) {row}")
    return [*lines, "    }"]


def _by_work(entries: Iterable[Entry]) -> list[Entry]:
    """Most work first: of problems that the table cannot tell apart, that one counts."""
    return sorted(entries, key=lambda entry: (-entry.problem.flops, entry.problem.name))


def _members(entry: Entry) -> dict[str, Value]:
    """What a Tile says of a config: the tunables, the tile, what a launch needs."""
    derived = entry.template.derive(entry.config, entry.problem, entry.record.device)
    tile = {name: derived[name] for name in _TILE if name in derived and name not in entry.config}
    return {**tile, **entry.source.options, **dict(entry.config)}


def _type(name: str, value: Value, enums: Mapping[str, Sequence[str]]) -> str:
    if name in enums:
        return _enum(name)
    return {bool: "bool", int: "int", float: "double"}[type(value)]


def _literal(name: str, value: Value, enums: Mapping[str, Sequence[str]]) -> str:
    if name in enums:
        return f"{_enum(name)}::{_word(str(value))}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _enum(name: str) -> str:
    """The type of a tunable of words, such as HeadOrder."""
    return "".join(part.capitalize() for part in name.split("_"))


def _identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)


def _word(text: str) -> str:
    """A choice as an enumerator: "registers" is kRegisters, which no macro or keyword is."""
    return "k" + "".join(part.capitalize() for part in re.split(r"\W|_", text))


TARGET = Target(
    name="cuda-header",
    summary="A C++17 header with the tiles of the CUDA kernels as constexpr lookups.",
    templates="cuda/*",
    stand_ins=True,
    files=_files,
)
