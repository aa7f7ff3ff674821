"""A record goes on after any cut, and takes nothing that other settings made."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.evaluate.answer_record import AnswerRecord

SETTINGS = {"model": "m", "shots": 5}
ROWS = [{"question": 0, "logits": [0.1, 2.0]}, {"question": 1, "logits": [0.3, 4.0]}]


def write(path):
    record = AnswerRecord(path, SETTINGS)
    assert record.lines == []
    record.add(ROWS[:1])
    record.add(ROWS[1:])
    record.close()
    return path.read_bytes()


@given(st.integers(0, 200))
def test_cut_anywhere_it_goes_on(tmp_path_factory, place):
    path = tmp_path_factory.mktemp("record") / "sub" / "answers.jsonl"
    whole = write(path)
    place = min(place, len(whole))
    path.write_bytes(whole[:place])
    record = AnswerRecord(path, SETTINGS)
    assert record.lines == ROWS[: max(whole[:place].count(b"\n") - 1, 0)]
    record.add(ROWS[len(record.lines) :])
    record.close()
    assert path.read_bytes() == whole


def test_other_settings_and_other_files_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = write(path)
    with pytest.raises(InputError, match=r"made with other settings \(shots: 5 there, 0 here\); choose another --out"):
        AnswerRecord(path, {**SETTINGS, "shots": 0})
    assert path.read_bytes() == whole
    for content in (b"notes", b"notes\nmore\n", b"[1]\n", b'{"settings": 3}\n', json.dumps(ROWS[0]).encode()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no record of answers"):
            AnswerRecord(path, SETTINGS)
        assert path.read_bytes() == content
    with pytest.raises(InputError, match="cannot be written"):
        AnswerRecord(tmp_path, SETTINGS)


def test_a_second_process_is_refused(tmp_path):
    first = AnswerRecord(tmp_path / "answers.jsonl", SETTINGS)
    with pytest.raises(InputError, match="in use by another process"):
        AnswerRecord(tmp_path / "answers.jsonl", SETTINGS)
    first.close()
