"""A folder's fingerprint goes with what its files hold, not with where it stands."""

import shutil

import pytest

from qlora_jax.io.fingerprint import fingerprint


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("place", [0, -1])
def test_any_change_shows(tmp_path, name, place) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for file in ("config.json", "adapter_config.json", "model-00001-of-00002.safetensors"):
        (folder / file).write_bytes(bytes(3 * 2**20 + 1))
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "b")
    assert fingerprint(tmp_path / "b") == before and len(before) == 16
    content = bytearray((folder / name).read_bytes())
    content[place] = 1
    (folder / name).write_bytes(content)
    assert fingerprint(folder) != before
    (tmp_path / "b" / name).unlink()
    assert fingerprint(tmp_path / "b") != before
