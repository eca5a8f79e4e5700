"""What does the database know of what was asked, device by device?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import autoflash
from autoflash.device import Device
from autoflash.record import Record
from autoflash.report.ceilings import Ceilings
from autoflash.report.conditions import Conditions, conditions
from autoflash.report.gates import Funnel, funnel
from autoflash.report.progress import Search, searches
from autoflash.report.table import Table
from autoflash.report.tunables import Tuned, tuned

if TYPE_CHECKING:
    from autoflash.database import Database

Choose = Callable[[Sequence[Record]], Sequence[Record]]
Infeasible = Callable[[Sequence[Record]], Mapping[tuple[str, str], int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """One device under one timing policy: times of different policies are never compared.

    Attributes:
        device: where.
        policy: tuning.timing.Policy.id, or the static model's name.
        predicted: whether that model, not hardware, produced the times.
        trials: how many are stored of what was asked.
        outdated: those of them, and winners, whose template has changed since.
        searches: one per problem.
        funnel: where candidates fell.
        tuned: the tunables of each template.
        ceilings: of the device.
        conditions: versions, clocks and power.
        runs: rows of table run.
        regret: what a dispatch table loses against tuning each problem; None: not computed.
    """

    device: Device
    policy: str
    predicted: bool
    trials: int
    outdated: int
    searches: tuple[Search, ...]
    funnel: Funnel
    tuned: tuple[Tuned, ...]
    ceilings: Ceilings
    conditions: Conditions
    runs: tuple[Mapping[str, Any], ...] = ()
    regret: Table | None = None

    @property
    def winners(self) -> list[Record]:
        """The best records, in the order of the searches."""
        return [search.winner for search in self.searches if search.winner]

    def gain(self, over: str) -> float | None:
        """Geometric mean of how many times faster the winners are than "default_us"/"torch_us"."""
        ratios = [
            reference / record.latency_us
            for record in self.winners
            if (reference := getattr(record, over)) and record.latency_us
        ]
        return statistics.geometric_mean(ratios) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "device": self.device.to_dict(),
            "device_key": self.device.key,
            "policy": self.policy,
            "predicted": self.predicted,
            "trials": self.trials,
            "outdated": self.outdated,
            "over_default": self.gain("default_us"),
            "over_torch": self.gain("torch_us"),
            "problems": [search.to_dict() for search in self.searches],
            "funnel": self.funnel.to_dict(),
            "tunables": [each.to_dict() for each in self.tuned],
            "ceilings": self.ceilings.to_dict(),
            "conditions": self.conditions.to_dict(),
            "runs": [dict(run) for run in self.runs],
            "regret": None
            if self.regret is None
            else {
                "title": self.regret.title,
                "columns": list(self.regret.columns),
                "rows": [list(r) for r in self.regret.rows],
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All chapters, and where they come from.

    Attributes:
        place: of the database.
        version: of autoflash.
        created: UTC, ISO 8601 to the second.
        asked: the options that chose what is shown, in words; "" is everything.
        digests: template -> digest as installed.
        chapters: the device with the most trials first.
    """

    place: str
    version: str
    created: str
    asked: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    chapters: tuple[Chapter, ...]

    def is_current(self, record: Record) -> bool:
        """Whether a record's template is installed as it was then."""
        return self.digests.get(record.config.template) == record.template_digest

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "database": self.place,
            "autoflash": self.version,
            "created": self.created,
            "asked": self.asked,
            "devices": [chapter.to_dict() for chapter in self.chapters],
        }


def findings(
    db: Database,
    *,
    digests: Mapping[str, str],
    device_key: str | None = None,
    run: int | None = None,
    choose: Choose = lambda records: records,
    asked: str = "",
    ceilings: Iterable[Ceilings] = (),
    infeasible: Infeasible | None = None,
    regret: Callable[[Device, str], Table | None] = lambda device, policy: None,
) -> Findings:
    """Read what is asked for, and work it out.

    Args:
        db: where it is stored.
        digests: template -> digest as installed.
        device_key: of this device only.
        run: trials of this run only, and the winners of the problems that it tried.
        choose: those of some records that are about the problems asked for.
        asked: all this in words.
        ceilings: measured ones; devices without take their stated ones.
        infeasible: counts what constraints reject in the spaces of trials (report.spaces); None
            leaves it out.
        regret: the regret table of a device and policy, where there is one.
    """
    only: dict[str, Any] = {} if run is None else {"run": run}
    trials = choose(db.trials(device_key=device_key, **only))
    winners = choose(db.bests(device_key=device_key))
    if run is not None:
        tried = {(record.device.key, record.problem) for record in trials}
        winners = [r for r in winners if (r.device.key, r.problem) in tried]
    found: dict[tuple[str, str], tuple[list[Record], list[Record]]] = {}
    for part, records in enumerate((trials, winners)):
        for record in records:
            found.setdefault((record.device.key, record.policy), ([], []))[part].append(record)
    measured = {each.device_key: each for each in ceilings}
    runs = [each for each in db.runs() if run in (None, each["id"])]
    chapters = []
    for (key, policy), (mine, best) in found.items():
        device = (mine or best)[0].device
        every = [*mine, *best]
        chapters.append(
            Chapter(
                device=device,
                policy=policy,
                predicted=any(record.outcome == "predicted" for record in every),
                trials=len(mine),
                outdated=sum(
                    digests.get(record.config.template) != record.template_digest
                    for record in every
                ),
                searches=searches(mine, best),
                funnel=funnel(mine, infeasible(mine) if infeasible else None),
                tuned=tuned(mine),
                ceilings=measured.get(key) or Ceilings.stated(device),
                conditions=conditions(mine or best),
                runs=tuple(
                    {**each, "budget": json.loads(each["budget"])}
                    for each in runs
                    if each["device_key"] == key
                ),
                regret=regret(device, policy),
            )
        )
    return Findings(
        place=db.place,
        version=autoflash.__version__,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        asked=asked,
        digests=digests,
        chapters=tuple(sorted(chapters, key=lambda chapter: -chapter.trials)),
    )
