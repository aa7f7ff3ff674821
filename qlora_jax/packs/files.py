"""The folder of a pack: configs of its members, one metrics file, checkpoints; and its members as folders of runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.files import atomic_folder, write_json
from qlora_jax.finite import first_not_finite
from qlora_jax.io.peft import write_arrays
from qlora_jax.packs.members import PlannedMember
from qlora_jax.settings import config_hash
from qlora_jax.train.checkpoints import Checkpoints
from qlora_jax.train.workdir import Workdir


class PackFolder:
    """Opens (or makes) the folder and holds it: config.json names the pack, members.json has its configs.

    Raises InputError where it is another pack's or in use, or where two members are one config.
    """

    def __init__(self, path: Path, members: Sequence[PlannedMember]):
        self.path, self.hashes = path, [member.hash for member in members]
        for place, name in enumerate(self.hashes):
            if (first := self.hashes.index(name)) != place:
                raise InputError(f"members {first} and {place} of the pack are one config; give each once")
        self._workdir = Workdir(path, {"members": len(members), "pack": config_hash({"members": self.hashes})})
        write_json(path / "members.json", [member.plain for member in members])
        self.checkpoints = Checkpoints(self._workdir.checkpoints, members[0].config.train.keep_checkpoints)

    def rows_until(self, step: int) -> list[tuple[int, dict[str, Any]]]:
        """(member, row) of the steps up to `step`; later ones are dropped from the file."""
        self._workdir.keep_metrics_until(step)
        places = {name: index for index, name in enumerate(self.hashes)}
        rows = self._workdir.metrics()
        return [(places[row.pop("member")], row) for row in rows if row.get("member") in places]

    def log(self, member: int, row: dict[str, Any]) -> None:
        self._workdir.log({"member": self.hashes[member]} | row)

    def write_members(self, members: Sequence[PlannedMember], results: Sequence[Any]) -> None:
        """members/HASH/ with config.json, metrics.jsonl, adapter/ and summary.json, each whole or not at all.

        No adapter of a member whose last update spoiled it.
        """
        for member, result in zip(members, results, strict=True):
            with atomic_folder(self.path / "members" / member.hash) as folder:
                write_json(folder / "config.json", member.plain)
                lines = "".join(json.dumps(row) + "\n" for row in result.rows)
                (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
                if all(first_not_finite(array) is None for pair in result.adapter.values() for array in pair):
                    write_arrays(folder / "adapter", result.adapter, result.lora, result.base)
                write_json(folder / "summary.json", result.summary)

    def close(self) -> None:
        self.checkpoints.settle()
        self._workdir.close()
