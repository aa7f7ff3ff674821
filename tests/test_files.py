"""What is read whole is a file of bounded size, and JSON of it is a value or a plain error."""

import errno
import os
import threading

import numpy as np
import pytest
from safetensors import SafetensorError

from qlora_jax import files
from qlora_jax.errors import InputError, full_disk_said
from qlora_jax.files import loads, read_whole
from qlora_jax.models.config import read_json
from qlora_jax.text.tokenizer_files import read


def test_a_pipe_and_a_device_are_no_files(tmp_path):
    """A pipe is not waited for, a device not read to an end that it has not."""
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "tokenizer_config.json")
    found: list[str] = []

    def look() -> None:
        for path in (tmp_path / "config.json", tmp_path / "zero", tmp_path):
            with pytest.raises(InputError, match="is no file, but a folder, a pipe or a device"):
                read_json(path)
        assert read(tmp_path).tokenizer_config == {}  # which is not there
        found.append("looked")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(30)
    assert found == ["looked"]


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(InputError, match="config.json has 200,000,000 bytes; expected 100,000,000 at most"):
        read_json(tmp_path / "config.json")
    (tmp_path / "small").write_bytes(b"12345")
    assert read_whole(tmp_path / "small", 5) == b"12345"
    with pytest.raises(InputError, match="has 5 bytes; expected 4 at most"):
        read_whole(tmp_path / "small", 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 5000, "nested too deeply"),
        (b'{"a": "\\ud83d"}', "half a surrogate pair"),
        (b'{"\\uDC00": 1}', "half a surrogate pair"),
        (b'"\xff"', "utf-8"),
        (b"{", "Expecting"),
        (b"1" * 5000, "digits"),
    ],
)
def test_what_is_no_json_is_a_value_error(data, words):
    with pytest.raises(ValueError, match=words):
        loads(data)


def test_json_as_it_is():
    assert loads(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00 \xc3\xa9"}') == {"a": "😀 é"}


def test_a_full_disk_is_an_os_error_of_safetensors_too(tmp_path, monkeypatch):
    def full(*given, **named):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: .*a.safetensors") as failed:
        files.save_tensors({"a": np.zeros(8, np.float32)}, tmp_path / "a.safetensors")
    assert failed.value.errno == errno.ENOSPC


def test_a_full_disk_is_said_and_no_other_failure():
    said = r"the disk has no room for /a/b \(No space left on device\); what was written before is whole: free"
    with pytest.raises(InputError, match=said), full_disk_said():
        raise OSError(errno.ENOSPC, "No space left on device", "/a/b")
    with pytest.raises(PermissionError), full_disk_said():
        raise PermissionError(errno.EACCES, "no", "/a/b")
