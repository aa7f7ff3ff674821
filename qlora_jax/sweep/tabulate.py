"""A ledger as tables, in Parquet and CSV: points.*, metrics.*, attempts.*."""

import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import csv, parquet

from qlora_jax.errors import InputError
from qlora_jax.settings import flatten
from qlora_jax.sweep.ledger import reading


def export(ledger: Path, folder: Path) -> list[Path]:
    """Writes the three tables in both forms; the files.

    A point's row has hash, status, error, groups (joined by "; "), in_grid, every key of its config, and
    `result.NAME` for every value of its result.
    Raises InputError when there is no ledger, or the folder cannot be written.
    """
    tables = {}
    with reading(ledger) as db:
        found = db.execute('SELECT hash, status, error, "groups", in_grid, pack, config, result FROM points '
                           "ORDER BY in_grid DESC, position, hash")  # fmt: skip
        tables["points"] = _table([_point(*row) for row in found])
        for name, columns in (
            ("metrics", "hash, step, name, value"),
            ("attempts", "id, pack, hash, node, started, ended, status, error"),
        ):
            order = "hash, step, name" if name == "metrics" else "id"
            rows = db.execute(f"SELECT {columns} FROM {name} ORDER BY {order}").fetchall()
            names = columns.split(", ")
            tables[name] = pyarrow.table({column: [row[at] for row in rows] for at, column in enumerate(names)})
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            parquet.write_table(table, folder / f"{name}.parquet")
            csv.write_csv(table, folder / f"{name}.csv")
            written += [folder / f"{name}.parquet", folder / f"{name}.csv"]
    except OSError as error:
        raise InputError(f"--export={folder} cannot be written: {error.strerror or error}") from error
    return written


def _point(
    digest: str, status: str, error: str | None, groups: str, in_grid: int, pack: str | None, config: str,
    result: str | None,
) -> dict[str, Any]:  # fmt: skip
    row = {
        "hash": digest,
        "status": status,
        "error": error,
        "groups": "; ".join(json.loads(groups)),
        "in_grid": bool(in_grid),
        "pack": pack,
    }
    row |= flatten(json.loads(config))
    return row | {f"result.{key}": value for key, value in json.loads(result or "{}").items()}


def _table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    """A column for every key of any row; values that are no scalars, and columns of mixed types, as JSON text."""
    columns: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds <= {int, float}:
            values = [None if value is None else float(value) for value in values] if float in kinds else values
        elif len(kinds) > 1 or kinds & {list, dict}:
            values = [None if value is None else json.dumps(value) for value in values]
        columns[key] = values
    return pyarrow.table(columns)
