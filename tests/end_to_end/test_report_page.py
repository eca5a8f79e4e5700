"""The report's page in a browser, with no network: it is drawn, quiet, and its tables sort."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.findings import CAUSAL, DIGEST, FULL, search, winner

from autoflash.database import Database
from autoflash.report import findings, page

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'"
    )
    with playwright.sync_playwright() as driver:
        installed = next(filter(None, map(shutil.which, _NAMES)), None)
        if installed is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium here; `make browser` gets one")
        # Containers seldom let Chromium build its sandbox; the page is our own.
        browser = driver.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with both problems, as a file."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    with Database.open("sqlite://", digests={"cuda/test": DIGEST}) as db:
        for record in search():
            db.add(record)
        db.set_best(winner(CAUSAL, 80.0))
        db.set_best(winner(FULL, 9.0))
        text = page(findings(db, digests={"cuda/test": DIGEST}))
    out.write_text(text, encoding="utf-8")
    return out


class Seen:
    """A page that was opened, and all that the browser had to say about it."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.tab = browser.new_page(**options)
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(file.as_uri())

    def column(self, number: int) -> list[str]:
        """Texts of a column of the first table, from 1."""
        found = self.tab.locator(f"table >> nth=0 >> tbody tr > :nth-child({number})")
        return [text.strip() for text in found.all_inner_texts()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_drawn_and_nothing_goes_wrong(
    chromium: Any, written: Path, scheme: str, width: int
) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow comes with matplotlib: '.[bench]'")
    seen = Seen(
        chromium, written, viewport={"width": width, "height": 900}, color_scheme=scheme
    )  # fmt: skip
    picture = image.open(io.BytesIO(seen.tab.screenshot(full_page=True))).convert("RGB")
    colours = picture.getcolors(maxcolors=picture.width * picture.height)
    assert picture.height > 2000
    assert len(colours) > 50  # text, lines and dots on a page that is not one empty colour
    paper = sum(max(colours)[1])
    assert paper > 600 if scheme == "light" else paper < 150
    assert seen.said == []
    assert [url for url in seen.asked if not url.startswith(("file:", "data:"))] == []
    # No sideways scrolling but that of a table in its frame.
    assert seen.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.tab.locator("svg[role=img]").count() >= 4
    assert all(box["height"] > 50 for box in map(_box, seen.tab.locator("svg[role=img]").all()))


def _box(element: Any) -> Any:
    return element.bounding_box()


def test_tables_sort_by_size_and_back(chromium: Any, written: Path) -> None:
    seen = Seen(chromium, written)
    heading = seen.tab.locator("table >> nth=0 >> thead th", has_text="us").first
    before = seen.column(5)
    assert before == ["80", "9"]
    heading.locator("button").click()
    assert seen.column(5) == ["9", "80"]  # by size: as text "80" comes first
    assert seen.column(1) == [FULL.name, CAUSAL.name]  # whole rows move
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").press("Enter")
    assert seen.column(5) == ["80", "9"]
    assert heading.get_attribute("aria-sort") == "descending"
    assert seen.said == []


def test_it_can_be_read_without_scripts(chromium: Any, written: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    seen = Seen(context, written)
    assert seen.column(1) == [CAUSAL.name, FULL.name]
    context.close()
