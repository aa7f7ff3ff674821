"""A file of answers survives whatever ends its writer, takes answers of one making only, and says what is wrong."""

import json
import multiprocessing
import resource
import signal
from contextlib import closing
from pathlib import Path

import pytest

from qlora_jax.errors import InputError
from qlora_jax.generate.answer_file import AnswerFile

SETTINGS = {"temperature": 0.7, "stop": ["a", "b"], "adapter": None}
ROWS = [{"question_id": number, "text": f"é\n\u2028 {number}"} for number in range(5)]


def rows_of(path: Path) -> list[dict]:
    with closing(AnswerFile(path, SETTINGS, say=lambda note: None)) as file:
        return file.rows


@pytest.fixture
def whole(tmp_path) -> Path:
    path = tmp_path / "new folder" / "out.jsonl"
    with closing(AnswerFile(path, SETTINGS)) as file:
        file.append(ROWS[:2])
        file.append(ROWS[2:])
    return path


def test_rows_come_back(whole) -> None:
    assert rows_of(whole) == ROWS
    assert [json.loads(line) for line in whole.read_text().split("\n")[:-1]] == ROWS


def test_cut_off_anywhere_it_ends_as_if_undisturbed(whole) -> None:
    content = whole.read_bytes()
    for length in range(len(content)):
        whole.write_bytes(content[:length])
        notes: list[str] = []
        with closing(AnswerFile(whole, SETTINGS, say=notes.append)) as file:
            kept = len(file.rows)
            assert kept == content[:length].count(b"\n")
            file.append(ROWS[kept:])
        assert whole.read_bytes() == content
        assert len(notes) == (content[:length][-1:] not in (b"", b"\n"))


def test_zeros_that_a_power_cut_left_are_cut_off(whole) -> None:
    whole.write_bytes(whole.read_bytes() + bytes(50))
    assert rows_of(whole) == ROWS


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({**SETTINGS, "temperature": 1.0}, "temperature: 0.7 there, 1.0 here"),
        ({**SETTINGS, "adapter": "x"}, 'adapter: null there, "x" here'),
        ({**SETTINGS, "stop": []}, r'stop: \["a","b"\] there, \[\] here'),
        ({**SETTINGS, "new": 1}, "new: missing there, 1 here"),
    ],
)
def test_answers_by_other_settings_are_refused(whole, settings, named) -> None:
    content = whole.read_bytes()
    with pytest.raises(InputError, match=f"other settings .{named}.: choose another --out, or .* --overwrite"):
        AnswerFile(whole, settings)
    assert whole.read_bytes() == content
    with closing(AnswerFile(whole, settings, overwrite=True)) as file:
        assert file.rows == []
        file.append(ROWS[:1])
    with closing(AnswerFile(whole, settings)) as file:
        assert file.rows == ROWS[:1]


def test_an_empty_file_takes_any_settings(tmp_path) -> None:
    (tmp_path / "out.jsonl").touch()
    AnswerFile(tmp_path / "out.jsonl", {"temperature": 1}).close()
    with closing(AnswerFile(tmp_path / "out.jsonl", SETTINGS)) as file:
        file.append(ROWS)
    assert rows_of(tmp_path / "out.jsonl") == ROWS


@pytest.mark.parametrize(
    ("content", "settings", "named"),
    [
        (b'{"a": 1}\n', None, "no out.jsonl.settings.json says what made it"),
        (b'{"a": 1}\n', b"", "out.jsonl.settings.json cannot be read"),
        (b'{"a": 1}\n', b"[]", "holds no settings"),
        (b'{"a": 1}\n\n{"a": 1}\n', json.dumps(SETTINGS).encode(), "line 2: no answer"),
        (b'{"a": 1}\n3\n', json.dumps(SETTINGS).encode(), "line 2: no answer but b'3'"),
        (b'{"a": "\xff"}\n', json.dumps(SETTINGS).encode(), "line 1: no answer"),
    ],
)
def test_what_is_no_file_of_answers_is_left_alone(tmp_path, content, settings, named) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    if settings is not None:
        (tmp_path / "out.jsonl.settings.json").write_bytes(settings)
    with pytest.raises(InputError, match=f"{named}.*--overwrite"):
        AnswerFile(path, SETTINGS)
    assert path.read_bytes() == content


def test_places_that_cannot_be_written(tmp_path, whole) -> None:
    for place, named in ((tmp_path, "no plain file"), (Path("/dev/null"), "no plain file"), (whole / "x", "cannot be")):
        with pytest.raises(InputError, match=named):
            AnswerFile(place, SETTINGS)


def test_one_writer_at_a_time(whole) -> None:
    with (
        closing(AnswerFile(whole, SETTINGS)),
        pytest.raises(InputError, match="being written by another process"),
    ):
        AnswerFile(whole, SETTINGS, overwrite=True)
    assert rows_of(whole) == ROWS


def fill_the_disk(path: Path, connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with closing(AnswerFile(path, SETTINGS)) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, resource.RLIM_INFINITY))
        try:
            file.append(ROWS)
        except InputError as error:
            connection.send(str(error))


def test_a_full_disk_keeps_what_was_answered(whole) -> None:
    receive, send = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=fill_the_disk, args=(whole, send))
    process.start()
    process.join()
    message = receive.recv() if receive.poll() else ""
    assert "cannot be written: File too large; the 5 answers in it are kept" in message
    assert rows_of(whole) == ROWS
