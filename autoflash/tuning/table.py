"""Table: what every config of a problem came to, recorded once, so that searches can be replayed.

One JSON Lines file holds one problem: a header, then one line per config in the order in which they
were run. A line is written at once, so that a recording which was killed is gone on with.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoflash.config import Config, Value
from autoflash.device import Device
from autoflash.errors import AutoflashError, InvalidInput
from autoflash.problem import Problem
from autoflash.record import OUTCOMES, Measurement

VERSION = 1
"""Of the format; a reader refuses any other."""
TIMED = ("ok", "slow")
"""Outcomes with a time; a slow one was dropped by racing when it was recorded."""
_RESOURCES = ("registers", "num_threads", "smem_bytes", "spill_bytes", "stack_bytes")


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung of the race: what was measured, and how long that took with its warm-up.

    Attributes:
        latency_us: median.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        count: calls timed.
        seconds: of the rung; None where it was not recorded.
    """

    latency_us: float
    p20_us: float
    p80_us: float
    count: int
    seconds: float | None = None

    @property
    def measurement(self) -> Measurement:
        """As the race sees it."""
        return Measurement(
            latency_us=self.latency_us, p20_us=self.p20_us, p80_us=self.p80_us, count=self.count
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one config came to.

    Attributes:
        config: which.
        outcome: a key of record.OUTCOMES.
        source: the first digits of the rendered source's digest: equal ones are one kernel.
        compile_s: seconds of its compilation, with as many beside it as the header's `jobs`.
        load_s: seconds to load the kernel; None where they were not recorded.
        check_s: seconds of the check for correctness; None where it was not made or recorded.
        rungs: of the race, as far as it went.
        do_bench: median in microseconds by triton.testing.do_bench and the seconds that it took,
            where that was recorded.
        resources: those that decide whether a kernel is worth a launch.
    """

    config: Config
    outcome: str
    source: str = ""
    compile_s: float | None = None
    load_s: float | None = None
    check_s: float | None = None
    rungs: tuple[Rung, ...] = ()
    do_bench: tuple[float, float] | None = None
    resources: Mapping[str, int] = field(default_factory=dict)

    @property
    def latency_us(self) -> float | None:
        """The time of the longest rung; None for what failed."""
        return self.rungs[-1].latency_us if self.outcome in TIMED and self.rungs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What was to choose in one template when a table was recorded.

    Attributes:
        language: of the template.
        digest: of the template.
        tunables: name -> choices.
        default: of the problem.
        seeds: further declared configs, in their order.
        gives_way: whether its default stood back for another template's.
        feasible: how many configs no constraint rejected; a sample has fewer rows.
    """

    language: str
    digest: str
    tunables: Mapping[str, tuple[Value, ...]]
    default: Config
    seeds: tuple[Config, ...]
    gives_way: bool
    feasible: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What holds for all rows.

    Attributes:
        problem: which.
        device: where.
        policy: how times were taken.
        timing_ms: of the last rung.
        jobs: compilations at once.
        sample: how the rows were chosen from the feasible configs, for people.
        date: when.
        environment: versions.
        spaces: template -> what there was to choose.
    """

    problem: Problem
    device: Device
    policy: str
    timing_ms: float
    jobs: int
    sample: str
    date: str
    environment: Mapping[str, Any]
    spaces: Mapping[str, Space]


class Table:
    """The rows of one problem.

    Attributes:
        header: what holds for all of them.
        rows: config -> row, in the order of recording.
    """

    def __init__(self, header: Header, rows: Iterable[Row]) -> None:
        self.header = header
        self.rows: dict[Config, Row] = {row.config: row for row in rows}

    @property
    def name(self) -> str:
        """Of the problem."""
        return self.header.problem.name

    @property
    def best(self) -> Row:
        """The fastest row.

        Raises:
            InvalidInput: nothing in the table was timed.
        """
        timed = [row for row in self.rows.values() if row.latency_us is not None]
        if not timed:
            raise InvalidInput(
                f"the table of {self.name} has no config that worked: there is nothing to search "
                "for. Record it again, or leave it out."
            )
        return min(timed, key=lambda row: row.latency_us or 0.0)

    @property
    def feasible(self) -> int:
        """Feasible configs, recorded or not."""
        return sum(space.feasible for space in self.header.spaces.values())

    def median(self, what: str) -> float | None:
        """The median of "compile_s", "load_s" or "check_s" over the rows that have it."""
        known = [getattr(row, what) for row in self.rows.values()]
        known = [seconds for seconds in known if seconds is not None]
        return statistics.median(known) if known else None


# Reading and writing ------------------------------------------------------------------------------


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        InvalidInput: the file cannot be read or is no table; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from None
    number, rows = 1, []
    try:
        header = _header_from(json.loads(lines[0]))
        for line in lines[1:]:
            number += 1
            rows.append(_row_from(json.loads(line), header))
    except (AutoflashError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InvalidInput(
            f"{path}:{number} is no line of a table of version {VERSION}: {error!r}. "
            "benchmarks/sweep.py records tables."
        ) from None
    return Table(header, rows)


def read_all(paths: Sequence[Path]) -> list[Table]:
    """The tables in files and in the *.jsonl files of folders, by name of the file.

    Raises:
        InvalidInput: there is none, or one is damaged.
    """
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InvalidInput(
            f"{', '.join(map(str, paths)) or 'nothing'} holds no table (*.jsonl); "
            "tests/replay of a checkout does, and benchmarks/sweep.py records more."
        )
    return [read(path) for path in files]


class Writer:
    """Appends rows to a file; one that was left off in the middle of a line is mended first."""

    def __init__(self, path: Path, header: Header) -> None:
        """Start a table, or go on with it.

        Attributes:
            done: the rows that are there already.

        Raises:
            InvalidInput: the file holds a table of something else.
        """
        self.path = path
        self.done: dict[Config, Row] = {}
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            if whole:
                table = read(path)
                self._check(table.header, header)
                self.done = table.rows
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._append(_header_to(header))

    def add(self, row: Row) -> None:
        """Write one row at once."""
        self.done[row.config] = row
        self._append(_row_to(row))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _check(self, old: Header, new: Header) -> None:
        for name in ("problem", "device", "policy", "timing_ms", "sample"):
            if getattr(old, name) != getattr(new, name):
                raise InvalidInput(
                    f"{self.path} was recorded with {name}={getattr(old, name)}, not "
                    f"{getattr(new, name)}; give another folder, or delete it."
                )
        digests = [{n: s.digest for n, s in header.spaces.items()} for header in (old, new)]
        if digests[0] != digests[1]:
            raise InvalidInput(
                f"{self.path} was recorded with other templates: {digests[0]}, now {digests[1]}; "
                "give another folder, or delete it."
            )


def _header_to(header: Header) -> dict[str, Any]:
    return {
        "table": VERSION,
        "problem": header.problem.name,
        "device": header.device.to_dict(),
        "policy": header.policy,
        "timing_ms": header.timing_ms,
        "jobs": header.jobs,
        "sample": header.sample,
        "date": header.date,
        "environment": dict(header.environment),
        "spaces": {
            name: {
                "language": space.language,
                "digest": space.digest,
                "tunables": {key: list(values) for key, values in space.tunables.items()},
                "default": _values(space.default),
                "seeds": [_values(seed) for seed in space.seeds],
                "gives_way": space.gives_way,
                "feasible": space.feasible,
            }
            for name, space in header.spaces.items()
        },
    }


def _header_from(data: Mapping[str, Any]) -> Header:
    if data["table"] != VERSION:
        raise ValueError(f"version {data['table']}")
    spaces = {}
    for name, space in data["spaces"].items():
        keys = sorted(space["tunables"])
        spaces[name] = Space(
            language=space["language"],
            digest=space["digest"],
            tunables={key: tuple(values) for key, values in space["tunables"].items()},
            default=_config(name, keys, space["default"]),
            seeds=tuple(_config(name, keys, seed) for seed in space["seeds"]),
            gives_way=space["gives_way"],
            feasible=space["feasible"],
        )
    return Header(
        problem=Problem.parse(data["problem"]),
        device=Device.from_dict(data["device"]),
        spaces=spaces,
        **{
            name: data[name]
            for name in ("policy", "timing_ms", "jobs", "sample", "date", "environment")
        },
    )


def _row_to(row: Row) -> dict[str, Any]:
    """Compact: values in the order of the tunables' names, times with four digits, no nulls."""
    line: dict[str, Any] = {
        "template": row.config.template,
        "values": _values(row.config),
        "outcome": row.outcome,
        "source": row.source,
        "compile_s": _short(row.compile_s),
        "load_s": _short(row.load_s),
        "check_s": _short(row.check_s),
        "rungs": [
            [*(_short(x) for x in (r.latency_us, r.p20_us, r.p80_us)), r.count, _short(r.seconds)]
            for r in row.rungs
        ],
        "do_bench": [_short(x) for x in row.do_bench] if row.do_bench else None,
        "resources": {name: row.resources[name] for name in _RESOURCES if row.resources.get(name)},
    }
    return {name: value for name, value in line.items() if value not in (None, [], {}, "")}


def _row_from(data: Mapping[str, Any], header: Header) -> Row:
    template = data["template"]
    keys = sorted(header.spaces[template].tunables)
    if data["outcome"] not in OUTCOMES:
        raise ValueError(f"outcome {data['outcome']!r}")
    do_bench = data.get("do_bench")
    return Row(
        config=_config(template, keys, data["values"]),
        outcome=data["outcome"],
        source=data.get("source", ""),
        compile_s=data.get("compile_s"),
        load_s=data.get("load_s"),
        check_s=data.get("check_s"),
        rungs=tuple(Rung(*rung) for rung in data.get("rungs", ())),
        do_bench=(do_bench[0], do_bench[1]) if do_bench else None,
        resources=data.get("resources", {}),
    )


def _values(config: Config) -> list[Value]:
    return [value for _, value in config.pairs]


def _config(template: str, keys: Sequence[str], values: Sequence[Value]) -> Config:
    return Config.of(template, dict(zip(keys, values, strict=True)))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
