"""package: a plain Python package of kernels and of what serves a call, on torch and triton."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflash import build, settings
from autoflash.build import cpp, cuda, triton
from autoflash.codegen import ops
from autoflash.codegen.template import Source, Template
from autoflash.config import Config
from autoflash.device import Device
from autoflash.dispatch_table import REACH, TILE_ROWS, DispatchTable
from autoflash.errors import ToolchainMissing
from autoflash.export import package_text
from autoflash.export.header import entry_dict, header
from autoflash.export.selection import Selection
from autoflash.export.target import Options, Target
from autoflash.problem import MAX_DISTANCE, Problem

LOADER = Path(__file__).parent / "loader"
"""The Python files that every package gets as they are."""

KERNELS = "kernels"
"""Folder of kernels in a package."""

LIBRARIES = f"{KERNELS}/libraries.json"
"""Digests of the built libraries: with them, all that differs between two exports of one
selection, for nvcc does not give the same bytes twice."""

_ENDINGS = {"python": ".py", "cuda": ".cu", "cpp": ".cpp"}
_SCHEMA_VERSION = 1  # of table.json; loader/_table.py refuses others
_GROUP_SIZES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a package: a rendered source, and what it may be asked.

    Attributes:
        template: of which it is.
        config: likewise.
        problem: for which it was rendered; its traits are the kernel's.
        source: what was rendered.
        device: for which.
    """

    template: Template
    config: Config
    problem: Problem
    source: Source
    device: Device

    @classmethod
    def of(cls, template: Template, config: Config, problem: Problem, device: Device) -> Kernel:
        """The kernel of a feasible config."""
        return cls(template, config, problem, template.render(config, problem, device), device)

    @property
    def name(self) -> str:
        """Of its files, such as "cuda_fwd_sm90_1e4d026f8a31"; a Python identifier."""
        return f"{re.sub(r'[^a-z0-9]+', '_', self.source.template)}_{self.source.digest[:12]}"

    @property
    def file(self) -> str:
        """Its source."""
        return self.name + _ENDINGS[self.source.language]

    @property
    def library(self) -> str:
        """What its source is compiled to, where that is not left to Triton."""
        return f"{self.name}.so"

    @property
    def text(self) -> str:
        """What its compiler is given."""
        compiled = {"cuda": cuda.compiled_text, "cpp": cpp.compiled_text}
        make = compiled.get(self.source.language)
        return make(self.source) if make else self.source.text

    @property
    def command(self) -> str | None:
        """How its library is built, in the folder of kernels; None where Triton compiles it."""
        return command(self.source.language, self.device, self.file, self.library)

    @property
    def group_sizes(self) -> list[int]:
        """Query heads per key/value head for which the same source would be rendered."""
        found = {self.problem.group_size}
        for size in _GROUP_SIZES:
            kv_heads = -(-self.problem.num_heads // size)  # about as many heads as were tuned
            asked = dataclasses.replace(
                self.problem, num_heads=size * kv_heads, num_kv_heads=kv_heads
            )
            if self.template.broken(self.config, asked, self.device) is None:
                same = Kernel.of(self.template, self.config, asked, self.device)
                found |= {size} if same.source.digest == self.source.digest else set()
        return sorted(found)

    def facts(self) -> dict[str, Any]:
        """What the loader must know of it; JSON-ready."""
        op, source = ops.get(self.source.op), self.source
        facts: dict[str, Any] = {
            "file": self.file,
            "sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "language": source.language,
            "template": source.template,
            "op": source.op,
            "config": dict(self.config),
            "options": dict(source.options),
            "source_digest": source.digest,
            "traits": {k: v for k, v in self.problem.traits.items() if k != "group_size"},
            "group_sizes": self.group_sizes,
            "pointers": [argument.name for argument in op.pointers],
            "num_scalars": len(op.scalars),
        }
        if source.language == "python":
            facts["signature"] = op.triton_signature(source.dtype)
            facts["divisible"] = [list(each) for each in triton.divisible(source)]
        return facts


def command(language: str, device: Device, source: str, library: str) -> str | None:
    """How a shell makes a library of a file; None for languages that Triton compiles."""
    makers = {"cuda": cuda.command, "cpp": cpp.command}
    make = makers.get(language)
    return make(device, source, library) if make else None


def package_files(selection: Selection, options: Options) -> dict[str, str | bytes]:
    """A project that pip installs: one package, pyproject.toml, README.md and LICENSE."""
    name = options.module(f"autoflash_kernels_{selection.device.slug.replace('-', '_')}")
    inside = module_files(selection, options)
    return {
        **{f"{name}/{path}": content for path, content in inside.items()},
        "pyproject.toml": package_text.pyproject(name, selection),
        "README.md": package_text.readme(name, selection, _build_loop(selection)),
        "LICENSE": package_text.LICENSE,
    }


def _build_loop(selection: Selection) -> str | None:
    """What a shell runs in the folder of kernels to build the libraries of all."""
    for kernel in kernels(selection):
        ending = Path(kernel.file).suffix
        library = f"${{source%{ending}}}.so"
        made = command(kernel.source.language, kernel.device, "$source", library)
        if made:
            return f"for source in *{ending}; do {made}; done"
    return None


def module_files(selection: Selection, options: Options) -> dict[str, str | bytes]:
    """The files of the package itself, by their paths below its folder.

    Its modules import one another relatively, so that the folder may have any name and lie in any
    package. They need torch, and triton where kernels are in Triton or Gluon.

    Raises:
        ToolchainMissing: libraries are to be built, and cannot be here.
        CompileError: a compiler rejected a kernel.
    """
    known = kernels(selection)
    files: dict[str, str | bytes] = {
        path.name: path.read_text(encoding="utf-8") for path in sorted(LOADER.glob("*.py"))
    }
    files["py.typed"] = ""
    files["table.json"] = _json(_table(selection, known))
    for kernel in known:
        files[f"{KERNELS}/{kernel.file}"] = kernel.text
    built = _libraries(known, options) if options.binaries else {}
    for library, content in built.items():
        files[f"{KERNELS}/{library}"] = content
    if built:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in built.items()}
        files[LIBRARIES] = _json(digests)
    return files


def kernels(selection: Selection) -> list[Kernel]:
    """The distinct kernels of a selection's winners and of what its dispatch tables serve."""
    found: dict[str, Kernel] = {}
    for kernel in (*_of_winners(selection), *_of_tables(selection)):
        same = found.setdefault(kernel.source.digest, kernel)
        assert _traits(same.problem) == _traits(kernel.problem), kernel.name
    return [found[digest] for digest in sorted(found, key=lambda digest: found[digest].name)]


def _traits(problem: Problem) -> dict[str, Any]:
    return {name: value for name, value in problem.traits.items() if name != "group_size"}


def _of_winners(selection: Selection) -> Iterator[Kernel]:
    for entry in selection.entries:
        made_for = entry.record.device
        yield Kernel(entry.template, entry.config, entry.problem, entry.source, made_for)


def _of_tables(selection: Selection) -> Iterator[Kernel]:
    templates = {entry.template.name: entry.template for entry in selection.entries}
    for table in selection.tables:
        for index in _served(table):
            yield from _variants(table, index, templates)


def _served(table: DispatchTable) -> list[int]:
    """Configs of a table that some shape is served by; what a leaf leaves to the default, too."""
    found = {leaf.config for leaf in table.leaves if leaf.config is not None}
    if any(leaf.config is None for leaf in table.leaves):
        found |= {probe.default for probe in table.probes if not probe.held_out}
    return sorted(found)


def _variants(
    table: DispatchTable, index: int, templates: Mapping[str, Template]
) -> Iterator[Kernel]:
    """The kernels of a table's config, one for each number of heads that share keys."""
    config = table.configs[index]
    template = templates.get(config.template)
    seen = set()
    for probe in table.probes if template else ():
        assert template is not None
        problem = probe.problem
        if problem.group_size in seen or template.refusal(problem, table.device):
            continue
        if template.broken(config, problem, table.device) is None:
            seen.add(problem.group_size)
            yield Kernel.of(template, config, problem, table.device)


# The table --------------------------------------------------------------------------------------


def _table(selection: Selection, known: Iterable[Kernel]) -> dict[str, Any]:
    """What the loader reads: which kernels there are, and which serves what."""
    names = {kernel.source.digest: kernel.name for kernel in known}
    templates = {entry.template.name: entry.template for entry in selection.entries}
    commands = {kernel.name: kernel.command for kernel in known if kernel.command}
    return {
        "schema_version": _SCHEMA_VERSION,
        "header": header(selection),
        "limits": {"max_distance": MAX_DISTANCE, "reach": REACH, "tile_rows": TILE_ROWS},
        "kernels": {kernel.name: kernel.facts() for kernel in known},
        "commands": commands,
        "winners": [
            {**entry_dict(entry), "kernel": names[entry.source.digest]}
            for entry in selection.entries
        ],
        "tables": [_dispatch(table, templates, names) for table in selection.tables],
    }


def _dispatch(
    table: DispatchTable, templates: Mapping[str, Template], names: Mapping[str, str]
) -> dict[str, Any]:
    variants = {index: list(_variants(table, index, templates)) for index in _served(table)}
    return {
        "family": table.family.to_dict(),
        "kernels": {
            str(index): [names[kernel.source.digest] for kernel in found]
            for index, found in variants.items()
        },
        "leaves": [
            {"where": [list(bound) for bound in leaf.where], "config": leaf.config}
            for leaf in table.leaves
        ],
        # With what serves there by default, for leaves where nothing was better.
        "probes": [
            [probe.problem.to_dict(), probe.default] for probe in table.probes if not probe.held_out
        ],
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


# Libraries --------------------------------------------------------------------------------------


def _libraries(known: Iterable[Kernel], options: Options) -> dict[str, bytes]:
    """Name of each library -> its content, built now or found in the cache."""
    wanted = [kernel for kernel in known if kernel.command]
    if not wanted:
        return {}
    device = wanted[0].device
    languages = {kernel.source.language for kernel in wanted}
    jobs = build.jobs_within_memory(settings.get().jobs, languages, device)
    found: dict[str, bytes] = {}
    with ThreadPoolExecutor(jobs) as pool:
        artifacts = pool.map(lambda kernel: build.compile_source(kernel.source, device), wanted)
        try:
            for number, (kernel, artifact) in enumerate(zip(wanted, artifacts, strict=True), 1):
                found[kernel.library] = (artifact.directory / build.LIBRARY).read_bytes()
                options.progress(f"[{number}/{len(wanted)}] built {kernel.library}")
        except ToolchainMissing as error:
            raise ToolchainMissing(f"{error} With --sources nothing is built.") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return found


TARGET = Target(
    name="package",
    summary="A Python package that pip installs, on torch and triton alone; FA-style functions.",
    templates="*",
    files=package_files,
)
