"""Are the winners of an export still right and still winners, on the device at hand?

Kernels run in a worker process, as in tuning: one that crashes or hangs costs its row alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflash import build, settings
from autoflash.build import cache
from autoflash.build.library import without_entry
from autoflash.codegen.catalog import Catalog
from autoflash.codegen.template import Source
from autoflash.config import Config
from autoflash.device import Device
from autoflash.export.bundle import Bundle
from autoflash.problem import Problem
from autoflash.tuning import wire
from autoflash.tuning.boards import held
from autoflash.tuning.boards import of as board_of
from autoflash.tuning.effort import Effort
from autoflash.tuning.pool import Pool
from autoflash.tuning.timing import MARGIN, Comparison, compare
from autoflash.tuning.trials import evaluate_timeout_s, explain

_WINNER, _DEFAULT = "winner", "default"
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What became of one winner.

    Attributes:
        entry: as the manifest has it.
        origin: where its kernel came from: "library" or "source" of the export, or "template".
        outcome: "ok", or as in record.OUTCOMES; "unchecked" where there was nothing to run.
        reason: why it is not "ok".
        now_us: its time in the race.
        versus_default: its time over that of its template's default; None where it is that, or
            the default could not be built.
        versus_torch: its time over that of PyTorch's best here; None where PyTorch has none.
        provider: which that was.
        is_default: whether the winner is its template's default.
    """

    entry: Mapping[str, Any]
    origin: str = ""
    outcome: str = "unchecked"
    reason: str = ""
    now_us: float | None = None
    versus_default: Comparison | None = None
    versus_torch: Comparison | None = None
    provider: str | None = None
    is_default: bool = False

    @property
    def verdict(self) -> str:
        """In a word: "holds", "tie", "lost", "default", "right", "wrong" or "unchecked".

        "default" is a winner that is its template's default, "right" one that computes what it
        should, but has nothing to be compared with.
        """
        if self.outcome != "ok":
            return "unchecked" if self.outcome == "unchecked" else "wrong"
        if self.is_default:
            return "default"
        ratio = self.versus_default
        if ratio is None:
            return "right"
        if ratio.low > 1 + MARGIN:
            return "lost"
        return "holds" if ratio.high < 1 - MARGIN else "tie"

    @property
    def is_bad(self) -> bool:
        """Whether nobody should rely on it here."""
        return self.verdict in ("wrong", "lost")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        ratios = {"versus_default": self.versus_default, "versus_torch": self.versus_torch}
        return {
            "problem": self.entry["name"],
            "template": self.entry["template"],
            "verdict": self.verdict,
            "outcome": self.outcome,
            "reason": self.reason,
            "origin": self.origin,
            "recorded_us": self.entry["latency_us"],
            "now_us": self.now_us,
            "provider": self.provider,
            **{
                name: None if c is None else {"ratio": c.ratio, "low": c.low, "high": c.high}
                for name, c in ratios.items()
            },
        }


@dataclass(frozen=True, slots=True)
class _Side:
    """A kernel that takes part: its source, and the folder of its library if it was shipped."""

    source: Source
    origin: str
    folder: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """As workers are sent it."""
        sent = wire.source_to_dict(self.source)
        return sent if self.folder is None else {**sent, wire.BUILT_IN: str(self.folder)}


def play(
    bundle: Bundle,
    device: Device,
    effort: Effort,
    catalog: Catalog,
    on_step: Callable[[str], None],
) -> list[Match]:
    """Check every winner of an intact export, and race it against its template's default.

    Raises:
        CacheError: another process tunes this device, or the cache cannot be written.
    """
    made_for = Device.from_dict(bundle.header["device"])
    with ExitStack() as stack:
        shipped = _shipped(bundle, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        sides = [_sides(entry, bundle, shipped, catalog, made_for) for entry in bundle.entries]
        board = board_of(device)
        stack.enter_context(held([board], cache.root()))
        jobs = build.jobs_within_memory(settings.get().jobs, _languages(sides), device)
        pool = Pool(jobs=jobs, cache_dir=cache.root(), visible=board.visible)
        stack.callback(pool.close)
        failed = _compile(pool, sides, device, effort, on_step)
        matches = []
        for number, (entry, (winner, default)) in enumerate(
            zip(bundle.entries, sides, strict=True), 1
        ):
            on_step(f"[{number}/{len(sides)}] {entry['name']}")
            if isinstance(winner, str):
                matches.append(Match(entry=entry, reason=winner))
            elif (why := failed.get(winner.source.digest)) is not None:
                reply = {"outcome": "compile_error", **why}
                # No compiler is not the export's fault.
                outcome = "unchecked" if "raise" in reply else reply["outcome"]
                reason = str(reply["reason"])
                matches.append(
                    Match(entry=entry, origin=winner.origin, outcome=outcome, reason=reason)
                )
            else:
                rival = default if default and default.source.digest not in failed else None
                matches.append(_match(pool, entry, winner, rival, device, effort))
        return matches


def _match(
    pool: Pool,
    entry: Mapping[str, Any],
    winner: _Side,
    default: _Side | None,
    device: Device,
    effort: Effort,
) -> Match:
    problem = Problem.from_dict(entry["problem"])
    is_default = default is not None and default.source.digest == winner.source.digest
    common = {"problem": problem.to_dict(), "device": device.to_dict(), "seed": _SEED}
    alone_s, finals_ms = evaluate_timeout_s(effort, problem, device), effort.finalist_ms(device)
    checked = _ask(
        pool, "device",
        {"kind": "evaluate", "source": winner.to_dict(), "timing_ms": effort.timing_ms,
         "best_us": None, **common},
        alone_s,
    )  # fmt: skip
    if checked["outcome"] == "ok":
        racing = {_WINNER: winner}
        if default is not None and not is_default:
            racing[_DEFAULT] = default
        raced = _ask(
            pool, "device",
            {"kind": "finals", "sources": {n: side.to_dict() for n, side in racing.items()},
             "rounds": effort.rounds, "finals_ms": finals_ms, "torch": True, **common},
            2 * alone_s + 10 * finals_ms / 1e3,
        )  # fmt: skip
    else:
        raced = checked
    if raced["outcome"] != "ok":
        outcome = "unchecked" if "raise" in raced else raced["outcome"]
        return Match(
            entry=entry, origin=winner.origin, outcome=outcome, reason=explain(raced)
        )  # fmt: skip
    rounds, provider = raced["rounds"], raced["provider"]

    def versus(name: str | None) -> Comparison | None:
        return compare(rounds[_WINNER], rounds[name]) if name in rounds else None

    return Match(
        entry=entry,
        origin=winner.origin,
        outcome="ok",
        now_us=raced["measurements"][_WINNER]["latency_us"],
        versus_default=versus(_DEFAULT),
        versus_torch=versus(provider),
        provider=provider,
        is_default=is_default,
    )


def _ask(pool: Pool, role: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    pool.submit(role, str(request["kind"]), request, timeout_s)
    while True:
        for finished in pool.wait(1.0):
            return finished.reply


# What takes part --------------------------------------------------------------------------------


def _sides(
    entry: Mapping[str, Any],
    bundle: Bundle,
    shipped: Mapping[str, _Side],
    catalog: Catalog,
    made_for: Device,
) -> tuple[_Side | str, _Side | None]:
    """The winner, or why there is none, and the default of its template."""
    name, problem = entry["template"], Problem.from_dict(entry["problem"])
    template = catalog.templates.get(name)
    digest = bundle.header["templates"].get(name, {}).get("digest")
    current = template is not None and template.digest == digest
    default, winner = None, shipped.get(entry["source_digest"])
    if template is not None and current:
        config = template.default_config(problem, made_for)
        if template.broken(config, problem, made_for) is None:
            default = _Side(template.render(config, problem, made_for), "template")
        if winner is None:
            config = Config.of(name, entry["config"])
            source = template.render(config, problem, made_for)
            if source.digest == entry["source_digest"]:
                winner = _Side(source, "template")
    if winner is None:
        return (
            f"the export has no source of it, and template {name} as installed is not that which "
            f"was tuned ({digest})",
            default,
        )
    return winner, default


def _shipped(bundle: Bundle, scratch: Path) -> dict[str, _Side]:
    """The kernels that an export holds, by the digest of their source.

    Those are in tables as `package` writes them, wherever in the export they lie. One whose text
    is not what its digest says is left out.
    """
    found: dict[str, _Side] = {}
    for path in bundle.files:
        if Path(path).name != "table.json":
            continue
        folder = Path(path).parent / "kernels"
        table = json.loads((bundle.folder / path).read_text(encoding="utf-8"))
        for name, facts in table.get("kernels", {}).items():
            file = (folder / facts["file"]).as_posix()
            if file not in bundle.files:
                continue
            text = (bundle.folder / file).read_text(encoding="utf-8")
            source = Source(
                template=facts["template"],
                language=facts["language"],
                text=without_entry(text) if facts["language"] != "python" else text,
                op=facts["op"],
                dtype=facts["traits"]["dtype"],
                aligned=facts["traits"]["aligned"],
                options=facts["options"],
            )
            if source.digest != facts["source_digest"]:
                continue
            library = (folder / f"{name}.so").as_posix()
            if library in bundle.files:
                place = scratch / name
                place.mkdir()
                (place / build.LIBRARY).symlink_to((bundle.folder / library).resolve())
                found[source.digest] = _Side(source, "library", place)
            else:
                found[source.digest] = _Side(source, "source")
    return found


_Sides = Sequence[tuple["_Side | str", "_Side | None"]]


def _languages(sides: _Sides) -> set[str]:
    return {side.source.language for pair in sides for side in pair if isinstance(side, _Side)}


def _compile(
    pool: Pool, sides: _Sides, device: Device, effort: Effort, on_step: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Compile what was not shipped as a library: digest -> the answer, of those that failed."""
    wanted = {
        side.source.digest: side.source
        for pair in sides
        for side in pair
        if isinstance(side, _Side) and side.folder is None
    }
    for digest, source in wanted.items():
        request = {
            "kind": "compile",
            "source": wire.source_to_dict(source),
            "device": device.to_dict(),
        }
        pool.submit("compile", digest, request, effort.compile_timeout_s)
    if wanted:
        on_step(f"building {len(wanted)} {'kernel' if len(wanted) == 1 else 'kernels'}")
    failed: dict[str, dict[str, Any]] = {}
    while pool.pending("compile"):
        for finished in pool.wait(1.0):
            if finished.reply["outcome"] != "ok":
                failed[finished.key] = finished.reply
    return failed
