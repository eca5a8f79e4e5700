"""What this machine can do: what is here, what is missing, what that costs, what to do next.

Every probe copes with anything being absent: no GPU, no compiler, no torch, a read-only cache.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import autoflash
from autoflash import settings
from autoflash.device import Device
from autoflash.errors import AutoflashError

_PROBE_TIMEOUT_S = 20
_OPENMP = (
    "#include <omp.h>\n"
    'extern "C" int probe() {\n'
    "  int n = 0;\n"
    "#pragma omp parallel reduction(+ : n)\n"
    "  n += omp_get_num_threads() > 0;\n"
    "  return n;\n"
    "}\n"
)
_LIBRARIES = ("jinja2", "sqlalchemy", "alembic", "optuna", "filelock")
_PEERS = {"flash_attn": "fa2", "flash_attn_interface": "fa3", "flash_attn.cute": "fa4"}
"""Module of an attention library that `bench` can set beside ours -> what it is called there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: its name.
        status: "ok", "missing" (something cannot be done), "absent" (it would add something) or
            "broken" (it is there and does not work).
        found: what is there, or why it does not work.
        costs: what cannot be done without it; empty if it is there.
        next_step: what to do about it; empty if it is there.
    """

    what: str
    status: str
    found: str
    costs: str = ""
    next_step: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, and what follows from them.

    Attributes:
        findings: in the order of what depends on what.
        can: what works on this machine.
        next_step: the command to try now.
    """

    findings: tuple[Finding, ...]
    can: tuple[str, ...]
    next_step: str

    @property
    def is_useful(self) -> bool:
        """Whether autoflash can do anything here."""
        return bool(self.can)


def diagnose() -> Diagnosis:
    """Look at everything."""
    device = _device()
    gpu = isinstance(device, Device) and device.is_cuda
    probes: tuple[Callable[[], Finding], ...] = (
        _python, _torch, lambda: _gpu(device), _cpu, _triton, lambda: _triton_compiler(gpu),
        _libraries, _cxx, _ninja, lambda: _nvcc(gpu), _cache, _database, _templates,
        lambda: _packs(device), _peers,
    )  # fmt: skip
    findings = tuple(_safely(probe) for probe in probes)
    ok = {finding.what for finding in findings if finding.status == "ok"}
    can = tuple(_abilities(ok, gpu))
    if not can:
        broken = next((f for f in findings if f.status in ("missing", "broken")), None)
        step = broken.next_step if broken else "reinstall autoflash"
    elif any(ability.startswith("tune") for ability in can):
        step = "autoflash tune"
    else:
        step = "autoflash tune --arch sm80 --head-dim 128"
    return Diagnosis(findings, can, step)


def _safely(probe: Callable[[], Finding]) -> Finding:
    """A probe that fails in an unforeseen way is a finding too: doctor must always answer."""
    try:
        return probe()
    except Exception as error:
        name = getattr(probe, "__name__", "probe").strip("_<>")
        return Finding(name, "broken", f"{type(error).__name__}: {error}", "unknown", "report it")


def _abilities(ok: set[str], gpu: bool) -> Iterator[str]:
    if not {"templates", "torch", "libraries"} <= ok:
        return
    if {"C++ compiler", "ninja"} <= ok:
        yield "tune and serve attention on this CPU"
    if "triton" in ok:
        if gpu and "compiler for Triton" in ok:
            yield "tune and serve attention on this GPU"
        yield "plan, compile and rank kernels for sm80 to sm120 (no GPU needed)"


# Probes -----------------------------------------------------------------------------------------


def _python() -> Finding:
    found = f"autoflash {autoflash.__version__}, Python {platform.python_version()}"
    return Finding("python", "ok", f"{found}, {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    step = "pip install 'torch>=2.11'"
    try:
        import torch
    except Exception as error:  # a broken install raises OSError, RuntimeError, ...
        status = "missing" if isinstance(error, ModuleNotFoundError) else "broken"
        return Finding("torch", status, str(error), "nothing can be tuned or served", step)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding(
        "torch", "ok", f"{torch.__version__} ({built}), {torch.get_num_threads()} threads"
    )


def _device() -> Device | Exception:
    from autoflash import device as devices

    try:
        return devices.native()
    except Exception as error:
        return error


def _gpu(device: Device | Exception) -> Finding:
    costs = "GPU kernels are not timed: for --arch sm80 and so on winners are predicted"
    if isinstance(device, Exception):
        return Finding("GPU", "broken", str(device), costs, "see torch above")
    if device.is_cuda:
        smem = device.smem_bytes_per_block // 1024
        found = f"{device.name}, {device.arch}, {device.num_sms} SMs, {smem} KiB per block"
        return Finding("GPU", "ok", found)
    smi = shutil.which("nvidia-smi")
    if smi and _output(smi, "-L").startswith("GPU"):
        step = "install a CUDA build of torch that fits the driver (pytorch.org/get-started)"
        return Finding("GPU", "missing", "there is one, but torch cannot use it", costs, step)
    return Finding("GPU", "absent", "none found", costs)


def _cpu() -> Finding:
    from autoflash import device as devices

    cpu = devices.for_arch("cpu")
    isa = ", ".join(cpu.isa) or "none of the vector extensions that templates know"
    found = f"{cpu.name}, {cpu.num_sms} cores, {isa}"
    if "avx2" in cpu.isa:
        return Finding("CPU", "ok", found)
    return Finding("CPU", "ok", found, "CPU kernels run without AVX2, several times slower")


def _triton() -> Finding:
    costs = "no Triton templates: on a GPU attention() falls back to PyTorch"
    step = "pip install 'triton>=3.6,<3.10' (Linux, x86-64)"
    if importlib.util.find_spec("triton") is None:
        return Finding("triton", "missing", "not installed", costs, step)
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("triton", "ok", "version unknown (a source build)")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if (3, 6) <= numbers < (3, 10):
        return Finding("triton", "ok", version)
    return Finding("triton", "broken", f"{version} is outside 3.6 to 3.9", costs, step)


def _triton_compiler(gpu: bool) -> Finding:
    what = "compiler for Triton"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and header.is_file():
        return Finding(what, "ok", f"{compiler}, {header}")
    lacks = "no C compiler" if not compiler else f"{header} does not exist"
    costs = "Triton cannot load kernels onto a GPU: attention() falls back to PyTorch"
    step = "apt-get install gcc python3-dev, or your system's equal"
    if gpu:
        return Finding(what, "missing", lacks, costs, step)
    return Finding(what, "absent", lacks, "nothing here: only a machine with a GPU needs it")


def _libraries() -> Finding:
    lacking = [name for name in _LIBRARIES if not _installed(name)]
    if lacking:
        costs = "nothing can be generated or tuned; attention() uses PyTorch"
        step = f"pip install {' '.join(lacking)}, or install autoflash with its dependencies"
        return Finding("libraries", "missing", ", ".join(lacking), costs, step)
    return Finding("libraries", "ok", ", ".join(_LIBRARIES))


def _cxx() -> Finding:
    cxx = settings.get().cxx
    costs = "no CPU kernels: attention() on CPU tensors uses PyTorch, the CPU cannot be tuned"
    step = "apt-get install g++ (or your system's equal), or name one in AUTOFLASH_CXX"
    if shutil.which(cxx) is None:
        return Finding("C++ compiler", "missing", f"{cxx} is not on PATH", costs, step)
    version = _output(cxx, "--version").partition("\n")[0]
    with tempfile.TemporaryDirectory(prefix="autoflash-doctor-") as scratch:
        source = Path(scratch) / "probe.cpp"
        source.write_text(_OPENMP, encoding="utf-8")
        command = [cxx, "-shared", "-fPIC", "-fopenmp", "-o", f"{scratch}/probe.so", str(source)]
        log = _failure(command)
    if log is None:
        return Finding("C++ compiler", "ok", f"{version}, OpenMP works")
    first = log.strip().partition("\n")[0]
    return Finding("C++ compiler", "broken", f"{version}: {first}", costs, step)


def _ninja() -> Finding:
    # The Python package puts its program into the environment's bin, which need not be on PATH.
    program = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if program is None and importlib.util.find_spec("ninja") is None:
        costs = "no C++ kernels: attention() on CPU tensors uses PyTorch"
        return Finding("ninja", "missing", "not installed", costs, "pip install ninja")
    return Finding("ninja", "ok", program or "the Python package")


def _nvcc(gpu: bool) -> Finding:
    """One of three states: CUDA kernels can be built; those built elsewhere run; neither."""
    from autoflash.build import cuda, nvcc

    cuda_templates = [t.name for t in _catalog_or_empty() if t.language == "cuda"]
    lacks = nvcc.unavailable()
    if lacks is None:
        compiler, headers = nvcc.compiler(), nvcc.headers()
        found = f"{compiler.command} {compiler.version}, CUTLASS {headers.version}"
        return Finding("nvcc", "ok", f"can build: {found}")
    built = cuda.built_kernels()
    listed = ", ".join(f"{count} for {arch}" for arch, count in sorted(built.items()))
    state = f"binaries only: {listed}" if built else "neither a compiler nor built kernels"
    found = f"{state}; it would take {lacks}"
    if not cuda_templates:
        return Finding("nvcc", "absent", found, "nothing here: no installed template needs it")
    names = ", ".join(cuda_templates)
    if built:
        costs = f"{names}: what is built runs, nothing else can be built or tuned"
    else:
        costs = f"{names} cannot be built; other templates serve instead"
    step = (
        "pip install 'autoflash[cuda,nvcc]' and g++, or install the CUDA toolkit, or copy the "
        "cache directory of a machine with a GPU of this kind that has them"
    )
    return Finding("nvcc", "missing" if gpu else "absent", found, costs, step)


def _cache() -> Finding:
    root = settings.get().cache_dir
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".doctor-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        costs = "kernels are built again in every process, and tuning results need --database"
        step = "set AUTOFLASH_CACHE_DIR to a directory that can be written"
        return Finding("cache", "broken", f"cannot write to {root}: {error.strerror}", costs, step)
    kernels = sum(1 for _ in root.glob("kernels/??/*"))
    free_gib = shutil.disk_usage(root).free / 2**30
    found = f"{root}, {kernels} kernels, {free_gib:.1f} GiB free"
    if free_gib < 0.5:
        costs = "a tuning run may stop for lack of space"
        return Finding("cache", "broken", found, costs, "free some, or set AUTOFLASH_CACHE_DIR")
    return Finding("cache", "ok", found)


def _database() -> Finding:
    from autoflash.database import Database

    costs = "attention() uses template defaults, nothing that is tuned is kept"
    step = "see the message, or name another one in AUTOFLASH_DATABASE"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are said here
            with Database.open() as database:
                facts, obstacle = database.summary(), database.obstacle
    except AutoflashError as error:
        return Finding("database", "broken", str(error), costs, step)
    found = f"{facts['place']}, {facts['best']} best records, {facts['trial']} trials"
    if obstacle:
        costs = "what is in it is served, but nothing can be tuned"
        return Finding("database", "broken", f"{found}: {obstacle}", costs, step)
    return Finding("database", "ok", found)


def _templates() -> Finding:
    from autoflash.codegen import catalog

    try:
        names = sorted(catalog.installed().templates)
    except AutoflashError as error:
        costs = "no kernel can be generated: attention() uses PyTorch"
        step = "correct the file; without AUTOFLASH_TEMPLATES, reinstall autoflash"
        return Finding("templates", "broken", str(error), costs, step)
    if not names:
        where = settings.get().templates_dir
        return Finding(
            "templates", "missing", f"none below {where}", "no kernels", "reinstall autoflash"
        )
    return Finding("templates", "ok", ", ".join(names))


def _packs(device: Device | Exception) -> Finding:
    folder = settings.get().tuning_db_dir
    packs = sorted(path.name for path in folder.glob("*.jsonl"))
    if isinstance(device, Device) and f"{device.slug}.jsonl" in packs:
        return Finding("reviewed records", "ok", f"{device.slug}.jsonl is for this device")
    found = f"of other devices: {', '.join(packs)}" if packs else f"none in {folder}"
    costs = "before it is tuned, this device is served by template defaults"
    return Finding("reviewed records", "absent", found, costs, "autoflash tune")


def _peers() -> Finding:
    here = [name for module, name in _PEERS.items() if _installed(module)]
    if here:
        return Finding("peers", "ok", f"beside PyTorch's own: {', '.join(here)}")
    costs = "`autoflash bench` compares with PyTorch's own attention only"
    return Finding("peers", "absent", "no other attention library", costs)


# Small tools ------------------------------------------------------------------------------------


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _catalog_or_empty() -> list[autoflash.codegen.template.Template]:
    from autoflash.codegen import catalog

    try:
        return list(catalog.installed().templates.values())
    except AutoflashError:
        return []  # said by _templates


def _output(*command: str) -> str:
    """What a program prints; empty if it fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _failure(command: list[str]) -> str | None:
    """What a program says when it fails; None if it does not."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (done.stderr or f"exit status {done.returncode}") if done.returncode else None
