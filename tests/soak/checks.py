"""What must hold of a run's folder, whatever ended the attempts at it. Knows nothing of how the library looks at it."""

import json
import re
from pathlib import Path

import xxhash

from tests.soak.attempts import STEPS, step_rows

# all that a run's folder may hold in the end
_FILES = {".lock", "config.json", "inputs.json", "cut.json", "metrics.jsonl", "summary.json", "adapter", "checkpoints"}
_MEASURED = ("seconds",)


def is_whole(checkpoint: Path) -> bool:
    """Whether each file has the checksum that the checkpoint's list states."""
    item = checkpoint / "default"
    try:
        sums = json.loads((item / "checksums.json").read_text())
        return bool(sums) and all(
            xxhash.xxh3_128((item / name).read_bytes()).hexdigest() == x for name, x in sums.items()
        )
    except (OSError, ValueError):
        return False


def newest_whole(workdir: Path) -> int:
    """Its step; 0 where there is none."""
    found = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit() and is_whole(path)]
    return max((int(path.name) for path in found), default=0)


def resumed_at(said: str) -> int | None:
    """The step that an attempt said it goes on from: 0 for a fresh start, None where it did not come so far."""
    found = re.search(r"run: (?:resumed|finished: its files are written again), (\d+) of", said)
    return int(found[1]) if found else None


def losses(workdir: Path) -> list[tuple]:
    """All lines of metrics.jsonl without what is measured of the machine."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [tuple((key, value) for key, value in row.items() if key not in _MEASURED) for row in rows]


def adapter(workdir: Path) -> bytes:
    return (workdir / "adapter" / "adapter_model.safetensors").read_bytes()


def check_finished(workdir: Path, reference: Path, set_aside: int) -> None:
    """A run that ended is the uninterrupted one, bit for bit, and left nothing lying about."""
    assert [row["step"] for row in step_rows(workdir)] == list(range(1, STEPS + 1)), "steps are missing, or there twice"
    assert losses(workdir) == losses(reference), "metrics are not those of the uninterrupted run"
    assert adapter(workdir) == adapter(reference), "the adapter is not that of the uninterrupted run"
    mine, its = (json.loads((folder / "summary.json").read_text()) for folder in (workdir, reference))
    for key in ("steps", "final_train_loss", "final_eval_loss", "base_bytes", "trainable_params"):
        assert mine[key] == its[key], f"summary.json: {key} is {mine[key]}, not {its[key]}"
    left = {path.name for path in workdir.iterdir()} - _FILES
    assert not left, f"left behind in the folder: {left}"
    kept = [path.name for path in (workdir / "checkpoints").iterdir()]
    strange = [name for name in kept if not name.isdigit()]
    assert len(strange) == set_aside and all("set_aside" in name for name in strange), f"left behind: {strange}"
    assert str(STEPS) in kept and len(kept) - len(strange) <= 3, f"checkpoints {kept}"
    beside = [path.name for path in workdir.parent.iterdir() if path.name.startswith(f".{workdir.name}")]
    assert not beside, f"left behind beside the folder: {beside}"
