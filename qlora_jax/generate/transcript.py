"""Conversations on disk, in OpenAI's form: {"messages": [{"role", "content"}]} on one line. Training reads it too."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_jax.data.read import read_rows
from qlora_jax.errors import InputError
from qlora_jax.generate.prompting import system_turn
from qlora_jax.generate.requests import messages


def write_transcript(path: Path, system: str | None, turns: Sequence[Mapping[str, str]], replace: bool) -> None:
    """Whole or not at all. Raises InputError when there is nothing to write, the file exists and is not to be replaced,
    or it cannot be written."""
    if not turns:
        raise InputError("nothing was said yet, so there is nothing to save")
    if path.exists() and not replace:
        raise InputError(f"{path} exists already; choose another name")
    partial = path.with_name(f".{path.name}.partial")
    line = json.dumps({"messages": [*system_turn(system), *map(dict, turns)]}, ensure_ascii=False)
    try:
        partial.write_text(line + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def read_transcript(path: str) -> tuple[str | None, list[dict[str, str]]]:
    """System line (None without one) and turns of the one conversation in a file (.json or .jsonl).

    Raises:
      InputError: the file is missing or damaged, holds no or several conversations, or turns that do not alternate.
    """
    rows = read_rows(path)
    if len(rows) != 1:
        raise InputError(f"{path} holds {len(rows)} rows; expected one conversation")
    turns = [dict(turn) for turn in messages(rows[0])]
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    roles = [turn["role"] for turn in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise InputError(f"{path}: expected turns of user and assistant in turn, ended by the assistant's")
    return system, turns
