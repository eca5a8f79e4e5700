from __future__ import annotations

import pytest

from autoflash import device
from autoflash.device import KNOWN_GPUS, Device
from autoflash.errors import InvalidInput, UnknownName


@pytest.mark.parametrize("arch", device.ARCHES)
def test_every_arch_has_a_device_without_the_hardware(arch: str) -> None:
    found = device.for_arch(arch)
    assert Device.from_dict(found.to_dict()) == found
    assert found.num_sms > 0
    if found.is_cuda:
        assert 0 < found.smem_bytes_per_block < found.smem_bytes_per_sm
        assert found.capability == int(found.arch[2:])


def test_an_unknown_arch_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"unknown arch 'sm81'.*sm80"):
        device.for_arch("sm81")


def test_parts_of_one_arch_never_share_a_key() -> None:
    h100 = KNOWN_GPUS["sm90"]
    h200 = Device.from_dict({**h100.to_dict(), "name": "NVIDIA H200"})
    h20 = Device.from_dict({**h100.to_dict(), "num_sms": 78})
    assert len({h100.key, h200.key, h20.key}) == 3
    assert h200.slug == "nvidia-h200"


def test_the_cpu_reports_its_cores_and_extensions() -> None:
    cpu = device.for_arch("cpu")
    assert cpu.arch == "cpu"
    assert cpu.capability == 0
    assert cpu == device.of_tensor("cpu", None)
    assert cpu.tflops_peak("float32") > 0
    assert cpu.tflops_peak("float8_e4m3fn") == 0


@pytest.mark.parametrize(
    ("arch", "rate"), [("sm80", 0), ("sm86", 0), ("sm89", 330), ("sm90", 1978), ("sm100", 4500)]
)
def test_8_bits_are_twice_as_fast_where_there_are_units_for_them(arch: str, rate: float) -> None:
    assert KNOWN_GPUS[arch].tflops_peak("float8_e4m3fn") == rate
    assert KNOWN_GPUS[arch].tflops_peak("bfloat16") == KNOWN_GPUS[arch].tflops_16bit


def test_a_tensor_elsewhere_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'meta'"):
        device.of_tensor("meta", None)
