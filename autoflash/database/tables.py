"""Which tables the database has, in the newest version of the schema (migrations.py makes them)."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

schema = sa.Table(
    "autoflash_schema",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("autoflash", sa.String(64), nullable=False),
    sa.Column("migrated", sa.String(32), nullable=False),
)
"""One row per migration that was run; the largest version is the schema's.

Its name tells our databases from other people's.
"""

device = sa.Table(
    "device",
    metadata,
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("arch", sa.String(32), nullable=False),
    sa.Column("num_sms", sa.Integer, nullable=False),
    sa.Column("facts", sa.Text, nullable=False),
)
"""Device.key -> the facts of the first device seen with that key, as JSON."""

environment = sa.Table(
    "environment",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("facts", sa.Text, nullable=False),
)
"""Versions of what took part, as JSON, under the sha256 of that JSON."""

run = sa.Table(
    "run",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("uid", sa.String(32), nullable=False, unique=True),
    sa.Column("command", sa.Text, nullable=False),
    sa.Column("device_key", sa.ForeignKey("device.key"), nullable=False),
    sa.Column("environment", sa.ForeignKey("environment.digest"), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("budget", sa.Text, nullable=False),
    sa.Column("status", sa.String(32), nullable=False),
    sa.Column("started", sa.String(32), nullable=False),
    sa.Column("ended", sa.String(32)),
)
"""One tuning command. `uid` stays the same when databases are merged, `id` does not."""


def _problem_columns() -> list[sa.Column[object]]:
    """The fields of a Problem, so that SQL can select by them; `problem` is its name."""
    return [
        sa.Column("problem", sa.String(255), nullable=False),
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
        sa.Column("window_left", sa.BigInteger),
        sa.Column("window_right", sa.BigInteger),
        sa.Column("softcap", sa.Double, nullable=False, server_default="0"),
        sa.Column("aligned", sa.Boolean, nullable=False),
    ]


def _outcome_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("device_key", sa.ForeignKey("device.key"), nullable=False),
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


trial = sa.Table(
    "trial",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("run", sa.ForeignKey("run.id")),
    *_problem_columns(),
    *_outcome_columns(),
    sa.Column("source_digest", sa.String(64), nullable=False),
    sa.Column("environment", sa.ForeignKey("environment.digest"), nullable=False),
    sa.Index("trial_problem", "problem", "device_key"),
    sa.Index("trial_template", "template", "template_digest"),
)
"""Everything tried, failures too. `record` is the whole Record as canonical JSON, `digest` the
sha256 of it: the same record is stored once, however often it is loaded or merged."""

best = sa.Table(
    "best",
    metadata,
    sa.Column("problem", sa.String(255), primary_key=True),
    *_problem_columns()[1:],
    sa.Column("device_key", sa.ForeignKey("device.key"), primary_key=True),
    *_outcome_columns()[1:],
    sa.Column("pack", sa.ForeignKey("pack.name")),
    sa.Index("best_arch", "arch"),
)
"""The winner of each problem and device. `pack` is the pack it came from, null if tuned here."""

pack = sa.Table(
    "pack",
    metadata,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("loaded", sa.String(32), nullable=False),
)
"""The files of tuning_db/ that were loaded, with the sha256 of their content."""

dispatch = sa.Table(
    "dispatch",
    metadata,
    sa.Column("family", sa.String(255), primary_key=True),
    sa.Column("device_key", sa.ForeignKey("device.key"), primary_key=True),
    sa.Column("arch", sa.String(32), nullable=False),
    sa.Column("policy", sa.String(255), nullable=False),
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("pack", sa.ForeignKey("pack.name")),
    sa.Column("content", sa.Text, nullable=False),
)
"""The dispatch table of each family and device. `content` is DispatchTable.to_dict() as canonical
JSON, `pack` the pack it came from, null if made here."""
