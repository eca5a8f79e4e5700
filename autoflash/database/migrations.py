"""How a database gets from one version of the schema to the next, and what version it has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

import autoflash
from autoflash.database import tables
from autoflash.database.rows import utc_now
from autoflash.errors import DatabaseCorrupt, DatabaseNewer

if TYPE_CHECKING:
    from alembic.operations import Operations


def m001_initial(op: Operations) -> None:
    """Devices, environments, runs, trials, winners and packs."""
    op.create_table(
        "autoflash_schema",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("autoflash", sa.String(64), nullable=False),
        sa.Column("migrated", sa.String(32), nullable=False),
    )
    op.create_table(
        "device",
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("arch", sa.String(32), nullable=False),
        sa.Column("num_sms", sa.Integer, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
    )
    op.create_table(
        "environment",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("facts", sa.Text, nullable=False),
    )
    op.create_table(
        "pack",
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("loaded", sa.String(32), nullable=False),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("uid", sa.String(32), nullable=False, unique=True),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("device_key", sa.String(255), sa.ForeignKey("device.key"), nullable=False),
        sa.Column(
            "environment", sa.String(64), sa.ForeignKey("environment.digest"), nullable=False
        ),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("budget", sa.Text, nullable=False),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("started", sa.String(32), nullable=False),
        sa.Column("ended", sa.String(32)),
    )

    def searched(*, key: bool) -> list[sa.Column[object]]:
        """The columns that trials and winners share; `key`: two of them are the primary key."""
        return [
            sa.Column("problem", sa.String(255), primary_key=key, nullable=False),
            sa.Column("op", sa.String(32), nullable=False),
            sa.Column("dtype", sa.String(32), nullable=False),
            sa.Column("batch", sa.BigInteger, nullable=False),
            sa.Column("seqlen_q", sa.BigInteger, nullable=False),
            sa.Column("seqlen_k", sa.BigInteger, nullable=False),
            sa.Column("num_heads", sa.BigInteger, nullable=False),
            sa.Column("num_kv_heads", sa.BigInteger, nullable=False),
            sa.Column("head_dim", sa.BigInteger, nullable=False),
            sa.Column("head_dim_v", sa.BigInteger, nullable=False),
            sa.Column("causal", sa.Boolean, nullable=False),
            sa.Column("aligned", sa.Boolean, nullable=False),
            sa.Column(
                "device_key",
                sa.String(255),
                sa.ForeignKey("device.key"),
                primary_key=key,
                nullable=False,
            ),
            sa.Column("arch", sa.String(32), nullable=False),
            sa.Column("template", sa.String(255), nullable=False),
            sa.Column("template_digest", sa.String(64), nullable=False),
            sa.Column("config", sa.Text, nullable=False),
            sa.Column("outcome", sa.String(32), nullable=False),
            sa.Column("policy", sa.String(255), nullable=False),
            sa.Column("latency_us", sa.Double),
            sa.Column("created", sa.String(32), nullable=False),
            sa.Column("record", sa.Text, nullable=False),
        ]

    op.create_table(
        "trial",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("run", sa.Integer, sa.ForeignKey("run.id")),
        *searched(key=False),
        sa.Column("source_digest", sa.String(64), nullable=False),
        sa.Column(
            "environment", sa.String(64), sa.ForeignKey("environment.digest"), nullable=False
        ),
    )
    op.create_index("trial_problem", "trial", ["problem", "device_key"])
    op.create_index("trial_template", "trial", ["template", "template_digest"])
    op.create_table(
        "best",
        *searched(key=True),
        sa.Column("pack", sa.String(255), sa.ForeignKey("pack.name")),
    )
    op.create_index("best_arch", "best", ["arch"])


def m002_windows(op: Operations) -> None:
    """Sliding windows and softcap: fields of every problem, unbounded and off in former records.

    A trial's digest is that of its record. Both are written anew, so that a record that is loaded
    or merged from elsewhere is still known to be stored.
    """
    for table in ("trial", "best"):
        op.add_column(table, sa.Column("window_left", sa.BigInteger))
        op.add_column(table, sa.Column("window_right", sa.BigInteger))
        op.add_column(table, sa.Column("softcap", sa.Double, nullable=False, server_default="0"))
    if op.get_context().as_sql:  # rows cannot be read when a script is written
        return
    connection = op.get_bind()
    added = {"window_left": None, "window_right": None, "softcap": 0.0}
    trial = sa.table("trial", sa.column("id"), sa.column("digest"), sa.column("record"))
    best = sa.table("best", sa.column("problem"), sa.column("device_key"), sa.column("record"))
    for row in connection.execute(sa.select(trial.c.id, trial.c.record)).all():
        if (text := _with_problem_fields(row.record, added)) is not None:
            values = {"record": text, "digest": hashlib.sha256(text.encode()).hexdigest()}
            connection.execute(sa.update(trial).where(trial.c.id == row.id).values(values))
    for row in connection.execute(sa.select(best)).all():
        if (text := _with_problem_fields(row.record, added)) is not None:
            here = (best.c.problem == row.problem) & (best.c.device_key == row.device_key)
            connection.execute(sa.update(best).where(here).values(record=text))


def _with_problem_fields(text: str, added: Mapping[str, Any]) -> str | None:
    """A record's text with fields added to its problem; None where it is no record's."""
    try:
        record = json.loads(text)
        record["problem"] = {**added, **record["problem"]}
        made = json.dumps(
            record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return made.encode().decode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # damaged: readers leave it out and say so


def m003_dispatch(op: Operations) -> None:
    """Dispatch tables: what serves the shapes between those that were tuned."""
    op.create_table(
        "dispatch",
        sa.Column("family", sa.String(255), primary_key=True),
        sa.Column("device_key", sa.String(255), sa.ForeignKey("device.key"), primary_key=True),
        sa.Column("arch", sa.String(32), nullable=False),
        sa.Column("policy", sa.String(255), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("pack", sa.String(255), sa.ForeignKey("pack.name")),
        sa.Column("content", sa.Text, nullable=False),
    )


MIGRATIONS: list[Callable[[Operations], None]] = [m001_initial, m002_windows, m003_dispatch]
"""In order: the n-th makes version n of version n - 1. One that was released is never changed."""


def version(connection: sa.Connection, place: str) -> int:
    """The version of the schema found; 0 where there are no tables at all.

    Raises:
        DatabaseNewer: a newer autoflash wrote it.
        DatabaseCorrupt: the tables are not ours.
    """
    names = sa.inspect(connection).get_table_names()
    if tables.schema.name not in names:
        if names:
            raise DatabaseCorrupt(
                f"{place} is no autoflash database: it has the tables {', '.join(sorted(names))} "
                f"and no {tables.schema.name}. It was left as it is; name another database with "
                "AUTOFLASH_DATABASE."
            )
        return 0
    newest = connection.execute(
        sa.select(tables.schema.c.version, tables.schema.c.autoflash)
        .order_by(tables.schema.c.version.desc())
        .limit(1)
    ).one_or_none()
    if newest is None or not isinstance(newest.version, int) or newest.version < 1:
        raise DatabaseCorrupt(
            f"{place}: the table {tables.schema.name} gives no version. It was left as it is; move "
            "it away to start anew, or name another database with AUTOFLASH_DATABASE."
        )
    if newest.version > len(MIGRATIONS):
        raise DatabaseNewer(
            f"{place} has schema version {newest.version}, written by autoflash "
            f"{newest.autoflash}; this is autoflash {autoflash.__version__}, which knows versions "
            f"up to {len(MIGRATIONS)}. It was left as it is: upgrade with pip install -U autoflash,"
            " or name another database with AUTOFLASH_DATABASE."
        )
    return newest.version


def migrate(connection: sa.Connection, place: str) -> None:
    """Bring the schema to the newest version, inside the caller's write transaction.

    SQLite rolls tables back like rows, so that a kill in the middle leaves the former version.
    """
    found = version(connection, place)
    if found == len(MIGRATIONS):
        return  # another process was faster
    # 130 ms that only a database of a former version costs.
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    op = Operations(MigrationContext.configure(connection))
    for number, step in enumerate(MIGRATIONS[found:], found + 1):
        step(op)
        connection.execute(
            tables.schema.insert().values(
                version=number, autoflash=autoflash.__version__, migrated=utc_now()
            )
        )
