"""A device that pretends, in a real process: `python fake_device.py compile|device BYTES`.

It times configs of triton/plane by the numbers x and y in their source, and misbehaves as
FAKE_FAULTS says, a JSON object from "x,y", "finals-x,y" or "hello" to a fault, or to
[fault, first, end]: which times. FAKE_STATE is a directory in which it notes what has happened,
since it is killed again and again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
import time
from pathlib import Path

from autoflash.tuning import guard, wire

REPLIES = os.dup(1)
FAULTS = json.loads(os.environ.get("FAKE_FAULTS", "{}"))
STATE = Path(os.environ["FAKE_STATE"])


def bowl(x: int, y: int) -> float:
    """Fastest at x=2, y=1."""
    return 100.0 + 10 * (x - 2) ** 2 + 10 * (y - 1) ** 2


def measurement(time_us: float) -> dict:
    return {"latency_us": time_us, "p20_us": time_us, "p80_us": time_us, "count": 5}


def at(source: dict) -> tuple[int, int]:
    found = re.search(r"x=(\d+) y=(\d+)", source["text"])
    return int(found[1]), int(found[2])


def note(name: str) -> int:
    """How often this has been noted before."""
    with (STATE / name.replace(",", "-")).open("a+b") as file:
        file.write(b".")
        file.flush()
        return file.tell() - 1


def fault_of(key: str) -> str | None:
    """What to do wrong this time."""
    wanted = FAULTS.get(key)
    if isinstance(wanted, list):
        fault, first, end = wanted
        return fault if first <= note(f"{key}-{fault}") < end else None
    return wanted


def answer(request: dict) -> dict:
    kind = request["kind"]
    if kind == "hello":
        fault = fault_of("hello")
        if fault == "silent":
            time.sleep(300)
        if fault == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        return {"outcome": "ok", "environment": {"torch": "pretended"}}
    if kind == "compile":
        return {"outcome": "ok", "resources": {"compile_s": 0.01, "binary_bytes": 10}}
    if kind == "evaluate":
        x, y = at(request["source"])
        note(f"evaluated-{x},{y}")
        reply = {"outcome": "ok", "measurement": measurement(bowl(x, y)), "error_ratio": 0.5}
        return misbehave(fault_of(f"{x},{y}"), reply, request["id"])
    times = {name: bowl(*at(source)) for name, source in request["sources"].items()}
    for source in request["sources"].values():
        if fault_of("finals-{},{}".format(*at(source))) == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
    times["cudnn"] = 150.0
    return {
        "outcome": "ok",
        "measurements": {name: measurement(time_us) for name, time_us in times.items()},
        "rounds": {name: [time_us] * request["rounds"] for name, time_us in times.items()},
        "provider": "cudnn",
    }


def misbehave(fault: str | None, reply: dict, number: int) -> dict:
    good = wire.pack({**reply, "id": number})
    times = {"nan": float("nan"), "infinite": float("inf"), "zero": 0.0, "negative": -5.0,
             "text": "fast"}  # fmt: skip
    if fault in times:
        return {**reply, "measurement": measurement(times[fault])}
    if fault == "no_calls":
        return {**reply, "measurement": {**reply["measurement"], "count": 0}}
    if fault == "odd_percentiles":
        return {**reply, "measurement": {**reply["measurement"], "p20_us": 1e9}}
    if fault == "no_time":
        return {"outcome": "ok"}
    if fault == "odd_outcome":
        return {**reply, "outcome": "splendid"}
    if fault == "odd_error":
        return {**reply, "raise": "KeyboardInterrupt"}
    if fault == "odd_ratio":
        return {**reply, "error_ratio": float("nan")}
    raw = {
        "garbage": b"no message at all, but more than the header of one",
        "list": struct.pack(">I", 3) + b"[1]",
        "deep": struct.pack(">I", 200_000) + b"[" * 200_000,
        "huge": struct.pack(">I", 1 << 31),
        "half_and_dead": good[: len(good) // 2],
        "half_and_hang": good[: len(good) // 2],
        "twice": good + good,
        "late": good,
        "other": wire.pack({**reply, "id": number - 1}),
    }.get(fault or "")
    if raw is not None:
        os.write(REPLIES, raw)
    if fault in ("segfault", "half_and_dead"):
        os.kill(os.getpid(), signal.SIGKILL if raw else signal.SIGSEGV)
    if fault == "flood":
        while True:
            os.write(REPLIES, b"\0" * 65536)
    if fault == "late":  # and once more when the answer has been taken
        time.sleep(0.05)
        os.write(REPLIES, good)
    elif raw is not None or fault == "silent":
        time.sleep(300)
    return {} if fault == "late" else reply


def main(role: str) -> None:
    guard.enter(role)
    requests = os.fdopen(os.dup(0), "rb")
    while (request := wire.read(requests)) is not None:
        reply = answer(request)
        if reply:
            os.write(REPLIES, wire.pack({**reply, "id": request["id"]}))


if __name__ == "__main__":
    main(sys.argv[1])
