"""DispatchTable: what serves the shapes of a family that nobody tuned, and what shows it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from autoflash.config import Config
from autoflash.device import Device
from autoflash.errors import UnknownName
from autoflash.problem import MAX_DISTANCE, Problem

TILE_ROWS = 128
"""Query rows of the tile by which work is counted: that of most kernels."""

FEATURES: Mapping[str, Callable[[Problem], int]] = {
    "tiles": lambda p: p.tiles(TILE_ROWS),
    "seqlen_k": lambda p: p.seqlen_k,
    "seqlen_q": lambda p: p.seqlen_q,
    "heads": lambda p: p.batch * p.num_heads,
    "group_size": lambda p: p.group_size,
}
"""What a leaf may ask of a problem. Tiles over multiprocessors are the waves of a launch, so that
on one device a bound of the one is a bound of the other."""

REACH = 4.0
"""Doublings from the nearest training probe within which a table speaks: lengths four times as long
are more of the same work, while a decoding step is another kind unless one was measured."""

TURNS = "-turns"
"""Ends the policy of a table's times: those of a shape's configs, in turns and nothing else beside
them, are compared among themselves. The search, which times one by one, does not count them."""

STRATEGIES = ("table", "nearest", "default")
"""What may serve a shape that was not tuned: the table, the nearest winner, the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The problems that one table is for: alike but for batch, heads, lengths, windows' widths.

    Attributes:
        op: as in Problem, like the others.
        dtype: of q, k and v.
        head_dim: elements of a query or key row.
        head_dim_v: elements of a value row.
        causal: with the other two, the mask.
        local: whether there is a sliding window.
        softcapped: whether scores are capped.
        aligned: whether addresses and strides are multiples of 16 bytes.
    """

    op: str
    dtype: str
    head_dim: int
    head_dim_v: int
    causal: bool
    local: bool
    softcapped: bool
    aligned: bool

    @classmethod
    def of(cls, problem: Problem) -> Family:
        """The family of a problem."""
        names = (entry.name for entry in dataclasses.fields(cls))
        return cls(**{name: getattr(problem, name) for name in names})

    @property
    def name(self) -> str:
        """Short text, such as "fwd-d128c-bfloat16"; "w" is a window, "cap" a softcap."""
        dim = f"{self.head_dim}" + (f"x{self.head_dim_v}" * (self.head_dim_v != self.head_dim))
        mask = ("c" if self.causal else "f") + "w" * self.local + "cap" * self.softcapped
        return f"{self.op}-d{dim}{mask}-{self.dtype}" + "-unaligned" * (not self.aligned)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return dataclasses.asdict(self)


class Bound(NamedTuple):
    """A range of a feature: above < value <= most; None is no bound."""

    feature: str
    above: int | None
    most: int | None

    def holds(self, problem: Problem) -> bool:
        """Whether a problem is within."""
        value = FEATURES[self.feature](problem)
        return (self.above is None or value > self.above) and (
            self.most is None or value <= self.most
        )

    def __str__(self) -> str:
        if self.above is None:
            return f"{self.feature} <= {self.most}"
        if self.most is None:
            return f"{self.feature} > {self.above}"
        return f"{self.above} < {self.feature} <= {self.most}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A range of shapes and what serves them.

    Attributes:
        where: bounds that all hold; none: every shape.
        config: index in the table's configs; None is what serves without records.
        probes: training probes in it.
        mean: geometric mean of its regret over them; 0.02 is 2 % slower than the best measured.
        worst: the largest.
    """

    where: tuple[Bound, ...]
    config: int | None
    probes: int
    mean: float
    worst: float

    def holds(self, problem: Problem) -> bool:
        """Whether a problem is in the range."""
        return all(bound.holds(problem) for bound in self.where)

    def __str__(self) -> str:
        return " and ".join(map(str, self.where)) or "every shape"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A shape on which the configs were timed in turns.

    Attributes:
        problem: the shape.
        held_out: not used for choosing; it tells what the choice is worth.
        times_us: of each of the table's configs; None where it is not feasible or failed.
        default: index of the config that serves here without records; its time is known.
    """

    problem: Problem
    held_out: bool
    times_us: tuple[float | None, ...]
    default: int

    @property
    def default_us(self) -> float:
        """Time of the default."""
        time = self.times_us[self.default]
        assert time is not None
        return time

    @property
    def best_us(self) -> float:
        """Time of the fastest config measured here: what an oracle would serve."""
        return min(time for time in self.times_us if time is not None)


class Regret(NamedTuple):
    """How much slower than the oracle a strategy is, over some shapes.

    Attributes:
        shapes: how many.
        mean: geometric mean of time over the oracle's, less 1.
        worst: the largest.
        where: name of the shape with the largest; "" where there is no shape.
    """

    shapes: int
    mean: float
    worst: float
    where: str

    @classmethod
    def of(cls, ratios: Mapping[str, float]) -> Regret:
        """Summarise shape -> time over the oracle's."""
        if not ratios:
            return cls(0, 0.0, 0.0, "")
        where = max(ratios, key=lambda name: (ratios[name], name))
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) - 1
        return cls(len(ratios), mean, ratios[where] - 1, where)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return self._asdict()


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchTable:
    """What serves a family's shapes on a device where nothing was tuned for the very shape.

    Attributes:
        device: where it was measured; it serves devices of equal key only.
        family: which problems.
        policy: how the times were taken.
        digests: template -> its digest then, for each template of `configs`.
        configs: those that were timed.
        leaves: ranges that no two share a shape of; each training probe is in one.
        probes: the evidence.
        tuned: (problem, index of its winner's config, None where that is what serves without
            records), as serving by the nearest record would have them.
        environment: versions of what took part.
        created: UTC, ISO 8601 to the second.
    """

    device: Device
    family: Family
    policy: str
    digests: Mapping[str, str]
    configs: tuple[Config, ...]
    leaves: tuple[Leaf, ...]
    probes: tuple[Probe, ...]
    tuned: tuple[tuple[Problem, int | None], ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""

    def leaf(self, problem: Problem) -> Leaf | None:
        """The leaf of a problem of this family; None where nothing alike was measured.

        Serving goes on with the nearest winner there, and so does `time_us`.
        """
        near = (p.problem.distance(problem) <= REACH for p in self.probes if not p.held_out)
        if Family.of(problem) != self.family or not any(near):
            return None
        return next((leaf for leaf in self.leaves if leaf.holds(problem)), None)

    def config_of(self, leaf: Leaf) -> Config | None:
        """What a leaf serves; None is the default."""
        return None if leaf.config is None else self.configs[leaf.config]

    def is_current(self, name: str, digest: str | None) -> bool:
        """Whether what was measured of a template is what has that digest now."""
        return digest is not None and self.digests.get(name) == digest

    def time_us(self, strategy: str, probe: Probe) -> float:
        """What a strategy takes for a probe's shape.

        Args:
            strategy: one of STRATEGIES; each falls back on those behind it, as serving does.
            probe: one of this table's.

        Raises:
            UnknownName: there is no such strategy.
        """
        if strategy not in STRATEGIES:
            raise UnknownName.of("strategy", strategy, STRATEGIES)
        if strategy == "table" and (leaf := self.leaf(probe.problem)) is not None:
            if leaf.config is None:
                return probe.default_us
            if (time := probe.times_us[leaf.config]) is not None:
                return time
        if strategy != "default":
            ranked = sorted(
                (problem.distance(probe.problem), number)
                for number, (problem, _) in enumerate(self.tuned)
            )
            for distance, number in ranked:
                config = self.tuned[number][1]
                time = probe.default_us if config is None else probe.times_us[config]
                if distance <= MAX_DISTANCE and time is not None:
                    return time
        return probe.default_us

    def regret(self, strategy: str, *, held_out: bool) -> Regret:
        """The regret of a strategy against the best config measured at each shape.

        Args:
            strategy: one of STRATEGIES.
            held_out: over the shapes that were not used for choosing, or over those that were.
        """
        asked = [probe for probe in self.probes if probe.held_out == held_out]
        return Regret.of({p.problem.name: self.time_us(strategy, p) / p.best_us for p in asked})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: what a line of tuning_db/*.jsonl has under "table"."""
        return {
            "device": self.device.to_dict(),
            "family": self.family.to_dict(),
            "policy": self.policy,
            "digests": dict(self.digests),
            "configs": [config.to_dict() for config in self.configs],
            "leaves": [
                {**dataclasses.asdict(leaf), "where": [list(bound) for bound in leaf.where]}
                for leaf in self.leaves
            ],
            "probes": [
                {
                    "problem": probe.problem.name,
                    "held_out": probe.held_out,
                    "times_us": list(probe.times_us),
                    "default": probe.default,
                }
                for probe in self.probes
            ],
            "tuned": [[problem.name, config] for problem, config in self.tuned],
            "environment": dict(self.environment),
            "created": self.created,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DispatchTable:
        """Inverse of `to_dict`.

        Raises:
            ValueError: it cannot be meant; KeyError, TypeError and InvalidInput likewise.
        """
        table = cls(
            device=Device.from_dict(data["device"]),
            family=Family(**data["family"]),
            policy=data["policy"],
            digests=dict(data["digests"]),
            configs=tuple(Config.from_dict(each) for each in data["configs"]),
            leaves=tuple(
                Leaf(**{**each, "where": tuple(Bound(*bound) for bound in each["where"])})
                for each in data["leaves"]
            ),
            probes=tuple(
                Probe(
                    problem=Problem.parse(each["problem"]),
                    held_out=each["held_out"],
                    times_us=tuple(each["times_us"]),
                    default=each["default"],
                )
                for each in data["probes"]
            ),
            tuned=tuple((Problem.parse(name), config) for name, config in data["tuned"]),
            environment=dict(data["environment"]),
            created=data["created"],
        )
        table._check()
        return table

    def _check(self) -> None:
        """Raise a ValueError where parts do not fit together: serving must not meet that."""
        known = range(len(self.configs))
        used = [*(leaf.config for leaf in self.leaves), *(config for _, config in self.tuned)]
        used = [config for config in used if config is not None]
        used += [probe.default for probe in self.probes]
        if wrong := [index for index in used if index not in known]:
            raise ValueError(f"config {wrong[0]!r} of a table that has {len(self.configs)}")
        if strange := [
            bound.feature
            for leaf in self.leaves
            for bound in leaf.where
            if bound.feature not in FEATURES
        ]:
            raise ValueError(f"a leaf asks for {strange[0]!r}, none of {', '.join(FEATURES)}")
        for probe in self.probes:
            times = probe.times_us
            good = (time is None or 0 < time < math.inf for time in times)
            if len(times) != len(self.configs) or not all(good) or times[probe.default] is None:
                raise ValueError(f"probe {probe.problem.name} has the times {times}")
        if missing := {config.template for config in self.configs} - set(self.digests):
            raise ValueError(f"no digest of {', '.join(sorted(missing))}")


def by_family(tables: Iterable[DispatchTable]) -> dict[Family, DispatchTable]:
    """The tables by what they are for; of two, the newer."""
    ordered = sorted(tables, key=lambda table: table.created)
    return {table.family: table for table in ordered}
