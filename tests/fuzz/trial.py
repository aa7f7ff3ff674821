"""One input for one reader: whether it was accepted, or refused as it should be; what else it did."""

import dataclasses
import resource
import shutil
import time
import traceback
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from tests.fuzz.fence import Fence
from tests.fuzz.readers import READERS, bait

SLOW = 2.0  # seconds of the processor that no input takes
# Bounds of a chat template here, a hundredth of what they are: what they hold they hold at any number
TEMPLATE_SECONDS, TEMPLATE_LETTERS = 0.1, 2**17
MOST_LETTERS = 20_000  # of a refusal
MOST_BYTES = 3 * 2**30  # of address space that reading may take


def set_bounds(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Makes the bounds of chat templates small."""
    from qlora_jax.text import chat_sandbox, chat_template

    put(chat_sandbox, "SECONDS", TEMPLATE_SECONDS)
    put(chat_sandbox, "LONGEST", TEMPLATE_LETTERS)
    put(chat_template, "LONGEST", TEMPLATE_LETTERS)
    put(chat_sandbox, "ALTOGETHER", 64 * TEMPLATE_LETTERS)


@dataclasses.dataclass(frozen=True)
class Failure:
    """What an input did that it may not. `kind` is the same for failures of one cause."""

    kind: str
    text: str


class Bench:
    """A reader in a folder of its own, under a fence. One a process.

    Warms up by the good inputs, so that what is imported late is there.
    """

    def __init__(self, name: str, root: Path):
        reader, folder = READERS[name], root / name
        shutil.rmtree(folder, ignore_errors=True)
        bait(folder)
        self._read = reader.make(folder)
        self._file = folder / reader.file if reader.file else None
        self.accepted = self.refused = 0
        good = 0
        for seed in reader.seeds():
            self._put(seed)
            error = outcome(self._read, seed)
            good += error is None
            if isinstance(judge(error), Failure):
                raise AssertionError(f"{name}: a good input fails") from error
        assert good, f"{name}: no good input is accepted: {error}"
        self._fence = Fence(folder, write=reader.writes)

    def _put(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write_bytes(data)

    def trial(self, data: bytes) -> Failure | None:
        self._put(data)
        begun = time.perf_counter()
        with self._fence:
            error = outcome(self._read, data)
        found = judge(error)
        took = 0.0
        if time.perf_counter() - begun > SLOW:  # the machine may have been busy: once more, by the processor's clock
            begun = time.process_time()
            outcome(self._read, data)
            took = time.process_time() - begun
        if self._fence.breaches:
            breach = self._fence.breaches[0]
            return Failure(f"breach {breach.partition(' ')[0]}", breach)
        if isinstance(found, Failure):
            return found
        if took > SLOW:
            return Failure("slow", f"{took:.1f} s")
        self.refused += found
        self.accepted += not found
        return None


def outcome(read: Callable[[bytes], Any], data: bytes) -> BaseException | None:
    """What the reader raises; None where it accepts the input."""
    try:
        read(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a library in Rust panics beside Exception
        return error
    return None


def judge(error: BaseException | None) -> bool | Failure:
    """Whether an input was refused as it should be; a Failure where something else came of it."""
    if error is None:
        return False
    if isinstance(error, InputError):
        return _unfit(str(error)) or True
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/qlora_jax/" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return Failure(f"{type(error).__name__} at {where}", f"{type(error).__name__} at {where}: {str(error)[:300]}")


def _unfit(message: str) -> Failure | None:
    """A refusal is one line that any terminal can show."""
    if len(message) > MOST_LETTERS:
        return Failure("long refusal", f"{len(message)} letters: {message[:200]!r}")
    if not message or len(message.splitlines()) != 1:
        return Failure("lines", repr(message[:300]))
    if wrong := [letter for letter in message if unicodedata.category(letter) in ("Cc", "Cs")]:
        return Failure("control character", f"{wrong[0]!r} in {message[:300]!r}")
    return None


def bound_memory() -> None:
    """From here on this process takes no more than MOST_BYTES more of address space."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))
