"""Settings and fixtures of all tests. The tests run on the CPU unless JAX_PLATFORMS says otherwise."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.support import process
from tests import quick_compile

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent

# What a shell starts in the background ignores Ctrl-C, and so would every command that a test starts and interrupts
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# before any test imports jax; as for commands
process.prepare()
# compiled programs are shared by workers, commands and later runs
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# a worker has one core: XLA divides compiling among threads, which costs more altogether (a GPU's step a quarter more)
ONE_THREAD = ("--xla_gpu_force_compilation_parallelism=1", "--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join([*ONE_THREAD, os.environ.get("XLA_FLAGS", "")]).strip()

# tokenized data of this run of the tests alone, shared by its workers and commands
if "QLORA_JAX_CACHE" not in os.environ:
    os.environ["QLORA_JAX_CACHE"] = tempfile.mkdtemp(prefix="qlora_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["QLORA_JAX_CACHE"], ignore_errors=True)

try:
    from hypothesis import settings
except ImportError:  # the tests for a GPU need pytest alone
    pass
else:
    # the same examples on every run, no time limits (the machine may be slow), nothing kept on disk
    settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50, database=None)
    settings.load_profile("tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With -m gpu, folders and files without such tests are not imported: their packages may be missing there."""
    if config.option.markexpr != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("pytest.mark.gpu" in file.read_text() for file in files) else True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `quick_compile` compile without LLVM's optimizations: a gradient in a quarter of the time.

    Before their first fixture, for them and the commands they run. XLA's programs are the same, but machine code may
    round otherwise, so nothing compiled in one way is left for the other.
    """
    wanted = item.get_closest_marker("quick_compile") is not None
    if wanted != quick_compile.is_on():
        quick_compile.switch(wanted)


MOST_MAPS = 20_000  # of a process's memory; Linux gives 65,530, and LLVM aborts the process where there is none left


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Compiled programs, a dozen memory maps each, are dropped in time: a worker compiles thousands."""
    global _tests_done
    _tests_done += 1
    if _tests_done % 8 or "jax" not in sys.modules or not Path("/proc/self/maps").exists():
        return
    with open("/proc/self/maps", "rb") as maps:
        count = sum(1 for _ in maps)
    if count > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


_tests_done = 0


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of files that other software wrote; each comes with the script that made it."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that is no part of the project: $QLORA_JAX_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("QLORA_JAX_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (QLORA_JAX_DATA names another folder)")
    return folder


# What more than one folder's tests share; imported where it is used, for the tests for a GPU need pytest alone.


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory) -> Path:
    """Folder of a tokenizer with one token a byte (tests/byte_tokenizer.py)."""
    from tests.byte_tokenizer import write_byte_tokenizer

    return write_byte_tokenizer(tmp_path_factory.mktemp("byte_tokenizer"))


@pytest.fixture(scope="session")
def byte_tokenizer(byte_folder):
    """The tokenizer of `byte_folder`."""
    from qlora_jax.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(byte_folder)


@pytest.fixture
def tiny_config(golden, tmp_path):
    """A config of six small steps (tests/tiny_run.py)."""
    from tests import tiny_run

    return tiny_run.tiny_config(golden, tmp_path)


@pytest.fixture(scope="session")
def run_commands() -> Callable[[list[list[str]]], list[dict]]:
    """Runs commands in this process, in the repository: each a module's name or a script's path and its arguments.

    Returns {"status": exit status, "out": stdout, "err": stderr} for each.
    """
    from tests.run_commands import run

    return lambda commands: [run(command) for command in commands]


@pytest.fixture(scope="session")
def assert_one_line_error() -> Callable[[dict, list[str]], None]:
    """Checks a result of `run_commands`: exit status 2, nothing on stdout, a last line of stderr that has all words."""

    def check(result: dict, words: list[str]) -> None:
        assert result["status"] == 2 and result["out"] == ""
        last = result["err"].splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in result["err"]
        assert all(word in last for word in words), last

    return check
