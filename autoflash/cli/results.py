"""What tuning came to, as `tune` prints it: exit code, table, ranking, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoflash.cli.output import (
    kib,
    ratio,
    remark,
    say,
    shortened,
    table,
    tflops,
    us,
    versus_torch,
    write_json,
)
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.record import Record

if TYPE_CHECKING:
    from autoflash.database import Database
    from autoflash.tuning.progress import TuneResult

EXIT_OK, EXIT_ERROR, EXIT_UNIMPROVED, EXIT_PARTIAL, EXIT_INVALID = 0, 2, 3, 4, 5
"""What a script learns from `tune`: something improved (or was predicted), a mistake in the
request, nothing beat the default, not everything asked for was done, nothing valid was found."""
_EXPECTED = ("ok", "predicted", "slow", "infeasible")
_RANKS = 5
"""Rows of a ranking: the static model is rough, so its first few are worth a trial."""


def exit_code(results: Sequence[TuneResult], asked: int) -> int:
    """The exit code of `tune` for its results, where `asked` problems were to be tuned."""
    statuses = {result.status for result in results}
    if "partial" in statuses or len(results) < asked:
        return EXIT_PARTIAL
    if statuses & {"improved", "predicted"}:
        return EXIT_OK
    return EXIT_UNIMPROVED if "unimproved" in statuses else EXIT_INVALID


def tuned(results: Sequence[TuneResult], device: Device, db: Database, as_json: bool) -> None:
    """The end of `tune`: one row per problem, or the ranking where the device is not here."""
    absent = [r.problem for r in results if r.best and not r.best.is_measured]
    ranked = {problem: ranking(problem, device, db) for problem in absent}
    if as_json:
        write_json(
            {
                "device": device.to_dict(),
                "results": [result_dict(r, ranked.get(r.problem, ())) for r in results],
            }
        )
        return
    if ranked:
        _predicted(ranked, device)
    rest = [result for result in results if result.problem not in ranked]
    if rest:
        _tuned(rest, device)
    _remarks(results)


def ranking(problem: Problem, device: Device, db: Database) -> list[Record]:
    """The best predicted configs of a problem, as the installed templates have them."""
    digests = installed_digests()
    found = {
        record.config.key: record
        for record in db.trials(problem=problem, device_key=device.key)
        if record.outcome == "predicted"
        and record.template_digest == digests.get(record.config.template)
    }
    return sorted(found.values(), key=lambda record: record.predicted_us or 0.0)[:_RANKS]


def installed_digests() -> dict[str, str]:
    """Template -> digest as installed; a record of another digest is not served."""
    from autoflash.codegen import catalog

    return {name: t.digest for name, t in catalog.installed().templates.items()}


def _tuned(results: Sequence[TuneResult], device: Device) -> None:
    rows = []
    configs, notes = shortened([result.best.config if result.best else None for result in results])
    for result, config in zip(results, configs, strict=True):
        best = result.best
        rows.append(
            (
                result.problem.name,
                best.config.template if best else "-",
                us(best.latency_us) if best else "",
                tflops(best) if best else "",
                ratio(best.default_us, best.latency_us) if best else "",
                versus_torch(best) if best else "",
                result.status,
                result.trials,
                config if best else result.reason,
            )
        )
    columns = ("shape", "winner", ">us", ">tflops", ">vs default", ">vs PyTorch", "status",
               ">trials", "config")  # fmt: skip
    table(f"Tuned on {device.name} ({device.arch})", columns, rows)
    for note in notes:
        say(note)


def _remarks(results: Iterable[TuneResult]) -> None:
    """What the table has no room for: which trials yielded no time."""
    for result in results:
        bad = {k: n for k, n in result.outcomes.items() if n and k not in _EXPECTED}
        if bad:
            counted = ", ".join(f"{n} {kind}" for kind, n in sorted(bad.items()))
            remark(f"{result.problem.name}: {counted} (`autoflash show --all` has the reasons)")


def _predicted(ranked: Mapping[Problem, Sequence[Record]], device: Device) -> None:
    rows = []
    texts, notes = shortened([record.config for records in ranked.values() for record in records])
    configs = iter(texts)
    for problem, records in ranked.items():
        for rank, record in enumerate(records, 1):
            used = record.resources
            rows.append(
                (
                    problem.name if rank == 1 else "",
                    rank,
                    record.config.template,
                    us(record.predicted_us),
                    used.get("registers"),
                    kib(used.get("smem_bytes")),
                    used.get("spill_bytes"),
                    _occupancy(record),
                    next(configs),
                )
            )
    columns = ("shape", ">rank", "template", ">predicted us", ">registers", ">smem",
               ">spills", ">occupancy", "config")  # fmt: skip
    table(f"Predicted for {device.name} ({device.arch}), which is not here", columns, rows)
    for note in notes:
        say(note)
    say("Compiled and ranked by a static model, not measured; a measurement replaces them.")


def _occupancy(record: Record) -> str:
    """Share of a multiprocessor's threads that can be resident, and what limits it."""
    from autoflash.tuning.predict import occupancy

    used, device = record.resources, record.device
    names = ("registers", "smem_bytes", "num_threads")
    if not device.is_cuda or any(used.get(name) is None for name in names):
        return ""
    held = occupancy(device, **{name: int(used[name]) for name in names})
    return f"{32 * held.warps / device.threads_per_sm:.0%} ({held.limit})"


def result_dict(result: TuneResult, ranked: Sequence[Record]) -> dict[str, Any]:
    """A tuning result for JSON; `ranked` holds the predicted configs, best first."""
    return {
        "problem": result.problem.name,
        "status": result.status,
        "trials": result.trials,
        "outcomes": dict(sorted(result.outcomes.items())),
        "elapsed_s": round(result.elapsed_s, 3),
        "reason": result.reason,
        "best": result.best.to_dict() if result.best else None,
        "ranked": [record.to_dict() for record in ranked],
    }
