"""What goes wrong while a folder is read or written: one clear line, nothing half-written, what was there stays."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.errors import InputError
from qlora_jax.io.folder import TensorFiles, resolve
from qlora_jax.io.header import make_header, read_header
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.shards import new_folder
from qlora_jax.io.write import quantize_folder
from qlora_jax.quant.native import stack_key
from tests import forked

pytestmark = pytest.mark.quick_compile

KILL_AT_TENSOR = """
import os, signal, sys
from pathlib import Path
from qlora_jax.io.write import quantize_folder
def progress(done, total):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)
quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], overwrite=True, shard_bytes=5000, progress=progress)
"""
KILL_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
from qlora_jax.io.write import quantize_folder
rename = Path.rename
def last(self, target):
    rename(self, target)
    if Path(target).name == ".out.old":
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = last
quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], overwrite=True)
"""
WITHOUT_ASKING_FOR_ROOM = """
import resource, sys
from pathlib import Path
from qlora_jax.errors import InputError
from qlora_jax.io import shards
from qlora_jax.io.write import quantize_folder
shards._check_room = lambda *arguments: None
if len(sys.argv) > 4:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
try:
    quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], overwrite=True)
except InputError as error:
    sys.exit(str(error))
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return forked.run(script, *arguments, JAX_ENABLE_COMPILATION_CACHE="false")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(golden: Path) -> Path:
    return golden / "llama" / "llama2"


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """A folder that is there before: int4 of the source."""
    quantize_folder(source, tmp_path / "place" / "out", quant=QuantSpec("int4"))
    return tmp_path / "place" / "out"


@pytest.mark.parametrize("form", ["native", "bnb"])
def test_killed_while_writing(source: Path, out: Path, form: str) -> None:
    before = contents(out)
    assert run(KILL_AT_TENSOR, source, out, form).returncode == -signal.SIGKILL
    assert contents(out) == before
    assert {path.name for path in out.parent.iterdir()} == {"out", ".out.partial"}
    quantize_folder(source, out, form, overwrite=True)
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    load_model(out, QuantSpec())


def test_killed_between_two_renames(source: Path, out: Path) -> None:
    before = contents(out)
    assert run(KILL_BETWEEN_RENAMES, source, out, "native").returncode == -signal.SIGKILL
    assert {path.name for path in out.parent.iterdir()} == {".out.old", ".out.partial"}
    with pytest.raises(InputError, match=r"was replacing this folder was killed; what was there is .*/\.out\.old"):
        resolve(str(out))
    with pytest.raises(InputError, match="not empty.*--overwrite"):
        quantize_folder(source, out)
    assert contents(out) == before and {path.name for path in out.parent.iterdir()} == {"out"}


def test_two_at_once(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("first")
        with (
            pytest.raises(InputError, match="is being written by another process: wait"),
            new_folder(tmp_path / "out"),
        ):
            raise AssertionError("the block must not begin")
        assert (folder / "config.json").exists()
    assert contents(tmp_path / "out") == {"config.json": b"first"}


@pytest.mark.parametrize("form", ["native", "bnb"])
def test_a_file_that_may_not_grow(source: Path, out: Path, form: str) -> None:
    before = contents(out)
    result = run(WITHOUT_ASKING_FOR_ROOM, source, out, form, 20_000)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"{out} was not written, and nothing is left half-written")
    assert "File too large" in result.stderr and "Traceback" not in result.stderr
    assert contents(out) == before and [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("form", ["native", "bnb"])
def test_a_disk_that_fills(source: Path, tmp_path: Path, form: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        with pytest.raises(InputError, match=r"would take about .* KiB, its disk has \d+\.00 KiB left"):
            quantize_folder(source, disk / "out", form)
        result = run(WITHOUT_ASKING_FOR_ROOM, source, disk / "out", form)
        assert result.returncode == 1 and "No space left on device" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1 and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def native(source: Path, tmp_path: Path):
    """native(change of tensors, change of config.json): a folder in our own form, altered."""

    def make(tensors=lambda held: None, config=lambda raw: None) -> Path:
        folder = tmp_path / "native"
        quantize_folder(source, folder)
        held, raw = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        tensors(held)
        config(raw)
        save_file(held, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return make


def test_our_own_form_that_does_not_fit(native) -> None:
    def damage(held: dict[str, np.ndarray]) -> None:
        held[stack_key("mlp.up_proj", "absmax")] = held[stack_key("mlp.up_proj", "absmax")].astype(np.float32)
        held[stack_key("mlp.down_proj", "codes")] = held[stack_key("mlp.down_proj", "codes")][:1]
        del held[stack_key("self_attn.q_proj", "offset")]
        held[stack_key("self_attn.x_proj", "codes")] = np.zeros((2, 3), np.uint8)

    with pytest.raises(InputError) as error:
        load_model(native(damage))
    message = str(error.value)
    assert "(4 problems)" in message
    for part in (
        "mlp.up_proj.weight.absmax is float32, expected uint8",
        "mlp.down_proj.weight.codes is [1, ",
        "missing model.layers.self_attn.q_proj.weight.offset [2]",
        "unexpected model.layers.self_attn.x_proj.weight.codes [2, 3]",
    ):
        assert part in message


def test_sizes_that_contradict_the_tensors(native, source: Path, tmp_path: Path) -> None:
    wide = {"intermediate_size": 256}
    unquantized = Path(shutil.copytree(source, tmp_path / "unquantized"))
    raw = json.loads((unquantized / "config.json").read_text())
    (unquantized / "config.json").write_text(json.dumps(raw | wide))
    for folder in (native(config=lambda raw: raw.update(wide)), unquantized):
        with pytest.raises(InputError, match=r"does not hold the model of its config\.json .*up_proj.* expected \["):
            load_model(folder)
        with pytest.raises(InputError, match=r"does not hold the model of its config\.json"):
            quantize_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_cut_while_it_is_read(native) -> None:
    file = native() / "model.safetensors"
    files, key = TensorFiles(file.parent), stack_key("mlp.up_proj", "codes")
    os.truncate(file, 2000)
    for read in (lambda: files.read(key), lambda: list(files.pieces(key))):
        with pytest.raises(InputError, match=rf"model\.safetensors: {key} cannot be read: it ends after 2,000 bytes"):
            read()
    with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short: it ends after 2,000 bytes"):
        load_model(file.parent)


def header_of(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it ends after"),
        (b"PK\x03\x04" + bytes(60), "it ends after 64 bytes"),
        ((2**40).to_bytes(8, "little") + bytes(60), "would have"),
        (header_of("not json"), "not the JSON"),
        (header_of("[1, 2]"), "not the JSON"),
        (header_of('{"a": {"dtype": "F32", "shape": [2]}}'), "not the JSON"),
        (header_of('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}') + bytes(8), "not the JSON"),
        (header_of('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}') + bytes(7), "it ends after"),
        (header_of('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}') + bytes(8), "not those of float32"),
        (header_of('{"a": {"dtype": "U8", "shape": [3], "data_offsets": [5, 8]}}') + bytes(8), "do not begin where"),
    ],
    ids=range(10),
)
def test_a_damaged_header_says_how(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=rf"model\.safetensors is damaged or cut short: .*{reason}"):
        TensorFiles(tmp_path)


def test_our_headers_are_what_safetensors_reads(tmp_path: Path) -> None:
    shapes = {"a": ("uint8", (3, 5)), "b": ("float32", ()), "c": ("bfloat16", (0, 4)), "d": ("float16", (7,))}
    header, places = make_header(shapes)
    data = bytes(range(places["d"].stop - len(header)))
    (tmp_path / "model.safetensors").write_bytes(header + data)
    assert len(header) % 8 == 0
    held, files = load_file(tmp_path / "model.safetensors"), TensorFiles(tmp_path)
    for key, (dtype, shape) in shapes.items():
        assert (held[key].dtype.name, held[key].shape) == (files.dtypes[key], files.shapes[key]) == (dtype, shape)
        assert held[key].tobytes() == files.read(key).tobytes()

    def read(start: int, out: np.ndarray) -> None:
        out[:] = np.frombuffer(header + data, np.uint8)[start : start + out.size]

    assert read_header(read) == places
