"""`autoflash db`: the tuning database as text, and upkeep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoflash.cli.options import AnyDeviceOption, DatabaseOption, JsonOption, device_key, use
from autoflash.cli.output import say, write_json

app = typer.Typer(no_args_is_help=True, help="Move, join and tidy tuning records.")

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines, one record each.")]
TrialsOption = Annotated[bool, typer.Option("--trials", help="All trials, not the best records.")]


@app.command()
def dump(
    file: FileArgument,
    device: AnyDeviceOption = None,
    trials: TrialsOption = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the best records to a text file, one per line, sorted: for review and for `load`."""
    from autoflash.database import Database

    use(database=database)
    with Database.open() as db:
        count = db.dump(file, device_key=device_key(device, db), trials=trials)
    _answer("dumped", count, f"{count} records written to {file}", as_json)


@app.command()
def load(
    file: FileArgument,
    trials: TrialsOption = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add the records of a text file; a better one that is there already stays."""
    from autoflash.database import Database

    use(database=database)
    with Database.open() as db:
        count = db.load(file, trials=trials)
    _answer("loaded", count, f"{count} records loaded from {file}", as_json)


@app.command()
def merge(
    url: Annotated[str, typer.Argument(metavar="URL", help="SQLAlchemy URL, or an SQLite file.")],
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add what another database knows, trials and best records."""
    from autoflash.database import Database

    use(database=database)
    with Database.open() as db:
        count = db.merge(url)
    _answer("merged", count, f"{count} records merged from {url}", as_json)


@app.command()
def prune(database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Delete what no installed template can use: records of other template digests."""
    from autoflash.codegen import catalog
    from autoflash.database import Database

    use(database=database)
    digests = {name: t.digest for name, t in catalog.installed().templates.items()}
    with Database.open() as db:
        count = db.prune(digests)
    _answer("pruned", count, f"{count} records deleted", as_json)


def _answer(name: str, count: int, text: str, as_json: bool) -> None:
    write_json({name: count}) if as_json else say(text)
