"""What `report` prints: the short form of its page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from autoflash.cli.output import remark, say, table, write_json
from autoflash.cli.problems import Selection
from autoflash.errors import InvalidInput

if TYPE_CHECKING:
    from autoflash.report import Chapter, Findings, Table

_REASONS = 5
_TUNABLES = 5
_VERSIONS = ("autoflash", "torch", "triton", "cuda", "driver", "cxx")


def asked(selection: Selection, device: str | None, run: int | None) -> str:
    """The options that chose what is shown, as they were typed; "" for everything."""
    given = {**dataclasses.asdict(selection), "device": device, "run": run}
    given["problems"] = given.pop("file")
    given["causal" if given.pop("causal") else "full"] = (
        "" if selection.causal is not None else None
    )
    words = [
        f"--{name.replace('_', '-')} {each}".strip()
        for name, value in given.items()
        for each in (value if isinstance(value, list) else [value])
        if each is not None
    ]
    return " ".join(words)


def reported(findings: Findings, html: Path | None, as_json: bool) -> None:
    """The short form, or its JSON; with `html` the page goes there."""
    if html is not None:
        _write(findings, html)
    if as_json:
        write_json(findings.to_dict())
    elif html is None:
        _short(findings)


def _write(findings: Findings, html: Path) -> None:
    from autoflash.report import page

    text = page(findings)
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"--html {html} cannot be written ({error.strerror or error}); name a file in a "
            "directory that this user may write to."
        ) from None
    remark(f"written to {html} ({len(text.encode()) / 1024:.0f} KiB)")


def _short(findings: Findings) -> None:
    from autoflash.report import tables

    if not findings.chapters:
        of = f" of {findings.asked}" if findings.asked else ""
        say(f"no records{of}; `autoflash tune` makes some, `autoflash db load` brings some")
        return
    for number, chapter in enumerate(findings.chapters):
        if number:
            say()
        _headline(chapter)
        _table(tables.problems(chapter, findings))
        if chapter.funnel.gates:
            _table(tables.gates(chapter.funnel))
        if chapter.funnel.reasons:
            _table(tables.reasons(chapter.funnel, _REASONS))
        if chapter.regret:
            _table(chapter.regret)
        _lines(chapter)
    say("`autoflash report --html FILE` writes all of this, and more, as a page.")


def _headline(chapter: Chapter) -> None:
    device = chapter.device
    gains = [
        f"{gain:.2f}x {what}"
        for what, over in (("the default", "default_us"), ("PyTorch's best", "torch_us"))
        if (gain := chapter.gain(over))
    ]
    say(f"{device.name} ({device.arch}), policy {chapter.policy}"
        + (", predicted, not measured" if chapter.predicted else ""))  # fmt: skip
    problems, winners = len(chapter.searches), len(chapter.winners)
    say(f"problems: {problems}, trials: {chapter.trials}, winners: {winners}"
        + (f", {', '.join(gains)} (geometric means)" if gains else ""))  # fmt: skip


def _lines(chapter: Chapter) -> None:
    """What the tables have no room for."""
    for tuned in chapter.tuned:
        known = [t for t in tuned.tunables if t.importance is not None][:_TUNABLES]
        if known:
            shares = ", ".join(f"{t.name} {t.importance:.2f}" for t in known)
            say(f"importance: {tuned.template} ({tuned.count} timed trials): {shares}")
    say(f"ceilings:   {chapter.ceilings.origin}")
    found = chapter.conditions
    if spread := found.spreads.get("clock_mhz"):
        say(f"clock:      {spread.median:.0f} MHz, from {spread.least:.0f} to {spread.most:.0f}; "
            f"reduced in {found.throttled} of {found.watched} records")  # fmt: skip
    versions = [
        f"{name} {'/'.join(found.facts[name])}" for name in _VERSIONS if name in found.facts
    ]
    say(f"versions:   {', '.join(versions) or 'none recorded'}")
    if chapter.outdated:
        say(f"old:        {chapter.outdated} records are of templates that have changed since")


def _table(content: Table) -> None:
    table(content.title, content.columns, content.rows)
    say()
