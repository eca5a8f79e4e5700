"""Configs of Triton attention kernels for one device, and `seed`, which an autotuner takes them by.

They were measured with autoflash's own kernels (the templates named below), and a config is worth
its time only for a kernel that does the same work by the same meta-parameters. For another kernel
they are a start: give `configs()` to `triton.autotune` and let it choose. `seed` is for a kernel
that you know to be alike: what it seeds is not benchmarked again.

    from {module} import configs, seed

    NAMES = {"block_m": "BLOCK_M", "block_n": "BLOCK_N", "loads": None}  # ours -> yours; None: none

    @triton.autotune(configs=configs(NAMES), key=["N_CTX", "HEAD_DIM"])
    @triton.jit
    def kernel(q, k, v, out, N_CTX, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, ...): ...

    seed(kernel, {"N_CTX": "seqlen_q", "HEAD_DIM": "head_dim"}, tensors=4, rename=NAMES,
         where=lambda shape: shape["causal"])
"""

# {header}
from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton

DEVICE = ""
"""As PyTorch names it."""
SM = 0
"""Compute capability times ten."""
TRITON: str | None = None
"""Which compiled the kernels that were measured."""
SHAPES: dict[str, dict[str, Any]] = {}
"""Problem -> its dtype, sizes and mask; those that take longest come last."""
CONFIGS: dict[str, triton.Config] = {}
"""Problem -> the best config known for it."""
# {end of data}

Shape = Mapping[str, Any]
"""A value of SHAPES."""
Rename = Mapping[str, str | None]
"""A meta-parameter here -> its name in your kernel, or None where your kernel has none such."""


def configs(rename: Rename | None = None) -> list[triton.Config]:
    """The different configs, for `triton.autotune(configs=...)`; the most frequent comes first.

    Raises:
        ValueError: `rename` names what no config has.
    """
    found = [_renamed(config, rename or {}) for config in CONFIGS.values()]
    counts: dict[str, int] = {}
    for config in found:
        counts[str(config)] = counts.get(str(config), 0) + 1
    first = {str(config): config for config in reversed(found)}
    return [first[text] for text in sorted(counts, key=lambda text: (-counts[text], text))]


def seed(
    autotuner: Any,
    key: Mapping[str, str | Callable[[Shape], Any]],
    *,
    tensors: int | Sequence[str | None],
    rename: Rename | None = None,
    where: Callable[[Shape], bool] = lambda shape: True,
) -> dict[tuple[Any, ...], triton.Config]:
    """Fill the cache of a `triton.autotune`d function, so that these shapes are not benchmarked.

    Args:
        autotuner: the decorated function; what it found itself already stays.
        key: each name in the autotuner's `key` -> the field of a shape that it is equal to, or
            what computes it from a shape. One that is missing is the field of that name.
        tensors: how many tensor arguments a call passes, all of the shape's dtype, or the dtype of
            each in order ("float32"), None being the shape's.
        rename: as for `configs`. A meta-parameter that is dropped was part of what was measured.
        where: which shapes your kernel is for.

    Returns:
        What was seeded: key in the cache -> config. Of shapes with an equal key the one that takes
        longest counts. Nothing where the GPU here is of another arch; Triton benchmarks then.

    Raises:
        TypeError: this is no autotuner as Triton 3.6 to 3.9 make it.
        ValueError: a name fits neither the kernel nor a shape, or nothing is looked up.
    """
    if not all(hasattr(autotuner, name) for name in ("cache", "keys", "arg_names", "configs")):
        raise TypeError(f"{autotuner!r} is no function with @triton.autotune.")
    wanted = {name: shape for name, shape in SHAPES.items() if where(shape)}
    seeds = {}
    for name, shape in wanted.items():
        values = [_value(argument, key, shape) for argument in autotuner.keys]
        kinds = [None] * tensors if isinstance(tensors, int) else tensors
        config = _renamed(CONFIGS[name], rename or {})
        if unknown := sorted(set(config.kwargs) - set(autotuner.arg_names)):
            raise ValueError(
                f"the kernel has no parameter {', '.join(unknown)}: map these names with rename, "
                "to None what it has no counterpart of."
            )
        seeds[(*values, *(f"torch.{kind or shape['dtype']}" for kind in kinds))] = config
    others = {str(config) for config in seeds.values()} - {str(c) for c in autotuner.configs}
    if others and len(autotuner.configs) == 1:
        raise ValueError("an autotuner of one config looks nothing up; give it configs().")
    if not _serves_here():
        return {}
    new = {place: config for place, config in seeds.items() if place not in autotuner.cache}
    autotuner.cache.update(new)
    return new


def _value(argument: str, key: Mapping[str, str | Callable[[Shape], Any]], shape: Shape) -> Any:
    source = key.get(argument, argument)
    if callable(source):
        return source(shape)
    if source not in shape:
        raise ValueError(
            f"key {argument!r}: a shape has no {source!r}, but {', '.join(shape)}. Say what it is "
            f"with key={{{argument!r}: ...}}."
        )
    return shape[source]


def _renamed(config: triton.Config, rename: Rename) -> triton.Config:
    if unknown := sorted(set(rename) - set(config.kwargs)):
        raise ValueError(
            f"rename: there is no {', '.join(unknown)}, but {', '.join(config.kwargs)}."
        )
    names = {name: rename.get(name, name) for name in config.kwargs}
    kwargs = {new: config.kwargs[old] for old, new in names.items() if new is not None}
    return triton.Config(
        kwargs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        num_ctas=config.num_ctas,
        maxnreg=config.maxnreg,
    )


def _serves_here() -> bool:
    """Whether the configs may be used here; warns of what differs. Without a GPU they may."""
    import torch

    release = [str(version).split(".")[:2] for version in (TRITON, triton.__version__)]
    if TRITON is not None and release[0] != release[1]:
        warnings.warn(
            f"these configs were measured with Triton {TRITON}, and this is {triton.__version__}: "
            "others may be faster now.",
            stacklevel=3,
        )
    if not torch.cuda.is_available():
        return True
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if 10 * major + minor != SM:
        warnings.warn(
            f"these configs are of {DEVICE} (sm{SM}), and this is {name} (sm{major}{minor}): "
            "nothing is seeded, Triton will benchmark.",
            stacklevel=3,
        )
        return False
    if name != DEVICE:
        warnings.warn(
            f"these configs are of {DEVICE}, and this is {name}: others may be faster here.",
            stacklevel=3,
        )
    return True
