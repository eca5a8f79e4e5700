"""How do findings become one HTML file that needs no network? The only user of jinja2 for HTML."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoflash.report import drawings, tables
from autoflash.report.findings import Chapter, Findings
from autoflash.report.progress import Search

if TYPE_CHECKING:
    import jinja2

REASONS = 60
"""Most reasons that are listed; a page is for people."""
CURVES = 48
"""Most problems whose search is drawn; every one has a row in the table."""

_HERE = Path(__file__).parent / "html"


def page(findings: Findings) -> str:
    """The page: styles, script and drawings are in it, and it asks for nothing else."""
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            findings=findings,
            chapters=[_chapter(chapter, findings) for chapter in findings.chapters],
            style=(_HERE / "page.css").read_text(encoding="utf-8"),
            script=(_HERE / "page.js").read_text(encoding="utf-8"),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    # Reasons hold what compilers say, names hold what users give: everything is escaped.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _chapter(chapter: Chapter, findings: Findings) -> dict[str, Any]:
    drawn = sorted(chapter.searches, key=_interest)[:CURVES]
    curves = [drawings.one_search(s) for s in chapter.searches if s in drawn]
    shown = [curve for curve in curves if curve]
    return {
        "facts": chapter,
        "sections": _sections(chapter),
        "problems": tables.problems(chapter, findings),
        "winners": tables.winners(chapter),
        "searches": drawings.all_searches(chapter.searches),
        "curves": shown,
        "not_drawn": sum(len(search.points) > 1 for search in chapter.searches) - len(shown),
        "gates": tables.gates(chapter.funnel),
        "reasons": tables.reasons(chapter.funnel, REASONS),
        "kinds": len(chapter.funnel.reasons),
        "tuned": [(each, tables.values(each)) for each in chapter.tuned],
        "roofline": drawings.roofline(chapter.winners, chapter.ceilings),
        "dtypes": drawings.dtypes_of(chapter.winners),
        "readings": tables.readings(chapter.conditions),
        "clocks": drawings.clocks(chapter.conditions),
        "environment": tables.environment(chapter.conditions),
        "device": tables.device(chapter),
        "runs": tables.runs(chapter),
    }


def _interest(search: Search) -> int:
    return -len(search.points)


def _sections(chapter: Chapter) -> list[tuple[str, str]]:
    """(id, heading) of what a chapter has."""
    names = {
        "problems": "Problems",
        "search": "Search",
        "gates": "Gates",
        "tunables": "Tunables",
        "roofline": "Roofline",
        "regret": "Regret" if chapter.regret else "",
        "clocks": "Clocks and power",
        "winners": "Winners" if chapter.winners else "",
        "environment": "Environment",
    }
    return [(name, heading) for name, heading in names.items() if heading]
