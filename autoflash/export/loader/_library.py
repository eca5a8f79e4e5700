"""From a shared library of CUDA or C++ to what launches its kernel, by ctypes."""

from __future__ import annotations

import ctypes
import json
import re
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from ._load import Bind, Launch, NoLibrary, Tensors, address, content, memory, stream
from ._table import HERE, table


def load(name: str, index: int) -> Bind:
    """The library of a kernel, with its code on a device."""
    facts = table()["kernels"][name]
    on_cpu = facts["language"] == "cpp"
    library = _open(f"{name}.so", on_cpu)
    sized = hasattr(library, "workspace_bound")
    if sized:
        library.workspace_bound.restype = ctypes.c_int64
    pointers = len(facts["pointers"]) + sized
    start = library.launch_bound
    last = ctypes.c_int if on_cpu else ctypes.c_void_p
    start.argtypes = [ctypes.c_void_p] * (1 + pointers) + [ctypes.c_float, last]

    def bind(scalars: Sequence[float]) -> Launch:
        *whole, softcap = scalars  # as they are, and by its bits
        words = [*map(int, whole), *struct.unpack("<i", struct.pack("<f", softcap))]
        array = (ctypes.c_int64 * len(words))(*words)
        at = ctypes.c_void_p(ctypes.addressof(array))
        num_bytes = library.workspace_bound(at) if sized else 0

        # `alive`: what `at` points to.
        def launch(tensors: Tensors, scale: float, alive: object = array) -> None:
            parts = (memory(num_bytes, index) if num_bytes else None,) if sized else ()
            word = torch.get_num_threads() if on_cpu else stream(index)
            if code := start(at, *[address(each) for each in (*tensors, *parts)], scale, word):
                raise RuntimeError(f"{name}: its launch returned {code}{_meaning(library, code)}")

        return launch

    if not on_cpu:
        # Over no rows: starts nothing, but loads the code, which may not be done while a CUDA
        # graph is captured.
        with torch.cuda.device(index):
            bind([0] + [1] * (facts["num_scalars"] - 1))([None] * len(facts["pointers"]), 1.0)
    return bind


def _open(file: str, on_cpu: bool) -> ctypes.CDLL:
    path = HERE / "kernels" / file
    command = table()["commands"][path.stem]
    if not path.is_file():
        raise NoLibrary(f"{path} is not built. In its folder, run: {command}")
    listed = HERE / "kernels" / "libraries.json"
    shipped = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    if file in shipped:  # else whoever installed the sources built it
        content(file, shipped[file])
    try:
        if on_cpu:
            _openmp()
        return ctypes.CDLL(str(path))
    except OSError as error:  # for another processor, system, libc or CUDA
        raise NoLibrary(
            f"{path} was not built for this machine ({error}). To do so, delete libraries.json in "
            f"its folder and run there: {command}"
        ) from error


def _meaning(library: ctypes.CDLL, code: int) -> str:
    if not hasattr(library, "launch_error"):
        return ""
    library.launch_error.restype = ctypes.c_char_p
    return f": {(library.launch_error(code) or b'').decode()}"


@cache
def _openmp() -> None:
    """Let kernels, which are linked to none, use the OpenMP runtime that PyTorch has loaded.

    A second one would keep a second pool of threads, which spin where the first wants to compute.
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    loaded = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so\S*)$", maps, re.MULTILINE)
    path = min(loaded, key=lambda each: "/torch" not in each, default="libgomp.so.1")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
