"""How much does a launch from Python cost above the driver's own?

For each language of GPU templates: kernel.prepare(...)() in a Python loop beside cuLaunchKernel in
a C loop, of an empty kernel that takes as many bytes of parameters and has one block of
as many threads. Where a kernel has a C launcher, that launcher in a C loop too, so that its share
(TMA descriptors, attributes) is seen. All of them take turns; the device is idle between blocks.

    python benchmarks/launch_overhead.py [--json FILE] [--problem NAME] [--rounds N]

Exit code: 0 within the budget, 1 over it, 2 when nothing could be measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from autoflash import build, device, settings
from autoflash.build import library
from autoflash.codegen import ops
from autoflash.codegen.catalog import installed
from autoflash.device import Device
from autoflash.errors import AutoflashError
from autoflash.problem import Problem
from autoflash.tuning.environment import environment
from autoflash.tuning.inputs import make_inputs

BUDGET_US = 3.0
CALLS = 200  # of one block: a stream takes about 1000 launches before the host has to wait
LANGUAGES = ("python", "cuda")

# Loops that no interpreter takes part in. cuLaunchKernel is looked up in the driver that is loaded.
LOOPS = r"""
#include <chrono>
#include <cstdint>
#include <dlfcn.h>
using Clock = std::chrono::steady_clock;
using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       void*, void**, void**);

static double us_since(Clock::time_point start, int calls) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count() / calls;
}

// cuLaunchKernel of `function`, whose one parameter is a block of bytes; negative: its error.
extern "C" double driver_loop(void* function, const unsigned* grid, unsigned threads,
                              unsigned smem, void* stream, int calls) {
  static Launch launch = (Launch)dlsym(dlopen("libcuda.so.1", RTLD_LAZY), "cuLaunchKernel");
  if (!launch) return -1;
  char bytes[4096] = {};
  void* parameters[] = {bytes};
  const auto start = Clock::now();
  for (int i = 0; i < calls; ++i) {
    const int code = launch(function, grid[0], grid[1], grid[2], threads, 1, 1, smem, stream,
                            parameters, nullptr);
    if (code) return -code;
  }
  return us_since(start, calls);
}

// The launcher of a library, called with what LOOP_TYPES declares.
extern "C" double launcher_loop(int (*launch)(const int64_t*, LOOP_TYPES, float, void*),
                                const int64_t* scalars, void** p, float scale, void* stream,
                                int calls) {
  const auto start = Clock::now();
  for (int i = 0; i < calls; ++i) {
    const int code = launch(scalars, LOOP_VALUES, scale, stream);
    if (code) return -code;
  }
  return us_since(start, calls);
}
"""
EMPTY = """
.version 7.0
.target sm_80
.address_size 64
.visible .entry empty(.param .align 64 .b8 bytes[{size}]) {{ ret; }}
"""


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problem", default="b1s1h1d64f-bfloat16", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=101, help="blocks of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("launch_overhead: there is no CUDA device here", file=sys.stderr)
        return 2
    here = device.native()
    problem = Problem.parse(options.problem)
    rows, failures = [], {}
    for name, template in sorted(installed().templates.items()):
        if template.language not in LANGUAGES or template.refusal(problem, here) is not None:
            continue
        try:
            config = template.default_config(problem, here)
            kernel = build.build(template.render(config, problem, here), here)
            row = measure(kernel, problem, here, max(1, options.rounds))
            rows.append({"template": name, "config": str(config), **row})
        except AutoflashError as error:
            failures[name] = str(error)
    for name, reason in failures.items():
        print(f"launch_overhead: {name}: {reason}", file=sys.stderr)
    if not rows:
        print("launch_overhead: no kernel could be measured", file=sys.stderr)
        return 2
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": here.to_dict(),
        "environment": environment(here),
        "problem": problem.name,
        "budget_us": BUDGET_US,
        "calls_per_round": CALLS,
        "rounds": max(1, options.rounds),
        "rows": rows,
        "failures": failures,
    }
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["within_budget"] for row in rows) else 1


def show(report: dict[str, Any]) -> None:
    """The result as a table."""
    columns = ("driver_us", "launcher_us", "python_us", "above_us")
    print(f"{report['device']['name']}, {report['date'][:10]}, {report['problem']}, medians in us")
    print(f"{'template':<20}" + "".join(f"{name.removesuffix('_us'):>10}" for name in columns))
    for row in report["rows"]:
        cells = (
            f"{row[name]:10.2f}" if row[name] is not None else f"{'-':>10}" for name in columns
        )
        print(f"{row['template']:<20}" + "".join(cells))
    print(f"budget of Python above the driver: {report['budget_us']} us")


def measure(kernel: build.Kernel, problem: Problem, here: Device, rounds: int) -> dict[str, Any]:
    """Medians of one kernel, over blocks of calls."""
    inputs = make_inputs(problem, here)
    op = ops.get(problem.op)
    scalars = ops.fwd_scalars((inputs.q, inputs.k, inputs.v, inputs.out), "bshd", problem)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "out": inputs.out}
    pointers = [
        tensors[argument.name].data_ptr() if argument.name in tensors else 0
        for argument in op.pointers
    ]
    scale = inputs.softmax_scale
    stream = torch.cuda.current_stream().cuda_stream
    launch = kernel.prepare(scalars)
    launch(*pointers, scale, stream)
    torch.cuda.synchronize()

    loops = compiled_loops(len(pointers))
    threads = kernel.resources.num_threads or 128
    size = parameter_bytes(op)
    empty = empty_kernel(size)
    grid = (ctypes.c_uint * 3)(1, 1, 1)
    smem = min(kernel.resources.smem_bytes or 0, 48 << 10)  # more has to be asked for first

    def driver() -> float:
        return checked(loops.driver_loop(empty, grid, threads, smem, stream, CALLS))

    def python() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            launch(*pointers, scale, stream)
        return (time.perf_counter() - start) / CALLS * 1e6

    calls: dict[str, Callable[[], float]] = {"driver": driver, "python": python}
    if kernel.artifact.source.language == "cuda":
        opened = library.open_library(kernel.artifact.directory)
        address = ctypes.cast(opened.launch_bound, ctypes.c_void_p)
        bound = library.bound_array(op, scalars)
        listed = (ctypes.c_void_p * len(pointers))(*pointers)

        def launcher() -> float:
            return checked(loops.launcher_loop(address, bound, listed, scale, stream, CALLS))

        calls["launcher"] = launcher
    times = take_turns(calls, rounds)
    pairs = zip(times["python"], times["driver"], strict=True)
    above_us = statistics.median(one - other for one, other in pairs)
    median = {name: round(statistics.median(found), 3) for name, found in times.items()}
    return {
        "language": kernel.artifact.source.language,
        "driver_us": median["driver"],
        "launcher_us": median.get("launcher"),
        "python_us": median["python"],
        "above_us": round(above_us, 3),
        "within_budget": above_us <= BUDGET_US,
        "parameter_bytes": size,
    }


def take_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Microseconds per call of each, block by block, in an order that alternates."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for round_ in range(rounds + 3):
        for name in sorted(calls, reverse=bool(round_ % 2)):
            took = calls[name]()
            torch.cuda.synchronize()
            if round_ >= 3:  # the first ones warm up
                times[name].append(took)
    gc.enable()
    return times


def checked(us: float) -> float:
    """A time, or the error that a loop returned instead."""
    if us < 0:
        raise RuntimeError(f"a launch of the loop in C returned {-us:.0f}")
    return us


def parameter_bytes(op: ops.Op) -> int:
    """Bytes of an op's whole argument list as kernel parameters."""
    sizes = {"int32": 4, "float32": 4, "scale": 4}
    return sum(sizes.get(argument.kind, 8) for argument in op.arguments)


def compiled_loops(num_pointers: int) -> ctypes.CDLL:
    """The loops in C, compiled for launchers of so many pointers."""
    types = ", ".join(["const void*"] * num_pointers)
    values = ", ".join(f"p[{index}]" for index in range(num_pointers))
    text = f"#define LOOP_TYPES {types}\n#define LOOP_VALUES {values}\n{LOOPS}"
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "loops.cpp", Path(folder) / "loops.so"
        source.write_text(text, encoding="utf-8")
        command = [settings.get().cxx, "-O2", "-shared", "-fPIC", source, "-o", output, "-ldl"]
        subprocess.run(command, check=True)
        loops = ctypes.CDLL(str(output))
    loops.driver_loop.restype = loops.launcher_loop.restype = ctypes.c_double
    pointer, unsigned, number = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
    loops.driver_loop.argtypes = [pointer, pointer, unsigned, unsigned, pointer, number]
    loops.launcher_loop.argtypes = [pointer, pointer, pointer, ctypes.c_float, pointer, number]
    return loops


def empty_kernel(size: int) -> int:
    """A CUfunction that takes `size` bytes of parameters and does nothing."""
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    text = EMPTY.format(size=size).encode()
    code = driver.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(text))
    code = code or driver.cuModuleGetFunction(ctypes.byref(function), module, b"empty")
    if code or not function.value:
        raise RuntimeError(f"the driver did not load the empty kernel: error {code}")
    return function.value


if __name__ == "__main__":
    sys.exit(main())
