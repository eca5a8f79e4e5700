"""Draw a report of `autoflash bench --out FILE`: TFLOPS of every provider, ratio to the best peer.

python benchmarks/chart.py benchmarks/nvidia-h200/fwd.json benchmarks/nvidia-h200/fwd.png

One panel for each head_dim and mask. The picture carries a digest of what it was drawn from, which
tells whether it is out of date (readme.py). Needs matplotlib: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoflash.benchmark.report import OURS, Report, Row
from autoflash.benchmark.standing import Ratio, best_ratios, rivals, standing
from autoflash.errors import AutoflashError, ToolchainMissing
from autoflash.problem import Problem

LOOKS = {
    # Okabe and Ito's colours, which the colour-blind tell apart; the same in every chart.
    OURS: (OURS, "#D55E00"), "cudnn": ("cuDNN", "#0072B2"),
    "fa2": ("FlashAttention-2", "#56B4E9"), "flash_attn2": ("flash-attn 2", "#56B4E9"),
    "flash_attn3": ("FlashAttention-3", "#CC79A7"), "fa4": ("FlashAttention-4", "#009E73"),
    "flex": ("FlexAttention", "#E69F00"), "efficient": ("memory-efficient", "#999999"),
    "sdpa": ("PyTorch SDPA", "#0072B2"), "math": ("PyTorch math", "#BBBBBB"),
    "naive": ("naive", "#777777"),
}  # fmt: skip
"""Provider -> name in the legend, colour."""
SOURCE = "Source"
"""Key of the text chunk that holds the digest."""

_VERSIONS = ("torch", "cudnn", "flash-attn-4", "driver")
_PANEL_IN = (4.6, 2.7)  # at 880 pixels for three of them, as a README shows it, 9 pt is legible
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def main() -> int:
    """Draw one report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path, help="what `autoflash bench --out` wrote")
    parser.add_argument("out", type=Path, help="the picture, a PNG")
    options = parser.parse_args()
    try:
        draw(options.report, options.out)
    except AutoflashError as error:
        print(f"chart: {error}", file=sys.stderr)
        return 2
    return 0


def draw(path: Path, out: Path) -> None:
    """Draw the report in a file.

    Raises:
        ToolchainMissing: matplotlib is not installed.
        InvalidInput: the file is no report.
    """
    report = Report.load(path)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ToolchainMissing(
            "matplotlib is not installed, and charts are drawn with it: pip install '.[bench]'."
        ) from None
    peers = rivals(report)
    best = best_ratios(report, peers)
    panels = _panels(report)
    dims = sorted({dim for dim, _ in panels})
    masks = [mask for mask in ("causal", "full") if any(mask == one for _, one in panels)]
    figure = Figure(figsize=(_PANEL_IN[0] * len(dims), _PANEL_IN[1] * len(masks) + 0.9), dpi=150)
    axes = figure.subplots(len(masks), len(dims), squeeze=False, sharey=True)
    for i, mask in enumerate(masks):
        for j, dim in enumerate(dims):
            problems = panels.get((dim, mask), [])
            _panel(axes[i][j], report, problems, [OURS, *peers], best)
            axes[i][j].set_title(f"head_dim {dim}, {mask}", fontsize=11)
        axes[i][0].set_ylabel("TFLOPS", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=len(labels), loc="upper center", frameon=False, fontsize=11
    )
    figure.supxlabel(_caption(report, list(best.values())), fontsize=9, color="#444444")
    figure.tight_layout(rect=(0, 0, 1, 0.95), w_pad=2)
    figure.savefig(out, metadata={SOURCE: source_of(path), "Software": None})


def source_of(path: Path) -> str:
    """Digest of a report's file and of this one: of all that decides how a chart looks."""
    texts = (path.read_bytes(), Path(__file__).read_bytes())
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def drawn_from(picture: Path) -> str | None:
    """The digest that a chart carries; None where there is no chart."""
    data = picture.read_bytes() if picture.is_file() else b""
    at = len(_SIGNATURE)
    while data.startswith(_SIGNATURE) and at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        key, _, text = data[at + 8 : at + 8 + size].partition(b"\0")
        if kind == b"tEXt" and key == SOURCE.encode():
            return text.decode()
        at += size + 12  # length, kind and checksum
    return None


def _panels(report: Report) -> dict[tuple[int, str], list[Problem]]:
    """(head_dim, mask) -> problems, as they follow each other in the report."""
    found: dict[tuple[int, str], list[Problem]] = {}
    for name in dict.fromkeys(row.problem for row in report.rows):
        problem = Problem.parse(name)
        mask = "causal" if problem.causal else "full"
        found.setdefault((problem.head_dim, mask), []).append(problem)
    return found


def _panel(
    axes: Any,
    report: Report,
    problems: Sequence[Problem],
    providers: Sequence[str],
    best: dict[str, Ratio],
) -> None:
    """Groups of bars; whiskers are the 20th and 80th percentile."""
    rows = {(row.problem, row.provider): row for row in report.rows if row.latency_us}
    width = 0.84 / len(providers)
    for k, provider in enumerate(providers):
        name, colour = LOOKS.get(provider, (provider, "#000000"))
        taken = [
            (i, row)
            for i, problem in enumerate(problems)
            if (row := rows.get((problem.name, provider)))
        ]
        axes.bar(
            [i + (k - (len(providers) - 1) / 2) * width for i, _ in taken],
            [row.tflops for _, row in taken],
            0.92 * width,
            label=name,
            color=colour,
            yerr=[[_below(row) for _, row in taken], [_above(row) for _, row in taken]],
            error_kw={"elinewidth": 0.7, "ecolor": "#333333"},
        )
    for i, problem in enumerate(problems):
        if ratio := best.get(problem.name):
            top = max(
                row.tflops + _above(row)
                for provider in providers
                if (row := rows.get((problem.name, provider))) and row.tflops
            )
            bold = "bold" if ratio.ratio >= 1 else "normal"
            axes.annotate(
                f"{ratio.ratio:.2f}", (i, top), (0, 3), textcoords="offset points", ha="center",
                fontsize=10, fontweight=bold,
            )  # fmt: skip
    axes.set_xticks(range(len(problems)), [_label(p, problems) for p in problems], fontsize=10)
    axes.margins(y=0.13)
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _below(row: Row) -> float:
    """From the median rate down to that of the 80th percentile of times."""
    if not (row.tflops and row.latency_us and row.p80_us):
        return 0.0
    return row.tflops * (1 - row.latency_us / row.p80_us)


def _above(row: Row) -> float:
    if not (row.tflops and row.latency_us and row.p20_us):
        return 0.0
    return row.tflops * (row.latency_us / row.p20_us - 1)


def _label(problem: Problem, among: Sequence[Problem]) -> str:
    """Sequence length, and whatever else tells the problem from its neighbours."""
    length = problem.seqlen_q
    label = f"{length // 1024}k" if length % 1024 == 0 else str(length)
    if problem.seqlen_k != length:
        label += f"x{problem.seqlen_k}"
    if any(one.group_size != problem.group_size for one in among):
        label += f"\n{problem.num_heads}/{problem.num_kv_heads}"
    if problem.local:
        label += f"\nw{problem.window_left}"
    if problem.softcapped:
        label += "\nsoftcap"
    if any(one.dtype != problem.dtype for one in among):
        label += f"\n{problem.dtype}"
    return label


def _caption(report: Report, best: Sequence[Ratio]) -> str:
    facts = report.environment
    versions = ", ".join(f"{name} {facts[name]}" for name in _VERSIONS if facts.get(name))
    settings = report.settings
    text = (
        "sequence length (and query/key-value heads, where a panel has several);"
        f" {report.device.name}, {report.date[:10]}, {versions};"
        f" medians of {settings['rounds']} interleaved rounds"
    )
    if best:
        one = standing(best)
        text += (
            f"\nabove the bars: {OURS} over the best peer of the cell; geometric mean"
            f" {one.mean:.2f}, worst {one.worst.ratio:.2f}; whiskers: 20th and 80th percentile"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
