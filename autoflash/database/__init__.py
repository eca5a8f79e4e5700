"""What was learned, kept: every trial, the winners, and the reviewed records of tuning_db/."""

from __future__ import annotations

from autoflash.database.database import Database

__all__ = ["Database"]
