from __future__ import annotations

from pathlib import Path

import pytest

from autoflash.errors import InvalidInput
from autoflash.settings import Settings


def test_defaults_find_the_data_folders() -> None:
    settings = Settings.from_environment({})
    assert (settings.templates_dir / "cpp").is_dir()
    assert settings.tuning_db_dir.is_dir()
    assert settings.database_url == f"sqlite:///{settings.cache_dir}/autoflash.db"


def test_every_variable_moves_what_it_names(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "AUTOFLASH_CACHE_DIR": str(tmp_path),
            "AUTOFLASH_DATABASE": "postgresql://host/db",
            "AUTOFLASH_TEMPLATES": str(tmp_path / "t"),
            "AUTOFLASH_TUNING_DB": str(tmp_path / "d"),
            "AUTOFLASH_JOBS": "3",
            "AUTOFLASH_CXX": "clang++",
            "AUTOFLASH_RECORD": str(tmp_path / "ran.txt"),
        }
    )
    assert settings == Settings(
        cache_dir=tmp_path,
        database_url="postgresql://host/db",
        templates_dir=tmp_path / "t",
        tuning_db_dir=tmp_path / "d",
        jobs=3,
        cxx="clang++",
        record_file=tmp_path / "ran.txt",
    )


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_a_wrong_number_names_the_variable(text: str) -> None:
    with pytest.raises(InvalidInput, match="AUTOFLASH_JOBS="):
        Settings.from_environment({"AUTOFLASH_JOBS": text})
