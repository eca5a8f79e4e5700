"""Finals: which of the best few wins, timed in turns with the default and PyTorch?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoflash.codegen.template import Source
from autoflash.config import Config
from autoflash.errors import WorkerError
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.tuning import wire
from autoflash.tuning.run import Run, now
from autoflash.tuning.timing import Interleaved
from autoflash.tuning.trials import (
    CANARIES,
    SLOWER,
    device_failed,
    evaluate_request,
    evaluate_timeout_s,
    explain,
)

NEAR = 1.1
"""Finalists are within this factor of the best: single timings differ by less from run to run."""
FEWEST_ROUNDS = 6
"""Of the finals: up to three finalists can be told from the default by so many (tuning.effort)."""
_MARGIN = 1.2
TRIES = 2
ATTEMPTS = 3
"""Finals that fail are held again, without those that made them fail."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the finals ended.

    Attributes:
        best: the winner, with default_us and torch_us of the same run.
        improved: whether it beats the default by more than the noise.
        finalists: every config timed, as records with the times of the finals.
        reason: why there is no certain winner, or "".
    """

    best: Record
    improved: bool
    finalists: tuple[Record, ...]
    reason: str = ""


def estimate_s(run: Run, best_us: float | None) -> float:
    """How long the finals will take: two calls a turn, for the finalists, the default, PyTorch."""
    entries = finalists_within(run, best_us) + 2
    least_ms = run.effort.finalist_ms(run.device)
    each_s = max(2 * (rounds_within(run, best_us) + 1) * (best_us or 0.0) / 1e6, least_ms / 1e3)
    return _MARGIN * entries * each_s


def finalists_within(run: Run, best_us: float | None) -> int:
    """How many finalists there is time for: one where a call takes seconds."""
    effort = run.effort
    if effort.finals_s is None or not best_us:
        return effort.finalists
    each_s = 2 * (effort.rounds + 1) * best_us / 1e6
    return max(1, min(effort.finalists, int(0.6 * effort.finals_s / each_s)))


def rounds_within(run: Run, best_us: float | None) -> int:
    """How many rounds there is time for: the fewest that prove something where calls are long."""
    effort = run.effort
    if effort.finals_s is None or not best_us:
        return effort.rounds
    entries = finalists_within(run, best_us) + 2
    round_s = _MARGIN * entries * 2 * best_us / 1e6
    return min(effort.rounds, max(FEWEST_ROUNDS, int(effort.finals_s / round_s) - 1))


def choose(records: Sequence[Record], count: int, keep: Config | None = None) -> list[Record]:
    """The fastest records with different sources that are near the best, and `keep` with them."""
    timed = [record for record in records if record.is_measured]
    ranked = sorted(timed, key=lambda record: record.latency_us or 0.0)
    chosen: dict[str, Record] = {}
    for record in ranked:
        near = (record.latency_us or 0.0) <= NEAR * (ranked[0].latency_us or 0.0)
        if record.config == keep or (near and len(chosen) < count):
            chosen.setdefault(record.source_digest or record.config.key, record)
    return list(chosen.values())


def decide(run: Run, problem: Problem, records: Sequence[Record], defaults: Sequence[Config],
           champion: Record | None) -> Verdict:  # fmt: skip
    """Time the best few again, beside the defaults and PyTorch, and name the winner.

    The fastest finalist wins if it beats the fastest default by more than the noise; otherwise that
    default does. Against the fastest of several templates' defaults, a tuned result is never worse
    than not tuning, whichever template would serve then.

    Args:
        run: gives the worker and the effort.
        problem: which.
        records: trials of the problem, at least one of them correct and timed.
        defaults: the templates' default configs; those that proved wrong are left out.
        champion: the stored winner so far, which has to defend its title; also one that was not
            tried, whose template is not searched.
    """
    by_config = {record.config: record for record in records}
    best_us = min(record.latency_us or 0.0 for record in records if record.is_measured)
    keep = champion.config if champion else None
    finalists = choose(records, finalists_within(run, best_us), keep)
    if champion is not None and champion.config not in by_config:
        finalists.append(champion)
    entrants = {record.config: record for record in finalists}
    for config in defaults:
        record = by_config.get(config)
        if record is not None and record.outcome in ("ok", "slow"):
            entrants.setdefault(config, record)
    reply: dict[str, Any] = {}
    for _ in range(ATTEMPTS):
        # With nothing but defaults there is nothing to prove.
        rounds = rounds_within(run, best_us) if set(entrants) - set(defaults) else 3
        reply = turns(run, problem, list(entrants), rounds=rounds, best_us=best_us)
        if reply["outcome"] == "ok":
            break
        for config, failure in guilty(run, problem, list(entrants), reply).items():
            # Stored as it is now, it and its twins stand in nobody's way again.
            for record in records:
                if record.source_digest == failure.source_digest or record.config == config:
                    twin = dataclasses.replace(failure, config=record.config)
                    run.ledger.trial(twin, run.number)
            del entrants[config]
        if not entrants:
            break
    names = _names(entrants)
    if reply["outcome"] != "ok":
        reason = f"the finals failed: {explain(reply)}"
        best = next((record for record in finalists if record.config in entrants), finalists[0])
        return Verdict(best, False, (), reason)
    times = {name: Measurement.from_dict(m) for name, m in reply["measurements"].items()}
    timed = Interleaved(times, reply["rounds"])
    # Twins of one source stand for each other: compare records by their entry's name.
    rivals = [names[config] for config in defaults if config in names]
    baseline = min(rivals, key=lambda name: times[name].latency_us, default=None)
    winner = min(names.values(), key=lambda name: times[name].latency_us)
    challengers = len(set(entrants) - set(defaults))
    improved = baseline is None or (
        winner != baseline and timed.beats(winner, baseline, rivals=max(1, challengers))
    )
    if not improved and baseline is not None:
        winner = baseline
    provider = reply["provider"]

    def final(config: Config) -> Record:
        return dataclasses.replace(
            entrants[config],
            outcome="ok",
            reason="",
            measurement=times[names[config]],
            default_us=times[baseline].latency_us if baseline is not None else None,
            torch_us=times[provider].latency_us if provider else None,
            torch_provider=provider,
            environment=dict(run.environment),
            created=now(),
        )

    every = {names[config]: final(config) for config in entrants}
    return Verdict(every[winner], improved, tuple(every.values()))


def _names(entrants: Iterable[Config]) -> dict[Config, str]:
    """Config -> the name under which it is timed."""
    return {config: str(number) for number, config in enumerate(entrants)}


def turns(
    run: Run,
    problem: Problem,
    entrants: Sequence[Config],
    *,
    rounds: int,
    best_us: float,
    torch: bool = True,
) -> dict[str, Any]:
    """The worker's answer to timing these configs in turns, each under its place among them.

    Args:
        run: gives worker and effort.
        problem: which.
        entrants: to be timed.
        rounds: how many turns each gets.
        best_us: time of the fastest, about.
        torch: whether PyTorch's best takes part.
    """
    request = {
        "kind": "finals",
        "sources": {
            name: wire.source_to_dict(_source(run, problem, config))
            for config, name in _names(entrants).items()
        },
        "problem": problem.to_dict(),
        "device": run.device.to_dict(),
        "seed": run.seed,
        "rounds": rounds,
        "finals_ms": run.effort.finalist_ms(run.device),
        "torch": torch,
    }
    alone_s = evaluate_timeout_s(run.effort, problem, run.device)
    return ask(run, request, 2 * alone_s + SLOWER * estimate_s(run, best_us))


def guilty(
    run: Run, problem: Problem, entrants: Sequence[Config], reply: Mapping[str, Any]
) -> dict[Config, Record]:
    """Which configs made the finals fail, and what is to be stored of them.

    The worker names those that were wrong. Of a worker that died or hung nobody knows which it
    was: each is run once more alone.
    """
    failures: dict[Config, Record] = {}
    wrong = reply.get("wrong", {})
    for config, name in _names(entrants).items():
        source = _source(run, problem, config)
        if "wrong" in reply:
            answer = {"outcome": "wrong_result", "reason": wrong[name]} if name in wrong else {}
        else:
            request = evaluate_request(run, problem, source, None)
            timeout_s = evaluate_timeout_s(run.effort, problem, run.device)
            answer = ask(run, request, timeout_s)
        if answer and answer["outcome"] != "ok" and "raise" not in answer:
            reason = f"in the finals: {explain(answer)}"
            failures[config] = run.record(
                problem, config, answer["outcome"], source=source, reason=reason
            )
    return failures


def _source(run: Run, problem: Problem, config: Config) -> Source:
    return run.template(config.template).render(config, problem, run.device)


def greet(run: Run) -> None:
    """See that the device works, and ask for its versions.

    Raises:
        WorkerError: it does not, for several fresh workers in a row.
    """
    request = {"kind": "hello", "device": run.device.to_dict()}
    reply: dict[str, Any] = {}
    for _ in range(CANARIES):
        reply = ask(run, request, run.effort.evaluate_timeout_s)
        if reply["outcome"] == "ok":
            run.environment = reply["environment"]
            return
    raise device_failed(run.device, reply)


def ask(
    run: Run, request: Mapping[str, Any], timeout_s: float, tries: int = TRIES
) -> dict[str, Any]:
    """Have the device's worker answer one request; a second time in a fresh process if it fails."""
    reply: dict[str, Any] = {}
    for _ in range(tries):
        run.workers.submit("device", str(request["kind"]), request, timeout_s)
        while True:
            answers = [f.reply for f in run.workers.wait(1.0) if f.role == "device"]
            if answers:
                reply = answers[0]
                break
            if not run.workers.pending("device"):
                raise WorkerError(f"the worker for {run.device.name} lost a request")
        if reply["outcome"] == "ok":
            break
    return reply
