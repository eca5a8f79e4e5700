"""What came of a comparison: rows, JSON and a table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflash.device import Device
from autoflash.errors import InvalidInput
from autoflash.problem import Problem

SCHEMA_VERSION = 1
OURS = "autoflash"
_DEFAULT = "sdpa"  # what a user of PyTorch runs without thinking about it


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One provider on one problem.

    Attributes:
        problem: Problem.name.
        provider: "autoflash" or a name in autoflash.tuning.peers.PEERS.
        outcome: "ok"; "unavailable": it cannot run this here; "wrong_result": its output is off;
            "implausible": so slow that it must have run something else than it is meant to.
        reason: for any outcome but "ok", why; for autoflash, which rule chose the config.
        latency_us: median; None unless "ok".
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        count: calls timed.
        tflops: achieved rate by Problem.flops.
        speedup: how many times faster autoflash was, from paired rounds; None for itself and for
            a provider too slow to take part in them.
        speedup_low: lower end of its interval (autoflash.tuning.timing.compare).
        speedup_high: upper end.
        error_ratio: error in units of that of PyTorch in the same precision; 2 are allowed, or 3
            under a softcap.
        clock_mhz: median SM clock while timing, where it can be read.
        power_w: median board power, likewise; only where each turn took a fifth of a second.
        temperature_c: likewise.
        throttled: whether the driver gave a reason for a reduced clock.
        template: of the kernel that served, for autoflash.
        config: its tunables.
        rule: how it was chosen: "exact", "bucket", "default" or "torch".
    """

    problem: str
    provider: str
    outcome: str
    reason: str = ""
    latency_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    count: int | None = None
    tflops: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    error_ratio: float | None = None
    clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    template: str | None = None
    config: Mapping[str, Any] | None = None
    rule: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: the first fields always, the others where they are known."""
        always = ("problem", "provider", "outcome", "latency_us", "tflops")
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) not in (None, "") or field.name in always
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of one run, and under which conditions they came about.

    Attributes:
        device: where.
        policy: id of the timing policy.
        date: UTC, ISO 8601 to the second.
        environment: versions (autoflash.tuning.environment).
        settings: rounds, budget_ms, seed.
        rows: by problem, then provider, in the order asked.
    """

    device: Device
    policy: str
    date: str
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "date": self.date,
            "device": self.device.to_dict(),
            "policy": self.policy,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self) -> str:
        """The JSON document as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`."""
        return cls(
            device=Device.from_dict(data["device"]),
            policy=data["policy"],
            date=data["date"],
            environment=data["environment"],
            settings=data["settings"],
            rows=tuple(Row(**row) for row in data["rows"]),
        )

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file that `autoflash bench --out` wrote.

        Raises:
            InvalidInput: it cannot be read, or is not such a report.
        """
        wanted = f"a report of `autoflash bench --out`, schema_version {SCHEMA_VERSION}"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"its schema_version is {data['schema_version']}")
            return cls.from_dict(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise InvalidInput(f"{path} is not {wanted} ({said}).") from None

    def latencies(self) -> dict[str, dict[str, float]]:
        """Problem -> provider -> microseconds, of what was timed."""
        found: dict[str, dict[str, float]] = {row.problem: {} for row in self.rows}
        for row in self.rows:
            if row.latency_us is not None:
                found[row.problem][row.provider] = row.latency_us
        return found

    def skipped(self) -> list[str]:
        """One line for each reason for which providers are missing."""
        missing: dict[tuple[str, str], dict[str, list[str]]] = {}
        for row in self.rows:
            if row.outcome != "ok":
                by_provider = missing.setdefault((row.outcome, row.reason), {})
                by_provider.setdefault(row.provider, []).append(row.problem)
        every = len({row.problem for row in self.rows})
        lines = []
        for (outcome, reason), by_provider in missing.items():
            said = reason if outcome == "unavailable" else f"{outcome}: {reason}"
            where = {
                p: "" if len(n) == every else f" ({', '.join(n)})" for p, n in by_provider.items()
            }
            if len(set(where.values())) == 1:
                lines.append(f"{', '.join(where)}: {said}{next(iter(where.values()))}")
            else:
                lines += [f"{provider}: {said}{names}" for provider, names in where.items()]
        return lines


@dataclass(frozen=True, slots=True)
class Table:
    """Text to be laid out.

    Attributes:
        title: printed above.
        columns: headings; one that starts with ">" is aligned right.
        rows: cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table(report: Report) -> Table:
    """One line per problem: TFLOPS of each provider, autoflash over the best of them and over sdpa.

    The last line is the geometric mean of autoflash over each, where both ran.
    """
    latencies = report.latencies()
    ran = {provider for times in latencies.values() for provider in times}
    providers = [p for p in dict.fromkeys(row.provider for row in report.rows) if p in ran]
    peers = [p for p in providers if p != OURS]
    rules = {row.problem: row.rule or "" for row in report.rows if row.provider == OURS}
    ratios: dict[str, list[float]] = {key: [] for key in (*peers, "best", "default")}
    rows = []
    for name, times in latencies.items():
        problem = Problem.parse(name)
        cells = [name, *(_tflops(problem, times.get(p)) for p in providers)]
        ours = times.get(OURS)
        best = min((times[p], p) for p in peers if p in times)[1] if times.keys() - {OURS} else ""
        for key, peer in (*((p, p) for p in peers), ("best", best), ("default", _DEFAULT)):
            if ours and peer in times:
                ratios[key].append(times[peer] / ours)
        versus_best = f"{times[best] / ours:.2f}x {best}" if ours and best else ""
        default = times.get(_DEFAULT)
        versus_default = f"{default / ours:.2f}x" if ours and default else ""
        rows.append((*cells, rules.get(name, ""), versus_best, versus_default))
    if OURS in providers and peers:
        means = ["" if p == OURS else _mean(ratios[p]) for p in providers]
        last = ("geometric mean, autoflash over it", *means, "")
        rows.append((*last, _mean(ratios["best"]), _mean(ratios["default"])))
    columns = ("problem", *(f">{p}" for p in providers), "rule", ">over best", f">over {_DEFAULT}")
    title = f"TFLOPS on {report.device.name}, {report.date}, policy {report.policy}"
    return Table(title, columns, tuple(rows))


def _tflops(problem: Problem, latency_us: float | None) -> str:
    if latency_us is None:
        return "-"
    rate = problem.tflops(latency_us)
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _mean(ratios: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}x" if ratios else ""
