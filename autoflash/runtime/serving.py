"""One call, from tensors to launch: a dictionary lookup when it was seen before.

`call` stands below autograd, autocast and torch.compile (runtime/attention.py is above them). Its
key holds all that decides what runs and whether the call is valid, so a hit checks nothing, reads
no environment, takes no lock and opens no database.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoflash import build
from autoflash.build import Kernel
from autoflash.codegen import catalog, ops
from autoflash.codegen.template import Source
from autoflash.device import Device, of_tensor
from autoflash.errors import UnsupportedProblem
from autoflash.problem import Problem
from autoflash.runtime import options, prepare, recording, request, warn
from autoflash.runtime.dispatch import Dispatcher, Learned, Served
from autoflash.runtime.prepare import Result, Run
from autoflash.runtime.request import UNSCALED, Descales

MOST_CALLS = 4096
"""Prepared calls kept (about 1 KiB each). Decoding makes a new key with every token; when they are
too many all are dropped, and each that comes again costs one prepare: no build, no database."""

prepared: dict[Any, Run] = {}
"""Key of a call (see `call`) -> what to run; runtime.attention looks into it itself."""
_dispatchers: dict[tuple[str, int], Dispatcher] = {}
_lock = threading.RLock()


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: object,
    softcap: float,
    softmax_scale: float | None,
    descales: Descales | None,
    return_lse: bool,
    layout: str,
) -> Result:
    """Attention without gradients; arguments, semantics and errors as autoflash.attention.

    `descales` is None where none of the three is given.
    """
    if softmax_scale is not None and not (
        type(softmax_scale) is float
        and options.SMALLEST_SCALE <= softmax_scale <= options.LARGEST_SCALE
    ):
        return _unusual_scale(
            q, k, v, causal, window_size, softcap, softmax_scale, descales, return_lse, layout
        )
    try:
        q_address, k_address, v_address = q.data_ptr(), k.data_ptr(), v.data_ptr()
        # As in attention(), to the letter: there a call finds what was prepared here. The strides
        # of a contiguous tensor follow from its shape, and asking is quicker than reading them.
        key: tuple[object, ...] = (
            q.shape, k.shape, v.shape,
            q.is_contiguous() or q.stride(),
            k.is_contiguous() or k.stride(),
            v.is_contiguous() or v.stride(),
            q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            causal, window_size, softcap, layout, (q_address | k_address | v_address) & 15,
        )  # fmt: skip
        if descales is not None:
            # Strides are seen to in every call; without an address it goes as for q, k and v.
            key += tuple([
                d if d is None else (d.shape, d.dtype, d.device, d.data_ptr() & 3) for d in descales
            ])  # fmt: skip
        run = prepared.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensor; no storage; unhashable option
        return _without_key(
            q, k, v, causal, window_size, softcap, softmax_scale, descales, return_lse, layout
        )
    if run is None:
        return _first(
            key, q, k, v, causal, window_size, softcap, softmax_scale, descales, return_lse, layout
        )
    if descales is None:
        return run(q, k, v, q_address, k_address, v_address, softmax_scale, return_lse)
    return run(q, k, v, q_address, k_address, v_address, softmax_scale, return_lse, descales)


def dispatcher(device_type: str, index: int | None) -> Dispatcher:
    """The dispatcher of a device of this process, made on first use."""
    with _lock:
        place = (device_type, index or 0)
        if place not in _dispatchers:
            device = of_tensor(device_type, index)
            on_device = partial(_build_on, place)
            _dispatchers[place] = Dispatcher(
                device, partial(stored, device), catalog.installed(), on_device
            )
        return _dispatchers[place]


def stored(device: Device) -> Learned:
    """What the database knows for this arch; nothing, and a warning, where it cannot be read."""
    # A database must never stand between a caller and an answer.
    try:
        from autoflash.database import Database

        with Database.open() as database:
            return Learned(database.bests(arch=device.arch), database.tables(device.key))
    except Exception as error:
        warn.once(
            f"the tuning database cannot be read, so templates serve with their defaults: "
            f"{type(error).__name__}: {error}"
        )
        return Learned()


def reload() -> None:
    """Forget what was decided and read the database again; kernels stay built."""
    with _lock:
        for each in _dispatchers.values():
            each.reload()
        prepared.clear()


def reset() -> None:
    """Forget everything, warnings included: for tests."""
    with _lock:
        _dispatchers.clear()
        prepared.clear()
        recording.reset()
        warn.forget()


def use(device_type: str, index: int, chosen: Dispatcher) -> None:
    """Serve a device by a given dispatcher until `reset`: for tests and tools."""
    with _lock:
        _dispatchers[device_type, index] = chosen
        prepared.clear()


# The first call of a kind ---------------------------------------------------------------------


def _first(
    key: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: object,
    softcap: float,
    softmax_scale: float | None,
    descales: Descales | None,
    return_lse: bool,
    layout: str,
) -> Result:
    # Sizes are tensors while torch.jit traces, so that every traced call comes here.
    if torch._C._get_tracing_state() is not None:
        raise UnsupportedProblem(
            "torch.jit.trace cannot record autoflash.attention: it is one operator to "
            "torch.export and torch.compile. Use one of them."
        )
    request.check(
        q, k, v, causal=causal, layout=layout,
        window_size=window_size, softcap=softcap, descales=descales or UNSCALED,
    )  # fmt: skip
    addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr())
    scaled = () if descales is None else (descales,)
    given = (q, k, v, *addresses, softmax_scale, return_lse, *scaled)

    def keep(run: Run, problem: Problem | None, again: bool = True) -> None:
        if problem is not None:
            run = recording.counted(run, problem)
        if again:
            if len(prepared) >= MOST_CALLS:
                prepared.clear()
            prepared[key] = run

    def finish(run: Run, problem: Problem | None = None, again: bool = True) -> Result:
        result = run(*given)
        keep(run, problem, again)
        return result

    _, s, _ = ops.LAYOUT_AXES[layout]
    if 0 in (q.shape[0], q.shape[s], k.shape[s]) or q.is_meta:
        return finish(prepare.empty_call(q, v, layout))
    by_torch = _by_torch(q, causal, window_size, softcap, layout)
    if (reason := request.no_kernel_for(q)) is not None:
        warn.once(reason)
        return finish(by_torch)
    problem = request.problem_of(
        q, k, v, causal=causal, layout=layout, window_size=window_size, softcap=softcap
    )
    chosen = dispatcher(q.device.type, q.device.index)
    capturing = q.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    while True:
        served = chosen.serve(problem, may_build=not capturing)
        if served.kernel is None:
            if not served.failures:  # those were told when they happened
                _warn_of_torch(served, chosen.device)
            # What is decided during a capture holds for that capture only.
            return finish(by_torch, problem, again=not capturing)
        try:
            run = prepare.kernel_call(served.kernel, problem, q, k, v, layout)
            result = run(*given)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            if capturing:
                raise  # what is on the stream already cannot be taken back
            # Next time round another config serves, at last PyTorch.
            chosen.gave_up(served, f"{type(error).__name__}: {str(error).strip()}")
        else:
            keep(run, problem)
            return result


def _warn_of_torch(served: Served, device: Device) -> None:
    traits = ", ".join(f"{name} {value}" for name, value in served.problem.traits.items())
    warn.once(
        f"PyTorch serves attention with {traits} on {device.name}, because of every template: "
        f"{served.reason}. `autoflash why` shows more."
    )


def _unusual_scale(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: object,
    softcap: float,
    softmax_scale: object,
    descales: Descales | None,
    return_lse: bool,
    layout: str,
) -> Result:
    """A scale that is no float, or not one that kernels take; then it is brought into range."""
    scale = options.scale_of(softmax_scale)
    request.check(
        q, k, v, causal=causal, layout=layout,
        window_size=window_size, softcap=softcap, descales=descales or UNSCALED,
    )  # fmt: skip
    q, scale = request.positive_scale(q, scale)
    return call(q, k, v, causal, window_size, softcap, scale, descales, return_lse, layout)


def _by_torch(q: Tensor, causal: bool, window_size: object, softcap: float, layout: str) -> Run:
    window, cap = options.window_of(window_size), options.softcap_of(softcap)
    return prepare.torch_call(q, causal, window, cap, layout)


def _without_key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: object,
    softcap: float,
    softmax_scale: float | None,
    descales: Descales | None,
    return_lse: bool,
    layout: str,
) -> Result:
    """A window that is a list, a mistake, or tensors that have no address in torch.func."""
    if isinstance(window_size, list):
        window_size = tuple(window_size)
        return call(
            q, k, v, causal, window_size, softcap, softmax_scale, descales, return_lse, layout
        )
    request.check(
        q, k, v, causal=causal, layout=layout,
        window_size=window_size, softcap=softcap, descales=descales or UNSCALED,
    )  # fmt: skip
    warn.once(
        "PyTorch serves attention of tensors that have no storage of their own (inside "
        "torch.func.vmap, grad or jvp)."
    )
    run = _by_torch(q, causal, window_size, softcap, layout)
    return run(q, k, v, 0, 0, 0, softmax_scale, return_lse, descales or UNSCALED)


def _build_on(place: tuple[str, int], source: Source, device: Device) -> Kernel:
    if place[0] != "cuda":
        return build.build(source, device)
    with torch.cuda.device(place[1]):  # a module is loaded into the current device's context
        return build.build(source, device)


def _after_fork() -> None:
    """A child must not wait for locks that a thread of its parent held."""
    global _lock
    _lock = threading.RLock()
    for each in _dispatchers.values():
        each.after_fork()
    if recording.after_fork():
        prepared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
