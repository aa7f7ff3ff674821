"""Pages in host memory are written from where they lie, while training goes on, and are put back there; what is damaged
is never taken."""

import errno
import math
import os
import pickle
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import type_handlers

from qlora_jax.errors import InputError
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages, RowWise
from qlora_jax.train import checkpoints as module
from qlora_jax.train.checkpoints import Checkpoints

pytestmark = pytest.mark.quick_compile

SHAPES = {"a": (8, 6, 7), "b": (5, 4, 3)}


def tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def start(resident: float):
    params = tree(0)
    optimizer = PagedOptimizer(Pages(RowWise(*optax.adam(1e-2)), params, 900), params, resident)
    return optimizer, *optimizer.update(params, tree(1), optimizer.init(params))


@pytest.mark.parametrize("resident", [0, 1500, math.inf])
def test_what_is_written_is_the_state_at_save_though_training_goes_on(tmp_path, monkeypatch, resident):
    """The writer is held back until two more updates have donated and replaced everything."""
    go_on, original = threading.Event(), type_handlers.NumpyHandler._background_serialize

    async def held(self, *arguments):
        assert go_on.wait(60)
        return await original(self, *arguments)

    monkeypatch.setattr(type_handlers.NumpyHandler, "_background_serialize", held)
    optimizer, params, states = start(resident)
    expected = jax.tree.map(np.array, (params, states))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, params, states)
    for seed in (2, 3):
        params, states = optimizer.update(params, tree(seed), states)
    jax.block_until_ready((params, states))
    go_on.set()
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    step, *restored = again.restore(params, states)
    again.close()
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).tobytes() == y.tobytes()
    assert step == 1
    placed = optimizer.place(restored[1])
    for page, kept in zip(placed, optimizer.resident, strict=True):
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(page) if x.ndim}
        assert kinds == {"device" if kept else "pinned_host"}


def test_pages_in_host_memory_are_neither_copied_nor_sent_through_the_device(tmp_path, monkeypatch):
    """What reaches orbax's writer is the pages' own memory."""
    written, original = [], type_handlers.NumpyHandler._background_serialize

    async def seen(self, values, *arguments):
        written.extend(values)
        return await original(self, values, *arguments)

    monkeypatch.setattr(type_handlers.NumpyHandler, "_background_serialize", seen)
    _, params, states = start(1500)
    places = {x.unsafe_buffer_pointer(): x for x in jax.tree.leaves((params, states)) if x.ndim}
    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(jax, "device_put", lambda *arguments: pytest.fail("a transfer"))
    checkpoints.save(1, params, states, wait=True)
    monkeypatch.undo()
    checkpoints.close()
    shared = [places[pointer] for x in written if (pointer := x.__array_interface__["data"][0]) in places]
    in_host_memory = [x for x in places.values() if x.sharding.memory_kind == "pinned_host"]
    assert len(written) == len(jax.tree.leaves((params, states)))
    assert in_host_memory and {id(x) for x in shared} == {id(x) for x in in_host_memory}


def test_shapes_of_another_run_are_refused(tmp_path):
    """Orbax restores the arrays of a folder whatever shapes it is asked for."""
    _, params, states = start(0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, params, states, wait=True)
    other = {name: jnp.zeros((x.shape[0] + 1, *x.shape[1:])) for name, x in params.items()}
    with pytest.raises(InputError, match=r"no checkpoint .*1: an array of shape \[8, 6, 7\], expected \[9, 6, 7\]"):
        checkpoints.restore(other, states)
    checkpoints.close()


def state(step: int):
    return tree(step), [{"moments": tree(step + 10), "count": jnp.int32(step)}]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with the checkpoints 1 and 2 of `state`."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, *state(step), wait=True)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(two, tmp_path) -> Path:
    return shutil.copytree(two, tmp_path / "checkpoints")


def assert_goes_on(folder: Path, step: int, said: list[str]) -> None:
    """Restores `step` bit for bit, and saves 3 beside what is there."""
    checkpoints = Checkpoints(folder, keep=2, say=said.append)
    found, *restored = checkpoints.restore(*state(0))
    assert found == checkpoints.latest == step
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state(step)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    before = {path.name for path in folder.iterdir()}
    checkpoints.save(3, *state(3), wait=True)
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == (before | {"3"}) - ({"1"} if step == 2 else set())


def damages(size: int):
    """Ways to damage a file: a bit in either half and at its end, cut, emptied, gone."""

    def flip(place):
        def damage(file: Path) -> None:
            content = bytearray(file.read_bytes())
            content[place] ^= 8
            file.write_bytes(content)

        return damage

    yield from (flip(place) for place in {size // 4, size * 3 // 4, size - 1})
    yield from (lambda file: os.truncate(file, size // 2), lambda file: os.truncate(file, 0), Path.unlink)


def test_whatever_is_damaged_in_the_newest_checkpoint_the_one_before_is_taken(two, copy):
    """Any file of it, in any way: said in one line, set aside with all that is in it."""
    files = [file.relative_to(two) for file in (two / "2" / "default").rglob("*") if file.is_file()]
    assert len(files) > 6
    for file in files:
        if file.name in ("commit_success.txt", "checksums.json"):
            continue
        for damage in damages((two / file).stat().st_size):
            damage(copy / file)
            said: list[str] = []
            assert Checkpoints(copy, keep=2, say=said.append).latest == 1
            (line,) = said
            assert f"{copy / '2'} cannot be used ({file.relative_to('2')} is" in line and line.count("\n") == 0
            assert line.endswith("set aside as 2.set_aside, going on from step 1")
            aside = copy / "2.set_aside"
            assert (aside / file.relative_to("2")).exists() == (damage is not Path.unlink)
            shutil.rmtree(aside)
            shutil.copytree(two / "2", copy / "2")
    damage(copy / file)
    assert_goes_on(copy, 1, [])


def test_what_holds_no_state_may_be_damaged(two, copy):
    """Orbax's notes beside the arrays, and our own list of checksums: the state is the one that was saved, or the one
    before."""
    notes = ["_CHECKPOINT_METADATA", "commit_success.txt", "default/commit_success.txt"]
    for note in notes:
        (copy / "2" / note).write_bytes(b"\xff")
    assert_goes_on(copy, 2, [])
    for number, content in enumerate((b'{"a"', b"[]", b"{}", b"\xff")):
        folder = shutil.copytree(two, copy / f"again {number}")
        (folder / "2" / "default" / "checksums.json").write_bytes(content)
        said: list[str] = []
        assert Checkpoints(folder, keep=2, say=said.append).latest == 1 and len(said) == 1


def test_a_checkpoint_of_an_older_version_is_taken_with_a_word(two, copy):
    """It has no checksums. What is missing or cut is found all the same, without tracebacks of orbax's threads."""
    for step in (1, 2):
        (copy / str(step) / "default" / "checksums.json").unlink()
    said: list[str] = []
    assert_goes_on(shutil.copytree(copy, copy / "whole"), 2, said)
    assert len(said) == 1 and "2 has no checksums (an older version wrote it)" in said[0]
    largest = max((copy / "2" / "default").rglob("d/*"), key=lambda file: file.stat().st_size)
    for damage in (lambda: os.truncate(largest, 100), largest.unlink):
        damage()
        said.clear()
        assert Checkpoints(copy, keep=2, say=said.append).latest == 1
        assert "1 has no checksums" in said[0] and "2 cannot be used (" in said[1] and len(said) == 2
        (copy / "2.set_aside").rename(copy / "2")


def test_folders_that_are_no_checkpoints(two, copy):
    """Empty ones, a file in place of a folder, what orbax was writing when it was killed; other names are let be."""
    shutil.rmtree(copy / "2")
    (copy / "3").mkdir()
    (copy / "4").write_text("")
    (copy / "5" / "default").mkdir(parents=True)
    shutil.copytree(two / "2", copy / "6.orbax-checkpoint-tmp" / "default.orbax-checkpoint-tmp")
    for name in ("07", "8 ", "notes", "9.set_aside"):
        (copy / name).mkdir()
    said: list[str] = []
    assert Checkpoints(copy, keep=2, say=said.append).latest == 1 and len(said) == 3
    names = {path.name for path in copy.iterdir()}
    assert names == {"1", "3.set_aside", "4.set_aside", "5.set_aside", "07", "8 ", "notes", "9.set_aside"}


def test_what_is_set_aside_is_never_deleted_nor_counted(two, copy):
    """A second damaged checkpoint of the same step gets a name of its own; pruning sees neither."""
    for number in range(3):
        (copy / "2" / "default" / "manifest.ocdbt").write_bytes(bytes([number]))
        assert Checkpoints(copy, keep=2, say=lambda line: None).latest == 1
        shutil.copytree(two / "2", copy / "2")
    shutil.rmtree(copy / "2")
    checkpoints = Checkpoints(copy, keep=2)
    for step in range(2, 6):
        checkpoints.save(step, *state(step), wait=True)
    checkpoints.close()
    assert sorted(path.name for path in copy.iterdir()) == ["2.set_aside", "2.set_aside_2", "2.set_aside_3", "4", "5"]
    kept = [(copy / f"2.set_aside{end}" / "default" / "manifest.ocdbt").read_bytes() for end in ("", "_2", "_3")]
    assert kept == [b"\x00", b"\x01", b"\x02"]


def test_where_no_checkpoint_is_whole_nothing_is_renamed(copy):
    """The next start must not begin anew by itself either."""
    for step in (1, 2):
        (copy / str(step) / "default" / "manifest.ocdbt").unlink()
    for _ in range(2):
        with pytest.raises(InputError, match=r"no checkpoint in .*2: default/manifest.ocdbt is missing; 1: .*delete"):
            Checkpoints(copy, keep=2)
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_another_run_is_set_aside(copy):
    """Its files are whole, its arrays are not this run's."""
    alien = Checkpoints(copy / "alien", keep=1)
    alien.save(7, {"a": jnp.zeros((9, 6, 7)), "b": jnp.zeros((5, 4, 3))}, state(7)[1], wait=True)
    alien.close()
    (copy / "alien" / "7").rename(copy / "7")
    (copy / "alien").rmdir()
    said: list[str] = []
    assert_goes_on(copy, 2, said)
    assert "7 cannot be used (an array of shape [9, 6, 7], expected [8, 6, 7]): set aside" in said[0] and len(said) == 1


def test_what_this_process_may_not_read_is_no_damage(copy, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module.checksums, "of_file", forbidden)
    with pytest.raises(InputError, match=r"checkpoints/2 cannot be read: Permission denied"):
        Checkpoints(copy, keep=2)

    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(module.checksums, "of_file", failing)
    with pytest.raises(InputError, match=r"2: it cannot be read: Input/output error; 1: it cannot"):
        Checkpoints(copy, keep=2)
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_a_disk_that_is_full_at_the_end_of_a_save(copy, monkeypatch):
    """The checksums are the last thing written: without them there is no checkpoint, and the older ones stay."""

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(copy, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        with pytest.raises(InputError, match="could not be written .*No space left on device.*older checkpoints are"):
            checkpoints.save(3, *state(3), wait=True)
    checkpoints.settle()
    assert_goes_on(copy, 2, [])


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    """Nothing that is written is a pickle, and nothing is unpickled while it is read."""

    def fail(*arguments, **named):
        raise AssertionError("pickle was asked")

    optimizer, params, states = start(0)
    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, fail)
    written = Checkpoints(tmp_path, keep=1)
    written.save(1, params, states, wait=True)
    written.close()
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        data = file.read_bytes()
        assert not data.startswith(b"\x80") and b"pickle" not in data, file
    again = Checkpoints(tmp_path, keep=1)
    assert again.restore(params, states)[0] == 1
    again.close()
