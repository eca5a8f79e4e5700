from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from autoflash import benchmark
from autoflash.cli.problems import Selection, default_grid
from autoflash.device import KNOWN_GPUS, Device
from autoflash.errors import InvalidInput, UnknownName
from autoflash.problem import Problem

CPU = Device(name="test cpu", arch="cpu", num_sms=2)
SM80 = KNOWN_GPUS["sm80"]


def names(selection: Selection, device: Device = CPU) -> list[str]:
    return [problem.name for problem in selection.problems(device)]


def test_sizes_are_comma_lists_and_all_combinations_are_meant() -> None:
    chosen = Selection(
        batch="2", seqlen="128,256", heads="4", kv_heads="2", head_dim="64,128", dtype="float32",
        causal=True,
    ).problems(CPU)  # fmt: skip
    assert {(p.seqlen_q, p.head_dim) for p in chosen} == {
        (128, 64), (128, 128), (256, 64), (256, 128)
    }  # fmt: skip
    assert len(chosen) == 4
    assert {(p.batch, p.num_heads, p.num_kv_heads, p.causal) for p in chosen} == {(2, 4, 2, True)}


def test_a_size_that_is_not_given_is_the_usual_one_of_the_device() -> None:
    assert names(Selection(head_dim="64", causal=False)) == [
        "b1s1024h8/8d64f-float32", "b1s1024h8/8d64f-bfloat16"
    ]  # fmt: skip
    assert names(Selection(head_dim="64,128", dtype="bfloat16"), SM80) == [
        "b4s4096h32/32d64c-bfloat16", "b4s4096h32/32d64f-bfloat16",
        "b4s4096h16/16d128c-bfloat16", "b4s4096h16/16d128f-bfloat16",
    ]  # fmt: skip


def test_windows_and_caps_go_with_every_size() -> None:
    chosen = Selection(
        seqlen="64,128", heads="2", head_dim="64", dtype="float32", window="20", softcap="0,50"
    )
    assert names(chosen) == [
        f"b1s{seqlen}h2/2d64{mask}{cap}-float32"
        for seqlen in (64, 128)
        for mask in ("cw20", "fw20xinf")
        for cap in ("", "cap50")
    ]


@pytest.mark.parametrize(
    ("window", "causal", "found"),
    [
        ("20", True, ["cw20"]),
        ("20,5", None, ["fw20x5"]),  # a causal row sees nothing after its own
        ("20,5", False, ["fw20x5"]),
        ("20,0", None, ["cw20"]),
        ("inf,5", None, ["fwinfx5"]),
        ("-1,5", None, ["fwinfx5"]),
        ("20,inf", None, ["cw20", "fw20xinf"]),
        ("500,500", None, ["f"]),  # that hides nothing
        ("inf", None, ["c", "f"]),
    ],
)
def test_a_window_is_one_bound_or_two(window: str, causal: bool | None, found: list[str]) -> None:
    chosen = Selection(seqlen="128", heads="1", dtype="float32", window=window, causal=causal)
    assert names(chosen) == [f"b1s128h1/1d64{mask}-float32" for mask in found]


def test_windows_and_caps_choose_within_a_grid() -> None:
    local = Selection(grid="fwd-window", window="1024", head_dim="64").problems(SM80)
    assert [p.name for p in local] == [
        "b4s4096h32/32d64cw1024-bfloat16", "b1s16384h32/32d64cw1024-bfloat16"
    ]  # fmt: skip
    assert Selection(grid="fwd-window", window="128,128").problems(SM80) == [
        Problem.parse("b2s8192h16d64fw128x128")
    ]
    capped = Selection(grid="fwd-softcap", softcap="50", window="inf").problems(SM80)
    assert len(capped) == 4
    assert not any(p.local for p in capped)
    with pytest.raises(InvalidInput, match="none of the"):
        Selection(grid="fwd-softcap", softcap="0").problems(SM80)


def test_8_bits_are_tuned_only_where_they_are_asked_for() -> None:
    assert "float8_e4m3fn" not in {p.dtype for p in Selection(head_dim="64").problems(SM80)}
    [problem] = Selection(
        dtype="float8_e4m3fn", head_dim="128", seqlen="4096", causal=True
    ).problems(SM80)
    assert problem.name == "b4s4096h16/16d128c-float8_e4m3fn"
    assert problem.op == "fwd_fp8"


def test_key_rows_and_value_dims_follow_unless_given() -> None:
    [problem] = Selection(
        seqlen="1", seqlen_k="777", head_dim="192", head_dim_v="128", dtype="float16", causal=True
    ).problems(CPU)
    assert (problem.seqlen_q, problem.seqlen_k) == (1, 777)
    assert (problem.head_dim, problem.head_dim_v) == (192, 128)


def test_default_heads_are_a_multiple_of_the_kv_heads_asked_for() -> None:
    for problem in Selection(kv_heads="3,5", head_dim="96").problems(SM80):
        assert problem.num_heads % problem.num_kv_heads == 0


def test_an_empty_sequence_can_be_asked_for() -> None:
    assert names(Selection(seqlen="0", heads="1", dtype="float32", causal=True)) == [
        "b1s0h1/1d64c-float32"
    ]


@pytest.mark.parametrize("device", [CPU, SM80])
def test_with_nothing_asked_for_it_is_the_default_grid(device: Device) -> None:
    assert Selection().problems(device) == list(benchmark.GRIDS[default_grid(device)])


def test_sizes_choose_within_a_grid() -> None:
    everything = list(benchmark.GRIDS["cpu"])
    chosen = Selection(grid="cpu", causal=True, head_dim="64").problems(CPU)
    assert chosen == [p for p in everything if p.causal and p.head_dim == 64]
    assert 0 < len(chosen) < len(everything)


def test_a_file_names_one_problem_per_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("# mine\nb1s16h1d64c-float32  # small\n\nb2s99h4/2d80f\nb1s16h1d64c-float32\n")
    assert names(Selection(file=file)) == ["b1s16h1/1d64c-float32", "b2s99h4/2d80f-bfloat16"]


def test_a_shape_takes_each_dtype_unless_it_names_one() -> None:
    shapes = ["b1s16h1d64c", "b1s16h1d64f-float16"]
    assert names(Selection(shape=shapes, dtype="float32,bfloat16")) == [
        "b1s16h1/1d64c-float32", "b1s16h1/1d64c-bfloat16", "b1s16h1/1d64f-float16"
    ]  # fmt: skip


def test_what_takes_most_time_comes_first_where_calls_are_known(tmp_path: Path) -> None:
    file = tmp_path / "ran.txt"
    file.write_text("b1s64h8d64f-float32 9\nb1s1024h8d64f-float32 9\nb1s512h8d64f-float32 900\n")
    chosen = Selection(file=file)
    assert [p.seqlen_q for p in chosen.problems(CPU)] == [512, 1024, 64]
    costs = chosen.costs(CPU)
    assert [cost.calls for cost in costs] == [900, 9, 9]
    assert sum(cost.share for cost in costs) == pytest.approx(1.0)
    assert [p.seqlen_q for p in Selection(file=file, top=2).problems(CPU)] == [512, 1024]
    assert [p.seqlen_q for p in Selection(file=file, seqlen="64,1024").problems(CPU)] == [1024, 64]


def test_without_calls_the_order_is_that_of_the_file_unless_top_is_asked_for(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("b1s64h8d64f-float32\nb1s1024h8d64f-float32\n")
    assert [p.seqlen_q for p in Selection(file=file).problems(CPU)] == [64, 1024]
    assert Selection(file=file).costs(CPU) == []
    assert [p.seqlen_q for p in Selection(file=file, top=1).problems(CPU)] == [1024]


def test_a_preset_is_expanded_and_sizes_replace_its_own() -> None:
    assert names(Selection(preset=["llama3-8b"]), SM80) == [
        "b16s1024h32/8d128c-bfloat16", "b4s4096h32/8d128c-bfloat16",
        "b8s1x8192h32/8d128c-bfloat16",
    ]  # fmt: skip
    assert names(Selection(preset=["llama3-8b"])) == [
        "b1s1024h32/8d128c-bfloat16", "b1s1x1024h32/8d128c-bfloat16"
    ]  # fmt: skip
    sized = Selection(preset=["gpt2,vit-l"], batch="2", seqlen="300", dtype="float16,float32")
    assert names(sized, SM80) == [
        "b2s300h12/12d64c-float16", "b2s300h12/12d64c-float32",
        "b2s300h16/16d64f-float16", "b2s300h16/16d64f-float32",
    ]  # fmt: skip
    decoding = Selection(preset=["llama3-8b"], batch="64", seqlen="1", seqlen_k="500,900")
    assert names(decoding, SM80) == [
        "b64s1x500h32/8d128c-bfloat16", "b64s1x900h32/8d128c-bfloat16"
    ]  # fmt: skip


def test_other_options_choose_among_the_layers_of_a_preset() -> None:
    local = Selection(preset=["gemma2-9b"], window="4095", seqlen="8192", batch="1")
    assert names(local, SM80) == ["b1s8192h16/8d256cw4095cap50-bfloat16"]
    everywhere = Selection(preset=["gemma2-9b"], window="inf", seqlen="8192", batch="1")
    assert names(everywhere, SM80) == ["b1s8192h16/8d256ccap50-bfloat16"]


def wrong_file(tmp_path: Path, text: bytes) -> Path:
    path = tmp_path / "wrong.txt"
    path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        (Selection(grid="cqu"), UnknownName, "unknown grid or file 'cqu'. Did you mean 'cpu'"),
        (Selection(shape=["4x4"]), InvalidInput, "'4x4' is not of the form"),
        (Selection(shape=["b1s1h1d8c"], heads="2"), InvalidInput, "--heads says nothing beside"),
        (Selection(head_dim="64,x"), InvalidInput, "--head-dim 'x' is not a whole number"),
        (Selection(seqlen_k="-1"), InvalidInput, "--seqlen-k '-1'"),
        (Selection(dtype="bf16"), UnknownName, "unknown dtype 'bf16'.*bfloat16"),
        (Selection(heads="3", kv_heads="2"), InvalidInput, "num_heads=3 is not a multiple"),
        (Selection(grid="cpu", head_dim="7"), InvalidInput, "none of the .* grid 'cpu'"),
        (Selection(file=Path("/does/not/exist")), InvalidInput, "/does/not/exist cannot be read"),
        (Selection(preset=["llama3-8"]), UnknownName, "preset 'llama3-8'.* mean 'llama3-8b'"),
        (Selection(preset=["gpt2"], heads="7"), InvalidInput, "none of the .* preset gpt2 has"),
        (Selection(preset=["gpt2"], seqlen="x"), InvalidInput, "--seqlen 'x' is not a whole"),
        (Selection(window="x"), InvalidInput, "--window 'x' is not a whole number"),
        (Selection(window="1,2,3"), InvalidInput, "--window '1,2,3' is not LEFT"),
        (Selection(window=","), InvalidInput, "--window ',' is not LEFT"),
        (Selection(window="8,8", causal=True), InvalidInput, "--window 8,8 sees 8 keys after"),
        (Selection(softcap="x"), InvalidInput, "--softcap 'x' is not a number"),
        (Selection(softcap="-1"), InvalidInput, "softcap=-1.0"),
        (Selection(softcap="nan"), InvalidInput, "softcap=nan"),
        (Selection(shape=["b1s1h1d8c"], window="2"), InvalidInput, "--window says nothing beside"),
        (Selection(shape=["b1s1h1d8c"], softcap="2"), InvalidInput, "--softcap says nothing"),
    ],
)
def test_what_cannot_be_meant_names_option_and_value(
    selection: Selection, error: type[InvalidInput], message: str
) -> None:
    with pytest.raises(error, match=message):
        selection.problems(CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"b1s1h1d8c\nb1s1h1\n", "wrong.txt:2: problem 'b1s1h1' is not"),
        (b"b1s1h1d8c 0\n", "wrong.txt:1: the number of calls '0' is not a whole number from 1"),
        (b"b1s1h1d8c 1 2\n", "wrong.txt:1: 'b1s1h1d8c 1 2' has 3 words"),
        (b"x\nb1s1h1d8c\ny\n", "(?s)wrong.txt:1: .*wrong.txt:3: .*these 2 lines"),
        (b"# nothing\n", "names no problem"),
        (b"\xff\xfe", "wrong.txt cannot be read"),
    ],
)
def test_a_mistake_in_a_file_is_placed(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Selection(file=wrong_file(tmp_path, text)).problems(CPU)


def test_matching_keeps_the_records_of_the_problems_asked_for() -> None:
    class Known:
        def __init__(self, name: str) -> None:
            self.problem = Problem.parse(name)

    one, two = Known("b1s16h1d64c-float32"), Known("b1s32h1d64f-float32")
    assert Selection().matching([one, two]) == [one, two]
    assert Selection(causal=True).matching([one, two]) == [one]
    assert Selection(shape=["b1s32h1d64f-float32"]).matching([one, two]) == [two]
    local, capped = Known("b1s32h1d64cw5-float32"), Known("b1s32h1d64fcap5-float32")
    everything = [one, two, local, capped]
    assert Selection(window="5").matching(everything) == [local]
    assert Selection(window="inf").matching(everything) == [one, two, capped]
    assert Selection(softcap="5,6").matching(everything) == [capped]
    assert Selection(softcap="0", causal=True).matching(everything) == [one, local]
    layer, other = Known("b3s777h32/8d128c-float16"), Known("b3s777h32/4d128c-float16")
    assert Selection(preset=["llama3-8b"]).matching([one, layer, other]) == [layer]
    assert Selection(preset=["llama3-8b"], batch="4").matching([layer]) == []
    with pytest.raises(InvalidInput, match="--top 3 says nothing of records"):
        Selection(top=3).matching([one])


def test_an_op_makes_its_problems_of_whatever_is_named_and_chooses_among_records(
    tmp_path: Path,
) -> None:
    for selection in (
        Selection(shape=["b1s256h2d64c"], op="flex"),
        Selection(shape=["flex:b1s256h2d64c"]),
        Selection(
            batch="1", seqlen="256", heads="2", head_dim="64", causal=True, dtype="bfloat16",
            op="flex",
        ),
    ):  # fmt: skip
        assert names(selection) == ["flex:b1s256h2/2d64c-bfloat16"]
    assert {p.op for p in Selection(grid="fwd", op="flex").problems(SM80)} == {"flex"}
    assert {p.op for p in Selection(op="flex").problems(CPU)} == {"flex"}
    assert {p.op for p in Selection(preset=["llama3-8b"], op="flex").problems(SM80)} == {"flex"}
    listed = tmp_path / "problems.txt"
    listed.write_text("b1s256h2d64c 7\n")
    assert [p.op for p in Selection(file=listed, op="flex").problems(SM80)] == ["flex"]
    eight_bits = Selection(shape=["b1s64h2d64f"], dtype="float8_e4m3fn", op="fwd")
    assert [p.op for p in eight_bits.problems(SM80)] == ["fwd_fp8"]
    ours, theirs = (
        SimpleNamespace(problem=Problem.parse(f"{op}b4s4096h32/8d128c-bfloat16"))
        for op in ("", "flex:")
    )
    both = [ours, theirs]
    assert Selection().matching(both) == both
    assert Selection(op="flex").matching(both) == [theirs]
    assert Selection(op="fwd").matching(both) == [ours]
    assert Selection(grid="fwd").matching(both) == [ours]
    assert Selection(grid="fwd", op="flex").matching(both) == [theirs]
    assert Selection(preset=["llama3-8b"], op="flex").matching(both) == [theirs]
    with pytest.raises(UnknownName, match="unknown op 'flx'"):
        Selection(op="flx")
