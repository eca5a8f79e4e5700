"""How much Python does autoflash.attention() add to a bare launch?

Times, on the host, many calls of attention() and as many calls of the launch it ends in, with an
output made beforehand; the difference is what dispatch and the making of the output cost. The
problem is so small that its kernel takes next to nothing.

    python benchmarks/dispatch_overhead.py [--json] [--problem NAME] [--rounds N]

Exit code: 0 within the budget, 1 over it, 2 when no kernel serves the problem here.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from autoflash import attention, device
from autoflash.benchmark.runner import attention_options
from autoflash.codegen import ops
from autoflash.errors import AutoflashError
from autoflash.problem import Problem
from autoflash.runtime import serving
from autoflash.tuning.environment import environment
from autoflash.tuning.inputs import make_inputs

BUDGET_US = 5.0
CALLS = 200  # of one block: a stream takes about 1000 launches before the host has to wait


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problem", default="b1s1h1d64f", help="by name (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=101, help="blocks of each kind")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    try:
        result = measure(Problem.parse(options.problem), max(1, options.rounds))
    except AutoflashError as error:
        print(f"dispatch_overhead: {error}", file=sys.stderr)
        return 2
    if result is None:
        print("dispatch_overhead: PyTorch serves this problem; there is no launch", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name in ("attention_us", "launch_us", "overhead_us", "budget_us"):
            print(f"{name:13} {result[name]:6.2f}")
    return 0 if result["within_budget"] else 1


def measure(problem: Problem, rounds: int) -> dict[str, object] | None:
    """Medians over blocks of calls; None where no kernel serves the problem."""
    here = device.native()
    torch.set_num_threads(1)  # or a CPU kernel spends its time waking threads for nothing
    inputs = make_inputs(problem, here)
    q, k, v, causal = inputs.q, inputs.k, inputs.v, problem.causal
    options = attention_options(inputs)
    attention(q, k, v, **options)  # chooses and builds
    kernel = serving.dispatcher(q.device.type, q.device.index).serve(problem).kernel
    if kernel is None:
        return None
    launch = kernel.prepare(ops.fwd_scalars((q, k, v, inputs.out), "bshd", problem))
    q_address, k_address, v_address, out_address = (
        tensor.data_ptr() for tensor in (q, k, v, inputs.out)
    )
    scale = inputs.softmax_scale
    last = torch.cuda.current_stream().cuda_stream if here.is_cuda else 1

    descales = [descale.data_ptr() for descale in inputs.descales]

    def whole() -> None:
        if options.keys() == {"causal"}:  # as most write it; unpacking would take 0.1 us
            for _ in range(CALLS):
                attention(q, k, v, causal=causal)
        else:
            for _ in range(CALLS):
                attention(q, k, v, **options)

    def bare() -> None:
        addresses = (q_address, k_address, v_address, out_address, 0, *descales)
        for _ in range(CALLS):
            launch(*addresses, scale, last)

    def finish() -> None:
        if here.is_cuda:
            torch.cuda.synchronize()

    def block_us(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        finish()
        return took / CALLS * 1e6

    pairs = []
    gc.disable()
    for round_ in range(rounds + 3):
        # Which comes first alternates, so that neither always finds the other's state.
        order = (whole, bare) if round_ % 2 else (bare, whole)
        times = {run: block_us(run) for run in order}
        if round_ >= 3:  # the first ones warm up
            pairs.append((times[whole], times[bare]))
    gc.enable()
    overhead_us = statistics.median(one - other for one, other in pairs)
    return {
        "problem": problem.name,
        "attention_us": round(statistics.median(one for one, _ in pairs), 3),
        "launch_us": round(statistics.median(other for _, other in pairs), 3),
        "overhead_us": round(overhead_us, 3),
        "budget_us": BUDGET_US,
        "within_budget": overhead_us <= BUDGET_US,
        "rounds": rounds,
        "calls_per_round": CALLS,
        "environment": environment(here),
    }


if __name__ == "__main__":
    sys.exit(main())
