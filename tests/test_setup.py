"""The set-up: no addresses in its files, every dependency pinned, a Python found wherever it is, .venv made whole."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SETUP_FILES = ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "scripts/make_venv", ".ci/run")
FIND_PYTHON = REPOSITORY / "scripts" / "find_python"
MAKE_VENV = REPOSITORY / "scripts" / "make_venv"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(parts) == 2 for parts in split)
    return {canonical(name): version for name, version in split}


@pytest.mark.parametrize("name", SETUP_FILES)
def test_no_index_is_written_down(name: str) -> None:
    assert not re.search(r"index-url|find-links|trusted-host|https?:|file:/|@ ", (REPOSITORY / name).read_text())


def test_pyproject_has_only_the_build_system() -> None:
    assert list(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())) == ["build-system"]


@pytest.mark.parametrize("extra", ["", "cuda13", "cuda12", "plan", "sentencepiece", "dev"])
def test_every_dependency_is_pinned(extra: str) -> None:
    parser = setup_cfg()
    text = parser["options.extras_require"][extra] if extra else parser["options"]["install_requires"]
    names = {canonical(re.split(r"[\[<>=!~; ]", line)[0]) for line in text.split("\n") if line.strip()}
    assert names
    assert names <= set(pins())


def test_every_import_is_a_dependency() -> None:
    """Third-party modules that the packages import are among install_requires, or an extra's."""
    parser = setup_cfg()
    extras = parser["options.extras_require"]
    optional = ("sentencepiece", "triton", "eval", "sweep", "tensorboard", "wandb", "mlflow")
    text = parser["options"]["install_requires"] + "".join(extras[name] for name in optional)
    distributions = {canonical(re.split(r"[\[<>=]", line)[0]) for line in text.split("\n") if line.strip()}
    of_module = {"absl": "absl-py", "orbax": "orbax-checkpoint", "jaxlib": "jax"}
    own = {"qlora_jax", "pallas_kernels", "experiments", "configs"}
    imported: set[str] = set()
    for package in own:
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.split(".")[0])
    third_party = imported - own - set(sys.stdlib_module_names)
    assert {"jax", "numpy"} <= third_party
    # by the benchmarks, where they happen to be installed
    measured_against = {"torch", "bitsandbytes", "transformers", "peft"}
    around = {"IPython"}  # a notebook brings it, and nothing else imports it
    found = third_party - measured_against - around
    assert {canonical(of_module.get(name, name)) for name in found} <= distributions


def test_cuda_plugins_are_of_the_pinned_jax() -> None:
    versions = pins()
    for extra in ("cuda13", "cuda12"):
        assert versions[f"jax-{extra}-plugin"] == versions[f"jax-{extra}-pjrt"] == versions["jax"]


def test_scripts_can_be_run() -> None:
    for path in (FIND_PYTHON, MAKE_VENV, REPOSITORY / ".ci" / "run"):
        assert os.access(path, os.X_OK)
        subprocess.run(["sh", "-n", path], check=True)


def fake(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def real(path: Path) -> Path:
    """A candidate that answers as the Python of these tests, but for its own path."""
    return fake(path, f'exec "{sys.executable}" "$@"')


BROKEN_SHIM = "echo 'pyenv: python3.12: command not found' >&2\necho 'It exists in: 3.12.1' >&2\nexit 127"
TOO_OLD = "echo is Python 3.11"
NO_ENSUREPIP = "echo 'lacks the module ensurepip (on Debian and Ubuntu: apt install python3.12-venv)'"


def find_python(home: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs find_python where nothing but `home`'s fakes is to be found."""
    environment = {"PATH": str(home / "bin"), "HOME": str(home)} | environment
    shell = shutil.which("sh")
    assert shell
    return subprocess.run([shell, FIND_PYTHON], env=environment, capture_output=True, text=True, cwd=home)


def test_find_python_passes_over_what_does_not_work(tmp_path: Path) -> None:
    fake(tmp_path / "bin" / "python3.12", BROKEN_SHIM)
    fake(tmp_path / "bin" / "python3.13", NO_ENSUREPIP)
    real(tmp_path / "bin" / "python3")
    result = find_python(tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert Path(result.stdout.strip()).samefile(sys.executable)


@pytest.mark.parametrize("given", ["home", "PYENV_ROOT"])
def test_find_python_looks_into_pyenv(tmp_path: Path, given: str) -> None:
    fake(tmp_path / "bin" / "python3.12", BROKEN_SHIM)
    fake(tmp_path / "bin" / "python3", TOO_OLD)
    root = tmp_path / (".pyenv" if given == "home" else "a folder")
    fake(root / "versions" / "3.11.7" / "bin" / "python", "echo usable: never")
    fake(root / "versions" / "3.12.0" / "bin" / "python", NO_ENSUREPIP)
    real(root / "versions" / "3.12.1" / "bin" / "python")
    result = find_python(tmp_path, **({} if given == "home" else {"PYENV_ROOT": str(root)}))
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).samefile(sys.executable)


def test_find_python_takes_the_one_that_is_asked_for(tmp_path: Path) -> None:
    fake(tmp_path / "bin" / "python3.12", "echo usable: another")
    assert find_python(tmp_path).stdout == "another\n"
    asked = real(tmp_path / "a folder" / "python")
    assert Path(find_python(tmp_path, PYTHON=str(asked)).stdout.strip()).samefile(sys.executable)
    old = fake(tmp_path / "old", TOO_OLD)
    result = find_python(tmp_path, PYTHON=str(old))
    assert result.stdout == "another\n"
    assert f"PYTHON={old} cannot be used (is Python 3.11)" in result.stderr


def test_find_python_says_what_was_tried(tmp_path: Path) -> None:
    fake(tmp_path / "bin" / "python3.12", BROKEN_SHIM)
    fake(tmp_path / "bin" / "python3.13", NO_ENSUREPIP)
    fake(tmp_path / "bin" / "python3", TOO_OLD)
    result = find_python(tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    for part in (
        "python3.12: pyenv: python3.12: command not found",
        "python3.13: lacks the module ensurepip (on Debian and Ubuntu: apt install python3.12-venv)",
        "python3: is Python 3.11",
        "python3.14: not on PATH",
        "PYTHON=/path/to/python3.12",
    ):
        assert part in result.stderr


# a Python whose -m venv makes one whose -m pip does as $PIP says; all steps are written to $LOG
FAKE_PYTHON = """case "$*" in
"-m venv .venv") echo venv >>"$LOG"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
"-m pip install"*) echo pip >>"$LOG"; eval "$PIP" ;;
"-c"*) echo "usable: $0" ;;
esac"""


class Project:
    """A copy of what the set-up needs, with a Python that only pretends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "a project", folder / "log"
        (self.folder / "scripts").mkdir(parents=True)
        for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "scripts/find_python", "scripts/make_venv"):
            shutil.copy(REPOSITORY / name, self.folder / name)
        self.python = fake(folder / "python", FAKE_PYTHON)

    def set_up(self, pip: str = "true") -> tuple[int, list[str]]:
        """Exit status and the steps that it took."""
        self.log.write_text("")
        environment = os.environ | {"PYTHON": str(self.python), "LOG": str(self.log), "PIP": pip}
        script = self.folder / "scripts" / "make_venv"
        result = subprocess.run([script], env=environment, capture_output=True, cwd=self.folder.parent)
        return result.returncode, self.log.read_text().split()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_set_up_once(project: Project) -> None:
    assert project.set_up() == (0, ["venv", "pip"])
    assert project.set_up() == (0, [])


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml", "constraints.txt"])
def test_set_up_again_when_its_files_change(project: Project, name: str) -> None:
    project.set_up()
    with (project.folder / name).open("a") as file:
        file.write("\n# changed\n")
    assert project.set_up() == (0, ["pip"])
    assert project.set_up() == (0, [])


@pytest.mark.parametrize("pip", ["kill -9 $PPID", "exit 1"])
def test_cut_set_up_is_made_again(project: Project, pip: str) -> None:
    status, _ = project.set_up(pip)
    assert status != 0
    assert project.set_up() == (0, ["venv", "pip"])


def test_broken_venv_is_made_again(project: Project) -> None:
    project.set_up()
    fake(project.folder / ".venv" / "bin" / "python", "exit 1")
    assert project.set_up() == (0, ["venv", "pip"])
    (project.folder / ".venv" / "bin" / "python").unlink()
    assert project.set_up() == (0, ["venv", "pip"])


def test_moved_project_is_installed_again(project: Project) -> None:
    project.set_up()
    project.folder = project.folder.rename(project.folder.with_name("elsewhere"))
    assert project.set_up() == (0, ["pip"])
