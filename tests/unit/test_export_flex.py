"""kernel_options as an export: what is written, what picks from it, and what never gets out."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from autoflash import export
from autoflash.codegen.catalog import installed
from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS, Device
from autoflash.errors import InvalidInput
from autoflash.export.target import Options
from autoflash.problem import Problem
from autoflash.record import Measurement, Record

TEMPLATE = installed().get("flex/fwd")
H100 = KNOWN_GPUS["sm90"]
TILE = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}
PROMISES = {"rows_guaranteed_safe": True, "blocks_are_contiguous": True}
LONG, SHORT, LOCAL = (
    Problem.parse(f"flex:{name}-bfloat16")
    for name in ("b1s16384h32/8d128c", "b4s1024h32/8d128c", "b4s4096h32/8d128cw1023")
)
SIZES: dict[str, Any] = {
    "dtype": "bfloat16", "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "causal": True
}  # fmt: skip


def record(problem: Problem, us: float, device: Device = H100, **values: Any) -> Record:
    template = TEMPLATE if problem.op == "flex" else installed().get("triton/fwd")
    default = template.default_config(problem, device)
    return Record(
        problem=problem,
        config=Config.of(template.name, dict(default) | values),
        template_digest=template.digest,
        device=device,
        outcome="ok",
        policy="test",
        measurement=Measurement(latency_us=us, p20_us=us, p80_us=us, count=9),
        default_us=120.0,
        environment={"torch": torch.__version__},
        created="2026-11-21T10:00:00Z",
    )


RECORDS = (
    record(LONG, 100.0, use_tma=True, **TILE, **PROMISES),
    record(SHORT, 120.0),
    record(LOCAL, 80.0, **TILE | {"block_m": 64, "num_warps": 4}),
    record(LONG.forward, 70.0),
)


@pytest.fixture
def database() -> Any:
    with Database.open("sqlite://") as db:
        for each in RECORDS:
            db.set_best(each)
        yield db


def selection(database: Database, form: str) -> export.Selection:
    target = export.target(form)
    return export.select(database, installed(), templates=target.templates, op=target.op)


@pytest.fixture
def written(database: Database, tmp_path: Path) -> Path:
    chosen = selection(database, "flex")
    files = export.target("flex").files(chosen, Options())
    assert files == export.target("flex").files(chosen, Options())
    export.write(tmp_path, "flex", chosen, files)
    return tmp_path


def load(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("picked", folder / "flex_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_says_what_goes_in_and_what_it_gained(written: Path) -> None:
    entries = json.loads((written / "flex.json").read_text())["entries"]
    said = {entry["name"]: entry for entry in entries}
    assert set(said) == {LONG.name, SHORT.name, LOCAL.name}
    long = said[LONG.name]
    assert long["kernel_options"] == {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3,
        "fwd_USE_TMA": True, "fwd_ROWS_GUARANTEED_SAFE": True, "fwd_BLOCKS_ARE_CONTIGUOUS": True,
    }  # fmt: skip
    assert (long["default_us"], long["latency_us"], long["gain"]) == (120.0, 100.0, 1.2)
    assert set(long["mask_promises"]) == {"fwd_ROWS_GUARANTEED_SAFE", "fwd_BLOCKS_ARE_CONTIGUOUS"}
    assert said[SHORT.name]["kernel_options"] == {}
    table = (written / "inductor_flex_configs.txt").read_text()
    assert "(torch.bfloat16, 128): FlexConfig(128, 64, 3, 8),\n" in table
    assert f"#   {LONG.name} 1.2x (USE_TMA, ROWS_GUARANTEED_SAFE, BLOCKS_ARE_CONTIGUOUS)" in table
    assert "# (torch.bfloat16, 128): no other tile than the default's" in table


def test_the_nearest_entry_of_the_same_kind_is_picked(written: Path) -> None:
    pick: Callable[..., dict[str, Any]] = load(written).pick
    tile = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}
    near = {**SIZES, "batch": 1, "seqlen_q": 8000, "seqlen_k": 8000}
    assert pick(**near) == {**tile, "fwd_USE_TMA": True}
    assert pick(**{**near, "seqlen_q": 1500, "seqlen_k": 1500, "batch": 3}) == {}  # SHORT's
    assert pick(**near, window=(1000, 0))["fwd_BLOCK_M"] == 64
    for other in ({"causal": False}, {"head_dim": 64}, {"dtype": "float16"}, {"softcap": 30.0},
                  {"head_dim_v": 64}, {"seqlen_q": 64}, {"mask_block": 64},
                  {"seqlen_q": 500_000, "seqlen_k": 500_000, "batch": 64}):  # fmt: skip
        assert pick(**{**near, **other}) == {}, other


def test_a_promise_is_passed_on_only_for_the_mask_that_it_was_made_of(written: Path) -> None:
    pick: Callable[..., dict[str, Any]] = load(written).pick
    exact = {**SIZES, "batch": 8, "seqlen_q": 16384, "seqlen_k": 16384}
    assert "fwd_ROWS_GUARANTEED_SAFE" not in pick(**exact)
    promised = pick(**exact, mask_is_only_that=True)
    assert promised["fwd_ROWS_GUARANTEED_SAFE"]
    assert promised["fwd_BLOCKS_ARE_CONTIGUOUS"]
    longer = {**exact, "seqlen_k": 16384 + 127}
    assert "fwd_ROWS_GUARANTEED_SAFE" not in pick(**longer, mask_is_only_that=True)


class Cuda:
    """A torch.device of a GPU."""

    type = "cuda"


def test_another_device_or_pytorch_is_warned_of_and_another_arch_gets_nothing(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(written)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.suits(Cuda())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H20")
    with pytest.warns(RuntimeWarning, match="and this is NVIDIA H20"):
        assert module.suits(Cuda())
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.warns(RuntimeWarning, match="and this is 9.9"):
        assert module.suits(Cuda())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.warns(RuntimeWarning, match="is for sm90 and this device is sm80"):
        assert not module.suits(Cuda())
    q = torch.empty(1, 32, 16384, 128, dtype=torch.bfloat16)
    assert module.kernel_options(q, q, q, causal=True) == {}  # on a CPU, and the table is a GPU's


def test_a_table_of_another_version_is_refused(written: Path) -> None:
    path = written / "flex.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ValueError, match="is of schema version 2"):
        load(written).pick(**SIZES, batch=1, seqlen_q=512, seqlen_k=512)


def test_winners_of_one_op_are_not_among_those_of_another(database: Database) -> None:
    flex = export.select(database, installed(), templates="*", op="flex")
    ours = export.select(database, installed(), templates="*")
    assert [e.problem.op for e in flex.entries] == ["flex"] * 3
    assert [e.problem for e in ours.entries] == [LONG.forward]


def test_an_option_that_the_installed_pytorch_lacks_is_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import flex_attention

    known = dict(flex_attention.FlexKernelOptions.__annotations__)
    del known["USE_TMA"]
    monkeypatch.setattr(flex_attention.FlexKernelOptions, "__annotations__", known)
    with pytest.raises(InvalidInput, match=rf"{LONG.name}: .* no kernel option fwd_USE_TMA"):
        export.target("flex").files(selection(database, "flex"), Options())
