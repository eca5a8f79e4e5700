"""Boards: which devices of this host may a run use, and how is a worker made to see one of them?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from autoflash import device as devices
from autoflash.device import Device
from autoflash.errors import CacheError, InvalidInput
from autoflash.tuning.lock import WAIT_S, device_lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One device of this host.

    Attributes:
        index: its number as PyTorch counts, so within CUDA_VISIBLE_DEVICES; 0 is the CPU's.
        device: what it is.
        visible: CUDA_VISIBLE_DEVICES of a process that is to see it alone; None for a CPU.
        uuid: of the board, where the driver tells.
    """

    index: int
    device: Device
    visible: str | None = None
    uuid: str = ""

    @property
    def label(self) -> str:
        """How events and messages name it among others of its kind."""
        return str(self.index)

    @property
    def lock(self) -> str | None:
        """What two runs must not share, however either of them calls it."""
        # A slice of a GPU has a UUID of its own, which PyTorch does not always report.
        if self.visible and self.visible.startswith("MIG-"):
            return self.visible
        return short(self.uuid) or self.visible

    def __str__(self) -> str:
        """Number, name and UUID, as lists of what there is show it."""
        return f"{self.index}: {self.device.name}" + (f" ({short(self.uuid)})" if self.uuid else "")


def short(uuid: str) -> str:
    """The beginning of a GPU's UUID: enough to tell boards apart, and CUDA and `choose` take it."""
    return f"GPU-{uuid.removeprefix('GPU-')[:8]}" if uuid else ""


def here(arch: str = "native") -> list[Board]:
    """Every device of this host that `--arch` means: GPUs in PyTorch's order, or else the CPU."""
    import torch

    if arch == "cpu" or not torch.cuda.is_available():
        cpu = devices.for_arch("cpu")
        return [Board(index=0, device=cpu)] if arch in ("cpu", "native") else []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        board = Board(
            index=index,
            device=devices.of_tensor("cuda", index),
            visible=named[index] if index < len(named) and named[index] else str(index),
            uuid=str(getattr(properties, "uuid", "")),
        )
        if arch in ("native", board.device.arch):
            found.append(board)
    return found


def of(device: Device) -> Board:
    """The one that a run uses which names none."""
    if device.is_cuda:
        for board in here():
            if board.device.key == device.key:
                return board
    return Board(index=0, device=device)


def choose(text: str, arch: str = "native") -> list[Board]:
    """The devices that `--devices` means, all of one kind.

    Args:
        text: "all", or numbers and UUIDs (or their beginnings) with commas between them.
        arch: what `--arch` says.

    Raises:
        InvalidInput: one is not here, none is named, or they are of several kinds.
    """
    known = here(arch)
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if words == ["all"]:
        chosen = known
    else:
        chosen = list(dict.fromkeys(_named(word, known, arch) for word in words))
    if not chosen:
        raise InvalidInput(f"--devices {text!r} names no device; {_listed(known, arch)}")
    _one_kind(text, chosen)
    return chosen


@contextmanager
def held(boards: Sequence[Board], root: Path, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold all of these devices for this process, as `device_lock` does one.

    Args:
        boards: to be held.
        root: the cache directory.
        wait_s: how long to wait for other processes, for all of them together.

    Raises:
        CacheError: another process holds one; the message says which.
    """
    limit = time.monotonic() + wait_s
    with ExitStack() as stack:
        # In an order that every run has: or two of them could each wait for the other's.
        for board in sorted(boards, key=lambda board: board.lock or ""):
            left_s = max(0.0, limit - time.monotonic())
            try:
                stack.enter_context(device_lock(board.device, board.lock, root, wait_s=left_s))
            except CacheError as error:
                if len(boards) == 1:
                    raise
                raise CacheError(f"device {board.label}: {error}") from None
        yield


def _named(word: str, known: Sequence[Board], arch: str) -> Board:
    found = [
        board
        for board in known
        if (word.isdecimal() and int(word) == board.index)
        or (word.startswith("GPU-") and board.uuid and f"GPU-{board.uuid}".startswith(word))
        or (word.startswith("MIG-") and board.visible == word)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        what = f"could be any of {', '.join(map(str, found))}; give more of its UUID."
        raise InvalidInput(f"--devices: {word} {what}")
    raise InvalidInput(f"--devices: there is no {word}; {_listed(known, arch)}")


def _listed(known: Sequence[Board], arch: str) -> str:
    """What there is, for an error."""
    if not known:
        return (
            f"no {arch} is here. Without --devices it is planned and compiled for, and its times "
            "are predicted."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    among = f" (CUDA_VISIBLE_DEVICES={visible})" if visible and known[0].device.is_cuda else ""
    return f"here are {', '.join(map(str, known))}{among}. Give numbers, UUIDs, or all."


def _one_kind(text: str, chosen: Sequence[Board]) -> None:
    kinds: dict[str, list[Board]] = {}
    for board in chosen:
        kinds.setdefault(board.device.key, []).append(board)
    if len(kinds) == 1:
        return
    listed = "; ".join(
        f"{boards[0].device.name} ({boards[0].device.arch}, {boards[0].device.num_sms} SMs): "
        + ",".join(board.label for board in boards)
        for boards in kinds.values()
    )
    first = ",".join(board.label for board in next(iter(kinds.values())))
    raise InvalidInput(
        f"--devices {text}: these are {len(kinds)} kinds of device, and what is fast on one says "
        f"little about another: {listed}. Tune one kind at a time, such as --devices {first}."
    )
