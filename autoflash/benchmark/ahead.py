"""What can be built before a comparison begins, many at a time? Compiling is not compared.

Kernels of autoflash are compiled into their cache, and Triton kernels of peers into Triton's. What
a peer chooses among by timing it chooses later, alone on the device: of these processes, which
share it, nothing is kept but binaries.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from autoflash import build, settings
from autoflash.benchmark.report import OURS
from autoflash.codegen import catalog
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.errors import AutoflashError
from autoflash.problem import Problem
from autoflash.tuning.peers import PEERS, available

_TIMEOUT_S = 300.0
"""Longest that one peer may take over one problem; then it compiles in its turn after all."""
_THREADS = "2"
"""Compilers of each process of a peer: its candidates are few, and one takes longest."""


def build_ahead(
    problems: Iterable[Problem],
    device: Device,
    providers: Sequence[str],
    *,
    on_start: Callable[[int], None] | None = None,
) -> int:
    """Build what the providers will need for the problems; failures show later, in their turn.

    Args:
        problems: what is compared on.
        device: where; it must be present.
        providers: who takes part.
        on_start: called with the number of builds, if there are any.

    Returns:
        How many builds were tried; none where one at a time is allowed (AUTOFLASH_JOBS), or one
        problem is compared on: nothing would be gained.
    """
    jobs, wanted = settings.get().jobs, list(problems)
    if jobs == 1 or len(wanted) == 1:
        return 0
    tasks: list[Callable[[], object]] = []
    languages: set[str] = set()
    if OURS in providers:
        sources = _sources(wanted, device)
        languages = {source.language for source in sources}
        tasks += [partial(_compile, source, device) for source in sources]
    slow = [PEERS[name] for name in providers if name in PEERS and PEERS[name].builds_with_triton]
    tasks += [
        partial(_run_in_child, peer.name, problem)
        for peer in slow
        for problem in wanted
        if device.is_cuda and peer.unavailable(problem, device) is None
    ]
    if on_start and tasks:
        on_start(len(tasks))
    with ThreadPoolExecutor(build.jobs_within_memory(jobs, languages, device)) as pool:
        return len(list(pool.map(lambda task: task(), tasks)))


def _sources(problems: Iterable[Problem], device: Device) -> list[Source]:
    """What autoflash will serve the problems with, each source once."""
    from autoflash.runtime.explain import explain

    found: dict[str, Source] = {}
    for problem in problems:
        config = explain(problem, device, count=0).config
        if config is not None:
            source = catalog.installed().get(config.template).render(config, problem, device)
            found[source.digest] = source
    return list(found.values())


def _compile(source: Source, device: Device) -> None:
    try:
        build.compile_source(source, device)
    except AutoflashError:  # the dispatcher warns of it and takes the next
        return


def _run_in_child(peer: str, problem: Problem) -> None:
    """Let a peer compile in a process that leaves no trace but in Triton's cache."""
    call = f"from {__name__} import run_once; run_once({peer!r}, {problem.name!r})"
    with tempfile.TemporaryDirectory(prefix="autoflash-ahead-") as scratch:
        try:
            subprocess.run(
                [sys.executable, "-c", call],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
                    "TORCHINDUCTOR_CACHE_DIR": scratch,
                    "TRITON_CACHE_DIR": _triton_cache(),
                    "TORCHINDUCTOR_COMPILE_THREADS": _THREADS,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return


def _triton_cache() -> str:
    """Where this process will look for the binaries of kernels that PyTorch generates."""
    import torch

    places = importlib.import_module("torch._inductor.runtime.cache_dir_utils")
    return str(places.triton_cache_dir(torch.cuda.current_device()))


def run_once(peer: str, name: str) -> None:
    """In the child: one call of a peer, which compiles all that it may choose among."""
    from autoflash import device as devices
    from autoflash.tuning.inputs import make_inputs

    problem, here = Problem.parse(name), devices.native()
    inputs = make_inputs(problem, here)
    available(problem, here, inputs.q, inputs.k, inputs.v, [peer], descales=inputs.descales)
