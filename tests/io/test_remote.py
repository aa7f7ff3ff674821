"""Folders in object stores: the same model by byte ranges, one line for what is missing; file:// and a local server."""

import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.io import remote
from qlora_jax.io.folder import TensorFiles, resolve
from qlora_jax.io.load import QuantSpec, load_model, stored_quant
from qlora_jax.io.write import quantize_folder

pytestmark = pytest.mark.quick_compile

class Ranges(http.server.BaseHTTPRequestHandler):
    """Files of `folder` under /, by byte ranges as object stores answer them; notes what was asked for."""

    folder: Path
    asked: list[tuple[str, str | None]]

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Range")))
        file = self.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content, status = file.read_bytes(), 200
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        headers = {}
        if match:
            first, last = int(match[1]), min(int(match[2]), len(content) - 1)
            headers["Content-Range"], status = f"bytes {first}-{last}/{len(content)}", 206
            content = content[first : last + 1]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def served(tmp_path: Path):
    """A folder that is served, its address, and the requests."""
    handler = type("Here", (Ranges,), {"folder": tmp_path / "served", "asked": []})
    handler.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield handler.folder, f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


def assert_same(a: Path, b: Path, quant: QuantSpec | None = None) -> None:
    left, right = (nnx.state(load_model(folder, quant, "float32")) for folder in (a, b))
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["llama/llama2", "llama/llama3", "bnb4bit/nf4_dq"])  # llama2 is sharded
def test_a_file_address_gives_the_model_of_the_folder(golden: Path, name: str) -> None:
    folder = resolve(f"file://{golden / name}/")
    assert folder != golden / name and not list(folder.glob("*.safetensors"))
    assert stored_quant(folder) == stored_quant(golden / name)
    assert TensorFiles(folder).folder == f"file://{golden / name}"
    assert_same(folder, golden / name)


def test_our_own_form_by_byte_ranges(golden: Path, served, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address, asked = served
    quantize_folder(golden / "llama" / "llama2", folder / "model")
    shutil.copyfile(golden / "tokenizer" / "tokenizer.json", folder / "model" / "tokenizer.json")
    monkeypatch.setattr(remote, "_RANGE", 1000)
    here = resolve(f"{address}/model")
    assert (here / "tokenizer.json").read_bytes() == (folder / "model" / "tokenizer.json").read_bytes()
    assert_same(here, folder / "model")
    ranges = [part for path, part in asked if path == "/model/model.safetensors"]
    assert None not in ranges and len(ranges) > 20


def test_what_is_not_there_is_one_line(golden: Path, tmp_path: Path, served) -> None:
    folder, address, _ = served
    for url in (f"file://{tmp_path}/absent", f"{address}/absent"):
        with pytest.raises(InputError, match=re.escape(f"{url} holds no config.json")):
            resolve(url)
    copy = Path(shutil.copytree(golden / "llama" / "llama2", folder / "model"))
    (copy / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match=rf"{address}/model lacks model-00002-of-00004\.safetensors"):
        TensorFiles(resolve(f"{address}/model"))


def test_a_remote_shard_that_was_cut(golden: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden / "llama" / "llama1", tmp_path / "model"))
    data = (copy / "model.safetensors").read_bytes()
    for keep in (0, 5, 100, len(data) - 1):
        (copy / "model.safetensors").write_bytes(data[:keep])
        with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short: "):
            TensorFiles(resolve(f"file://{copy}"))


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SETTINGS", {"http_request_retries": {"max_retries": 1, "max_delay": "1s"}})
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/model cannot be read: .*Could not connect"):
        resolve("http://127.0.0.1:9/model")


def test_secrets_in_an_address_are_refused_and_not_repeated() -> None:
    for url in ("https://user:secret@host/model", "https://host/model?token=secret"):
        with pytest.raises(InputError, match="credentials are taken from the environment") as error:
            resolve(url)
        assert "secret" not in str(error.value)


def test_commands_take_addresses(run_commands, golden: Path, tmp_path: Path) -> None:
    url = f"file://{golden / 'llama' / 'llama1'}"
    out = tmp_path / "out"
    quantized, missing = run_commands(
        [
            ["experiments.quantize", f"--model={url}", f"--out={out}"],
            ["experiments.quantize", f"--model=file://{tmp_path}/absent", f"--out={tmp_path / 'no'}"],
        ]
    )
    assert quantized["status"] == 0, quantized["err"]
    assert url in quantized["out"] and json.loads((out / "qlora_jax_quantize.json").read_text())["source"] == url
    assert_same(out, golden / "llama" / "llama1", QuantSpec())
    assert missing["status"] == 2 and len(missing["err"].strip().splitlines()) == 1
