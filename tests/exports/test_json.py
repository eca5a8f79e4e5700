"""From the exported JSON alone a reader picks, renders and recognises a kernel."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.dispatch_tables import probe, table
from support.exports import GPU, H200, database, tried

from autoflash import export
from autoflash.codegen.catalog import installed
from autoflash.config import Config
from autoflash.device import Device
from autoflash.dispatch_table import DispatchTable, Family
from autoflash.export.json import SCHEMA
from autoflash.problem import Problem

jsonschema = pytest.importorskip(
    "jsonschema", reason="jsonschema is not installed (pip install '.[dev]')"
)

Document = dict[str, Any]


def files(*, pack: Path | None = None, tables: tuple[DispatchTable, ...] = ()) -> dict[str, str]:
    """Path -> text of an export of a pack, or of two winners and tables."""
    winners = (tried("triton/fwd"), tried("cuda/fwd_sm80", "b2s100h8/2d96cw50cap30-float16"))
    with database(winners=() if pack else winners, pack=pack) as db:
        for each in tables:
            assert db.set_table(each)
        chosen = export.select(db, installed(), templates="*")
    found = export.target("json").files(chosen, export.Options())
    return {path: str(text) for path, text in found.items()}


def dispatch_table() -> DispatchTable:
    digests = {"triton/fwd": installed().get("triton/fwd").digest}
    default = installed().get("triton/fwd").default_config(Problem.parse("b1s512h8d64c"), GPU)
    fast = Config.of("triton/fwd", {**default, "num_stages": 2})
    return table(digests, device=GPU, configs=(default, fast))


@pytest.fixture(scope="module")
def h200() -> Document:
    return dict(json.loads(files(pack=H200)["nvidia-h200.json"]))


@pytest.fixture(scope="module")
def with_table() -> Document:
    found = files(tables=(dispatch_table(),))
    return dict(json.loads(found["nvidia-h100-80gb-hbm3.json"]))


@pytest.fixture(scope="module")
def schema() -> Document:
    return dict(json.loads(files()[SCHEMA]))


def test_documents_are_valid(h200: Document, with_table: Document, schema: Document) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(h200, schema)
    jsonschema.validate(with_table, schema)
    assert len(with_table["tables"]) == 1
    assert h200["$schema"] == SCHEMA
    assert (h200["device_name"], h200["sm"], h200["num_sms"]) == ("NVIDIA_H200", 90, 132)


DAMAGE: dict[str, Callable[[Document], object]] = {
    "a device name with a blank": lambda d: d.update(device_name="NVIDIA H200"),
    "no entries": lambda d: d["entries"].clear(),
    "another version": lambda d: d["header"].update(schema_version=2),
    "no digest of the source": lambda d: d["entries"][0].pop("source_digest"),
    "half a digest": lambda d: d["entries"][0].update(source_digest="12ab"),
    "a time of nothing": lambda d: d["entries"][0].update(latency_us=0),
    "a time as text": lambda d: d["entries"][0].update(latency_us="12.5"),
    "a failure": lambda d: d["entries"][0].update(outcome="crash"),
    "an unknown dtype": lambda d: d["entries"][0]["problem"].update(dtype="int8"),
    "a misspelt size": lambda d: d["entries"][0]["problem"].update(heads=8),
    "no sizes": lambda d: d["entries"][0].pop("problem"),
    "an empty config": lambda d: d["entries"][0].update(config={}),
    "a list in a config": lambda d: d["entries"][0]["config"].update(block_m=[64]),
    "a template without a digest": lambda d: d["header"]["templates"]["triton/fwd"].pop("digest"),
    "half a bound": lambda d: d["tables"][0]["leaves"][0]["where"][0].pop(),
    "an unknown feature": lambda d: d["tables"][0]["leaves"][0].update(where=[["rows", 1, None]]),
    "a negative index": lambda d: d["tables"][0]["leaves"][1].update(config=-1),
    "a day": lambda d: d["header"].update(created="yesterday"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_schema_rejects_what_is_damaged(
    what: str, with_table: Document, schema: Document
) -> None:
    damaged = copy.deepcopy(with_table)
    DAMAGE[what](damaged)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(damaged, schema)


def test_a_reader_renders_the_very_kernels(h200: Document) -> None:
    device = Device.from_dict(h200["header"]["device"])
    for entry in h200["entries"]:
        problem = Problem.from_dict(entry["problem"])
        template = installed().get(entry["template"])
        assert problem == Problem.parse(entry["name"])
        assert h200["header"]["templates"][template.name]["digest"] == template.digest
        source = template.render(Config.of(template.name, entry["config"]), problem, device)
        assert source.digest == entry["source_digest"], entry["name"]


def test_a_reader_picks_the_nearest_entry_or_what_a_table_says(with_table: Document) -> None:
    wanted = Problem.parse("b1s1100h8d64c-bfloat16")
    nearest = min(
        with_table["entries"], key=lambda e: Problem.from_dict(e["problem"]).distance(wanted)
    )
    assert nearest["name"] == "b1s1024h8/8d64c-bfloat16"

    [data] = with_table["tables"]
    read = DispatchTable.from_dict({**data, "device": with_table["header"]["device"]})
    made = dispatch_table()
    assert read == dataclasses.replace(made, created=read.created)
    long = Problem.parse("b1s3000h8d64c-bfloat16")
    assert Family.of(long) == read.family
    leaf = read.leaf(long)
    assert leaf is not None
    assert read.config_of(leaf) == made.configs[1]


def test_a_table_of_a_template_that_has_changed_is_left_out() -> None:
    stale = dataclasses.replace(
        dispatch_table(), digests={"triton/fwd": "0" * 16}, probes=(probe(512, 1.0, 2.0),)
    )
    with database(winners=(tried("triton/fwd"),)) as db:
        db.set_table(stale)
        assert db.tables()
        assert export.select(db, installed(), templates="*").tables == ()


def test_the_csv_is_the_same_table(h200: Document) -> None:
    text = files(pack=H200)["nvidia-h200.csv"]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert text.startswith("# Made by autoflash")
    rows = list(csv.DictReader(lines))
    records = [line for line in H200.read_text().splitlines() if "problem" in json.loads(line)]
    assert len(rows) == len(h200["entries"]) == len(records) > 0
    for row, entry in zip(rows, h200["entries"], strict=True):
        assert json.loads(row["config"]) == entry["config"]
        assert float(row["latency_us"]) == entry["latency_us"]
        assert (row["device_name"], row["sm"], row["num_sms"]) == ("NVIDIA_H200", "90", "132")
        for name, value in (*entry["problem"].items(), ("source_digest", entry["source_digest"])):
            assert row[name] == ("" if value is None else str(value))
        problem = Problem.from_dict(entry["problem"])
        assert float(row["tflops"]) == pytest.approx(problem.tflops(entry["latency_us"]), rel=1e-3)
