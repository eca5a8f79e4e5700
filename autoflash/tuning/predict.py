"""Predict: how long a compiled config would take on a device that is not here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoflash.build.kernel import Resources
from autoflash.config import Config
from autoflash.device import Device
from autoflash.problem import Problem

MODEL = "model-2"
"""Names this model as records' policy: predictions of different models are never compared."""

HEAVY_SPILL_BYTES = 512
"""Local memory per thread from which a kernel is not worth launching. To be calibrated."""

_LAUNCH_US = 3.0
_EXP_PER_CLOCK = 16  # MUFU.EX2 per SM: 4 per scheduler and clock on every arch since Volta
_SMEM_BYTES_PER_CLOCK = 128
_L2_BYTES_PER_CLOCK = 30  # per SM; 7.1 TB/s measured on an H200 with tiles of 16 and 64 rows
_MATRIX_SHARE = 0.75  # of the peak, under the power limit: what cuBLAS reaches on an H200
_LOAD_LATENCY_CLOCKS = 700  # a global load that hits L2, issue to use
_SOFTCAP_OPS, _SOFTCAP_EXPS = 5, 2  # per score: a tanh made of exp2 and a reciprocal
_VECTOR_OPS = 7  # per score: scale, max, subtract, sum, convert and what addresses cost
_REDUCTION_OPS = 32
_BLOCKS_PER_SM = 32
_SMEM_RESERVED = 1024  # the driver's own, per block, on sm80 and up


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How many thread blocks one multiprocessor holds, and what stops it from holding more.

    Attributes:
        blocks: resident thread blocks; 0 if not even one fits.
        warps: resident warps.
        limit: "registers", "shared memory", "threads" or "blocks".
    """

    blocks: int
    warps: int
    limit: str


def occupancy(device: Device, *, registers: int, smem_bytes: int, num_threads: int) -> Occupancy:
    """The resident blocks that registers, shared memory and threads allow."""
    warps = math.ceil(num_threads / 32)
    # Registers are given out per warp in units of 256.
    per_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    limits = {
        "registers": device.registers_per_sm // (per_warp * warps),
        "shared memory": device.smem_bytes_per_sm // (smem_bytes + _SMEM_RESERVED),
        "threads": device.threads_per_sm // (warps * 32),
        "blocks": _BLOCKS_PER_SM,
    }
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit] if smem_bytes <= device.smem_bytes_per_block else 0
    return Occupancy(blocks, blocks * warps, limit)


def over_resources(resources: Mapping[str, Any], device: Device) -> str | None:
    """Why a compiled kernel cannot be launched on `device`, or None: limits, not taste."""
    if not device.is_cuda:
        return None
    smem = resources.get("smem_bytes") or 0
    if smem > device.smem_bytes_per_block:
        return (
            f"{smem} bytes of shared memory per block; the device has {device.smem_bytes_per_block}"
        )
    registers, threads = resources.get("registers") or 0, resources.get("num_threads") or 0
    if registers * threads > device.registers_per_sm:
        return (
            f"{registers} registers x {threads} threads; a block may have {device.registers_per_sm}"
        )
    return None


def spills_heavily(resources: Mapping[str, Any], device: Device) -> str | None:
    """Why a kernel is not worth a launch though it could be launched, or None."""
    # Arrays that are indexed by variables lie in local memory too, and count as no spill.
    local = max(resources.get("spill_bytes") or 0, resources.get("stack_bytes") or 0)
    if device.is_cuda and local > HEAVY_SPILL_BYTES:
        return (
            f"{local} bytes per thread lie in local memory; from {HEAVY_SPILL_BYTES} up it cannot "
            "be fast"
        )
    return None


def predict(
    problem: Problem,
    config: Config,
    device: Device,
    derived: Mapping[str, Any],
    resources: Resources | None,
) -> float:
    """Estimated latency of one call in microseconds: to rank configs, not to promise times.

    One thread block works through the keys of one tile of `block_m` queries; its clocks are the
    largest of its demands (matrix units, exponentials, vector operations, shared memory, L2) plus
    what too few resident warps leave unhidden of the others. Blocks then fill the device in waves;
    under a causal mask the last and longest decide when it ends. Where keys are shared out, as many
    blocks work on a tile as the device holds, and a second kernel adds what they found.

    Args:
        problem: what is asked.
        config: its tunables block_m, block_n, num_warps, num_stages, num_consumer_warpgroups,
            ctas_per_sm, pack_gqa and num_splits are read where it has them.
        device: a GPU.
        derived: the template's derived values; smem_bytes, block_d and, where they are no tunables,
            block_m and num_threads are read.
        resources: what the compiler said; None before compilation, when registers are estimated.

    Returns:
        Microseconds; infinite where the kernel cannot be resident on the device, or the device
        multiplies no such dtype.
    """
    assert device.is_cuda
    tile = _tile(problem, config, derived, resources)
    held = occupancy(
        device, registers=tile.registers, smem_bytes=tile.smem_bytes, num_threads=tile.num_threads
    )
    if not held.blocks or not device.tflops_peak(problem.dtype):
        return math.inf
    tiles_m = math.ceil(problem.seqlen_q * tile.heads / tile.block_m)
    tiles = tiles_m * problem.batch * (problem.num_heads // tile.heads)
    if not tiles:
        return _LAUNCH_US
    keys = [_visible_keys(problem, tile, index) for index in range(tiles_m)]
    parts = 1
    if config.get("num_splits", 1) == 0:
        parts = max(1, min(held.blocks * device.num_sms // tiles, max(keys) // tile.block_n))
        keys = [math.ceil(each / parts / tile.block_n) * tile.block_n for each in keys]
    programs = tiles * parts
    # Persistent kernels say how many of them there are per multiprocessor.
    resident = int(config.get("ctas_per_sm", 0)) or held.blocks
    blocks = min(held.blocks, resident, math.ceil(programs / device.num_sms))
    clocks_per_key = _clocks_per_key(problem, tile, device, blocks)
    start = 2 * _LOAD_LATENCY_CLOCKS + tile.block_m * tile.width / _L2_BYTES_PER_CLOCK
    mean = clocks_per_key * sum(keys) / tiles_m + start / blocks
    longest = clocks_per_key * max(keys) + start / blocks
    # A multiprocessor finishes one tile per `mean` clocks, `blocks` of them under way at once.
    rounds = programs / device.num_sms
    even = math.ceil(rounds) if max(keys) == min(keys) else rounds
    clocks = even * mean
    if max(keys) > min(keys):
        # Tiles of unlike length fill the gaps of a wave, but the last to start runs on alone.
        clocks = max(clocks + 0.5 * longest, longest)
    compute_us = clocks / (device.clock_ghz * 1e3)
    memory_us = problem.bytes / (device.memory_gbps * 1e3)
    return _LAUNCH_US + max(compute_us, memory_us) + _combine_us(problem, device, parts)


def _combine_us(problem: Problem, device: Device, parts: int) -> float:
    """What it costs to write float32 sums of so many parts, and to add them in a second kernel."""
    if parts == 1:
        return 0.0
    rows = problem.batch * problem.seqlen_q * problem.num_heads
    workspace = 4 * parts * rows * (problem.head_dim_v + 2)
    return _LAUNCH_US + 2 * workspace / (device.memory_gbps * 1e3)


@dataclass(frozen=True, slots=True)
class _Tile:
    """The figures of one thread block; `width` is bytes of one q, k or v row as computed.

    `warps` multiply; there are more threads than theirs where a warp only loads. Its rows are those
    of `heads` query heads.
    """

    block_m: int
    block_n: int
    num_stages: int
    num_threads: int
    warps: int
    head_dims: int
    width: int
    smem_bytes: int
    registers: int
    spill_bytes: int
    heads: int


def _tile(
    problem: Problem, config: Config, derived: Mapping[str, Any], resources: Resources | None
) -> _Tile:
    block_m = int(config.get("block_m", derived.get("block_m", 128)))
    block_n = int(config.get("block_n", 64))
    num_stages = int(config.get("num_stages", 2))
    threads = resources.num_threads if resources else None
    num_threads = int(threads or derived.get("num_threads") or 32 * int(config.get("num_warps", 4)))
    warps = 4 * int(config.get("num_consumer_warpgroups", 0)) or num_threads // 32
    # Matrix instructions take multiples of 16; templates that pad further say so as block_d.
    padded = int(derived.get("block_d", math.ceil(problem.head_dim / 16) * 16))
    padded_v = int(derived.get("block_d_v", math.ceil(problem.head_dim_v / 16) * 16))
    width = max(padded, padded_v) * problem.element_size
    smem = resources.smem_bytes if resources else None
    if smem is None:
        ring = num_stages * block_n * (padded + padded_v) * problem.element_size
        smem = int(derived.get("smem_bytes", block_m * padded * problem.element_size + ring))
    registers = resources.registers if resources else None
    spill = (resources.spill_bytes or 0) if resources else 0
    if not registers:
        # Output and score accumulators, the probabilities in 16 bits, and about 40 of bookkeeping.
        live = block_m * (padded_v + 1.5 * block_n) / num_threads + 40
        registers = math.ceil(min(live, 255))
        spill += math.ceil(max(live - 255, 0)) * 4
    return _Tile(
        block_m=block_m, block_n=block_n, num_stages=num_stages, num_threads=num_threads,
        warps=warps, head_dims=padded + padded_v, width=width, smem_bytes=smem,
        registers=registers, spill_bytes=spill,
        heads=problem.group_size if config.get("pack_gqa") else 1,
    )  # fmt: skip


def _visible_keys(problem: Problem, tile: _Tile, index: int) -> int:
    """Keys that the tile of query rows from index * block_m goes through, in whole blocks."""
    first, end = 0, problem.seqlen_k
    offset = problem.seqlen_k - problem.seqlen_q
    right = 0 if problem.causal else problem.window_right
    if right is not None:
        last_row = min(((index + 1) * tile.block_m - 1) // tile.heads, problem.seqlen_q - 1)
        end = min(end, max(0, last_row + 1 + offset + right))
    if problem.window_left is not None:
        first_row = index * tile.block_m // tile.heads
        first = max(0, first_row + offset - problem.window_left)
    blocks = math.ceil(end / tile.block_n) - min(first, end) // tile.block_n
    return blocks * tile.block_n


def _clocks_per_key(problem: Problem, tile: _Tile, device: Device, blocks: int) -> float:
    """Clocks a multiprocessor needs for one key of one tile, with `blocks` of them under way."""
    warps = tile.warps
    peak = device.tflops_peak(problem.dtype) * 1e3 / (device.num_sms * device.clock_ghz)
    matrix = 2 * tile.block_m * tile.head_dims / (peak * _matrix_share(tile, device))
    lanes = 64 if device.capability == 80 else 128
    # Once per block of keys and row: the output is rescaled, two reductions cross four lanes.
    per_block = (tile.head_dims / 2 + _REDUCTION_OPS) / tile.block_n
    per_score = _VECTOR_OPS + (_SOFTCAP_OPS if problem.softcapped else 0)
    vector = tile.block_m * (per_score + per_block) / lanes
    exponentials = tile.block_m / _EXP_PER_CLOCK
    if problem.softcapped:
        exponentials *= 1 + _SOFTCAP_EXPS
    row_bytes = tile.head_dims * problem.element_size
    # mma.sync: each warp reads every key and value row; wgmma: each group of four warps does.
    readers = warps / 4 if device.capability in (90, 100) else warps
    shared = readers * row_bytes / _SMEM_BYTES_PER_CLOCK
    l2 = row_bytes / _L2_BYTES_PER_CLOCK
    # Spilled values cross the L1 once out and once in for every block of keys.
    spills = 2 * tile.spill_bytes * tile.num_threads / tile.block_n / _SMEM_BYTES_PER_CLOCK
    products, softmax = max(matrix, shared), vector + exponentials
    # One warp per scheduler does one thing at a time; several hide each other's other work. Loads
    # are asynchronous and only have to keep up.
    per_scheduler = max(1.0, warps * blocks / 4)
    in_turn = max(products, softmax) + min(products, softmax) / per_scheduler
    busy = max(in_turn, l2)
    # The next block of keys is loaded under the work on this one where there is a stage to take it;
    # the stage that is being read is not free, so that two stages hide nothing in a lone block.
    under_way = max(blocks * (tile.num_stages - 1) - 1, 0)
    exposed = max(0.0, _LOAD_LATENCY_CLOCKS - under_way * busy * tile.block_n) / blocks
    barrier = 30 * warps / 4 / blocks
    return busy + spills + (exposed + barrier) / tile.block_n


def _matrix_share(tile: _Tile, device: Device) -> float:
    """The share of the matrix peak that a tile of this shape can use at all."""
    rows_per_warp = tile.block_m / tile.warps
    # 16 rows are one matrix instruction; with fewer its rows are wasted or keys split over warps.
    share = _MATRIX_SHARE * min(1.0, rows_per_warp / 16)
    if device.capability in (90, 100) and (tile.warps < 4 or tile.block_m < 64):
        share *= 0.6  # wgmma takes four warps and 64 rows; below that mma.sync serves
    return share
