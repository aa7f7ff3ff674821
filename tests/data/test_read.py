"""Local data files: every kind gives the same rows; every kind of damage is one clear line."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.read import _csv_rows, read_rows
from qlora_jax.errors import InputError

ROWS = [
    {"instruction": "Grüße", "input": "a, b", "output": 'say "hi"\nand go'},
    {"instruction": "猫", "input": "", "output": "🦙"},
]


def write(path, rows=ROWS):
    """The rows as the file's name says."""
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind in ("csv", "tsv"):
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "json":
            json.dump(rows, file, indent=1)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.csv.gz", "A.JSONL"]
)
def test_every_kind_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name) if name != "A.JSONL" else write(tmp_path / "a.jsonl").rename(tmp_path / name)
    rows = read_rows(str(path))
    assert [row.fields for row in rows] == ROWS
    assert {row.file for row in rows} == {str(path)}


def test_places(tmp_path):
    assert [row.number for row in read_rows(str(write(tmp_path / "a.csv")))] == [2, 4]  # a quoted line break between
    assert read_rows(str(write(tmp_path / "a.parquet")))[1].where == f"{tmp_path / 'a.parquet'}, row 2"


def test_letters_that_other_readers_stumble_over(tmp_path):
    """U+0000 is a letter, and a byte order mark is none, whatever the kind of file."""
    rows = [{"input": "a\0b", "output": "two\r\nlines\u2028three"}]
    for name in ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet"):
        path = write(tmp_path / name, rows)
        if name != "a.parquet":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert [row.fields for row in read_rows(str(path))] == rows, name


def test_byte_order_mark_and_unpacked_gz(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert [row.fields for row in read_rows(str(path))] == ROWS
    path.rename(tmp_path / "a.json.gz")
    assert [row.fields for row in read_rows(str(tmp_path / "a.json.gz"))] == ROWS


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_csv_gives_back_what_was_written(cells):
    import io

    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerows([("x", "y"), *cells])
    rows = list(_csv_rows("f", io.StringIO(buffer.getvalue(), newline=""), ","))
    assert [(row.fields["x"], row.fields["y"]) for row in rows] == cells


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.jsonl", b" \n\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"x,y\n", "has no rows"),
        ("a.txt", b"words", "unknown kind of file, expected one of .json, .jsonl"),
        ("a.parquet.gz", b"PAR1", "unknown kind of file"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8 (byte 0xff)"),
        ("a.jsonl", '{"a": "é"}'.encode("utf-16"), "line 1: not UTF-8 (byte 0xff); convert the file to UTF-8"),
        ("a.json", '[{"a": "é"}]'.encode("latin-1"), "line 1: not UTF-8 (byte 0xe9)"),
        ("a.json.gz", b"", "is empty (0 bytes)"),
        ("a.tsv.gz", gzip.compress(b"", mtime=0), "has no rows"),
        ("a.json", b'[{"a": 1},\n{"a": ', "line 2: not valid JSON"),
        ("a.csv", b"x,y\n1,2\n1\n1,2,3\n", "line 3: 1 fields, expected 2 as in the header (and 1 more bad row"),
        ("a.csv", b'x,y\n1,2\n1,"2\n', "line 3: unexpected end of data"),
        ("a.csv", b"x,x\n1,2\n", "line 1: expected a header of distinct field names"),
        ("a.parquet", b"PAR1 but no more", "not a readable Parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-12], "damaged or cut off gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:10] + b"\xff" * 20, "damaged or cut off gzip"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_rows(str(tmp_path / name))
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_suggest_what_is_there(tmp_path):
    write(tmp_path / "alpaca_small.json")
    with pytest.raises(InputError, match=r"no such file; did you mean .*alpaca_small\.json"):
        read_rows(str(tmp_path / "alpaca_smal.json"))
    with pytest.raises(InputError, match=r"no such file; data files in .*: alpaca_small\.json"):
        read_rows(str(tmp_path / "something"))
    with pytest.raises(InputError, match="there is no folder"):
        read_rows(str(tmp_path / "no" / "such.json"))
    with pytest.raises(InputError, match=r"is a folder, expected a file; data files in .*alpaca_small\.json"):
        read_rows(str(tmp_path))
    with pytest.raises(InputError, match="set data.path"):
        read_rows("")


def test_a_missing_file_in_a_folder_is_not_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl")
    with pytest.raises(InputError, match=r"no such file; did you mean data/train\.jsonl"):
        read_rows("data/trian.jsonl")


def test_real_files(shared_data):
    alpaca = read_rows(str(shared_data / "alpaca" / "alpaca_small.json"))
    assert len(alpaca) == 2000 and alpaca[0].number == 2 and alpaca[1].number == 7
    assert [row.fields for row in alpaca] == json.loads(
        (shared_data / "alpaca" / "alpaca_small.json").read_text(encoding="utf-8")
    )
    assert len(read_rows(str(shared_data / "oasst1" / "en_100_tree.jsonl"))) == 100
    assert len(read_rows(str(shared_data / "hh_rlhf" / "harmless-base" / "test.jsonl.gz"))) == 2312
    assert len(read_rows(str(shared_data / "mmlu" / "zero_shot_mmlu_val.json"))) == 1531  # one object a line
    assert len(read_rows(str(shared_data / "oa_bench" / "pairwise_gpt4.csv"))) > 40_000


def test_a_set_of_the_package_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = read_rows("quickstart")
    assert len(rows) == 1500 and {"instruction", "output"} <= set(rows[0].fields)
