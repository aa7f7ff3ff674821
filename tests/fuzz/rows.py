"""Readers of data sets' rows: see readers.py."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from tests.data.super_natural_folder import a_task


def rows(file: str) -> Callable[[Path], Callable[[bytes], Any]]:
    def make(folder: Path) -> Callable[[bytes], Any]:
        from qlora_jax.data.detect import format_of_rows
        from qlora_jax.data.formats import FORMATS, stream_chats, stream_texts
        from qlora_jax.data.read import stream_rows

        def read(data: bytes) -> None:
            held = list(stream_rows(folder / file, file))
            found = format_of_rows(held)
            assert found in FORMATS
            list(stream_texts(held, found))
            list(stream_chats(held, found))

        return read

    return make


_ROWS: list[dict[str, Any]] = [
    {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "system": "be"},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    {"text": "### Human: hi### Assistant: ho"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"message_id": "1", "parent_id": None, "message_tree_id": "1", "text": "q", "role": "prompter", "lang": "en"},
]  # fmt: skip


def row_lines() -> list[bytes]:
    return [b"\n".join(json.dumps(row).encode() for _ in range(3)) for row in _ROWS]


def row_lists() -> list[bytes]:
    return [json.dumps([row, row]).encode() for row in _ROWS] + [json.dumps({"data": _ROWS[:1], "version": 1}).encode()]


def tables() -> list[bytes]:
    return [
        b'instruction,input,output\nAdd,"1, 2",3\n"a\nb",,c\n',
        b"text\nhello\n",
        b"prompt,chosen,rejected\na,b,c\n",
    ]


def parquets() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    found = []
    for row in _ROWS[:3]:
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), file, compression="snappy")
        found.append(file.getvalue())
    return found


def glue(folder: Path) -> Callable[[bytes], Any]:
    from qlora_jax.data.glue.rows import read_rows
    from qlora_jax.data.glue.tasks import TASKS

    def read(data: bytes) -> None:
        name = "train.tsv" if b"\t" in data else "train.jsonl"
        torn: list[str] = []
        for task in (TASKS["cola"], TASKS["mrpc"], TASKS["stsb"]):
            try:
                list(read_rows(task, [(name, folder / "rows")], torn))
            except InputError as error:
                last = error
            else:
                return
        raise last

    return read


def glue_rows() -> list[bytes]:
    rows = [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "a", "sentence2": "b", "score": 2.5}]
    return [
        b"gj04\t1\t\tA sentence.\ngj04\t0\t*\tSentence a.\n",
        *(b"\n".join([json.dumps(row).encode()] * 3) for row in rows),
    ]


def task(folder: Path) -> Callable[[bytes], Any]:
    from qlora_jax.data.formats import stream_texts
    from qlora_jax.data.read import stream_rows

    def read(data: bytes) -> None:
        list(stream_texts(stream_rows(folder / "task1.json", "task1.json"), "super-natural-instructions"))

    return read


def tasks() -> list[bytes]:
    return [json.dumps(a_task(2, 2)).encode(), b'{"definition": "d", "inputs": "i", "targets": "t"}']
