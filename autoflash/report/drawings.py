"""Which charts does a chapter have, and what do they show?"""

from __future__ import annotations

from collections.abc import Sequence

from autoflash.record import Record
from autoflash.report.ceilings import Ceilings
from autoflash.report.charts import Axis, Chart
from autoflash.report.conditions import Conditions
from autoflash.report.progress import Search, convergence
from autoflash.report.table import figure

_THIN = 80
"""Problems that get a line of their own in the chart of all searches."""
_DOTS = 400
"""Trials that get a dot in the chart of one search: of more, every n-th one."""
_SLOW = 4.0
"""Trials this many times slower than the best lie at the upper edge: how slow says nothing."""
_KINDS = ("bfloat16", "float16", "float32", "float8_e4m3fn")


def all_searches(searches: Sequence[Search]) -> Chart | None:
    """Best so far over the best in the end, of each problem and in the middle of all."""
    timed = [search for search in searches if search.points]
    most = max((search.count for search in timed), default=0)
    if most < 2:
        return None
    middle = list(convergence(timed).items())
    starts = [search.steps[0][1] / search.steps[-1][1] for search in timed]
    chart = Chart(
        "How fast the searches got there",
        f"Best so far over the best in the end, by number of trials, for {len(timed)} problems. "
        + ", ".join(
            f"median {ratio:.2f} after {n}" for n, ratio in middle[:: len(middle) // 4 or 1]
        ),
        Axis.over("trials", [1, most], log=most > 30, count=6),
        Axis.over("time over the best found", [1.0, min(_SLOW, max(starts))]),
        height=300,
    )
    for search in timed[:: -(-len(timed) // _THIN)]:
        steps = [(n, us / search.steps[-1][1]) for n, us in search.steps]
        chart.stairs("thin", steps, search.count)
    chart.stairs("ours", middle, most)
    return chart


def one_search(search: Search) -> Chart | None:
    """Every trial of a problem, the best so far, and the rivals of the winner."""
    best, winner = search.best_us, search.winner
    if best is None or len(search.points) < 2:
        return None
    rivals = [us for us in (winner and winner.default_us, winner and winner.torch_us) if us]
    slowest = max(us for _, us in search.points)
    ends = [best, min(slowest, _SLOW * best), *(us for us in rivals if us < _SLOW * best)]
    chart = Chart(
        search.problem.name,
        f"{search.count} trials, {len(search.points)} of them with a time; the best takes "
        f"{figure(best)} microseconds and was near from trial {search.arrived} on.",
        Axis.over("", [1, search.count], count=5),
        Axis.over("", ends, log=True, count=5),
        width=300,
        height=180,
    )
    stride = -(-len(search.points) // _DOTS)
    chart.scatter("trials", search.points[::stride])
    for kind, us in (
        ("default", winner and winner.default_us),
        ("torch", winner and winner.torch_us),
    ):
        if us and chart.y.low <= us <= chart.y.high:
            chart.line(kind, [(chart.x.low, us), (chart.x.high, us)])
    chart.stairs("ours", search.steps, search.count)
    return chart


def roofline(winners: Sequence[Record], ceilings: Ceilings) -> Chart | None:
    """Rate of each winner over its operations per byte, under the ceilings."""
    points = [
        (record, record.problem.flops / record.problem.bytes, record.problem.tflops(us))
        for record in winners
        if (us := record.latency_us) and record.problem.bytes and record.problem.flops
    ]
    dtypes = [d for d in _KINDS if any(r.problem.dtype == d for r, _, _ in points)]
    rates = {dtype: ceilings.tflops[dtype] for dtype in dtypes if dtype in ceilings.tflops}
    memory = ceilings.memory_gbps / 1e3
    if not points or not rates or not memory:
        return None
    knees = [rate / memory for rate in rates.values()]
    shown = [*(x for _, x, _ in points), *(knee / 3 for knee in knees)]
    chart = Chart(
        "Roofline",
        f"Rate of {len(points)} winners over operations per byte; the ceilings are "
        f"{ceilings.origin}.",
        Axis.over("operations per byte that must move", shown, log=True, count=7),
        Axis.over("TFLOPS", [*(y for _, _, y in points), *rates.values()], log=True, count=6),
        height=400,
    )
    for rate in dict.fromkeys(rates.values()):
        same = [dtype for dtype in rates if rates[dtype] == rate]
        bottom = max(chart.x.low, chart.y.low / memory)
        knee = rate / memory
        chart.line("roof", [(bottom, bottom * memory), (knee, rate), (chart.x.high, rate)])
        chart.word("end", (chart.x.high, rate), f"{figure(rate)} TFLOPS, {', '.join(same)}")
    for record, intensity, rate in points:
        most = ceilings.attainable_tflops(record.problem.dtype, intensity)
        share = f", {rate / most:.0%} of the ceiling" if most else ""
        mask = "hollow" if not record.problem.causal else "full"
        kind = f"kind{dtypes.index(record.problem.dtype)} {mask}"
        chart.dot(kind, (intensity, rate), f"{record.problem.name}: {figure(rate)} TFLOPS{share}")
    return chart


def dtypes_of(winners: Sequence[Record]) -> list[str]:
    """The dtypes of a roofline in the order of their colours."""
    return [d for d in _KINDS if any(record.problem.dtype == d for record in winners)]


def clocks(found: Conditions) -> Chart | None:
    """SM clock of each record, those under a reduced clock in another colour."""
    if len(found.clocks) < 2:
        return None
    chart = Chart(
        "SM clock while timing",
        f"SM clock of {len(found.clocks)} records in their order, from "
        f"{min(mhz for _, mhz, _ in found.clocks):.0f} to "
        f"{max(mhz for _, mhz, _ in found.clocks):.0f} MHz.",
        Axis.over("record, in the order of storing", [n for n, _, _ in found.clocks]),
        Axis.over("MHz", [mhz for _, mhz, _ in found.clocks]),
        height=240,
    )
    chart.scatter("free", [(n, mhz) for n, mhz, reduced in found.clocks if not reduced])
    chart.scatter("reduced", [(n, mhz) for n, mhz, reduced in found.clocks if reduced])
    return chart
