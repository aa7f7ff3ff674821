"""A wheel brings all that the commands open: configs, assets, tuned tables, texts; and `qlora`."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("qlora_jax", "pallas_kernels", "experiments", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy of what git has, without an index."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in committed():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((REPOSITORY / name).read_bytes())
    script = "import sys, setuptools.build_meta as build; print(build.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=folder / "source", check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def committed() -> list[str]:
    names = [*PACKAGES, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *names],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [name for name in listed.splitlines() if (REPOSITORY / name).is_file()]


def test_every_file_of_the_packages_is_in_it(wheel):
    wanted = {name for name in committed() if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    assert len(wanted) > 250
    assert not wanted - set(wheel.namelist())


def test_it_has_the_command(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert re.search(r"^qlora = experiments.support.console:main$", wheel.read(name).decode(), re.MULTILINE)
