"""The `kernel-tuner` target: all trials as Kernel Tuner's cache files and as T4 results.

Source: Kernel Tuner 1.5 (github.com/KernelTuner/kernel_tuner), whose simulation mode replays the
cache files and whose T4 schemas, version 1.0.0, the other files follow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from autoflash.config import Value
from autoflash.errors import InvalidInput
from autoflash.export.header import header
from autoflash.export.selection import Entry, Selection
from autoflash.export.target import Options, Target

T4_VERSION = "1.0.0"
ERRORS = {
    "infeasible": "InvalidConfig",
    "over_resources": "InvalidConfig",
    "compile_error": "CompilationFailedConfig",
    "wrong_result": "RuntimeFailedConfig",
    "runtime_error": "RuntimeFailedConfig",
    "timeout": "RuntimeFailedConfig",
    "crash": "RuntimeFailedConfig",
}
"""Outcome of a failure -> what Kernel Tuner calls it; it has no name for a wrong result."""
INVALIDITY = {
    "ok": "correct",
    "slow": "correct",
    "infeasible": "constraints",
    "over_resources": "constraints",
    "compile_error": "compile",
    "wrong_result": "correctness",
    "runtime_error": "runtime",
    "timeout": "timeout",
    "crash": "runtime",
}
"""Outcome -> what T4 calls it. Predictions are no results and are left out of both."""
_FORBIDDEN = ("grid_size_x", "grid_size_y", "grid_size_z", "time")
"""Names that Kernel Tuner keeps for itself."""


def _files(selection: Selection, options: Options) -> Mapping[str, str]:
    if options.name is not None:
        raise InvalidInput("--name: these files are named after templates and problems; leave it.")
    facts = header(selection)
    files = {"t4/metadata.json": _text(_metadata(selection, facts))}
    for (template, problem), trials in _searches(selection).items():
        path = f"{template}/{problem}".replace("/", "-").replace(":", "-")
        files[f"cache/{path}.json"] = _text(_cache(selection, facts, trials))
        files[f"t4/{path}.json"] = _text(_results(facts, trials))
    if len(files) == 1:
        raise InvalidInput(
            f"there are no measured trials of {selection.device.name} among what was asked for, "
            "only winners, as tuning_db/ ships them. Trials are in the database of those who tuned "
            "(`autoflash db dump --trials`, `autoflash db load --trials`)."
        )
    return files


def _searches(selection: Selection) -> dict[tuple[str, str], list[Entry]]:
    """(template, problem) -> its trials; of several policies the newest, times being comparable."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for trial in selection.trials:
        # A tunable may have come or gone without a change of what the others render to.
        complete = set(trial.config) == set(trial.template.tunables)
        if complete and trial.record.outcome in INVALIDITY:
            found.setdefault((trial.template.name, trial.problem.name), []).append(trial)
    for place, trials in found.items():
        policy = max(trials, key=lambda trial: trial.record.created).record.policy
        found[place] = [trial for trial in trials if trial.record.policy == policy]
    return dict(sorted(found.items()))


def _cache(
    selection: Selection, facts: Mapping[str, Any], trials: Sequence[Entry]
) -> dict[str, Any]:
    """A cache file: one row per config, its newest trial. "cache" comes last, as readers expect."""
    problem, template = trials[0].problem, trials[0].template
    params = _tunables(trials)
    rows = {}
    for trial in trials:  # in the order in which they were stored
        values = {name: trial.config[name] for name in params}
        rows[",".join(str(value) for value in values.values())] = {**values, **_row(trial)}
    return {
        "autoflash": {**facts, "problem": problem.to_dict()},
        "device_name": selection.device.name,
        "kernel_name": template.name,
        "problem_size": [problem.seqlen_q, problem.num_heads, problem.batch],
        "tune_params_keys": list(params),
        "tune_params": params,
        "objective": "time",
        "cache": dict(sorted(rows.items())),
    }


def _tunables(trials: Sequence[Entry]) -> dict[str, list[Value]]:
    """Tunable -> its choices, and what was tried while there were others."""
    template = trials[0].template
    if taken := sorted(set(template.tunables) & set(_FORBIDDEN)):
        raise InvalidInput(f"{template.path}: Kernel Tuner has a use of its own for {taken}.")
    params = {}
    for name, choices in template.tunables.items():
        tried = {trial.config[name]: None for trial in trials}
        params[name] = [*choices, *sorted((set(tried) - set(choices)), key=str)]
    return params


def _row(trial: Entry) -> dict[str, Any]:
    """What a config came to; all times in milliseconds."""
    record = trial.record
    times = {"compile_time": _compile_ms(trial), "benchmark_time": _benchmark_ms(trial)}
    unknown = {"verification_time": 0.0, "strategy_time": 0.0, "framework_time": 0.0}
    row: dict[str, Any] = {**times, **unknown, "timestamp": record.created}
    if record.outcome in ERRORS:
        return {**row, "time": ERRORS[record.outcome], "__error__": ERRORS[record.outcome]}
    measured = record.measurement
    assert measured is not None
    return {
        "time": _ms(measured.latency_us),
        "time_p20": _ms(measured.p20_us),
        "time_p80": _ms(measured.p80_us),
        **row,
    }


def _results(facts: Mapping[str, Any], trials: Sequence[Entry]) -> dict[str, Any]:
    """T4 results: every trial, in the order in which they were made."""
    return {
        "schema_version": T4_VERSION,
        "metadata": {
            "timeunit": "milliseconds",
            "autoflash": {**facts, "problem": trials[0].problem.to_dict()},
        },
        "results": [_result(trial) for trial in trials],
    }


def _result(trial: Entry) -> dict[str, Any]:
    record, measured = trial.record, trial.record.measurement
    invalidity = INVALIDITY[record.outcome]
    values = {} if measured is None else {
        "time": _ms(measured.latency_us), "time_p20": _ms(measured.p20_us),
        "time_p80": _ms(measured.p80_us),
    }  # fmt: skip
    measurements: list[dict[str, Any]] = [
        {"name": name, "value": value, "unit": "ms"} for name, value in values.items()
    ]
    if record.error_ratio is not None:
        measurements.append({"name": "error_ratio", "value": record.error_ratio, "unit": ""})
    return {
        "timestamp": record.created,
        "configuration": dict(record.config),
        # Single runs are not stored: their number and percentiles are.
        "times": {"compilation_time": _compile_ms(trial), "runtimes": []},
        "invalidity": invalidity,
        "correctness": 0 if record.outcome == "wrong_result" else 1,
        "measurements": measurements,
        "objectives": ["time"],
    }


def _metadata(selection: Selection, facts: Mapping[str, Any]) -> dict[str, Any]:
    """T4 metadata: on what hardware, with which libraries."""
    versions = facts["versions"]
    libraries = ("torch", "triton", "autoflash")
    return {
        "schema_version": T4_VERSION,
        "metadata": {
            "hardware": {
                "hardware_description": [selection.device.to_dict()],
                "operating_system": str(versions.get("os", "")),
            },
            "environment": {
                "device_query": {n: versions[n] for n in ("driver", "cuda") if n in versions},
                "requirements": [f"{n}=={versions[n]}" for n in libraries if n in versions],
            },
            "autoflash": facts,
        },
    }


def _compile_ms(trial: Entry) -> float:
    """0 where the kernel was not compiled for this trial."""
    return round(1e3 * float(trial.record.resources.get("compile_s", 0.0)), 3)


def _benchmark_ms(trial: Entry) -> float:
    """The timed calls alone: warm-up and the check of the output are not stored."""
    measured = trial.record.measurement
    return round(measured.count * measured.latency_us / 1e3, 3) if measured else 0.0


def _ms(latency_us: float) -> float:
    return float(f"{latency_us / 1e3:.5g}")


def _text(data: Mapping[str, Any]) -> str:
    """JSON whose last line is a bracket of its own: Kernel Tuner takes other files for cut off."""
    return json.dumps(data, indent=1) + "\n"


TARGET = Target(
    name="kernel-tuner",
    summary="All trials as Kernel Tuner's cache files, which it replays, and as T4 results.",
    templates="*",
    stand_ins=True,
    trials=True,
    files=_files,
)
