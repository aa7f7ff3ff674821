"""Every input that a reader of strangers' files once failed on, and a few fresh ones: accepted, or refused in one
line."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.errors import InputError
from tests.fuzz import mutate, trial
from tests.fuzz.readers import READERS

CORPUS = Path(__file__).parent / "corpus"
REPOSITORY = CORPUS.parents[2]
FRESH = 8  # inputs of each reader beside those kept


@pytest.fixture(scope="module")
def small_bounds():
    """Of chat templates, as scripts/fuzz.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        trial.set_bounds(patch.setattr)
        yield


@pytest.mark.parametrize("name", READERS)
def test_every_reader_holds(name, tmp_path, small_bounds):
    reader, bench = READERS[name], trial.Bench(name, tmp_path)
    inputs = {file.name: file.read_bytes() for file in sorted((CORPUS / name).glob("*"))}
    seeds = reader.seeds()
    for number in range(FRESH):
        rng = mutate.rng_of(name, 7, number)
        inputs[str(number)] = reader.change(rng, rng.choice(seeds))
    failures = {key: failure for key, data in inputs.items() if (failure := bench.trial(data)) is not None}
    assert not failures


def test_the_corpus_is_of_readers():
    assert {path.name for path in CORPUS.iterdir()} <= READERS.keys()


def reads(data: bytes) -> None:
    raise InputError("a line\nand another \x1b[31m\u2028\ud800")


def test_a_refusal_is_one_line_whatever_it_quotes():
    with pytest.raises(InputError) as error:
        reads(b"")
    assert str(error.value) == r"a line\nand another \x1b[31m\u2028\ud800"
    assert trial.judge(error.value) is True
    long = str(InputError("x" * 10**6))
    assert len(long) < 11_000 and "990,000 letters left out" in long


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("x"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (SystemExit(0), "SystemExit"),
        (ValueError("a\nb"), "ValueError"),
    ],
)
def test_whatever_else_is_raised_is_a_failure(error, kind):
    found = trial.judge(error)
    assert isinstance(found, trial.Failure) and found.kind.startswith(kind)


FENCED = """
import pickle, socket, subprocess, sys
from pathlib import Path
from tests.fuzz.fence import Fence
folder = Path(sys.argv[1])
(folder / "own").write_text("")
(folder / "evil_code.py").write_text("")
fence = Fence(folder)
sys.path.insert(0, str(folder))
def breach(act):
    with fence:
        try:
            act()
        except Exception:
            pass
    return bool(fence.breaches)
acts = [
    lambda: (folder / "own").read_text(),
    lambda: (folder / ".." / "elsewhere").read_text(),
    lambda: open("/etc/passwd"),
    lambda: (folder / "new").write_text("x"),
    lambda: (folder / "own").unlink(),
    lambda: __import__("evil_code"),
    lambda: subprocess.run(["true"]),
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: pickle.loads(b"cos\\nsystem\\n."),
    lambda: exec("1"),
    lambda: (folder / "sub").mkdir(),
    lambda: (folder / "evil_code.py").read_text(),
    lambda: None,
]
print([breach(act) for act in acts])
"""


def test_the_fence_sees_what_it_forbids(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "elsewhere").write_text("")
    found = subprocess.run([sys.executable, "-c", FENCED, folder], capture_output=True, text=True, cwd=REPOSITORY)
    assert found.stdout.strip() == str([False, *[True] * 11, False]), found.stderr
