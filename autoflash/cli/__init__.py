"""The command line: one short function per command."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import autoflash
from autoflash.cli import db as db_commands
from autoflash.cli import output, records, reports, results
from autoflash.cli.options import (
    AnyArchOption,
    AnyDeviceOption,
    ArchOption,
    DatabaseOption,
    DevicesOption,
    EffortOption,
    HereOption,
    JobsOption,
    JsonOption,
    SeedOption,
    TemplatesOption,
    TrialsOption,
    default_effort,
    device_key,
    template_names,
    use,
)
from autoflash.cli.problems import Selection, takes_problems, words
from autoflash.errors import AutoflashError, InvalidInput
from autoflash.settings import PACKAGE_DIR

app = typer.Typer(
    name="autoflash",
    add_completion=False,
    rich_markup_mode="markdown",  # rewraps the docstrings
    pretty_exceptions_enable=False,  # a traceback is for our own bugs, and then a whole one
    help="Generate flash-attention kernels, find the fastest for a device and shape, serve it.",
)
app.add_typer(db_commands.app, name="db")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a mistake in the request; see results for `tune`.

    Args:
        arguments: those after the program's name; None takes them from sys.argv.
    """
    warnings.showwarning = _show_warning
    try:
        given = sys.argv[1:] if arguments is None else arguments
        app(args=given or ["--help"], prog_name="autoflash")
    except AutoflashError as error:
        output.remark(f"autoflash: {error}")
        sys.exit(results.EXIT_ERROR)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    output.remark(f"autoflash: warning: {message}")


@app.command()
@takes_problems
def tune(
    selection: Selection,
    arch: ArchOption = "native",
    templates: TemplatesOption = None,
    effort: EffortOption = None,
    trials: TrialsOption = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="S", min=0, help="Most time for the run.")
    ] = None,
    seed: SeedOption = 0,
    on: DevicesOption = None,
    jobs: JobsOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the fastest kernel for each problem: generate, compile, check, time and remember.

    Exit code: 0 something improved (or was predicted), 2 a mistake in the request, 3 nothing beat
    the template's default, 4 not all was done (what was done is kept; run again to go on),
    5 nothing valid was found.
    """
    from autoflash import device as devices
    from autoflash.database import Database
    from autoflash.tuning import boards, tuner

    use(jobs=jobs, database=database)
    chosen = [] if on is None else boards.choose(on, arch)
    device = chosen[0].device if chosen else devices.for_arch(arch)
    problems = selection.problems(device)
    if len(chosen) > len(problems):
        output.remark(f"{len(problems)} of {len(chosen)} devices are used: one for each problem")
    with Database.open() as db:
        with output.TuneProgress(quiet=as_json) as progress:
            found = tuner.tune(
                problems,
                device,
                database=db,
                effort=effort or default_effort(device),
                max_trials=trials,
                max_seconds=seconds,
                templates=template_names(templates),
                seed=seed,
                on_event=progress,
                boards=chosen,
            )
        results.tuned(found, device, db, as_json)
    raise typer.Exit(results.exit_code(found, len(problems)))


@app.command()
@takes_problems
def plan(
    selection: Selection,
    arch: ArchOption = "native",
    templates: TemplatesOption = None,
    effort: EffortOption = None,
    trials: TrialsOption = None,
    jobs: JobsOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what `tune` would do: how many configs, what rejects the others and why, how long."""
    from autoflash import device as devices
    from autoflash.database import Database
    from autoflash.tuning import tuner

    use(jobs=jobs, database=database)
    device = devices.for_arch(arch)
    costs = selection.costs(device)
    with Database.open() as db:
        plans = tuner.plan(
            [cost.problem for cost in costs] or selection.problems(device),
            device,
            templates=template_names(templates),
            effort=effort or default_effort(device),
            max_trials=trials,
            database=db,
            present=tuner.is_present(device),
        )
    reports.planned(plans, device, as_json, costs)


@app.command()
@takes_problems
def generalise(
    selection: Selection,
    probes: Annotated[
        int | None,
        typer.Option("--probes", metavar="N", min=5, help="Shapes of each family to measure."),
    ] = None,
    templates: TemplatesOption = None,
    effort: EffortOption = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="S", min=0, help="Most time for the run.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the shapes and of the random inputs.")
    ] = 0,
    jobs: JobsOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the winners on shapes between theirs, and choose what serves shapes nobody tuned.

    The problem options choose among the winners measured on the device found here; each family of
    them (dtype, head_dim, mask) gets a small table. Exit code: 0 a table has something better
    than the default, 3 the default is best everywhere, 4 not all was measured (run again to go
    on), 5 too little to choose by, 2 a mistake in the request.
    """
    from autoflash import device as devices
    from autoflash.cli import regret
    from autoflash.database import Database
    from autoflash.tuning import generalise as generalising

    use(jobs=jobs, database=database)
    device = devices.native()
    with Database.open() as db, output.TuneProgress(quiet=as_json) as progress:
        found = generalising.generalise(
            selection.matching(db.bests(device_key=device.key)),
            device,
            database=db,
            count=generalising.PROBES if probes is None else probes,
            effort=effort or "quick",
            max_seconds=seconds,
            templates=template_names(templates),
            seed=seed,
            on_event=progress,
        )
    regret.generalised(found, as_json)
    raise typer.Exit(regret.exit_code(found))


@app.command()
def simulate(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Recorded tables, or folders of them."),
    ],
    strategies: Annotated[
        str | None,
        typer.Option("--strategies", metavar="NAME,NAME...", help="Such as default,random."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="How many.")] = 5,
    trials: TrialsOption = None,
    jobs: JobsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare ways to search on recorded tables, without the hardware, in simulated time."""
    from autoflash.cli.simulation import simulated, strategy_names
    from autoflash.tuning.simulate import simulate as run_all
    from autoflash.tuning.table import read_all

    names = strategy_names(strategies)
    known = read_all(tables)
    found = run_all(
        known,
        names,
        seeds=seeds,
        trials=trials,
        jobs=jobs,
        on_strategy=lambda one: output.remark(f"{one.name} ..."),
    )
    simulated(found, known, as_json)


@app.command()
@takes_problems
def show(
    selection: Selection,
    arch: AnyArchOption = None,
    device: AnyDeviceOption = None,
    every: Annotated[bool, typer.Option("--all", help="Every trial, not only the best.")] = False,
    tables: Annotated[
        bool,
        typer.Option("--regret", help="The dispatch tables, and what they lose to the best."),
    ] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the best records, with --all every trial and what came of it, or dispatch tables."""
    from autoflash.cli import regret
    from autoflash.database import Database

    use(database=database)
    with Database.open() as db:
        key = device_key(device, db)
        if tables:
            made = [t for t in db.tables(key) if arch in (None, t.device.arch)]
            regret.shown(selection.concerning(made), as_json)
            return
        known = db.trials(device_key=key) if every else db.bests(arch=arch, device_key=key)
    wanted = [r for r in selection.matching(known) if arch in (None, r.device.arch)]
    records.shown(wanted, every, as_json)


@app.command()
@takes_problems
def report(
    selection: Selection,
    device: AnyDeviceOption = None,
    run: Annotated[
        int | None, typer.Option("--run", metavar="N", help="Only this run; the page lists them.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the page there.")
    ] = None,
    ceilings: Annotated[
        list[Path] | None,
        typer.Option(
            "--ceilings",
            metavar="FILE",
            help="Measured ceilings of a device, by benchmarks/ceilings.py; repeatable.",
        ),
    ] = None,
    spaces: Annotated[
        bool,
        typer.Option("--spaces", help="Count what constraints reject too: seconds a problem."),
    ] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what tuning tried and found, here in short, or all of it as a page for a browser."""
    from autoflash.cli import findings as short
    from autoflash.cli import regret
    from autoflash.database import Database
    from autoflash.report import Ceilings, findings
    from autoflash.report.spaces import infeasible

    use(database=database)
    measured = [Ceilings.load(path) for path in ceilings or ()]
    digests = results.installed_digests()
    with Database.open() as db:
        key = device_key(device, db)
        made = selection.concerning(db.tables(key))
        found = findings(
            db,
            digests=digests,
            device_key=key,
            run=run,
            choose=selection.matching,
            asked=short.asked(selection, device, run),
            ceilings=measured,
            infeasible=infeasible if spaces else None,
            regret=partial(regret.overview, made, digests),
        )
    short.reported(found, html, as_json)


@app.command()
def why(
    shapes: Annotated[
        list[str], typer.Argument(metavar="SHAPE...", help="Such as b4s4096h32/8d128c-bfloat16.")
    ],
    arch: HereOption = "native",
    count: Annotated[int, typer.Option("--count", min=0, help="Other records to list.")] = 5,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which record or rule serves a problem, and what the nearest others differ in."""
    from autoflash import device as devices
    from autoflash.runtime.explain import explain

    use(database=database)
    device = devices.for_arch(arch)
    answers = [explain(shape, device, count=count) for shape in shapes]
    if as_json:
        output.write_json([answer.to_dict() for answer in answers])
    else:
        for answer in answers:
            records.explained(answer)


@app.command()
@takes_problems
def bench(
    selection: Selection,
    arch: HereOption = "native",
    providers: Annotated[
        str | None,
        typer.Option(
            "--providers", metavar="NAME,NAME...", help="Such as autoflash,sdpa; default: all."
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", min=1, help="Turns of each provider.")
    ] = None,
    budget: Annotated[
        float, typer.Option("--budget-ms", metavar="MS", min=1, help="Time for each, about.")
    ] = 300.0,
    seed: SeedOption = 0,
    jobs: JobsOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the JSON there, after each problem."),
    ] = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time autoflash beside every other attention that is installed, in the same rounds.

    Exit code: 5 if no provider could be timed on any problem.
    """
    from autoflash import benchmark
    from autoflash import device as devices
    from autoflash.tuning.timing import ROUNDS

    use(jobs=jobs, database=database)
    device = devices.for_arch(arch)
    report = benchmark.run(
        selection.problems(device),
        device,
        words(providers) if providers else None,
        rounds=rounds or ROUNDS,
        budget_ms=budget,
        seed=seed,
        on_build=output.bench_builds,
        on_start=output.bench_started,
        on_row=output.bench_row,
        on_report=partial(reports.bench_saved, out=out) if out else None,
    )
    reports.benched(report, out, as_json)
    if not any(report.latencies().values()):
        raise typer.Exit(results.EXIT_INVALID)


@app.command()
@takes_problems
def export(
    selection: Selection,
    form: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="package, hf-kernel, json, flex, triton-configs, kernel-tuner or cuda-header.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Of the package, module or namespace made."),
    ] = None,
    binaries: Annotated[
        bool,
        typer.Option("--binaries/--sources", help="Ship compiled CUDA kernels, or sources only."),
    ] = True,
    device: AnyDeviceOption = None,
    arch: AnyArchOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write what was tuned for a device in a form that other projects load without autoflash."""
    from autoflash import export as exporting
    from autoflash.cli.exports import exported
    from autoflash.codegen import catalog
    from autoflash.database import Database

    use(database=database)
    target = exporting.target(form)
    if target.op is not None:
        if selection.op not in (None, target.op):
            raise InvalidInput(
                f"--op {selection.op}: {form} is of op {target.op} alone; leave --op away."
            )
        selection = dataclasses.replace(selection, op=target.op)
    with Database.open() as db:
        chosen = exporting.select(
            db,
            catalog.installed(),
            templates=target.templates,
            op=target.op,
            device_key=device_key(device, db),
            arch=arch,
            stand_ins=target.stand_ins,
            trials=target.trials,
            choose=selection.matching,
            chosen_tables=selection.concerning,
        )
    options = exporting.Options(name=name, binaries=binaries, progress=output.remark)
    files = target.files(chosen, options)
    exported(exporting.write(out, target.name, chosen, files), chosen, as_json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` wrote.")],
    effort: Annotated[
        str, typer.Option("--effort", metavar="NAME", help="How long to race: quick or normal.")
    ] = "quick",
    jobs: JobsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an export here: its files, whether its kernels are right, whether its winners win.

    Kernels are run where the device is of the arch they are for, and the files are as they were
    written. Exit code: 0 all is well, 4 not everything could be checked, 5 something is wrong (a
    file, a result, a winner that lost to its template's default), 2 a mistake in the request.
    """
    from autoflash.cli import verification
    from autoflash.export.verify import verify as check

    use(jobs=jobs)
    found = check(folder, effort=effort, on_step=output.remark)
    verification.verified(found, as_json)
    raise typer.Exit(verification.exit_code(found))


@app.command()
@takes_problems
def warmup(
    selection: Selection,
    arch: HereOption = "native",
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build now what will serve these problems, so that no call waits for a compiler."""
    from autoflash import device as devices
    from autoflash.cli.building import precompile
    from autoflash.runtime.warmup import warmup as build_ahead
    from autoflash.tuning.run import is_present

    use(database=database)
    device = devices.for_arch(arch)
    problems = selection.problems(device)
    if is_present(device):
        built = build_ahead(problems, device="cuda" if device.is_cuda else "cpu")
        reports.warmed(built, as_json)
    else:
        reports.compiled(precompile(problems, device), device, as_json)


@app.command("presets")
def list_presets(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these; default: all.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the models that --preset takes: their attention layers, and where that is known from."""
    from autoflash.cli import presets
    from autoflash.workload.presets import get, installed

    presets.listed([get(name) for name in names or installed()], as_json)


@app.command("doctor")
def examine(as_json: JsonOption = False) -> None:
    """Say what this machine can do, what is missing, what that costs and what to do next."""
    from autoflash.cli.doctor import diagnose

    diagnosis = diagnose()
    reports.diagnosed(diagnosis, as_json)
    raise typer.Exit(results.EXIT_OK if diagnosis.is_useful else results.EXIT_INVALID)


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the version."""
    facts = {"version": autoflash.__version__, "package": str(PACKAGE_DIR)}
    output.write_json(facts) if as_json else output.say(autoflash.__version__)
