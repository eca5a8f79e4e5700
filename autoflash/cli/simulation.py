"""What `simulate` prints: how each way to search did on recorded tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoflash.cli.output import duration, say, table, write_json
from autoflash.errors import ToolchainMissing, UnknownName

if TYPE_CHECKING:
    from autoflash.tuning.simulate import Spread, Standing
    from autoflash.tuning.table import Table


def strategy_names(text: str | None) -> list[str]:
    """The strategies that --strategies means; all that can be run here where it was not given.

    Raises:
        UnknownName: it names one that there is not.
        ToolchainMissing: one that it names lacks a library.
    """
    from autoflash.tuning.strategy import STRATEGIES

    names = [word.strip() for word in (text or "").split(",") if word.strip()]
    for name in names:
        if name not in STRATEGIES:
            raise UnknownName.of("strategy", name, STRATEGIES)
        if (missing := STRATEGIES[name].unavailable) is not None:
            raise ToolchainMissing(f"strategy {name}: {missing}.")
    return names or [name for name, one in STRATEGIES.items() if one.unavailable is None]


def simulated(standings: Sequence[Standing], tables: Sequence[Table], as_json: bool) -> None:
    """The comparison: regret of the best so far, median / worst over tables and seeds."""
    from autoflash.tuning.simulate import NEAR, sweep_s
    from autoflash.tuning.strategy import STRATEGIES

    if as_json:
        write_json(
            {
                "tables": [
                    {
                        "problem": one.name,
                        "device": one.header.device.name,
                        "configs": len(one.rows),
                        "feasible": one.feasible,
                        "best_us": one.best.latency_us,
                        "sweep_s": sweep_s(one),
                    }
                    for one in tables
                ],
                "strategies": [one.to_dict() for one in standings],
            }
        )
        return
    configs = sum(len(one.rows) for one in tables)
    say(f"{len(tables)} tables with {configs} configs; median / worst over tables and seeds.")
    say()
    first = standings[0]
    rows = [
        (one.strategy, *(_regret(s) for s in one.by_trials.values()), _count(one.trials_to_near))
        for one in standings
    ]
    near = f"{100 * NEAR:.0f} %"
    heads = [f">{count} trials" for count in first.by_trials]
    table(
        "Slower than the table's best, in %, after so many trials; trials until within " + near,
        ("strategy", *heads, f">to {near}"),
        rows,
    )
    say()
    rows = [
        (one.strategy, *(_regret(s) for s in one.by_share.values()),
         _share(one.share_to_near), _seconds(one.seconds_to_near))
        for one in standings
    ]  # fmt: skip
    heads = [f">{100 * share:.0f} % of sweep" for share in first.by_share]
    table(
        "The same at shares of the exhaustive sweep's wall time; share, and time, until within "
        + near,
        ("strategy", *heads, f">to {near}", ">time"),
        rows,
    )
    say()
    for one in standings:
        say(f"{one.strategy}: {STRATEGIES[one.strategy].summary}")


def _regret(spread: Spread) -> str:
    return " / ".join(
        f"{100 * value:.1f}" if math.isfinite(value) else "-"
        for value in (spread.median, spread.worst)
    )


def _count(spread: Spread) -> str:
    return " / ".join(
        f"{value:.0f}" if math.isfinite(value) else "never"
        for value in (spread.median, spread.worst)
    )


def _share(spread: Spread) -> str:
    return " / ".join(
        f"{100 * value:.0f} %" if math.isfinite(value) else "never"
        for value in (spread.median, spread.worst)
    )


def _seconds(spread: Spread) -> str:
    return " / ".join(
        duration(value) if math.isfinite(value) else "never"
        for value in (spread.median, spread.worst)
    )
