"""Declarations, constraints, rendering: on small templates written by the test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from autoflash.codegen import ops
from autoflash.codegen.catalog import Catalog, installed
from autoflash.codegen.template import Template
from autoflash.config import Config
from autoflash.device import KNOWN_GPUS
from autoflash.errors import InvalidInput, TemplateError, UnknownName
from autoflash.problem import FOREIGN_OPS, Problem

PROBLEM = Problem.parse("b1s1024h8d64f")
SM80 = KNOWN_GPUS["sm80"]
GOOD = """{#---
summary = "A test."
source  = "none"
op      = "fwd"

[accepts]
"device is an NVIDIA GPU" = "device.is_cuda"

[tunables]
block_m = [64, 128]
block_n = [32, 64, 128]

[default]
block_m = "64 if problem.head_dim > 128 else 128"
block_n = 64

[[seeds]]
block_m = 64

[derived]
smem_bytes = "problem.element_size * problem.head_dim * (block_m + 2 * block_n)"

[constraints]
"tiles fit in shared memory" = "smem_bytes <= 40000"
---#}
BLOCK_M = {{ block_m }}
BLOCK_N = {{ block_n }}
def kernel({{ op.python_parameters }}): return {{ problem.head_dim }}
"""


def catalog_of(tmp_path: Path, text: str, name: str = "triton/fwd", **others: str) -> Catalog:
    for file, body in {f"{name}.py.jinja": text, **others}.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    return Catalog.load(tmp_path)


def template_of(tmp_path: Path, text: str) -> Template:
    return catalog_of(tmp_path, text).get("triton/fwd")


def test_space_counts_what_each_constraint_rejects(tmp_path: Path) -> None:
    space = template_of(tmp_path, GOOD).space(PROBLEM, SM80)
    assert space.size == 6
    assert len(space) + sum(space.rejected.values()) == 6
    assert Config.of("triton/fwd", {"block_m": 64, "block_n": 32}) in space.configs
    assert Config.of("triton/fwd", {"block_m": 128, "block_n": 128}) not in space.configs
    assert set(space.rejected) == {"tiles fit in shared memory"}
    for config in space.configs:
        assert 2 * 64 * (config["block_m"] + 2 * config["block_n"]) <= 40000


def test_default_may_be_an_expression(tmp_path: Path) -> None:
    template = template_of(tmp_path, GOOD)
    assert template.default_config(PROBLEM, SM80)["block_m"] == 128
    wide = Problem.parse("b1s1024h8d256f")
    assert template.default_config(wide, SM80)["block_m"] == 64
    assert template.seed_configs(PROBLEM, SM80) == [
        Config.of("triton/fwd", {"block_m": 128, "block_n": 64}),
        Config.of("triton/fwd", {"block_m": 64, "block_n": 64}),
    ]


def test_facts_are_names_for_what_no_tunable_decides(tmp_path: Path) -> None:
    text = GOOD.replace("[tunables]", '[facts]\nwide = "problem.head_dim > 128"\n\n[tunables]')
    text = text.replace('"64 if problem.head_dim > 128 else 128"', '"64 if wide else 128"')
    text = text.replace('"smem_bytes <= 40000"', '"wide or smem_bytes <= 40000"')
    template = template_of(tmp_path, text)
    wide = Problem.parse("b1s1024h8d256f")
    assert template.default_config(PROBLEM, SM80)["block_m"] == 128
    assert template.default_config(wide, SM80)["block_m"] == 64
    assert len(template.space(wide, SM80)) == 6 > len(template.space(PROBLEM, SM80))


def test_a_fact_that_fails_is_named(tmp_path: Path) -> None:
    facts = '[facts]\nfine = "problem.head_dim"\nwrong = "fine // (fine - 64)"\n\n[tunables]'
    template = template_of(tmp_path, GOOD.replace("[tunables]", facts))
    assert template.decisive(dataclasses.replace(PROBLEM, head_dim=128), SM80)[-2:] == (128, 2)
    with pytest.raises(TemplateError, match=r"fact wrong: .* by zero") as caught:
        template.decisive(PROBLEM, SM80)
    assert caught.value.line == 11


@pytest.mark.parametrize("template", installed().templates.values(), ids=lambda t: t.name)
def test_facts_are_asked_for_at_once(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dataclasses.replace(Problem.parse("b3s1100x5000h8/2d64c"), op=template.op)
    one_by_one = {
        name: template._evaluate(text, template._facts(problem, SM80), name)
        for name, text in template.facts.items()
    }
    monkeypatch.setattr(Template, "_evaluate", lambda *_: pytest.fail("one by one"))
    facts = template._facts(problem, SM80)
    assert {name: facts[name] for name in template.facts} == one_by_one


def test_every_token_asks_the_same_of_a_template() -> None:
    h200 = KNOWN_GPUS["sm90"]
    for name in ("cuda/fwd_sm80", "cuda/fwd_sm90", "cuda/fwd_fp8_sm90", "gluon/fwd_sm90"):
        template = installed().get(name)
        dtype = "float8_e4m3fn" if "fp8" in name else "bfloat16"
        for shape in ("b8s1x{}h32/8d128c", "b1s{}h32/8d128c"):
            lengths = (Problem.parse(f"{shape.format(n)}-{dtype}") for n in range(5000, 5100))
            assert len({template.decisive(each, h200) for each in lengths}) <= 3, name


def test_render_binds_constants_and_the_argument_list(tmp_path: Path) -> None:
    template = template_of(tmp_path, GOOD)
    source = template.render(template.default_config(PROBLEM, SM80), PROBLEM, SM80)
    assert source.language == "python"
    assert source.text.startswith("BLOCK_M = 128\nBLOCK_N = 64\n")
    assert f"def kernel({ops.FWD.python_parameters}): return 64" in source.text


def test_problems_that_differ_in_size_share_source(tmp_path: Path) -> None:
    template = template_of(tmp_path, GOOD)
    config = template.default_config(PROBLEM, SM80)
    longer = Problem.parse("b3s777h4/2d64f")
    wider = Problem.parse("b1s1024h8d32f")
    one, two, other = (template.render(config, p, SM80).digest for p in (PROBLEM, longer, wider))
    assert one == two != other


def test_an_infeasible_config_is_named_with_its_constraint(tmp_path: Path) -> None:
    template = template_of(tmp_path, GOOD)
    config = Config.of("triton/fwd", {"block_m": 128, "block_n": 128})
    with pytest.raises(InvalidInput, match='block_m=128 block_n=128 breaks "tiles fit in shared'):
        template.render(config, PROBLEM, SM80)
    foreign = Config.of("triton/fwd", {"block_m": 128, "block_n": 96})
    assert template.broken(foreign, PROBLEM, SM80) == "block_n=96 is not one of [32, 64, 128]"


def test_refusal_gives_the_declared_reason(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, GOOD)
    from autoflash import device

    cpu = device.for_arch("cpu")
    assert catalog.serving(PROBLEM, SM80) == [catalog.get("triton/fwd")]
    assert catalog.refusals(PROBLEM, cpu) == {"triton/fwd": "device is an NVIDIA GPU"}
    # Whose op is another library's was not asked.
    assert catalog.refusals(dataclasses.replace(PROBLEM, op="flex"), cpu) == {}


def test_digest_follows_the_body_and_its_parts_but_not_the_declaration(tmp_path: Path) -> None:
    before = template_of(tmp_path, GOOD).digest
    assert template_of(tmp_path, GOOD.replace("[32, 64, 128]", "[32, 64]")).digest == before
    assert template_of(tmp_path, GOOD.replace("return", "return 1 +")).digest != before
    with_part = GOOD + '{% include "triton/_part.py.jinja" %}\n'
    one = catalog_of(tmp_path, with_part, **{"triton/_part.py.jinja": "x = 1\n"})
    two = catalog_of(tmp_path, with_part, **{"triton/_part.py.jinja": "x = 2\n"})
    assert list(one.templates) == ["triton/fwd"]
    assert one.get("triton/fwd").digest != two.get("triton/fwd").digest


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("block_n = 64\n", "block_n = 48\n", 15, "default block_n=48 is not one of"),
        ("block_n = 64\n", "", 11, "tunable block_n has no default"),
        ("block_n = [32", "block_k = [1]\nblock_n = [32", 11, "block_k has no default"),
        ('"smem_bytes <= 40000"', '"smem_byte <= 4"', 24, "unknown name 'smem_byte'.*smem_bytes"),
        ('"smem_bytes <= 40000"', '"smem_bytes <="', 24, "constraint"),
        ('op      = "fwd"', 'op      = "fdw"', 4, "unknown op 'fdw'.*Did you mean 'fwd'"),
        ("[constraints]", "[constraint]", 23, "Did you mean 'constraints'"),
        ("[64, 128]", "[64, 128", 11, "declaration"),
        ("{#---\n", "{#---\nspeed = 3\n", 2, "unknown declaration key 'speed'"),
        ('summary = "A test."\n', "", 2, "lacks 'summary'"),
        ("{{ block_n }}", "0", 11, "tunable block_n is used nowhere"),
        ("{{ block_m }}", "{{ block_m ", 27, "end of print statement"),
        ("[tunables]", '[facts]\nwide = "block_m > 1"\n\n[tunables]', 10, "unknown name 'block_m'"),
        ("[[seeds]]\nblock_m", "[[seeds]]\nblock_mm", 18, "seed 1: unknown tunable 'block_mm'"),
    ],
)
def test_a_mistake_is_reported_with_file_line_and_name(
    tmp_path: Path, old: str, new: str, line: int, words: str
) -> None:
    text = GOOD.replace(old, new, 1)
    if old == "{{ block_n }}":  # still used by smem_bytes: drop that too
        text = text.replace("(block_m + 2 * block_n)", "block_m")
    with pytest.raises(TemplateError, match=words) as caught:
        template_of(tmp_path, text)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"{tmp_path}/triton/fwd.py.jinja:{line}: ")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{{ block_k }}", "'block_k' is undefined"),
        ("{{ problem.seqlen_q }}", "problem.seqlen_q is not known when a kernel is compiled"),
        ("{{ 1 // (block_n - block_n) }}", "ZeroDivisionError"),
    ],
)
def test_a_mistake_met_while_rendering_has_its_line(tmp_path: Path, body: str, words: str) -> None:
    template = template_of(tmp_path, GOOD + body + "\n")
    with pytest.raises(TemplateError, match=words) as caught:
        template.render(template.default_config(PROBLEM, SM80), PROBLEM, SM80)
    assert caught.value.line == GOOD.count("\n") + 1


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"includes _gone.jinja, which does not exist"):
        template_of(tmp_path, GOOD + '{% include "_gone.jinja" %}\n')


def test_a_file_without_declaration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="starts with its declaration"):
        template_of(tmp_path, "BLOCK_M = 1\n")


def test_an_unknown_template_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown template 'triton/bwd'.*triton/fwd"):
        catalog_of(tmp_path, GOOD).get("triton/bwd")


def test_c_and_triton_see_one_argument_list() -> None:
    op = ops.FWD
    names = [part.split()[-1] for part in op.c_parameters("int num_threads").split(", ")]
    assert names == [*op.python_parameters.split(", "), "num_threads"]
    assert list(op.triton_signature("bfloat16")) == names[:-1]
    assert op.triton_signature("bfloat16")["q"] == "*bf16"
    assert op.triton_signature("float16")["lse"] == "*fp32"


def test_scalars_of_a_call_follow_the_argument_list_in_both_layouts() -> None:
    import torch

    q = torch.empty(2, 5, 6, 16)
    k = torch.empty(2, 7, 3, 16)
    v = torch.empty(2, 7, 3, 8)
    out = torch.empty(2, 5, 6, 8)
    scalars = ops.fwd_scalars((q, k, v, out), "bshd")
    named = dict(zip((arg.name for arg in ops.FWD.scalars), scalars, strict=True))
    assert named["batch"] == 2
    assert (named["seqlen_q"], named["seqlen_k"]) == (5, 7)
    assert (named["num_heads"], named["num_kv_heads"]) == (6, 3)
    assert (named["v_stride_batch"], named["v_stride_seq"], named["v_stride_head"]) == (168, 24, 8)
    turned = [tensor.transpose(1, 2) for tensor in (q, k, v, out)]
    assert ops.fwd_scalars(turned, "bhsd") == scalars


@pytest.mark.parametrize("template", installed().templates.values(), ids=lambda t: t.name)
def test_installed_templates_have_a_feasible_default_for_some_problem(template: Template) -> None:
    from autoflash import device

    devices = [*KNOWN_GPUS.values(), device.for_arch("cpu")]
    served = 0
    for where in devices:
        for dtype in ("float16", "bfloat16", "float32", "float8_e4m3fn"):
            for head_dim in (64, 128, 256):
                problem = Problem.parse(f"b2s512h8/2d{head_dim}c-{dtype}")
                if template.op in FOREIGN_OPS:
                    problem = dataclasses.replace(problem, op=template.op)
                if template.refusal(problem, where) is None:
                    config = template.default_config(problem, where)
                    assert template.broken(config, problem, where) is None
                    assert template.render(config, problem, where).text
                    served += 1
    assert served


@pytest.mark.parametrize("head_dim", [8, 320, 328, 512, 1024])
def test_no_template_breaks_over_head_dims_that_it_refuses(head_dim: int) -> None:
    problem = Problem.parse(f"b1s64h2d{head_dim}x8c")
    for device in KNOWN_GPUS.values():
        refused = installed().refusals(problem, device)
        if head_dim > 256:
            assert set(refused) == {n for n, t in installed().templates.items() if t.op != "flex"}
