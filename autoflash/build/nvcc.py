"""Where are nvcc and the CUTLASS headers, and what does nvcc say of a kernel?"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from autoflash import settings
from autoflash.errors import ToolchainMissing

_PROBE_TIMEOUT_S = 30.0
_EXACT = (90,)
"""Capabilities whose kernels use instructions of that one architecture (wgmma: sm_90a)."""


@dataclass(frozen=True, slots=True)
class Headers:
    """CUTLASS headers.

    Attributes:
        include: the folder that holds cute/ and cutlass/.
        version: such as "4.2.0".
    """

    include: Path
    version: str


@dataclass(frozen=True, slots=True)
class Compiler:
    """An nvcc.

    Attributes:
        command: what to run, quoted for a shell.
        version: such as "13.0.88".
        includes: folders of the toolkit that nvcc need not know of itself.
        libraries: likewise.
    """

    command: str
    version: str
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]


def target(capability: int) -> str:
    """What code is generated for, as nvcc counts: "90a" for sm90, "80" for sm80."""
    return f"{capability}a" if capability in _EXACT else str(capability)


def runs_on(compiled_for: int, present: int) -> bool:
    """Whether a binary for one compute capability (times ten) runs on another."""
    if compiled_for in _EXACT:
        return compiled_for == present
    return compiled_for // 10 == present // 10 and compiled_for <= present


# Finding ----------------------------------------------------------------------------------------


def compiler() -> Compiler:
    """The nvcc of this machine.

    Raises:
        ToolchainMissing: there is none, it does not run, or it has no host compiler.
    """
    found = _compiler(settings.get().nvcc, os.environ.get("PATH", ""), _cuda_homes())
    if isinstance(found, str):
        raise ToolchainMissing(found)
    return found


def headers() -> Headers:
    """The CUTLASS headers of this machine.

    Raises:
        ToolchainMissing: there are none.
    """
    found = _headers(settings.get().cutlass, os.environ.get("CUTLASS_PATH", ""))
    if isinstance(found, str):
        raise ToolchainMissing(found)
    return found


def unavailable() -> str | None:
    """Why CUDA C++ cannot be compiled here, or None."""
    try:
        compiler()
        headers()
    except ToolchainMissing as error:
        first = str(error).partition(". ")[0]
        return f"nvcc and the CUTLASS headers ({first}; `autoflash doctor` says what to do)"
    return None


def _cuda_homes() -> tuple[str, ...]:
    named = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return tuple(home for home in named if home)


@cache
def _compiler(command: str, path: str, homes: tuple[str, ...]) -> Compiler | str:
    """The compiler, or why there is none; cached, as asking nvcc takes tenths of a second."""
    words = shlex.split(command) or [""]
    program = shutil.which(words[0], path=path) if command else _search(path, homes)
    if program is None:
        wanted = f"AUTOFLASH_NVCC={command!r} does not exist" if command else _NO_NVCC
        return f"{wanted}. {_NEXT_STEP}"
    words = [program, *words[1:]]
    try:
        said = _output(*words, "--version")
        # What nvcc takes for its own root; where nvcc is a script, its path says nothing.
        dry = _output(*words, "--dryrun", "-E", "-x", "cu", os.devnull)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{program} does not run ({error}). {_NEXT_STEP}"
    if shutil.which("gcc", path=path) is None:
        return f"{program} needs gcc on PATH for the host's part. apt-get install g++"
    version = re.search(r"\bV(\d+(?:\.\d+)+)", said)
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    root = Path(top[1].strip() if top else program).resolve()
    root = root if top else root.parent.parent
    includes = [root / "include" / "cccl"]
    # Wheels have lib, which their nvcc does not look into; toolkits have lib64.
    libraries = [root / "lib", root / "lib64"]
    return Compiler(
        shlex.join(words),
        version[1] if version else said.strip().splitlines()[-1],
        tuple(folder for folder in includes if folder.is_dir()),
        tuple(folder for folder in libraries if (folder / "libcudart_static.a").is_file()),
    )


_NO_NVCC = (
    "nvcc is neither on PATH nor in CUDA_HOME, /usr/local/cuda or the nvidia-cuda-nvcc package"
)
_NEXT_STEP = (
    "Install the CUDA toolkit (12.8 or newer), or pip install 'autoflash[nvcc]', or name one in "
    "AUTOFLASH_NVCC; kernels that were built elsewhere run without it."
)


def _search(path: str, homes: tuple[str, ...]) -> str | None:
    if found := shutil.which("nvcc", path=path):
        return found
    for folder in (*(Path(home) for home in homes), *_packaged()):
        program = folder / "bin" / "nvcc"
        if program.is_file() and os.access(program, os.X_OK):
            return str(program)
    return None


def _packaged() -> Iterator[Path]:
    """Toolkits that nvidia-cuda-nvcc and its companions lay out in site-packages, newest first."""
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob("cu[0-9]*"), reverse=True)


@cache
def _headers(chosen: str, fallback: str) -> Headers | str:
    named = {"AUTOFLASH_CUTLASS": chosen, "CUTLASS_PATH": fallback}
    places = [Path(chosen).expanduser()] if chosen else []
    # Found without being imported: importing it makes a log file in the working directory.
    spec = None if chosen else find_spec("cutlass_library")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    places += [Path(folder) / "source" for folder in folders]
    if fallback and not chosen:
        places.append(Path(fallback).expanduser())
    for place in places:
        for include in (place / "include", place):
            text = include / "cutlass" / "version.h"
            if text.is_file() and (include / "cute").is_dir():
                return Headers(include.resolve(), _cutlass_version(text))
    said = ", ".join(f"{name}={value!r}" for name, value in named.items() if value)
    return (
        f"the CUTLASS headers are not here{f' ({said} has no include/cute)' if said else ''}. "
        "pip install 'autoflash[cuda]', or name a checkout in AUTOFLASH_CUTLASS."
    )


def _cutlass_version(version_h: Path) -> str:
    found = dict(
        re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH)\s+(\d+)", version_h.read_text("utf-8"))
    )
    return ".".join(found.get(part, "0") for part in ("MAJOR", "MINOR", "PATCH"))


def _output(*command: str) -> str:
    """What a program prints, on both streams."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_PROBE_TIMEOUT_S,
        check=True,
    )
    return done.stdout


# Reading what it says ---------------------------------------------------------------------------

ERROR_LINE = re.compile(
    r"^(?:.*(?:\d\)|\d): (?:catastrophic |fatal )?error\b.*:.*"  # cudafe++, cicc, g++
    r"|(?:nvcc|ptxas|nvlink|fatbinary|cicc)\b.*\b(?:error|fatal)\b.*:.*"
    r"|.*(?:Killed|Segmentation fault|internal error|internal compiler error).*)$",
    re.MULTILINE,
)
"""The line of nvcc's output that says what is wrong, among backtraces of templates."""

_WARNING = re.compile(r"^.*\bwarning\b.*:.*$", re.MULTILINE | re.IGNORECASE)
_LOSS = re.compile(r"Potential Performance Loss: (.+)")


@dataclass(frozen=True, slots=True)
class Usage:
    """What ptxas says kernels use, the most of all kernels in a source.

    Attributes:
        registers: per thread, at launch.
        spill_bytes: stored per thread because registers ran out.
        spill_load_bytes: loaded again.
        stack_bytes: local memory per thread.
        static_smem_bytes: shared memory that is not asked for at launch.
    """

    registers: int | None
    spill_bytes: int | None
    spill_load_bytes: int | None
    stack_bytes: int | None
    static_smem_bytes: int


def usage(output: str) -> Usage:
    """Read the output of `-Xptxas -v`."""
    return Usage(
        registers=_most(r"\bUsed (\d+) registers", output),
        spill_bytes=_most(r"(\d+) bytes spill stores", output),
        spill_load_bytes=_most(r"(\d+) bytes spill loads", output),
        stack_bytes=_most(r"(\d+) bytes stack frame", output),
        static_smem_bytes=_most(r"(\d+) bytes smem\b", output) or 0,
    )


def warnings(output: str) -> list[str]:
    """What the compilers warn of."""
    return [line.strip() for line in _WARNING.findall(output)]


def loss(output: str) -> str | None:
    """Why ptxas gave up what makes a kernel fast, such as overlapped wgmma; None: it did not."""
    found = _LOSS.search(output)
    return found[1].strip() if found else None


def _most(pattern: str, text: str) -> int | None:
    return max(map(int, re.findall(pattern, text)), default=None)
