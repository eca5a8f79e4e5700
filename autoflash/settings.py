"""Every AUTOFLASH_* variable, read once; arguments of functions and commands beat them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from autoflash.errors import InvalidInput

PACKAGE_DIR = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for.

    Attributes:
        cache_dir: built kernels and the default database (AUTOFLASH_CACHE_DIR; default: the
            user's cache directory as the operating system defines it).
        database_url: SQLAlchemy URL (AUTOFLASH_DATABASE; default: SQLite in `cache_dir`).
        templates_dir: the template files (AUTOFLASH_TEMPLATES; default: those of the package).
        tuning_db_dir: reviewed records (AUTOFLASH_TUNING_DB; default: those of the package).
        jobs: compile processes at once (AUTOFLASH_JOBS; default: the cores this process may use).
        cxx: the C++ compiler (AUTOFLASH_CXX; default: g++).
        nvcc: the CUDA compiler (AUTOFLASH_NVCC; default, as "": searched for, see build/nvcc.py).
        cutlass: a CUTLASS checkout (AUTOFLASH_CUTLASS; default, as "": the nvidia-cutlass package,
            else CUTLASS_PATH).
        record_file: where attention() notes the problems it serves (AUTOFLASH_RECORD; default, as
            None: nowhere).
    """

    cache_dir: Path
    database_url: str
    templates_dir: Path
    tuning_db_dir: Path
    jobs: int
    cxx: str
    nvcc: str = ""
    cutlass: str = ""
    record_file: Path | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the variables; a wrong value is an InvalidInput naming the variable."""
        env = os.environ if environ is None else environ
        cache_dir = Path(env.get("AUTOFLASH_CACHE_DIR") or _default_cache_dir()).expanduser()
        record = env.get("AUTOFLASH_RECORD")
        return cls(
            cache_dir=cache_dir.absolute(),
            database_url=env.get("AUTOFLASH_DATABASE")
            or f"sqlite:///{cache_dir.absolute()}/autoflash.db",
            templates_dir=Path(env.get("AUTOFLASH_TEMPLATES") or _data_dir("templates")),
            tuning_db_dir=Path(env.get("AUTOFLASH_TUNING_DB") or _data_dir("tuning_db")),
            jobs=_positive_int(env, "AUTOFLASH_JOBS", len(os.sched_getaffinity(0))),
            cxx=env.get("AUTOFLASH_CXX") or "g++",
            nvcc=env.get("AUTOFLASH_NVCC") or "",
            cutlass=env.get("AUTOFLASH_CUTLASS") or "",
            record_file=Path(record).expanduser().absolute() if record else None,
        )


@cache
def get() -> Settings:
    """The settings of this process, read from the environment on the first call."""
    return Settings.from_environment()


def _default_cache_dir() -> str:
    from platformdirs import user_cache_dir

    return user_cache_dir("autoflash", appauthor=False)


def _data_dir(name: str) -> Path:
    """A data folder: inside the package (wheel), else beside it (checkout, editable install).

    In that order: site-packages may hold somebody else's `templates`.
    """
    inside = PACKAGE_DIR / name
    return inside if inside.is_dir() else PACKAGE_DIR.parent / name


def _positive_int(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise InvalidInput(
            f"{name}={text!r} is not a whole number from 1 up; unset it for {default}."
        )
    return int(text)
