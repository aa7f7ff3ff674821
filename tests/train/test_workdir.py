"""A run goes on only from what it was made of, says what changed, and holds its folder from the first moment."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax import files
from qlora_jax.checksums import Input
from qlora_jax.errors import InputError
from qlora_jax.settings import resolved
from qlora_jax.train import loop
from qlora_jax.train.loop import finetune
from qlora_jax.train.workdir import Workdir
from tests.tiny_run import tiny_config as make_config

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def finished(golden, tmp_path_factory) -> tuple[Path, Path]:
    """A folder with a model and batches, and that of a finished run on them; the names in its config are below it."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(golden / "llama" / "llama1", root / "model")
    config = in_folder(make_config(golden, root), root)
    finetune(config, resolved(config), root / "run", say=lambda line: None)
    return root


def in_folder(config, root: Path):
    config.model.path, config.data.batches = str(root / "model"), str(root / "batches.npy")
    config.train.steps, config.data.eval_examples = 3, 0
    return config


@pytest.fixture
def again(finished, golden, tmp_path):
    """again(change) starts a copy of the finished run after change(folder): what was said."""

    def start(change=lambda root: None, moved: bool = True) -> list[str]:
        root = tmp_path / "root"
        shutil.copytree(finished, root)
        change(root)
        said: list[str] = []
        config = in_folder(make_config(golden, tmp_path), root)
        finetune(config, resolved(config), root / "run", said.append)
        return said

    return start


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_what_moved_and_is_the_same_goes_on(again, finished, tmp_path):
    """Content counts, not its name: the config takes the new names."""
    said = again()
    root = tmp_path / "root"
    for key, name in (("model.path", "model"), ("data.batches", "batches.npy")):
        assert f"run: {key} is {root / name} now and was {finished / name}; its content is the same" in said
    assert any("finished: its files are written again" in line for line in said)
    saved = json.loads((root / "run" / "config.json").read_text())
    assert saved["model"]["path"] == str(root / "model")
    before, after = (load_file(f / "run" / "adapter" / "adapter_model.safetensors") for f in (finished, root))
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_a_moved_model_may_lie_in_other_files(again):
    """Tensors in another order, with other metadata."""

    def rewrite(root: Path) -> None:
        file = root / "model" / "model.safetensors"
        save_file(dict(reversed(load_file(file).items())), file, {"note": "another"})
        config = json.loads((root / "model" / "config.json").read_text())
        text = json.dumps(dict(reversed((config | {"transformers_version": "9"}).items())))
        (root / "model" / "config.json").write_text(text)

    assert not any("changed" in line for line in again(rewrite))


def change_batch(root: Path) -> None:
    batches = np.load(root / "batches.npy")
    batches[-1, -1, -1] += 1
    np.save(root / "batches.npy", batches)


def change_setting(root: Path) -> None:
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_batch, "batches.npy changed since its checkpoint, and with it what data.batches stands for"),
        (lambda root: flip(root / "model" / "model.safetensors", -40), "the weights of the base changed"),
        (change_setting, "config.json of the base changed since its checkpoint, and with it what model.path stands"),
    ],
    ids=["batches", "weights", "settings"],
)
def test_what_changed_is_refused_by_name(again, tmp_path, change, words):
    with pytest.raises(InputError, match=f"root/run cannot go on: .*{words}.*Put it back .*another --workdir") as error:
        again(change)
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "root" / "run" / "config.json").read_text())["model"]["path"] != str(
        tmp_path / "root" / "model"
    )


def test_without_a_checkpoint_a_run_begins_anew_on_what_there_is(finished, golden, tmp_path):
    root = shutil.copytree(finished, tmp_path / "root")
    config = in_folder(make_config(golden, tmp_path), finished)
    shutil.rmtree(root / "run" / "checkpoints")
    batches = np.load(finished / "batches.npy")
    config.data.batches = str(root / "batches.npy")
    np.save(root / "batches.npy", np.roll(batches, 1))
    with pytest.raises(InputError, match="batches.npy changed"):  # another name for another content is another config
        finetune(config, resolved(config), root / "run", lambda line: None)
    saved = json.loads((root / "run" / "config.json").read_text())
    saved["data"]["batches"] = config.data.batches
    (root / "run" / "config.json").write_text(json.dumps(saved))
    finetune(config, resolved(config), root / "run", lambda line: None)
    recorded = json.loads((root / "run" / "inputs.json").read_text())
    assert recorded["data.batches"] != json.loads((finished / "run" / "inputs.json").read_text())["data.batches"]


@pytest.mark.parametrize(("content", "words"), [(None, "is missing (an older version"), ("{", "is damaged")])
def test_a_folder_that_does_not_say_what_it_was_made_of(finished, golden, tmp_path, content, words):
    """It goes on with one line, and says it from then on."""
    run = shutil.copytree(finished / "run", tmp_path / "run")
    recorded = (run / "inputs.json").read_text()
    (run / "inputs.json").unlink() if content is None else (run / "inputs.json").write_text(content)
    config, said = in_folder(make_config(golden, tmp_path), finished), []
    finetune(config, resolved(config), run, said.append)
    assert [line for line in said if words in line and "cannot be checked" in line] and len(said) > 2
    assert (run / "inputs.json").read_text() == recorded


def test_what_a_change_came_of_is_named(tmp_path):
    """Parts that changed and mattered, parts that changed and did not, and a change that no part explains."""
    first = Workdir(tmp_path / "run", {})
    inputs = {"data.path": Input("e1", [("a.json", "1"), ("b.json", "2")]), "model.path": Input("m", [])}
    first.check(inputs, print)
    first.begin()
    first.close()

    def check(content: str, *parts: tuple[str, str]) -> list[str]:
        said: list[str] = []
        workdir = Workdir(tmp_path / "run", {})
        try:
            workdir.go_on(said.append)
            workdir.check({"data.path": Input(content, list(parts))}, said.append)
        finally:
            workdir.close()
        return said

    assert check("e1", ("a.json", "1"), ("b.json", "2")) == []
    assert check("e1", ("elsewhere/b.json", "2"), ("a.json", "1")) == []
    (line,) = check("e1", ("a.json", "1"), ("b.json", "3"))
    assert "b.json changed, and what the run takes from data.path did not: it goes on" in line
    for parts, named in (
        ([("a.json", "1"), ("b.json", "3")], "b.json changed"),
        ([("a.json", "9"), ("b.json", "3")], "a.json and b.json changed"),
        ([("a.json", "1")], "b.json changed"),
        ([("a.json", "1"), ("b.json", "2"), ("c.json", "3")], "c.json changed"),
        ([("a.json", "1"), ("b.json", "2")], "the program that reads it, or one of its libraries, changed"),
    ):
        with pytest.raises(InputError, match=f"run cannot go on: {named}"):
            check("e2", *parts)
    workdir = Workdir(tmp_path / "run", {})
    workdir.go_on(print)
    workdir.check({"data.path": inputs["data.path"]}, print)
    with pytest.raises(InputError, match="it was trained with model.path, which this version does not read"):
        workdir.begin()
    workdir.close()


HOLD = """
import sys, time
from pathlib import Path
from qlora_jax.train.workdir import Workdir
workdir = Workdir(Path(sys.argv[1]), {})
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_in_use_is_noticed_before_anything_is_read(tiny_config, tmp_path, monkeypatch):
    """And is free as soon as its holder is gone, however that ended."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(loop, "prepare", lambda *arguments: pytest.fail("read"))
            patch.setattr(loop, "Checkpoints", lambda *arguments: pytest.fail("read"))
            with pytest.raises(InputError, match="run is in use by another process; wait, or choose another --workdir"):
                finetune(tiny_config, resolved(tiny_config), tmp_path / "run", print)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    Workdir(tmp_path / "run", {}).close()


def test_a_run_that_cannot_begin_leaves_no_folder(tiny_config, tmp_path):
    """Nor a config that the mended one would be held against."""
    good = tiny_config.data.batches
    tiny_config.data.batches = str(tmp_path / "typo.npy")
    with pytest.raises(InputError, match="typo.npy: no such file"):
        finetune(tiny_config, resolved(tiny_config), tmp_path / "run", print)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="typo.npy: no such file"):
        finetune(tiny_config, resolved(tiny_config), tmp_path / "run", print)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    tiny_config.data.batches, tiny_config.train.steps = good, 1
    finetune(tiny_config, resolved(tiny_config), tmp_path / "run", lambda line: None)


def test_disks_without_locks_and_disks_that_cannot_be_written(tmp_path, monkeypatch):
    """A network disk may know no locks: then two writers are not told apart. Any other trouble is one line."""

    def failing(code):
        def fail(*arguments, **named):
            raise OSError(code, os.strerror(code))

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", failing(errno.ENOLCK))
        Workdir(tmp_path / "run", {}).close()
        patch.setattr(files.fcntl, "flock", failing(errno.EIO))
        with pytest.raises(InputError, match="run cannot be used: Input/output error"):
            Workdir(tmp_path / "run", {})
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="workdir .*file.* cannot be used"):
            Workdir(path, {})
    monkeypatch.setattr(Path, "open", failing(errno.EROFS))
    with pytest.raises(InputError, match="cannot be used: Read-only file system"):
        Workdir(tmp_path / "run", {})
