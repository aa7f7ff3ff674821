"""The folder of a pack: configs of its members, one metrics file, checkpoints; and its members as folders of runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_jax import checksums
from qlora_jax.checksums import Input
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

    Args:
      plains: the members' configs (settings.resolved).
      say: takes lines for the user.
    Raises:
      InputError: it is another pack's or in use, two members are one config, or no checkpoint in it is whole.
    """

    def __init__(self, path: Path, plains: Sequence[dict[str, Any]], say: Callable[[str], None]):
        self.path, self._plains, self._say = path, plains, say
        self.hashes = [config_hash(plain) for plain in plains]
        for place, name in enumerate(self.hashes):
            if (first := self.hashes.index(name)) != place:
                raise InputError(f"members {first} and {place} of the pack are one config; give each once")
        self._workdir = Workdir(path, {"members": len(plains), "pack": config_hash({"members": self.hashes})})
        try:
            self.checkpoints = Checkpoints(self._workdir.checkpoints, plains[0]["train"]["keep_checkpoints"], say)
        except InputError:
            self._workdir.close()
            raise
        if self.checkpoints.latest is not None:
            self._workdir.go_on(say)

    def begin(self, inputs: Sequence[dict[str, Input]]) -> None:
        """Writes down what the pack is, once it is known what each member's names of files stand for.

        Raises InputError where that is not what it was at the newest checkpoint.
        """
        self._workdir.check(_together(inputs), self._say)
        self._workdir.begin(self._say)
        write_json(self.path / "members.json", self._plains)

    @property
    def workdir(self) -> Workdir:
        return self._workdir

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
                arrays = [*(array for pair in result.adapter.values() for array in pair), *result.head.values()]
                if all(first_not_finite(array) is None for array in arrays):
                    adapter, head = result.adapter, result.head
                    write_arrays(folder / "adapter", adapter, result.lora, result.base, kind=result.kind, head=head)
                write_json(folder / "summary.json", result.summary)

    def close(self) -> None:
        self.checkpoints.settle()
        self._workdir.close()


def _together(inputs: Sequence[dict[str, Input]]) -> dict[str, Input]:
    """The inputs of all members as those of one run."""
    found = {}
    for key in dict.fromkeys(key for own in inputs for key in own):
        each = [own.get(key, Input("", [])) for own in inputs]
        parts = dict.fromkeys(part for one in each for part in one.parts)
        found[key] = Input(checksums.of(*(one.content for one in each)), list(parts))
    return found
