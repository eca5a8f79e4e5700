"""Hugging Face transformers: models that run autoflash by `attn_implementation="auto_fa"`.

    from autoflash.integrations import register_transformers

    register_transformers()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="auto_fa")

docs/integrations/transformers.md says which calls reach kernels and what serves the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from autoflash.errors import InvalidInput

NAME = "auto_fa"
"""What `attn_implementation` is set to, unless another name is registered."""


@dataclass(frozen=True, slots=True)
class Registration:
    """An attention that transformers knows; as a context manager it goes when the block ends.

    Attributes:
        name: what `attn_implementation` is set to.
        first: whether nobody had registered it before; a block within another takes nothing back.
    """

    name: str
    first: bool = field(default=True, compare=False)

    def unregister(self) -> None:
        """Let transformers forget it; models that are set to it then fail when they run."""
        for registry in _registries():
            if registry._global_mapping.get(self.name) in _ours():
                del registry._global_mapping[self.name]

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.first:
            self.unregister()


def register_transformers(name: str = NAME) -> Registration:
    """Register autoflash's attention and its masks with transformers; twice is as good as once.

    Args:
        name: for `attn_implementation`.

    Raises:
        InvalidInput: transformers would take the name for something else, or has it already; or
            transformers is missing.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidInput(
            f"name={name!r}: letters, digits and underscores are needed; transformers reads others "
            f"as kernels of its hub. The default is {NAME!r}."
        )
    for word, reading in (
        ("flash", "FlashAttention"),
        ("sdpa", "PyTorch's attention"),
        ("flex_attention", "FlexAttention"),
    ):
        if word in name:
            raise InvalidInput(
                f"name={name!r}: transformers takes every name with {word!r} in it for {reading}, "
                f"and would not call what is registered. Choose another, such as {NAME!r}."
            )
    attentions, masks = _registries()
    attend, make_mask = _ours()
    if name == "eager" or attentions._global_mapping.get(name, attend) is not attend:
        raise InvalidInput(
            f"name={name!r} is an attention of transformers already. Choose another, such as "
            f"{NAME!r}."
        )
    first = name not in attentions._global_mapping
    attentions.register(name, attend)
    masks.register(name, make_mask)  # without one, padding would be forgotten
    return Registration(name, first)


def _registries() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise InvalidInput(
            f"transformers cannot be imported: {error}. pip install 'autoflash[frameworks]' "
            "brings a version that is tested."
        ) from error
    return AttentionInterface, AttentionMaskInterface


def _ours() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from autoflash.integrations.transformers_attention import attend
    from autoflash.integrations.transformers_masks import make_mask

    return attend, make_mask
