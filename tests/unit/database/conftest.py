"""What the database tests share: records to store, and places to store them."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from autoflash import settings
from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem
from autoflash.record import Measurement, Record

NOBODY = 65534
SERVER = os.environ.get("AUTOFLASH_TEST_SERVER", "")
"""URL of a database on a PostgreSQL server where more may be made: `url` is there then."""
CURRENT = {"triton/fwd": "d1", "cpp/fwd": "c1"}
"""Template digests as they are now, in these tests."""


def make_record(
    problem: str = "b4s4096h32/8d128c", latency_us: float = 100.0, **changes: Any
) -> Record:
    fields: dict[str, Any] = {
        "problem": Problem.parse(problem),
        "config": Config.of("triton/fwd", {"block_m": 128, "block_n": 64}),
        "template_digest": "d1",
        "device": KNOWN_GPUS["sm90"],
        "outcome": "ok",
        "policy": "cuda-events-cold",
        "measurement": Measurement(
            latency_us=latency_us, p20_us=latency_us - 1, p80_us=latency_us + 1, count=50
        ),
        "resources": {"registers": 168, "spill_bytes": 0},
        "environment": {"torch": "2.13.0", "driver": "580.1"},
        "created": "2026-11-21T10:00:00+00:00",
    }
    if changes.get("outcome", "ok") != "ok":
        fields["measurement"] = None
    if changes.get("outcome") == "predicted":
        fields["predicted_us"] = latency_us
    return Record(**{**fields, **changes})


@pytest.fixture
def record() -> Callable[..., Record]:
    return make_record


@pytest.fixture
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty tuning_db of this test, and a cache directory that does not exist yet."""
    with tempfile.TemporaryDirectory(prefix="autoflash-tuning-db-") as name:
        Path(name).chmod(0o755)  # `unprivileged` users read it too
        monkeypatch.setenv("AUTOFLASH_TUNING_DB", name)
        monkeypatch.setenv("AUTOFLASH_CACHE_DIR", str(tmp_path / "cache"))
        settings.get.cache_clear()
        yield Path(name)
    settings.get.cache_clear()


@pytest.fixture
def url(packs: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a database that does not exist yet: a file, or on SERVER an empty one."""
    if not SERVER or request.node.get_closest_marker("sqlite"):
        yield f"sqlite:///{tmp_path}/autoflash.db"
        return
    server = sa.create_engine(SERVER, isolation_level="AUTOCOMMIT")
    name = f"autoflash_test_{uuid.uuid4().hex}"
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    try:
        made = server.url.set(database=name)
        yield made.render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with Database.open(url, digests=CURRENT) as opened:
        yield opened


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that an `unprivileged` user can reach, which pytest's tmp_path is not."""
    directory = Path(tempfile.mkdtemp(prefix="autoflash-test-"))
    directory.chmod(0o755)
    yield directory
    for path in (directory, *directory.rglob("*")):
        path.chmod(stat.S_IRWXU)
    shutil.rmtree(directory)


@pytest.fixture
def unprivileged() -> Callable[[], AbstractContextManager[None]]:
    """File permissions count for nothing as root: inside the context be somebody else."""

    @contextmanager
    def become() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)

    return become
