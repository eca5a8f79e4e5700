"""The `json` target: what was tuned for a device as data, as JSON with a schema and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from autoflash.errors import InvalidInput
from autoflash.export.bundle import MANIFEST
from autoflash.export.header import comment, entry_dict, header
from autoflash.export.selection import Selection
from autoflash.export.target import Options, Target

SCHEMA = "autoflash-configs-1.schema.json"
"""Written beside the JSON; the number is header.SCHEMA_VERSION."""
SCHEMA_PATH = Path(__file__).parent / "schema" / SCHEMA
"""The published JSON Schema."""


def document(selection: Selection) -> dict[str, Any]:
    """What the JSON holds: the device, the header, the winners, the dispatch tables.

    A dispatch table is as DispatchTable.from_dict reads it but for its device, which is the
    header's.
    """
    tables = [
        {name: value for name, value in table.to_dict().items() if name != "device"}
        for table in selection.tables
    ]
    return {
        "$schema": SCHEMA,
        **_device(selection),
        "header": header(selection),
        "entries": [entry_dict(entry) for entry in selection.entries],
        "tables": tables,
    }


def _device(selection: Selection) -> dict[str, Any]:
    """The device in the words of other projects, whose file names begin with it."""
    device = selection.device
    return {
        "device_name": device.name.replace(" ", "_"),
        "sm": device.capability or None,
        "num_sms": device.num_sms,
    }


def table(selection: Selection) -> str:
    """The entries as CSV with a heading, below the header as comment lines ("#")."""
    rows = list(_rows(selection))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return comment(selection, "#") + text.getvalue()


def _rows(selection: Selection) -> Iterator[dict[str, Any]]:
    """An entry per row: its problem field by field, and its config as JSON in one cell."""
    for entry in selection.entries:
        facts = entry_dict(entry)
        problem, resources = facts.pop("problem"), facts.pop("resources")
        config = json.dumps(facts.pop("config"), sort_keys=True)
        time = entry.record.latency_us
        yield {
            "name": facts.pop("name"),
            **_device(selection),
            **problem,
            "template": facts.pop("template"),
            "config": config,
            "tflops": None if time is None else float(f"{entry.problem.tflops(time):.4g}"),
            **facts,
            **{name: resources.get(name) for name in ("registers", "smem_bytes", "spill_bytes")},
        }


def _files(selection: Selection, options: Options) -> Mapping[str, str]:
    stem = options.named(
        selection.device.slug,
        r"[^\W_][\w.-]*",
        "letters, digits, dots, dashes and underscores make a file's name, a letter or digit first",
    )
    if f"{stem}.json" in (MANIFEST, SCHEMA):
        raise InvalidInput(f"--name {stem}: another file of the export has it. Choose another.")
    return {
        f"{stem}.json": json.dumps(document(selection), indent=1) + "\n",
        f"{stem}.csv": table(selection),
        SCHEMA: SCHEMA_PATH.read_text(encoding="utf-8"),
    }


TARGET = Target(
    name="json",
    summary="One JSON file per device with a published schema, and the same table as CSV.",
    templates="*",
    files=_files,
)
