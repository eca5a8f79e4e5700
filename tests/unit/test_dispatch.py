"""The dispatcher alone: given templates, records and a device, what does it choose, and why?"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.dispatch_tables import FAST, SLOW, table

from autoflash.build import Artifact, Kernel, Launch, Resources
from autoflash.codegen.catalog import Catalog, installed
from autoflash.codegen.template import Source, Template
from autoflash.config import Config
from autoflash.device import KNOWN_GPUS, Device
from autoflash.dispatch_table import DispatchTable, Leaf
from autoflash.errors import CompileError, UnknownName
from autoflash.problem import MAX_DISTANCE, Problem
from autoflash.record import Measurement, Record
from autoflash.runtime import serving, warn
from autoflash.runtime.dispatch import Dispatcher, Learned
from autoflash.runtime.explain import explain

TEMPLATE = """{{#---
summary = "A kernel for tests."
source  = "this test"
op      = "fwd"

[accepts]
"device is a GPU" = "device.is_cuda"
"head_dim is at most {limit}" = "problem.head_dim <= {limit}"

[tunables]
block_m = [32, 64, 128]
num_stages = [1, 2]

[default]
block_m = 64
num_stages = 1

[constraints]
"long tiles want long sequences" = "block_m < 128 or problem.seqlen_q >= 128"
---#}}
block_m = {{{{ block_m }}}}; num_stages = {{{{ num_stages }}}}; dim = {{{{ problem.head_dim }}}}
"""

HERE = KNOWN_GPUS["sm90"]
SIBLING = dataclasses.replace(HERE, name="NVIDIA H20", num_sms=78)
ASKED = Problem.parse("b1s1024h8d64c-bfloat16")


class Built(Kernel):
    """What the fake builder makes: it remembers its source and cannot run."""

    def __init__(self, source: Source, device: Device) -> None:
        resources = Resources(compile_s=0.0, binary_bytes=0)
        super().__init__(Artifact(source, device.arch, source.digest, Path(), resources))

    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
        raise NotImplementedError


class Builder:
    """Builds, counts, and fails for sources that hold one of the texts in `broken`."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.sources: list[Source] = []

    def __call__(self, source: Source, device: Device) -> Kernel:
        self.sources.append(source)
        if any(text in source.text for text in self.broken):
            raise CompileError("ptxas says no")
        return Built(source, device)


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    warn.forget()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return make_catalog(tmp_path, {"triton/fwd.py.jinja": 256})


def make_catalog(root: Path, files: dict[str, int]) -> Catalog:
    for name, limit in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TEMPLATE.format(limit=limit))
    return Catalog.load(root)


def record(catalog: Catalog, problem: Problem | str, **changes: Any) -> Record:
    """A measured record of block_m 32 for a problem on HERE; `changes` are fields of Record."""
    config = Config.of("triton/fwd", {"block_m": 32, "num_stages": 2})
    fields: dict[str, Any] = {
        "problem": Problem.parse(problem) if isinstance(problem, str) else problem,
        "config": config,
        "template_digest": catalog.get(config.template).digest,
        "device": HERE,
        "outcome": "ok",
        "policy": "test",
        "measurement": Measurement(latency_us=10.0, p20_us=9.0, p80_us=11.0, count=5),
    }
    return Record(**{**fields, **changes})


def predicted(catalog: Catalog, problem: Problem | str, **changes: Any) -> Record:
    changes = {"outcome": "predicted", "measurement": None, "predicted_us": 5.0, **changes}
    return record(catalog, problem, **changes)


def values(**chosen: int) -> Config:
    return Config.of("triton/fwd", {"block_m": 64, "num_stages": 1, **chosen})


# The rules --------------------------------------------------------------------------------------


def test_the_record_of_the_very_problem_serves_it(catalog: Catalog) -> None:
    mine = record(catalog, ASKED)
    near = record(catalog, "b1s2048h8d64c", config=values(block_m=128))
    served = Dispatcher(HERE, [near, mine], catalog, Builder()).serve(ASKED)
    assert (served.rule, served.config, served.record) == ("exact", mine.config, mine)
    assert isinstance(served.kernel, Built)
    assert "block_m = 32; num_stages = 2; dim = 64" in served.kernel.artifact.source.text


def test_of_two_records_of_one_problem_the_faster_serves(catalog: Catalog) -> None:
    fast = Measurement(latency_us=1.0, p20_us=1.0, p80_us=1.0, count=5)
    best = record(catalog, ASKED, measurement=fast, config=values(block_m=128), policy="other")
    for records in ([record(catalog, ASKED), best], [best, record(catalog, ASKED)]):
        assert Dispatcher(HERE, records, catalog, Builder()).serve(ASKED).record is best


def test_the_nearest_record_stands_in(catalog: Catalog) -> None:
    far = record(catalog, "b1s8192h8d64c", config=values(block_m=128))
    near = record(catalog, "b1s1536h8d64c")
    other = record(catalog, "b1s1024h8d64f", config=values())
    served = Dispatcher(HERE, [far, other, near], catalog, Builder()).serve(ASKED)
    assert (served.rule, served.record) == ("bucket", near)
    assert "b1s1536h8/8d64c-bfloat16" in served.reason


def test_where_the_default_won_it_stands_in_as_it_is_for_the_sizes_asked(tmp_path: Path) -> None:
    written = TEMPLATE.replace(
        "[default]\nblock_m = 64", '[default]\nblock_m = "64 if problem.seqlen_q <= 1024 else 128"'
    ).format(limit=256)
    for name in ("triton/fwd", "triton/later"):
        (tmp_path / f"{name}.py.jinja").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py.jinja").write_text(written)
    catalog = Catalog.load(tmp_path)
    winner = record(catalog, ASKED, config=values())
    served = Dispatcher(HERE, [winner], catalog, Builder()).serve(Problem.parse("b1s2048h8d64c"))
    assert (served.rule, served.record) == ("bucket", winner)
    assert served.config == values(block_m=128)
    assert served.reason.endswith("; the default is best there")
    # A config that is no default won by itself;
    # so did the default of a template that others go before.
    later = Config.of("triton/later", dict(values().pairs))
    for config in (values(block_m=32), later):
        digest = catalog.get(config.template).digest
        other = record(catalog, ASKED, config=config, template_digest=digest)
        served = Dispatcher(HERE, [other], catalog, Builder()).serve(Problem.parse("b1s2048h8d64c"))
        assert (served.config, "default" in served.reason) == (other.config, False)


def test_a_record_too_far_away_does_not_stand_in(catalog: Catalog) -> None:
    far = record(catalog, "b1s1024h8d64c")
    decoding = Problem.parse("b1s1x1024h8d64c")
    assert decoding.distance(far.problem) > MAX_DISTANCE
    served = Dispatcher(HERE, [far], catalog, Builder()).serve(decoding)
    assert (served.rule, served.config) == ("default", values())
    edge = Problem.parse("b1s8192h8d64c")
    assert edge.distance(far.problem) == MAX_DISTANCE
    assert Dispatcher(HERE, [far], catalog, Builder()).serve(edge).record is far


def test_masks_that_are_compiled_differently_do_not_stand_in(catalog: Catalog) -> None:
    full = record(catalog, ASKED)
    windowed = record(catalog, "b1s1024h8d64cw127", config=values(block_m=128))
    capped = record(catalog, "b1s1024h8d64ccap50", config=values(num_stages=2))
    dispatcher = Dispatcher(HERE, [full, windowed, capped], catalog, Builder())
    for name, wanted in (
        ("b1s2048h8d64c", full), ("b1s2048h8d64cw255", windowed), ("b1s2048h8d64ccap30", capped),
    ):  # fmt: skip
        served = dispatcher.serve(Problem.parse(name))
        assert (served.rule, served.record) == ("bucket", wanted)
    assert dispatcher.serve(Problem.parse("b1s1024h8d64cw127")).rule == "exact"
    assert dispatcher.serve(Problem.parse("b1s1024h8d64cw127cap50")).rule == "default"


def test_windows_and_softcaps_of_all_values_share_a_kernel(catalog: Catalog) -> None:
    builder = Builder()
    dispatcher = Dispatcher(HERE, [], catalog, builder)
    names = ("b1s64h8d64fw3x5cap1.5", "b2s96h8d64fw90cap50", "b1s7h1d64fwinfx2cap20")
    kernels = {id(dispatcher.serve(Problem.parse(name)).kernel) for name in names}
    assert len(kernels) == len(builder.sources) == 1


def test_an_explanation_tells_masks_apart(catalog: Catalog) -> None:
    stored = record(catalog, "b1s1024h8d64cw127cap50")
    told = explain(
        "b1s1024h8d64cw63cap30", dispatcher=Dispatcher(HERE, [stored], catalog, Builder())
    )
    assert (told.rule, told.record) == ("bucket", stored)
    other = explain(ASKED, dispatcher=Dispatcher(HERE, [stored], catalog, Builder()))
    [neighbour] = other.nearest
    assert neighbour.differences == {"window_left": (None, 127), "softcap": (0.0, 50.0)}
    assert neighbour.unusable == "no kernel fits both problems"
    eight = explain(
        "b1s1024h8d64c-float8_e4m3fn", dispatcher=Dispatcher(HERE, [], catalog, Builder())
    )
    assert eight.refused == {"triton/fwd": "op is fwd"}


def test_evidence_counts_before_distance(catalog: Catalog) -> None:
    here = record(catalog, "b1s4096h8d64c")
    sibling = record(catalog, "b1s2048h8d64c", device=SIBLING, config=values())
    guess = predicted(catalog, ASKED, config=values(block_m=128))
    for records, expected in (
        ([guess, sibling, here], here),
        ([guess, sibling], sibling),
        ([guess], guess),
    ):
        served = Dispatcher(HERE, records, catalog, Builder()).serve(ASKED)
        assert served.record is expected
    elsewhere = Dispatcher(SIBLING, [guess], catalog, Builder()).serve(ASKED)
    assert elsewhere.rule == "bucket"
    assert elsewhere.record is guess


def test_records_of_another_arch_never_serve(catalog: Catalog) -> None:
    ampere = record(catalog, ASKED, device=KNOWN_GPUS["sm80"])
    dispatcher = Dispatcher(HERE, [ampere], catalog, Builder())
    assert dispatcher.serve(ASKED).rule == "default"
    assert dispatcher.index.rejected == [(ampere, "it is for sm80")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"template_digest": "0123456789abcdef"}, "has changed since: it was 0123456789abcdef"),
        ({"outcome": "wrong_result"}, "its outcome is wrong_result"),
        ({"config": Config.of("triton/gone", {})}, "unknown template 'triton/gone'"),
    ],
)
def test_a_record_that_does_not_hold_is_set_aside_with_its_reason(
    catalog: Catalog, changes: dict[str, Any], reason: str
) -> None:
    dispatcher = Dispatcher(HERE, [record(catalog, ASKED, **changes)], catalog, Builder())
    assert dispatcher.serve(ASKED).rule == "default"
    [(_, why)] = explain(ASKED, dispatcher=dispatcher).rejected
    assert reason in why


def test_a_record_whose_config_is_infeasible_here_is_passed_over(catalog: Catalog) -> None:
    short = Problem.parse("b1s64x4096h8d64c")
    long_tile = record(catalog, "b1s128x4096h8d64c", config=values(block_m=128))
    next_best = record(catalog, "b1s512x4096h8d64c")
    dispatcher = Dispatcher(HERE, [long_tile, next_best], catalog, Builder())
    assert dispatcher.serve(short).record is next_best
    [(rejected, why)] = explain(short, dispatcher=dispatcher).rejected
    assert (rejected, why) == (long_tile, "long tiles want long sequences")


def test_of_several_templates_the_most_specialised_default_serves(tmp_path: Path) -> None:
    catalog = make_catalog(
        tmp_path,
        {
            "triton/fwd.py.jinja": 256,
            "gluon/fwd.py.jinja": 128,
            "gluon/fwd_wide.py.jinja": 256,
            "other/fwd.py.jinja": 512,
        },
    )
    dispatcher = Dispatcher(HERE, [], catalog, Builder())

    def templates(head_dim: int) -> list[str]:
        problem = dataclasses.replace(ASKED, head_dim=head_dim, head_dim_v=head_dim)
        return [choice.template.name for choice in dispatcher.choices(problem)]

    assert templates(64) == ["gluon/fwd", "gluon/fwd_wide", "triton/fwd", "other/fwd"]
    assert templates(256) == ["gluon/fwd_wide", "triton/fwd", "other/fwd"]
    assert templates(512) == ["other/fwd"]
    assert dispatcher.serve(ASKED).reason == "the template's default"


def test_a_template_that_yields_serves_after_the_others_and_says_why(tmp_path: Path) -> None:
    make_catalog(tmp_path, {"triton/fwd.py.jinja": 256, "gluon/fwd.py.jinja": 256})
    path = tmp_path / "gluon/fwd.py.jinja"
    yields = '[yields]\n"one row" = "problem.seqlen_q == 1"\n\n[tunables]'
    path.write_text(path.read_text().replace("[tunables]", yields))
    dispatcher = Dispatcher(HERE, [], Catalog.load(tmp_path), Builder())

    def choices(seqlen_q: int) -> list[tuple[str, str]]:
        problem = dataclasses.replace(ASKED, seqlen_q=seqlen_q)
        return [(each.template.name, each.reason) for each in dispatcher.choices(problem)]

    default = "the template's default"
    assert choices(2) == [("gluon/fwd", default), ("triton/fwd", default)]
    later = f"{default}; others go first: one row"
    assert choices(1) == [("triton/fwd", default), ("gluon/fwd", later)]


def test_shipped_hopper_kernels_leave_decoding_to_triton() -> None:
    dispatcher = Dispatcher(HERE, [], installed(), Builder(), missing=lambda *_: None)

    def first(name: str) -> str:
        return next(dispatcher.choices(Problem.parse(name))).template.name

    assert first("b1s4096h8d128c-bfloat16") == "cuda/fwd_sm90"
    assert first("b8s1x4096h32/8d128c-bfloat16") == "triton/fwd"
    assert first("b1s4096h8d128c-float8_e4m3fn") == "cuda/fwd_fp8_sm90"


def test_without_nvcc_gluon_serves_hopper_before_the_portable_kernel() -> None:
    def missing(language: str, *_: Any) -> str | None:
        return "no nvcc" if language == "cuda" else None

    dispatcher = Dispatcher(HERE, [], installed(), Builder(), missing=missing)

    def order(name: str) -> list[str]:
        return [choice.template.name for choice in dispatcher.choices(Problem.parse(name))]

    assert order("b1s4096h8d128c-bfloat16") == ["gluon/fwd_sm90", "triton/fwd"]
    assert order("b1s4096h8d128c-bfloat16-unaligned") == ["triton/fwd"]
    assert order("b8s1x4096h32/8d128c-bfloat16") == ["triton/fwd", "gluon/fwd_sm90"]
    # 32 tiles of 128 rows for 132 multiprocessors, and enough keys to share out, or too few.
    assert order("b1s1024h4d128c-bfloat16") == ["triton/fwd", "gluon/fwd_sm90"]
    assert order("b1s1024x1023h4d128c-bfloat16") == ["gluon/fwd_sm90", "triton/fwd"]


def test_what_no_template_accepts_is_left_to_pytorch_with_the_reason(catalog: Catalog) -> None:
    wide = Problem.parse("b1s1024h8d300c")
    served = Dispatcher(HERE, [], catalog, Builder()).serve(wide)
    assert (served.rule, served.kernel, served.config) == ("torch", None, None)
    assert served.reason == "triton/fwd needs: head_dim is at most 256"


def test_a_declared_seed_serves_where_the_default_is_infeasible(tmp_path: Path) -> None:
    path = tmp_path / "triton/fwd.py.jinja"
    path.parent.mkdir()
    text = TEMPLATE.format(limit=256).replace("block_m = 64\nnum", "block_m = 128\nnum")
    path.write_text(text.replace("[constraints]", "[[seeds]]\nblock_m = 32\n\n[constraints]"))
    dispatcher = Dispatcher(HERE, [], Catalog.load(tmp_path), Builder())
    served = dispatcher.serve(Problem.parse("b1s64h8d64c"))
    assert served.config == values(block_m=32)
    assert served.reason == "the template's first seed"


# Building ---------------------------------------------------------------------------------------


def test_problems_that_differ_only_in_size_share_a_kernel(catalog: Catalog) -> None:
    builder = Builder()
    dispatcher = Dispatcher(HERE, [], catalog, builder)
    kernels = {
        id(dispatcher.serve(Problem.parse(name)).kernel)
        for name in ("b1s1024h8d64c", "b2s77x1000h4d64c", "b1s1h1d64c")
    }
    assert len(kernels) == len(builder.sources) == 1
    dispatcher.serve(Problem.parse("b1s1024h8/2d64c"))
    dispatcher.serve(dataclasses.replace(ASKED, aligned=False))
    assert len(builder.sources) == 3


def test_flexattention_is_compiled_for_each_size() -> None:
    builder = Builder()
    dispatcher = Dispatcher(HERE, [], installed(), builder)
    names = ("flex:b1s1024h2d64c", "flex:b1s4096h2d64c", "flex:b1s1024h2d64c")
    one, other, again = (dispatcher.serve(Problem.parse(name)).kernel for name in names)
    assert one is again is not other
    assert ["1024, 1024" in each.text for each in builder.sources] == [True, False]


def test_a_config_that_cannot_be_built_gives_way_to_the_default(catalog: Catalog) -> None:
    builder = Builder("block_m = 32")
    dispatcher = Dispatcher(HERE, [record(catalog, ASKED)], catalog, builder)
    with pytest.warns(RuntimeWarning, match="ptxas says no") as told:
        served = dispatcher.serve(ASKED)
    assert len(told) == 1
    assert (served.rule, served.config) == ("default", values())
    assert served.reason == "the template's default"
    assert served.failures == ("triton/fwd (block_m=32 num_stages=2): CompileError: ptxas says no",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        dispatcher.serve(dataclasses.replace(ASKED, batch=2))
    assert len(builder.sources) == 2  # nor is it built again


def test_when_nothing_can_be_built_pytorch_serves(catalog: Catalog) -> None:
    dispatcher = Dispatcher(HERE, [], catalog, Builder("block_m"))
    with pytest.warns(RuntimeWarning, match=r"triton/fwd \(block_m=64 num_stages=1\) cannot"):
        served = dispatcher.serve(ASKED)
    assert served.rule == "torch"
    assert "ptxas says no" in served.reason


def test_a_kernel_that_cannot_be_launched_is_given_up(catalog: Catalog) -> None:
    dispatcher = Dispatcher(HERE, [record(catalog, ASKED)], catalog, Builder())
    served = dispatcher.serve(ASKED)
    with pytest.warns(RuntimeWarning, match="out of resources"):
        dispatcher.gave_up(served, "out of resources")
    assert dispatcher.serve(ASKED).rule == "default"
    dispatcher.reload()  # such as by warmup, after the reason was removed
    assert dispatcher.serve(ASKED).rule == "exact"


def test_nothing_is_read_or_built_while_a_graph_is_captured(catalog: Catalog) -> None:
    reads: list[int] = []

    def read() -> list[Record]:
        reads.append(1)
        return [record(catalog, ASKED)]

    builder = Builder()
    dispatcher = Dispatcher(HERE, read, catalog, builder)
    served = dispatcher.serve(ASKED, may_build=False)
    assert served.rule == "torch"
    assert "autoflash.warmup" in served.reason
    assert (reads, builder.sources) == ([], [])
    other = dataclasses.replace(ASKED, head_dim=128, head_dim_v=128)
    assert dispatcher.serve(ASKED).rule == "exact"
    assert dispatcher.serve(ASKED, may_build=False).rule == "exact"
    assert dispatcher.serve(other, may_build=False).rule == "torch"
    assert dispatcher.serve(other).rule == "default"
    assert len(reads) == 1


def test_threads_that_ask_at_once_build_once(catalog: Catalog) -> None:
    builder = Builder()
    dispatcher = Dispatcher(HERE, [record(catalog, ASKED)], catalog, builder)
    barrier = threading.Barrier(8)
    kernels: list[Kernel | None] = []

    def ask() -> None:
        barrier.wait()
        kernels.append(dispatcher.serve(ASKED).kernel)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 8
    assert len(set(map(id, kernels))) == len(builder.sources) == 1


# Explaining -------------------------------------------------------------------------------------


def test_an_explanation_names_rule_rivals_and_differences(catalog: Catalog) -> None:
    mine, near = record(catalog, ASKED), record(catalog, "b2s2048h8d64c")
    far, other = record(catalog, "b1s1h8d64c"), record(catalog, "b1s1024h8d64f")
    guess = predicted(catalog, ASKED, device=SIBLING)
    builder = Builder()
    dispatcher = Dispatcher(HERE, [other, far, near, guess, mine], catalog, builder)
    told = explain(ASKED.name, dispatcher=dispatcher, count=4)
    assert (told.rule, told.record, told.config) == ("exact", mine, mine.config)
    assert told.next == [("default", values(), "the template's default")]
    assert [neighbour.record for neighbour in told.nearest] == [guess, near, far, other]
    by_device, by_size, too_far, no_kin = told.nearest
    assert by_device.differences == {"device": (HERE.key, SIBLING.key)}
    assert by_size.differences == {
        "batch": (1, 2), "seqlen_q": (1024, 2048), "seqlen_k": (1024, 2048),
    }  # fmt: skip
    assert by_size.unusable is None
    assert too_far.unusable == "it is 20 away; the limit is 6"
    assert no_kin.differences == {"causal": (True, False)}
    assert no_kin.unusable == "no kernel fits both problems"
    assert no_kin.to_dict()["distance"] is None
    assert builder.sources == []
    first = told.to_dict()["nearest"][0]
    assert first["differences"] == {"device": [HERE.key, SIBLING.key]}


def test_an_explanation_says_why_templates_refuse(catalog: Catalog) -> None:
    told = explain("b1s64h1d320f", dispatcher=Dispatcher(HERE, [], catalog, Builder()))
    assert told.rule == "torch"
    assert told.refused == {"triton/fwd": "head_dim is at most 256"}
    assert told.config is None
    assert told.to_dict()["refused"] == told.refused


def test_a_device_that_is_not_here_can_be_asked_about(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    ampere = KNOWN_GPUS["sm80"]
    stored = [record(catalog, ASKED, device=ampere)]
    monkeypatch.setattr(serving, "stored", lambda device: stored)
    monkeypatch.setattr("autoflash.codegen.catalog.installed", lambda: catalog)
    assert explain(ASKED, ampere).rule == "exact"


def test_a_new_length_asks_a_template_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Jinja takes some 20 us per expression; with every token of a decoding step that would add up.
    asked: list[str] = []
    evaluate = Template._evaluate

    def counted(self: Template, expression: str, scope: Any, what: str) -> Any:
        asked.append(what)
        return evaluate(self, expression, scope, what)

    monkeypatch.setattr(Template, "_evaluate", counted)
    triton = Catalog(installed().root, {"triton/fwd": installed().get("triton/fwd")})
    dispatcher = Dispatcher(HERE, [], triton, Built)
    first = dispatcher.serve(Problem.parse("b4s1x1000h32/8d128c"))
    assert first.rule == "default"
    assert any(what.startswith("constraint") for what in asked)
    asked.clear()
    assert dispatcher.serve(Problem.parse("b4s1x1001h32/8d128c")).config == first.config
    assert not [what for what in asked if what.startswith(("constraint", "derived", "default"))]
    # What an expression does read is asked again: more than 16 rows are not decoding.
    asked.clear()
    assert dispatcher.serve(Problem.parse("b4s17x1001h32/8d128c")).config != first.config
    assert any(what.startswith("constraint") for what in asked)


# Dispatch tables --------------------------------------------------------------------------------


def tabled(catalog: Catalog, **changes: Any) -> DispatchTable:
    digests = {name: template.digest for name, template in catalog.templates.items()}
    return table(digests, **changes)


def rules(catalog: Catalog, name: str, *records: Record, **changes: Any) -> tuple[str, Config]:
    dispatcher = Dispatcher(HERE, Learned(records, [tabled(catalog, **changes)]), catalog)
    choice = next(dispatcher.choices(Problem.parse(name)))
    return choice.rule, choice.config


def test_a_table_serves_what_was_not_tuned_and_before_the_nearest_record(catalog: Catalog) -> None:
    # The record's config is FAST; the table says that up to 1024 rows the default is best.
    near = record(catalog, "b1s600h8d64c")
    assert rules(catalog, "b1s601h8d64c", near) == ("table", SLOW)
    assert rules(catalog, "b1s2000h8d64c", near) == ("table", FAST)
    assert rules(catalog, "b1s600h8d64c", near) == ("exact", FAST)
    # Another mask, dtype or kind of work is none of its business.
    assert rules(catalog, "b1s601h8d64f", near) == ("default", SLOW)
    assert rules(catalog, "b1s601h8d64c-float16", near) == ("bucket", FAST)
    assert rules(catalog, "b1s1x64h8d64c", near) == ("default", SLOW)


def test_a_table_serves_no_other_device(catalog: Catalog) -> None:
    assert rules(catalog, "b1s2000h8d64c", device=SIBLING) == ("default", SLOW)


@pytest.mark.parametrize("seqlen", [601, 2000])
def test_a_leaf_of_a_template_that_has_changed_is_not_served(catalog: Catalog, seqlen: int) -> None:
    name, former = f"b1s{seqlen}h8d64c", {"digests": {"triton/fwd": "former"}}
    assert rules(catalog, name, **former) == ("default", SLOW)
    # Records that hold say more than a table that does not.
    assert rules(catalog, name, record(catalog, "b1s1000h8d64c"), **former) == ("bucket", FAST)


def test_a_leaf_that_is_not_feasible_falls_to_the_next_rule(catalog: Catalog) -> None:
    long = Config.of("triton/fwd", {"block_m": 128, "num_stages": 1})
    whole = (Leaf(where=(), config=1, probes=4, mean=0.0, worst=0.0),)
    changes = {"configs": (SLOW, long), "leaves": whole}
    assert rules(catalog, "b1s128h8d64c", **changes) == ("table", long)
    assert rules(catalog, "b1s127h8d64c", **changes) == ("default", SLOW)


def test_a_leaf_that_cannot_be_built_is_served_by_the_default(catalog: Catalog) -> None:
    builder = Builder("block_m = 32")
    dispatcher = Dispatcher(HERE, Learned((), [tabled(catalog)]), catalog, builder)
    with pytest.warns(RuntimeWarning, match="ptxas says no"):
        served = dispatcher.serve(Problem.parse("b1s2000h8d64c"))
    assert (served.rule, served.config) == ("default", SLOW)


def test_why_names_the_leaf_and_what_the_table_is_worth(catalog: Catalog) -> None:
    made = tabled(catalog)
    dispatcher = Dispatcher(HERE, Learned((), [made]), catalog)
    told = explain("b1s2000h8d64c", dispatcher=dispatcher)
    assert (told.rule, told.config, told.record, told.table) == ("table", FAST, None, made)
    assert told.reason == (
        "dispatch table fwd-d64c-bfloat16: seqlen_q > 1024; 2 shapes measured, 1.0% behind the "
        "best of each on average, 2.0% at worst"
    )
    assert told.to_dict()["table"] == made.to_dict()
    short = explain("b1s601h8d64c", dispatcher=dispatcher)
    assert "seqlen_q <= 1024, where the default is best; 2 shapes" in short.reason
    assert explain("b1s601h8d64f", dispatcher=dispatcher).table is None


def test_a_device_may_be_named_by_its_arch() -> None:
    assert explain("b1s4096h16d128c-bfloat16", "sm90").device.name == "NVIDIA H100 80GB HBM3"
    with pytest.raises(UnknownName, match="nvidia-h200"):
        explain("b1s4096h16d128c-bfloat16", "nvidia-h200")
