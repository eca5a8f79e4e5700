"""Which devices `--devices` means, how a worker is made to see one, and who holds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoflash import device as devices
from autoflash import errors
from autoflash.device import KNOWN_GPUS, Device
from autoflash.tuning import boards
from autoflash.tuning.boards import Board, choose, held

H200 = dataclasses.replace(KNOWN_GPUS["sm90"], name="NVIDIA H200")
SLICE = dataclasses.replace(H200, name="NVIDIA H200 MIG 1g.18gb", num_sms=16)
A100 = KNOWN_GPUS["sm80"]
UUIDS = [f"{number}{number}aa0000-1111-2222-3333-444444444444" for number in range(4)]


def pretend(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Device], visible: str | None = None
) -> None:
    """A host with these GPUs."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    facts = [SimpleNamespace(uuid=uuid) for uuid in UUIDS]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts[index])
    monkeypatch.setattr(devices, "of_tensor", lambda kind, index: gpus[index])


def test_all_are_those_that_pytorch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [H200] * 3)
    found = choose("all")
    assert [board.index for board in found] == [0, 1, 2]
    assert [board.visible for board in found] == ["0", "1", "2"]
    assert [board.lock for board in found] == ["GPU-00aa0000", "GPU-11aa0000", "GPU-22aa0000"]
    assert {board.device for board in found} == {H200}


def test_numbers_count_within_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [H200] * 3, visible="7, 2,GPU-22aa0000")
    assert [board.visible for board in choose("2,0,2")] == ["GPU-22aa0000", "7"]
    assert choose("1")[0].uuid == UUIDS[1]


def test_uuids_and_their_beginnings_name_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [H200] * 3)
    assert [board.index for board in choose(f"GPU-{UUIDS[2]},GPU-00")] == [2, 0]
    with pytest.raises(errors.InvalidInput, match=r"could be any of 0: .*1: .*2: "):
        choose("GPU-")


def test_slices_of_a_gpu_are_held_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [SLICE, SLICE], visible="MIG-aaaa,MIG-bbbb")
    assert [board.lock for board in choose("all")] == ["MIG-aaaa", "MIG-bbbb"]
    assert choose("MIG-bbbb")[0].index == 1


@pytest.mark.parametrize("text", ["4", "-1", "0,9", "GPU-99", "gpu0", "all,7"])
def test_what_is_not_here_is_an_error_that_lists_what_is(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    pretend(monkeypatch, [H200] * 2, visible="3,1")
    with pytest.raises(errors.InvalidInput) as caught:
        choose(text)
    assert "0: NVIDIA H200 (GPU-00aa0000), 1: NVIDIA H200 (GPU-11aa0000)" in str(caught.value)
    assert "CUDA_VISIBLE_DEVICES=3,1" in str(caught.value)


def test_no_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [H200])
    with pytest.raises(errors.InvalidInput, match="names no device; here are 0: NVIDIA H200"):
        choose(" , ")


@pytest.mark.parametrize("other", [A100, SLICE])
def test_kinds_are_not_mixed(monkeypatch: pytest.MonkeyPatch, other: Device) -> None:
    pretend(monkeypatch, [H200, other, H200])
    with pytest.raises(errors.InvalidInput, match=r"2 kinds .*: 0,2; .*: 1\. .*--devices 0,2\."):
        choose("all")
    assert [board.index for board in choose("0,2")] == [0, 2]


def test_an_arch_narrows_what_all_means(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [A100, H200, H200])
    assert [board.index for board in choose("all", "sm90")] == [1, 2]
    with pytest.raises(errors.InvalidInput, match="there is no 0; here are 1: NVIDIA H200"):
        choose("0", "sm90")
    with pytest.raises(errors.InvalidInput, match="no sm100 is here"):
        choose("all", "sm100")


def test_a_cpu_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [])
    (cpu,) = choose("all")
    assert (cpu.device, cpu.visible, cpu.lock) == (devices.for_arch("cpu"), None, None)
    with pytest.raises(errors.InvalidInput, match="there is no 1; here are 0: "):
        choose("1")
    with pytest.raises(errors.InvalidInput, match="no sm90 is here"):
        choose("all", "sm90")


def test_a_run_that_names_none_holds_the_same_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [A100, H200])
    assert boards.of(A100) == choose("0")[0]
    assert boards.of(devices.for_arch("cpu")).visible is None


def test_holding_several_is_all_or_nothing(tmp_path: Path) -> None:
    some = [Board(index=i, device=H200, visible=str(i)) for i in range(3)]
    with held(some[1:], tmp_path, wait_s=0.1):
        with (
            pytest.raises(errors.CacheError, match=r"^device 1: NVIDIA H200 is being tuned"),
            held(some, tmp_path, wait_s=0.1),
        ):
            pass
        with held(some[:1], tmp_path, wait_s=0.1):  # was let go again
            assert len(list((tmp_path / "locks").glob("*.pid"))) == 3
    assert not list((tmp_path / "locks").glob("*.pid"))
