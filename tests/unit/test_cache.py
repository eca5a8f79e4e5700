from __future__ import annotations

import errno
import functools
import os
import shutil
import threading
from pathlib import Path

import pytest

from autoflash.build import cache
from autoflash.errors import CacheError


def test_content_is_made_once_and_found_again(cache_dir: Path) -> None:
    calls = []

    def fill(directory: Path) -> None:
        calls.append(directory)
        (directory / "kernel.so").write_text("binary")

    first = cache.find_or_make("ab12", fill)
    assert cache.find_or_make("ab12", fill) == first == cache_dir / "kernels/ab/ab12"
    assert (first / "kernel.so").read_text() == "binary"
    assert len(calls) == 1


def test_a_failed_build_leaves_nothing_behind(cache_dir: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("")
        raise RuntimeError("compiler said no")

    with pytest.raises(RuntimeError, match="compiler said no"):
        cache.find_or_make("cd34", fail)
    assert list((cache_dir / "kernels/cd").iterdir()) == []


def test_threads_that_want_one_digest_build_it_once(cache_dir: Path) -> None:
    calls: list[int] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        cache.find_or_make("ef56", lambda directory: calls.append(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


def test_deleting_the_cache_is_safe(cache_dir: Path) -> None:
    made = cache.find_or_make("0011", lambda directory: (directory / "x").touch())
    shutil.rmtree(cache_dir)
    assert cache.find_or_make("0011", lambda directory: (directory / "x").touch()) == made
    assert (made / "x").exists()


def test_a_full_disk_names_the_place_and_the_variable(cache_dir: Path) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CacheError, match=f"no space left below {cache_dir}.*AUTOFLASH_CACHE_DIR"):
        cache.find_or_make("2233", full)


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests may run as root, whom permissions do not stop: a file where the folder should be does.
    cache_dir.write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="cannot write to the cache directory"):
        made = cache.find_or_make("4455", lambda directory: (directory / "x").touch())
    assert (made / "x").exists()
    assert cache_dir not in made.parents


def test_a_lock_held_too_long_names_the_file(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.1)
    (cache_dir / "locks").mkdir(parents=True)
    with (
        FileLock(cache_dir / "locks/6677.lock"),
        pytest.raises(CacheError, match=r"6677.lock was held for more than"),
    ):
        cache.find_or_make("6677", lambda directory: None)


def test_what_was_made_last_for_a_request_is_found(cache_dir: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "x").touch()

    assert cache.find_built("r1") is None
    cache.find_or_make("aa", fill, request="r1")
    newer = cache.find_or_make("bb", fill, request="r1")
    assert cache.find_built("r1") == newer
    assert cache.find_built("r2") is None
    shutil.rmtree(newer)
    assert cache.find_built("r1") is None


def test_a_failed_build_keeps_the_note_of_the_last_good_one(cache_dir: Path) -> None:
    good = cache.find_or_make("aa", lambda directory: (directory / "x").touch(), request="r1")

    def fail(directory: Path) -> None:
        raise RuntimeError("compiler said no")

    with pytest.raises(RuntimeError, match="compiler said no"):
        cache.find_or_make("bb", fail, request="r1")
    assert cache.find_built("r1") == good


def test_what_a_read_only_cache_holds_is_used(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cache.find_or_make("aa", lambda directory: (directory / "x").touch(), request="r1")

    def no(directory: Path) -> bool:
        raise AssertionError("nothing need be written")

    monkeypatch.setattr(cache, "_writable", functools.cache(no))
    assert cache.find_or_make("aa", lambda directory: None, request="r1") == made
    assert cache.find_built("r1") == made
