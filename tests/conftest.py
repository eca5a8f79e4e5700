"""What tests share: a cache directory of their own, and the device they may use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test processes beside each other: OpenMP's threads wait by spinning, on cores others need.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything reads the settings: tests must neither use nor fill the user's cache. One shared
# directory for the whole run, so that a kernel is compiled once however many tests use it; or one
# that is kept, AUTOFLASH_TEST_CACHE: those of the GPU tests take a core an hour.
_CACHE = tempfile.TemporaryDirectory(prefix="autoflash-tests-")
os.environ["AUTOFLASH_CACHE_DIR"] = os.environ.get("AUTOFLASH_TEST_CACHE") or _CACHE.name
for _name in ("AUTOFLASH_DATABASE", "AUTOFLASH_TEMPLATES"):
    os.environ.pop(_name, None)
# Nor should what they expect depend on which devices were tuned for.
_NO_PACKS = Path(_CACHE.name) / "no-packs"
_NO_PACKS.mkdir()
os.environ["AUTOFLASH_TUNING_DB"] = str(_NO_PACKS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden from what is rendered"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here; `make gpu` runs these where there is one")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory of this test alone, in this process and in those it starts."""
    from autoflash import settings
    from autoflash.build import cache

    monkeypatch.setenv("AUTOFLASH_CACHE_DIR", str(tmp_path / "cache"))
    settings.get.cache_clear()
    cache._writable.cache_clear()
    yield tmp_path / "cache"
    settings.get.cache_clear()
    cache._writable.cache_clear()
