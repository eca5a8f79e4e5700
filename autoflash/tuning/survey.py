"""Survey: run every config of some problems once, and write down what it came to and what it cost.

Unlike a search it leaves nothing out, or a stated sample, and learns nothing. Compilers and the
device work at once; sources that problems share are compiled once.
"""

from __future__ import annotations

import dataclasses
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflash import build, settings
from autoflash.build import cache
from autoflash.codegen.catalog import Catalog, installed
from autoflash.codegen.template import Source, Template
from autoflash.config import Config
from autoflash.device import Device
from autoflash.errors import InvalidInput
from autoflash.problem import Problem
from autoflash.tuning import wire
from autoflash.tuning.boards import held
from autoflash.tuning.boards import of as board_of
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.pool import Finished, Pool, Workers
from autoflash.tuning.predict import over_resources
from autoflash.tuning.run import KILLS, is_present, now, refusal
from autoflash.tuning.table import TIMED, Header, Row, Rung, Space, Table, Writer, read
from autoflash.tuning.timing import policy_for
from autoflash.tuning.trials import (
    CANARIES,
    compile_request,
    device_failed,
    evaluate_timeout_s,
    raise_named,
)

CHECKED = 4
"""So many configs of each problem are checked, and every source once: the check of a source says
little that is new on a problem of other lengths, and takes longer than timing it."""
_HELLO = "hello"

Listener = Callable[[Problem, Row, int, int], None]
"""Called with problem, row, how many rows it has and how many it will have."""


def survey(
    problems: Sequence[Problem],
    device: Device,
    folder: Path,
    *,
    templates: Sequence[str] | None = None,
    sample: int | None = None,
    seconds: float | None = None,
    do_bench_every: int = 0,
    seed: int = 0,
    on_row: Listener | None = None,
    catalog: Catalog | None = None,
    workers: Workers | None = None,
) -> list[Table]:
    """Record one table per problem in a folder, or go on with those that are there.

    Args:
        problems: in this order; those that share sources should stand together.
        device: present.
        folder: for `<problem>.jsonl`.
        templates: names; None is all that accept a problem.
        sample: of each template, the default, the seeds and so many random configs; None: all.
        seconds: after which no more is started; None is no limit.
        do_bench_every: also time every so-manieth config with triton.testing.do_bench; 0: none.
        seed: of the order of configs, the sample and the inputs.
        on_row: called with each new row.
        catalog: of templates; None is the installed one.
        workers: what compiles and runs configs; None: processes of our own.

    Raises:
        InvalidInput: the device is not here, or a table in the folder is of something else.
        WorkerError: the device does not work.
    """
    if workers is None and not is_present(device):
        raise InvalidInput(f"{device.name} is not here: tables are recorded where kernels run.")
    every = (catalog or installed()).templates
    chosen = [each for name, each in every.items() if templates is None or name in templates]
    jobs = build.jobs_within_memory(settings.get().jobs, {t.language for t in chosen}, device)
    with ExitStack() as stack:
        if workers is None:
            root, board = cache.root(), board_of(device)
            stack.enter_context(held([board], root))
            workers = Pool(jobs=jobs, cache_dir=root, visible=board.visible)
        stack.callback(workers.close)
        deadline = time.monotonic() + seconds if seconds is not None else None
        shared = _Shared(device, chosen, folder, sample, jobs, seed, _greet(workers, device))
        surveying = _Surveying(device, workers, jobs, do_bench_every, seed, deadline, on_row)
        parts = (_Part.open(problem, shared) for problem in problems)
        surveying.run(_ahead(_candidates(parts, device)))
    paths = (_path(folder, problem) for problem in problems)
    return [read(path) for path in paths if path.exists()]


def _greet(workers: Workers, device: Device) -> Mapping[str, Any]:
    """See that the device works; the versions of what runs there."""
    reply: dict[str, Any] = {}
    for _ in range(CANARIES):
        timeout_s = EFFORTS["normal"].evaluate_timeout_s
        workers.submit("device", _HELLO, {"kind": _HELLO, "device": device.to_dict()}, timeout_s)
        while workers.pending("device"):
            for finished in workers.wait(1.0):
                reply = finished.reply
        if reply.get("outcome") == "ok":
            return dict(reply["environment"])
    raise device_failed(device, reply)


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all problems of a survey share."""

    device: Device
    templates: Sequence[Template]
    folder: Path
    sample: int | None
    jobs: int
    seed: int
    environment: Mapping[str, Any]


def _path(folder: Path, problem: Problem) -> Path:
    return folder / f"{problem.name.replace('/', '-').replace(':', '-')}.jsonl"


@dataclass(slots=True)
class _Part:
    """One problem of a survey."""

    problem: Problem
    writer: Writer
    wanted: list[Config]
    templates: Mapping[str, Template]
    total: int  # rows when it is complete
    best_us: float | None
    checks: int  # made so far
    runs: int  # on the device

    @classmethod
    def open(cls, problem: Problem, shared: _Shared) -> _Part:
        device, sample, seed = shared.device, shared.sample, shared.seed
        usable = [each for each in shared.templates if refusal(each, problem, device) is None]
        spaces, first, rest = {}, [], []
        for template in usable:
            configs = template.space(problem, device).configs
            default = template.default_config(problem, device)
            seeds = [c for c in template.seed_configs(problem, device) if c != default]
            spaces[template.name] = Space(
                language=template.language,
                digest=template.digest,
                tunables=template.tunables,
                default=default,
                seeds=tuple(seeds),
                gives_way=template.gives_way(problem, device) is not None,
                feasible=len(configs),
            )
            early = [c for c in (default, *seeds) if c in set(configs)]
            others = [config for config in configs if config not in set(early)]
            first += early
            rest += random.Random(seed).sample(others, min(len(others), sample or len(others)))
        random.Random(seed).shuffle(rest)
        effort = EFFORTS["normal"]
        chosen = f"defaults, seeds and {sample} random configs of each template, seed {seed}"
        header = Header(
            problem=problem,
            device=device,
            policy=policy_for(device).id,
            timing_ms=effort.timing_ms,
            jobs=shared.jobs,
            sample="all" if sample is None else chosen,
            date=now(),
            environment=shared.environment,
            spaces=spaces,
        )
        writer = Writer(_path(shared.folder, problem), header)
        done = list(writer.done.values())
        wanted = [config for config in (*first, *rest) if config not in writer.done]
        return cls(
            problem,
            writer,
            wanted,
            {template.name: template for template in usable},
            total=len(first) + len(rest),
            best_us=min((row.latency_us for row in done if row.latency_us), default=None),
            checks=sum(row.check_s is not None for row in done),
            runs=len(done),
        )


@dataclass(slots=True)
class _Candidate:
    part: _Part
    config: Config
    source: Source


def _candidates(parts: Iterator[_Part], device: Device) -> Iterator[_Candidate]:
    for part in parts:
        for config in part.wanted:
            template = part.templates[config.template]
            yield _Candidate(part, config, template.render(config, part.problem, device))


def _ahead(candidates: Iterator[_Candidate], limit: int = 64) -> Iterator[_Candidate | None]:
    """The same, made by a thread; None where the next is not ready, for the device must not wait.

    Listing the feasible configs of a problem takes seconds, rendering one some milliseconds.
    """
    made: queue.Queue[_Candidate | BaseException | None] = queue.Queue(limit)

    def make() -> None:
        try:
            for candidate in candidates:
                made.put(candidate)
        except BaseException as error:  # raised again where it is taken
            made.put(error)
        made.put(None)

    threading.Thread(target=make, daemon=True).start()
    while True:
        try:
            found = made.get_nowait()
        except queue.Empty:
            yield None
            continue
        if found is None:
            return
        if isinstance(found, BaseException):
            raise found
        yield found


class _Surveying:
    """The loop of one survey: compiles ahead, runs one problem after the other."""

    def __init__(
        self,
        device: Device,
        workers: Workers,
        jobs: int,
        do_bench_every: int,
        seed: int,
        deadline: float | None,
        on_row: Listener | None,
    ) -> None:
        self._device, self._workers = device, workers
        self._every, self._seed, self._deadline = do_bench_every, seed, deadline
        self._tell: Listener = on_row or (lambda problem, row, done, total: None)
        self._ahead = 8 * jobs  # sources with the compilers: none of them waits for the device
        self._exclusive = not device.is_cuda  # on a CPU compilers would disturb what is timed
        self._compiled: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, list[_Candidate]] = {}  # digest -> those it is compiled for
        self._ready: deque[_Candidate] = deque()
        self._running: tuple[_Candidate, bool] | None = None  # and whether it is checked
        self._checked: dict[str, str] = {}  # digest -> outcome of its check
        self._measured: dict[tuple[Problem, str], Row] = {}  # twins of one source
        self._part: _Part | None = None  # whose inputs the worker holds
        self._suspect = False
        self._greeting = 0

    def run(self, candidates: Iterator[_Candidate | None]) -> None:
        """Record all rows, or those for which there is time."""
        more = True
        while True:
            while more and not self._is_full():
                try:
                    candidate = next(candidates)
                except StopIteration:
                    more = False
                    break
                if candidate is None:
                    break
                self._compile(candidate)
            if self._out_of_time():
                for digest in self._workers.cancel("compile"):
                    self._waiting.pop(digest, None)
                self._ready.clear()
                more = False
            self._run_next()
            if not (more or self._waiting or self._ready or self._running or self._suspect):
                return
            if more and not (self._waiting or self._running):
                time.sleep(0.02)  # nothing is under way, and the next is being made
            for finished in self._workers.wait(0.1):
                self._handle(finished)

    def _is_full(self) -> bool:
        if self._exclusive:
            return bool(self._ready or self._running) or len(self._waiting) >= self._ahead
        return len(self._waiting) >= self._ahead or len(self._ready) >= 2 * self._ahead

    def _out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _compile(self, candidate: _Candidate) -> None:
        digest = candidate.source.digest
        if digest in self._compiled:
            self._built(candidate)
        elif digest in self._waiting:
            self._waiting[digest].append(candidate)
        else:
            self._waiting[digest] = [candidate]
            request = compile_request(candidate.source, self._device)
            timeout_s = EFFORTS["full"].compile_timeout_s
            self._workers.submit("compile", digest, request, timeout_s)

    def _built(self, candidate: _Candidate) -> None:
        reply = self._compiled[candidate.source.digest]
        if reply["outcome"] != "ok":
            self._write(candidate, {"outcome": reply["outcome"]})
        elif over_resources(reply["resources"], self._device) is not None:
            self._write(candidate, {"outcome": "over_resources"})
        else:
            self._ready.append(candidate)

    def _run_next(self) -> None:
        if self._running or self._workers.pending("device"):
            return
        if self._suspect:
            request: dict[str, Any] = {"kind": _HELLO, "device": self._device.to_dict()}
            self._workers.submit("device", _HELLO, request, EFFORTS["full"].evaluate_timeout_s)
            return
        if self._exclusive and self._waiting:
            return
        while (candidate := self._next()) is not None:
            part, source = candidate.part, candidate.source
            if twin := self._measured.get((part.problem, source.digest)):
                self._add(part, dataclasses.replace(twin, config=candidate.config))
                continue
            if self._checked.get(source.digest, "ok") != "ok":
                self._write(candidate, {"outcome": self._checked[source.digest]})
                continue
            check = part.checks < CHECKED or source.digest not in self._checked
            request = {
                "kind": "survey",
                "source": wire.source_to_dict(source),
                "problem": part.problem.to_dict(),
                "device": self._device.to_dict(),
                "seed": self._seed,
                "timing_ms": EFFORTS["normal"].timing_ms,
                "best_us": part.best_us,
                "check": check,
                "do_bench": bool(self._every) and part.runs % self._every == 0,
            }
            part.checks += check
            part.runs += 1
            timeout_s = evaluate_timeout_s(EFFORTS["normal"], part.problem, self._device)
            self._running = candidate, check
            self._workers.submit("device", source.digest, request, timeout_s)
            return

    def _next(self) -> _Candidate | None:
        """Of the problem under way, as long as there are any: inputs of another are made anew."""
        for candidate in self._ready:
            if candidate.part is self._part:
                self._ready.remove(candidate)
                return candidate
        waiting = (c.part for several in self._waiting.values() for c in several)
        if not self._ready or any(part is self._part for part in waiting):
            return None
        self._part = self._ready[0].part
        return self._ready.popleft()

    def _handle(self, finished: Finished) -> None:
        reply = finished.reply
        raise_named(reply)
        if finished.role == "compile":
            self._compiled[finished.key] = reply
            for candidate in self._waiting.pop(finished.key, []):
                self._built(candidate)
        elif finished.key == _HELLO:
            self._suspect = reply["outcome"] != "ok"
            self._greeting = self._greeting + 1 if self._suspect else 0
            if self._greeting >= CANARIES:
                raise device_failed(self._device, reply)
        elif self._running is not None:
            (candidate, checked), self._running = self._running, None
            self._suspect = reply["outcome"] in KILLS or bool(reply.get("exiting"))
            if checked:
                outcome = reply["outcome"]
                self._checked[candidate.source.digest] = "ok" if outcome in TIMED else outcome
            self._write(candidate, reply)

    def _write(self, candidate: _Candidate, reply: Mapping[str, Any]) -> None:
        compiled = self._compiled.get(candidate.source.digest, {})
        resources = compiled.get("resources") or {}
        do_bench = reply.get("do_bench")
        row = Row(
            config=candidate.config,
            outcome=reply["outcome"],
            source=candidate.source.digest[:12],
            compile_s=resources.get("compile_s"),
            load_s=reply.get("load_s"),
            check_s=reply.get("check_s"),
            rungs=tuple(Rung(*rung) for rung in reply.get("rungs", ())),
            do_bench=(do_bench[0], do_bench[1]) if do_bench else None,
            resources=resources,
        )
        self._measured[candidate.part.problem, candidate.source.digest] = row
        self._add(candidate.part, row)

    def _add(self, part: _Part, row: Row) -> None:
        part.writer.add(row)
        if row.outcome == "ok" and row.latency_us is not None:
            part.best_us = min(part.best_us or row.latency_us, row.latency_us)
        self._tell(part.problem, row, len(part.writer.done), part.total)
