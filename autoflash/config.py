"""Config: one point of a template's space, what a search chooses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Value = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Config(Mapping[str, Value]):
    """The values of a template's tunables, immutable and hashable.

    Attributes:
        template: the template's name, such as "triton/fwd".
        pairs: (tunable, value) pairs sorted by name.
    """

    template: str
    pairs: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, template: str, values: Mapping[str, Value]) -> Config:
        """The config of `template` with these `values`, in any order."""
        return cls(template, tuple(sorted(values.items())))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`."""
        return cls.of(data["template"], data["values"])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"template": self.template, "values": dict(self.pairs)}

    @property
    def key(self) -> str:
        """Canonical text: equal configs, and only those, have equal keys."""
        return self.template + json.dumps(dict(self.pairs), sort_keys=True, separators=(",", ":"))

    def __getitem__(self, name: str) -> Value:
        for key, value in self.pairs:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.pairs)
