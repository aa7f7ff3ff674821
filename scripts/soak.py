#!/usr/bin/env python
"""A small training run, killed at random moments again and again, and other faults: what a run promises, it keeps.

    python scripts/soak.py --kills=200

Each run has 24 steps of a random Llama (NF4, paged_adamw, dropout, evaluation, a checkpoint every 1 to 3 steps). Held
of each attempt and each run's end (tests/soak/checks.py): no whole checkpoint is ever lost, an attempt goes on from the
newest one, and in the end adapter, metrics and summary are those of a run that nothing interrupted, bit for bit.
Between kills: SIGTERM, a byte flipped in the newest checkpoint, a row of the data changed, a second run in the same
folder, a disk that fills up.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.soak import checks  # noqa: E402
from tests.soak.attempts import (  # noqa: E402
    DONE,
    REFUSED,
    STEPS,
    STOPPED,
    Attempt,
    config_of,
    make_inputs,
    step_rows,
    warm,
)

DISK = 2**24  # bytes of the small disk that runs are on, where one can be mounted

_NOT_READ = "commit_success.txt"  # orbax looks whether it is there, and nobody at what it says

def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=200, help="by SIGKILL and SIGTERM together")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", type=Path, help="a JSON file of what was counted")
    flags.add_argument("--no_disk", action="store_true", help="mount no small disk")
    given = flags.parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "QLORA_JAX_CACHE": str(root / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    }  # fmt: skip
    warm()
    soak = Soak(root, random.Random(given.seed), with_disk=not given.no_disk)
    try:
        counted = soak.run(given.kills)
    except AssertionError as error:
        print(f"FAILED after {dict(soak.counts)}: {error}; the folders are left in {root}")
        return 1
    finally:
        soak.close()
    print(json.dumps(counted, indent=1))
    if given.out:
        given.out.write_text(json.dumps(counted, indent=1) + "\n")
    shutil.rmtree(root)
    return 0


class Soak:
    """Runs, and what happens to them."""

    def __init__(self, root: Path, rng: random.Random, with_disk: bool):
        self.root, self.rng, self.counts = root, rng, collections.Counter()
        self.lost: collections.Counter[int] = collections.Counter()  # steps done again after a kill -> kills
        make_inputs(root)
        self.rows = (root / "rows.jsonl").read_bytes()
        self.place, self.mounted = root / "runs", False
        self.place.mkdir()
        if with_disk:
            command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.place)]
            self.mounted = not subprocess.run(command, capture_output=True).returncode
        self.reference = root / "reference"
        self._finish(Attempt(config_of(root, 2), self.reference, root / "out"))
        begun = time.monotonic()  # once more with compiled programs: how long an attempt takes
        again = root / "again"
        self._finish(Attempt(config_of(root, 2), again, root / "out"))
        self.seconds = time.monotonic() - begun
        checks.check_finished(again, self.reference, 0)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.place)], check=True)

    def run(self, kills: int) -> dict[str, object]:
        begun = time.monotonic()
        while self.counts["SIGKILL"] + self.counts["SIGTERM"] < kills:
            self._one_run(min(self.rng.randint(4, 12), kills - self.counts["SIGKILL"] - self.counts["SIGTERM"]))
            print(f"{time.monotonic() - begun:.0f} s: {dict(self.counts)}", flush=True)
        return {
            **self.counts, "steps done again, by kill": dict(sorted(self.lost.items())),
            "seconds": round(time.monotonic() - begun),
            "seconds of a run that nothing interrupts": round(self.seconds, 1),
        }  # fmt: skip

    def _one_run(self, kills: int) -> None:
        """One run from its beginning to its end, with so many kills between."""
        self.workdir, self.aside = self.place / "run", 0
        self.every = self.rng.randint(1, 3)
        self.config = config_of(self.root, self.every)
        for _ in range(kills):
            self._killed()
            if self.rng.random() < 0.4:
                self.rng.choice((self._flip, self._change_data, self._second, self._fill))()
        self._finish(self._start())
        checks.check_finished(self.workdir, self.reference, self.aside)
        self.counts["runs"] += 1
        shutil.rmtree(self.workdir)

    def _start(self, **more: object) -> Attempt:
        return Attempt(self.config, self.workdir, self.root / "out", **more)  # type: ignore[arg-type]

    def _finish(self, attempt: Attempt) -> None:
        newest = checks.newest_whole(attempt.workdir)
        status = attempt.wait()
        assert status == DONE, f"an attempt ended with {status}: {attempt.said()[-1500:]}"
        at = checks.resumed_at(attempt.said())
        assert (at or 0) == newest, f"it went on from {at}, the newest whole checkpoint was {newest}"

    def _killed(self) -> None:
        """An attempt that is killed somewhere: at any moment of an attempt's length, or soon after some step."""
        before, done = checks.newest_whole(self.workdir), len(step_rows(self.workdir))
        attempt = self._start()
        by = signal.SIGTERM if self.rng.random() < 0.2 else signal.SIGKILL
        if self.rng.random() < 0.3:
            until = time.monotonic() + self.rng.uniform(0, self.seconds)
            while attempt.poll_alive() and time.monotonic() < until:
                time.sleep(0.002)
        else:
            wanted = min(max(done, before) + self.rng.randint(0, 6), STEPS)
            while attempt.poll_alive() and attempt.steps() < wanted:
                time.sleep(0.005)
            time.sleep(self.rng.uniform(0, 0.08))
        if attempt.poll_alive():
            attempt.kill(by)
        status = attempt.wait(120)
        reached, newest = len(step_rows(self.workdir)), checks.newest_whole(self.workdir)
        at = checks.resumed_at(attempt.said())
        assert at is None or at == before, f"it went on from {at}, the newest whole checkpoint was {before}"
        assert newest >= before, f"the checkpoint of step {before} is lost, the newest whole one is {newest}"
        if status == DONE:  # it was faster
            self.counts["ended before its kill"] += 1
            return
        assert status in (-by, STOPPED), f"an attempt ended with {status}: {attempt.said()[-1500:]}"
        if status == STOPPED:
            assert newest == reached, f"SIGTERM after step {reached} saved step {newest}"
            self.counts["SIGTERM that saved"] += 1
        lost = max(0, reached - newest)
        # one checkpoint may be on its way to the disk when the next is due
        assert lost <= 2 * self.every, f"{lost} steps are lost with a checkpoint every {self.every}"
        self.lost[lost] += 1
        self.counts[by.name] += 1

    def _refused(self, attempt: Attempt, *words: str) -> None:
        """One line, nothing lost."""
        newest = checks.newest_whole(self.workdir)
        status, said = attempt.wait(120), attempt.said()
        assert status == REFUSED, f"expected a refusal, found status {status}: {said[-1500:]}"
        line = [line for line in said.splitlines() if line.startswith("error: ")][-1]
        assert all(word in line for word in words) and "Traceback" not in said, f"refused with: {said[-1500:]}"
        assert checks.newest_whole(self.workdir) >= newest, "a checkpoint is lost"

    def _flip(self) -> None:
        """A bit of the newest checkpoint: the one before is taken, or, without one, nothing."""
        newest = checks.newest_whole(self.workdir)
        if not newest:
            return
        folder = self.workdir / "checkpoints" / str(newest) / "default"
        meant = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _NOT_READ]
        file = self.rng.choice([path for path in meant if path.stat().st_size])
        good = file.read_bytes()
        bad = bytearray(good)
        bad[self.rng.randrange(len(bad))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(bad)
        self.counts["flipped bits"] += 1
        before = checks.newest_whole(self.workdir)
        assert before != newest, "the check does not see a flipped bit"
        if not before:
            self._refused(self._start(), "no checkpoint in", "can be used")
            file.write_bytes(good)
            return
        attempt = self._start()
        while attempt.poll_alive() and checks.resumed_at(attempt.said()) is None:
            time.sleep(0.01)
        if attempt.poll_alive():
            attempt.kill(signal.SIGKILL)
        attempt.wait()
        said = attempt.said()
        assert checks.resumed_at(said) == before and "set aside as" in said, (
            f"after {file} was damaged, at {before}: {said[-1500:]}"
        )
        self.aside += 1

    def _change_data(self) -> None:
        """A row: the run is refused, and the file named."""
        if not checks.newest_whole(self.workdir):
            return
        (self.root / "rows.jsonl").write_bytes(self.rows.replace(b"sings", b"sinks", self.rng.randint(1, 9)))
        try:
            self._refused(self._start(), "rows.jsonl changed since its checkpoint", "data.path")
        finally:
            (self.root / "rows.jsonl").write_bytes(self.rows)
        self.counts["changed data"] += 1

    def _second(self) -> None:
        """A second run in the same folder while one goes on: refused at once, and the first goes on."""
        first = self._start()
        done = first.steps()
        while first.poll_alive() and first.steps() <= min(done, STEPS - 4):
            time.sleep(0.005)
        begun = time.monotonic()
        second = Attempt(self.config, self.workdir, self.root / "second")
        status = second.wait(60)
        took = time.monotonic() - begun
        was_alive = first.poll_alive()
        if was_alive:
            said = second.said()
            assert status == REFUSED and "is in use by another process" in said, f"status {status}: {said[-800:]}"
            assert took < 20, f"the refusal took {took:.1f} s"
            first.kill(signal.SIGKILL)
            self.counts["second runs"] += 1
        first.wait()

    def _fill(self) -> None:
        """A disk that has room for a part of a checkpoint, or of the lines of metrics."""
        if not self.mounted:
            return
        free = shutil.disk_usage(self.place).free
        leave = self.rng.choice((0, 4096, self.rng.randrange(1, 120_000), 2**20 + self.rng.randrange(1, 60_000)))
        filler = self.place / "filler"
        with filler.open("wb") as file:
            file.write(bytes(max(0, free - leave)))
        looks_first = self.rng.random() < 0.5
        try:
            attempt = self._start(before=(lambda: None) if looks_first else _look_no_more)
            newest = checks.newest_whole(self.workdir)
            status, said = attempt.wait(120), attempt.said()
            assert status in (REFUSED, DONE), f"status {status} on a full disk: {said[-2500:]}"
            assert checks.newest_whole(self.workdir) >= newest, "a checkpoint is lost on a full disk"
        finally:
            filler.unlink()
        self.counts["full disks" if status == REFUSED else "disks that were not full enough"] += 1


def _look_no_more() -> None:
    """So that orbax itself runs into the end of the disk."""
    from qlora_jax.train.checkpoints import Checkpoints

    Checkpoints._check_room = lambda *arguments: None  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
