"""Bring the tables and charts of the documentation up to date with the committed measurements.

python benchmarks/readme.py [--check]

What is rewritten stands between two comments, of which the first says what is wanted:

    <!-- report: benchmarks/nvidia-h200/fwd.json -->      table, standings, conditions
    <!-- standings: benchmarks/nvidia-h200/fwd.json -->   only how autoflash stands
    <!-- chart: benchmarks/nvidia-h200/fwd.json -->       the picture beside it, fwd.png, drawn anew
    <!-- tunables: benchmarks/nvidia-h200/hopper-trials.csv cuda/fwd_sm90 -->
    <!-- end -->

A new report is shown by writing two such lines. Paths are those of the repository.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import chart
import markdown
import tunables

from autoflash.benchmark.report import Report
from autoflash.errors import AutoflashError, InvalidInput, UnknownName

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "hopper-forward.md")
"""The pages that have such comments."""

_BLOCK = re.compile(r"(?<=^<!-- )(\w+): (\S+)(?: (\S+))?( -->\n).*?(?=^<!-- end -->$)", re.M | re.S)


def main() -> int:
    """Rewrite the pages, or say which ones are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    options = parser.parse_args()
    try:
        stale = outdated()
        if not options.check:
            update()
    except AutoflashError as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(ROOT)}")
    return int(options.check and bool(stale))


def outdated() -> list[Path]:
    """Pages that do not show what their reports say, and charts that were drawn from other ones."""
    pages = [page for page in PAGES if rewritten(page) != page.read_text(encoding="utf-8")]
    reports = [report for page in PAGES for report in charted(page)]
    pictures = [
        picture_of(report)
        for report in reports
        if chart.drawn_from(picture_of(report)) != chart.source_of(report)
    ]
    return [*pages, *dict.fromkeys(pictures)]


def update() -> None:
    """Write what is out of date; charts need matplotlib."""
    for path in outdated():
        if path in PAGES:
            path.write_text(rewritten(path), encoding="utf-8")
        else:
            chart.draw(path.with_suffix(".json"), path)


def rewritten(page: Path) -> str:
    """The text of a page with every block as it should be.

    Raises:
        InvalidInput: a report cannot be read.
        UnknownName: a block asks for what there is not.
    """

    def block(found: re.Match[str]) -> str:
        kind, path, detail, end = found.groups()
        if kind not in KINDS:
            raise UnknownName.of(f"kind of block ({page.name})", kind, KINDS)
        asked = " ".join(filter(None, (path, detail)))
        return f"{kind}: {asked}{end}\n{KINDS[kind](page, ROOT / path, detail)}\n\n"

    text = page.read_text(encoding="utf-8")
    blocks, ends = len(_BLOCK.findall(text)), text.count("<!-- end -->")
    if blocks != ends:
        raise InvalidInput(
            f"{page} has {ends} ends of blocks and {blocks} blocks; each "
            "begins with a line such as <!-- report: FILE --> and ends with <!-- end -->."
        )
    return _BLOCK.sub(block, text)


def charted(page: Path) -> list[Path]:
    """The reports of which a page shows a chart."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [ROOT / path for kind, path, *_ in found if kind == "chart"]


def picture_of(report: Path) -> Path:
    """Where the chart of a report lies."""
    return report.with_suffix(".png")


def _report(page: Path, path: Path, detail: str) -> str:
    return markdown.whole(Report.load(path))


def _standings(page: Path, path: Path, detail: str) -> str:
    report = Report.load(path)
    return f"{markdown.standings(report)}\n\n{markdown.conditions(report)}"


def _chart(page: Path, path: Path, detail: str) -> str:
    report = Report.load(path)
    said = f"TFLOPS of each provider on {report.device.name}, {report.date[:10]}"
    return f"![{said}]({os.path.relpath(picture_of(path), page.parent)})"


def _tunables(page: Path, path: Path, detail: str) -> str:
    return tunables.tables(tunables.read(path, detail or None))


KINDS: dict[str, Callable[[Path, Path, str], str]] = {
    "report": _report, "standings": _standings, "chart": _chart, "tunables": _tunables,
}  # fmt: skip
"""First word of a block -> what it shows, given the page, the file and the word after it."""


if __name__ == "__main__":
    sys.exit(main())
