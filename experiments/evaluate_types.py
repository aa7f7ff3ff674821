"""Measures models in several data types, without finetuning: the paper's Table 2 and Figure 3.

    python -m experiments.evaluate_types --tables=configs/sweeps/paper_types.py --dry_run

Each cell of a table is one run of experiments.evaluate in a process of its own. The workdir gets its JSON and, at the
end, tables.json; run again, what is missing is run. --dry_run lists models, types and how much memory each takes; it
needs neither weights nor a GPU. A table of perplexities wants --text=FILE or --tokens=FILE.npy.

Exit statuses beside those of all commands: 3 if evaluations failed.
"""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments.support import cli

if TYPE_CHECKING:
    from qlora_jax.evaluate.by_type import Cell, Table

TABLES = flags.DEFINE_string("tables", None, "file with tables(), as configs/sweeps/paper_types.py", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the results")
TEXT = flags.DEFINE_string("text", None, "text file (UTF-8) for tables of perplexities")
TOKENS = flags.DEFINE_string("tokens", None, ".npy file of token ids, in place of --text")
ONLY = flags.DEFINE_string("only", "", "only tables with this in their names")
ALSO = flags.DEFINE_string("also", "", 'more flags for evaluate, as "--batch_size=4 --limit=100"')
DRY_RUN = flags.DEFINE_bool("dry_run", False, "list what would be run; run nothing")


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.by_type import Table
    from qlora_jax.evaluate.tables import as_text

    tables = cli.call(TABLES.value, "tables")
    if not isinstance(tables, tuple) or not tables or not all(isinstance(table, Table) for table in tables):
        raise InputError(f"{TABLES.value}: tables() returns {tables!r}; expected a tuple of evaluate.by_type.Table")
    chosen = [table for table in tables if ONLY.value in table.name]
    if not chosen:
        raise InputError(f"--only={ONLY.value}: no such table; there are {'; '.join(table.name for table in tables)}")
    if DRY_RUN.value:
        for table in chosen:
            print(f"\n{table.name}: {len(table.models)} models * {len(table.quants)} types = {len(_cells(table))}")
            print(f"evaluate {' '.join(table.flags)}")
            print(as_text(("GB of weights", *table.quants), [[m, *_sizes(m, table.quants)] for m in table.models]))
        print(f"\nevaluations: {sum(len(_cells(table)) for table in chosen)}")
        return 0
    if WORKDIR.value is None:
        raise InputError("missing flag --workdir=...; without it there is --dry_run")
    for table in chosen:
        if table.task == "perplexity" and (TEXT.value is None) == (TOKENS.value is None):
            raise InputError(f"{table.name} measures perplexity: give one of --text=FILE and --tokens=FILE.npy")
    return _run(chosen, Path(WORKDIR.value).expanduser())


def _cells(table: "Table") -> "list[Cell]":
    from qlora_jax import checksums
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.by_type import cells

    more, contents = shlex.split(ALSO.value), {}
    for name, value in (("text", TEXT.value), ("tokens", TOKENS.value)):
        if value is not None and table.task == "perplexity":
            if not Path(value).is_file():
                raise InputError(f"--{name}={value}: no such file")
            more.append(f"--{name}={value}")
            contents[name] = checksums.of_file(Path(value))
    return cells(table, more, contents)


def _sizes(model: str, quants: tuple[str, ...]) -> list[str]:
    """GB that the model takes in each type; "?" where neither a folder nor the table of sizes knows it."""
    from qlora_jax.embedded import located
    from qlora_jax.io.load import load_config
    from qlora_jax.io.peaks import model_bytes
    from qlora_jax.io.write import quant_spec
    from qlora_jax.models.known import known_config

    folder = located(model)
    config = load_config(folder) if folder.is_dir() else known_config(model)
    if config is None:
        return ["?"] * len(quants)
    return [f"{model_bytes(config, quant_spec(quant)) / 1e9:.3f}" for quant in quants]


def evaluate(arguments: "list[str]") -> int:
    """Exit status of experiments.evaluate, in a process that gives all its memory back."""
    command = [sys.executable, "-m", "experiments.evaluate", *arguments]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode


def _run(tables: "list[Table]", workdir: Path) -> int:
    from qlora_jax.evaluate.by_type import score, summary
    from qlora_jax.evaluate.tables import as_text
    from qlora_jax.files import write_json

    workdir.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    report = {}
    for table in tables:
        found = {}
        for cell in _cells(table):
            if cell.result(workdir) is None:
                print(f"evaluate: {cell.model}, {cell.quant} ({table.name})", file=sys.stderr)
                command = [*cell.arguments, f"--out={workdir / cell.file}"]
                status = evaluate(command)
                if status == 130:
                    raise KeyboardInterrupt
                if status:
                    failed.append(f"{cell.model}, {cell.quant}: evaluate ended with status {status}")
                    continue
            result = cell.result(workdir)
            if result is not None:
                found[cell.model, cell.quant] = score(table.task, result)
        print(f"\n{table.name}\n{as_text(*summary(table, found))}")
        report[table.name] = [
            {"model": model, "quant": quant, "score": value} for (model, quant), value in found.items()
        ]
    write_json(workdir / "tables.json", report)
    print(f"\nwritten: {workdir / 'tables.json'}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    cli.run(main)
