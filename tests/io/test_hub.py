"""A model named on the hub, fetched by the command from a server on this machine that speaks the hub's protocol."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.hub_server import SHA, TOKEN, HubHandler, serving
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Address of a server that has one model, owner/tiny, and the list of what it was asked for."""
    for name in os.environ:
        if "proxy" in name.lower():
            monkeypatch.delenv(name)
    folder = tmp_path / "served"
    write_tiny_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")

    class Hub(HubHandler):
        requests: list[tuple[str, str]] = []

        def find(self, path):
            if path.startswith("/api/models/owner/tiny/tree/"):
                files = sorted(folder.iterdir())
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                return 200, {}, json.dumps(tree).encode()
            if path.startswith("/api/models/owner/tiny"):
                siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                return 200, {}, json.dumps({"id": "owner/tiny", "sha": SHA, "siblings": siblings}).encode()
            file = folder / Path(path).name
            if path.startswith("/owner/tiny/resolve/") and file.is_file():
                return 200, {"X-Repo-Commit": SHA, "ETag": f'"{file.name}"'}, file.read_bytes()
            return 404, {"X-Error-Code": "RepoNotFound"}, b""

    with serving(Hub) as address:
        yield address, Hub.requests


def generate(model: str, address: str, cache: Path) -> subprocess.CompletedProcess:
    """In a process of its own: huggingface_hub reads its settings once."""
    script = "import runpy; runpy.run_module('experiments.generate', run_name='__main__', alter_sys=True)"
    arguments = [f"--model={model}", "--prompt=a", "--max_new_tokens=2", "--temperature=0"]
    return forked.run(script, *arguments, HF_ENDPOINT=address, HF_HOME=str(cache), HF_TOKEN=TOKEN)


def test_a_model_comes_from_the_hub_without_pickles_or_code(hub, tmp_path):
    address, asked = hub
    fetched = generate("owner/tiny", address, tmp_path / "cache")
    assert fetched.returncode == 0, fetched.stderr
    local = generate(str(tmp_path / "served"), address, tmp_path / "cache")
    assert fetched.stdout == local.stdout and fetched.stdout.startswith("a")
    assert not [path for path, _ in asked if path.endswith((".bin", ".py"))]
    assert TOKEN not in fetched.stdout + fetched.stderr


def test_a_model_the_hub_does_not_have_is_one_line(hub, tmp_path):
    address, _ = hub
    missing = generate("owner/nothing", address, tmp_path / "cache")
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1 and "owner/nothing" in missing.stderr and TOKEN not in missing.stderr
