"""Rendered source, exactly: a refactor changes no kernel, and a change of one shows in review.

`pytest tests/golden --update-golden` rewrites the files from what is rendered now.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from autoflash.codegen.catalog import installed
from autoflash.device import KNOWN_GPUS, Device
from autoflash.problem import Problem

HERE = Path(__file__).parent
AVX512 = Device(
    name="golden cpu",
    arch="cpu",
    num_sms=2,
    l2_bytes=1 << 20,
    isa=("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
)
AVX2 = Device(
    name="golden cpu", arch="cpu", num_sms=2, l2_bytes=1 << 20, isa=("avx2", "fma", "f16c")
)
CASES = {
    "sm80-d64c-bfloat16": (KNOWN_GPUS["sm80"], Problem.parse("b4s4096h16d64c-bfloat16")),
    "sm80-d80x48f-float32": (KNOWN_GPUS["sm80"], Problem.parse("b4s1000h6/2d80x48f-float32")),
    "sm90-d128c-bfloat16": (KNOWN_GPUS["sm90"], Problem.parse("b4s4096h16d128c-bfloat16")),
    "sm90-d128f-unaligned": (KNOWN_GPUS["sm90"], Problem.parse("b4s99h16d128f-float16-unaligned")),
    "sm80-d64fw512x64-float16": (
        KNOWN_GPUS["sm80"],
        Problem.parse("b4s4096h16d64fw512x64-float16"),
    ),
    "sm90-d128cw1023cap50-bfloat16": (
        KNOWN_GPUS["sm90"],
        Problem.parse("b4s4096h16/4d128cw1023cap50-bfloat16"),
    ),
    "sm90-d128c-few-rows": (
        KNOWN_GPUS["sm90"],
        Problem.parse("b1s4x8192h32/8d128c-bfloat16"),
    ),
    "sm90-d128f-float8": (
        KNOWN_GPUS["sm90"],
        Problem.parse("b4s4096h16d128f-float8_e4m3fn"),
    ),
    "sm90-flex-d128c-bfloat16": (
        KNOWN_GPUS["sm90"],
        Problem.parse("flex:b4s4096h32/8d128c-bfloat16"),
    ),
    "sm90-flex-d64w1023cap50-float16": (
        KNOWN_GPUS["sm90"],
        Problem.parse("flex:b1s4096x5000h16d64cw1023cap50-float16"),
    ),
    "avx512-d64c-bfloat16": (AVX512, Problem.parse("b1s1024h8d64c-bfloat16")),
    "avx512-d128f-float32": (AVX512, Problem.parse("b1s1024h8d128f-float32")),
    "avx2-d80x48c-float16": (AVX2, Problem.parse("b1s1000h6/2d80x48c-float16")),
    "avx2-d64cw255cap50-float32": (AVX2, Problem.parse("b1s1000h8d64cw255cap50-float32")),
}
ENDINGS = {"python": "py", "cuda": "cu", "cpp": "cpp", "flex": "py"}


def rendered() -> list[tuple[str, Path, str]]:
    found = []
    for case, (device, problem) in CASES.items():
        for template in installed().serving(problem, device):
            source = template.render(template.default_config(problem, device), problem, device)
            path = HERE / template.name / f"{case}.{ENDINGS[template.language]}"
            found.append((f"{template.name}-{case}", path, source.text))
    return found


@pytest.mark.parametrize(("path", "text"), [pytest.param(p, t, id=i) for i, p, t in rendered()])
def test_rendered_source_is_as_recorded(
    path: Path, text: str, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing: run `make golden` and review what it adds"
    assert text == path.read_text(encoding="utf-8"), "run `make golden` and review the difference"


def test_no_recorded_file_is_left_over() -> None:
    kept = {path for path in HERE.rglob("*") if path.suffix in (".py", ".cu", ".cpp")}
    assert kept - {Path(__file__)} == {path for _, path, _ in rendered()}
