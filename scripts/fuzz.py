#!/usr/bin/env python
"""Hostile files for every reader of strangers' files: accepted, or refused in one line, in bounded time and memory.

    python scripts/fuzz.py --inputs=1000000              all readers, in shares
    python scripts/fuzz.py --reader=template --seconds=60
    python scripts/fuzz.py --list

An input is a function of reader, seed and number (tests/fuzz/mutate.py); what is held of it stands in
tests/fuzz/trial.py and fence.py. Readers run in a process of their own: one that crashes it, hangs, or takes too much
memory is a failure as any. The first input of each cause is kept in tests/fuzz/corpus, which `make test` reads again.
"""

import argparse
import hashlib
import json
import logging
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.fuzz import mutate  # noqa: E402
from tests.fuzz.readers import READERS  # noqa: E402
from tests.fuzz.trial import Bench, Failure, bound_memory, set_bounds  # noqa: E402

CORPUS = REPOSITORY / "tests" / "fuzz" / "corpus"
HANG = 30.0  # seconds of the processor on one input, after which its process is ended
_ROOM = 2**22  # bytes of an input
_HEAD = struct.Struct("qqqqq")  # number, length, tried, accepted, refused
_MOST_KEPT = 200_000  # bytes of an input that is kept


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--reader", action="append", choices=sorted(READERS), help="one of --list; again for more")
    flags.add_argument("--inputs", type=int, default=100_000, help="in all, over the readers by their shares")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--seconds", type=float, default=0, help="of each reader at most; 0 is no bound")
    flags.add_argument("--out", type=Path, help="a JSON file of what was counted")
    flags.add_argument("--list", action="store_true")
    given = flags.parse_args()
    names = given.reader or list(READERS)
    if given.list:
        print("\n".join(READERS))
        return 0
    whole, found, failed = sum(READERS[name].share for name in names), {}, 0
    warm()
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        for name in names:
            inputs = -int(-given.inputs * READERS[name].share // whole)
            counted = Campaign(name, root, given.seed, inputs, given.seconds).run()
            found[name] = counted
            failed += counted["failures"]
            print(
                f"{name}: {counted['inputs']:,} inputs, {counted['inputs'] / counted['seconds']:,.0f}/s, "
                f"{counted['accepted']:,} accepted, {counted['refused']:,} refused, {counted['failures']} failures",
                flush=True,
            )
            if given.out:
                given.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"{sum(each['inputs'] for each in found.values()):,} inputs in all, {failed} failures")
    return 1 if failed else 0


def warm() -> None:
    """Imports what readers import late, so that no child has to; warnings of readers are not shown."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import sentencepiece  # noqa: F401
    import tokenizers  # noqa: F401

    import configs.base  # noqa: F401
    import qlora_jax.data.detect
    import qlora_jax.io.write
    import qlora_jax.report.source
    import qlora_jax.text.tokenizer
    import qlora_jax.train.checks  # noqa: F401


class Campaign:
    """Inputs for one reader, in a child that is made anew where one ends it."""

    def __init__(self, name: str, root: Path, seed: int, inputs: int, seconds: float):
        self.name, self._root, self._seed, self._inputs, self._seconds = name, root, seed, inputs, seconds
        self._shared = mmap.mmap(-1, _HEAD.size + _ROOM)
        self._kinds: set[str] = set()
        self._counted = {"inputs": 0, "accepted": 0, "refused": 0, "failures": 0}

    def run(self) -> dict[str, float]:
        begun, first = time.monotonic(), 0
        while first < self._inputs and not self._is_over(begun):
            _HEAD.pack_into(self._shared, 0, first, 0, 0, 0, 0)
            report, its = os.pipe()
            child = os.fork()
            if not child:
                os.close(report)
                self._child(its, first, begun)
            os.close(its)
            with os.fdopen(report, "rb") as lines:
                ended = self._watch(child)
                for line in lines:
                    said = json.loads(line)
                    data = (self._root / f"{self.name}-{said['number']}").read_bytes()
                    self._fail(Failure(said["kind"], said["text"]), said["number"], data)
            number, length, tried, accepted, refused = _HEAD.unpack_from(self._shared)
            for key, more in (("inputs", tried), ("accepted", accepted), ("refused", refused)):
                self._counted[key] += more
            first = number + 1
            if ended:
                self._counted["inputs"] += 1
                self._fail(Failure(ended, ended), number, self._shared[_HEAD.size : _HEAD.size + length])
        return self._counted | {"seconds": round(time.monotonic() - begun, 1)}

    def _is_over(self, begun: float) -> bool:
        return bool(self._seconds) and time.monotonic() - begun > self._seconds

    def _child(self, report: int, first: int, begun: float) -> None:
        """Never returns."""
        status = 9
        try:
            reader = READERS[self.name]
            good = reader.seeds()
            bench = Bench(self.name, self._root)
            bound_memory()
            set_bounds()
            for tried, number in enumerate(range(first, self._inputs), 1):
                rng = mutate.rng_of(self.name, self._seed, number)
                data = reader.change(rng, rng.choice(good))[:_ROOM]
                self._shared[_HEAD.size : _HEAD.size + len(data)] = data
                _HEAD.pack_into(self._shared, 0, number, len(data), tried - 1, bench.accepted, bench.refused)
                failure = bench.trial(data)
                if failure is not None and (failure.kind not in self._kinds or failure.kind == "slow"):
                    self._kinds.add(failure.kind)
                    (self._root / f"{self.name}-{number}").write_bytes(data)
                    said = {"kind": failure.kind, "text": failure.text, "number": number}
                    os.write(report, json.dumps(said).encode()[:4000] + b"\n")
                _HEAD.pack_into(self._shared, 0, number, len(data), tried, bench.accepted, bench.refused)
                if not tried % 64 and self._is_over(begun):
                    break
            status = 0
        except BaseException as error:
            print(f"{self.name}: the fuzzer itself failed: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)

    def _watch(self, child: int) -> str:
        """Waits for the child; what ended it otherwise than well."""
        at, begun = -1, 0.0
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                if os.WIFSIGNALED(status):
                    return f"crash {signal.Signals(os.WTERMSIG(status)).name}"
                if os.WEXITSTATUS(status):
                    raise SystemExit(f"{self.name}: its process ended with status {os.WEXITSTATUS(status)}")
                return ""
            if (now := _HEAD.unpack_from(self._shared)[0]) != at:
                at, begun = now, _seconds_of(child)
            elif _seconds_of(child) - begun > HANG:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "hang"
            time.sleep(0.05)

    def _fail(self, failure: Failure, number: int, data: bytes) -> None:
        """Counts a failure, says it and keeps the first input of its kind."""
        self._counted["failures"] += 1
        self._kinds.add(failure.kind)
        print(f"  {self.name} input {number}: {failure.text[:400]}", flush=True)
        if len(data) <= _MOST_KEPT:
            file = CORPUS / self.name / hashlib.sha256(data).hexdigest()[:12]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def _seconds_of(process: int) -> float:
    """Of the processor, that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
