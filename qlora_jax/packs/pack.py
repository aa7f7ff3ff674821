"""Packs: many adapters trained at once over one frozen base, each as if it were alone.

    runner = PackRunner()                             # loads a base, reads data and compiles once, for many packs
    results = train_pack(configs, None, print, on_row, runner=runner)
    export_member(results[0], Path("adapter"))

A pack's members share what `pack_key` says. On CPUs they take their steps one after the other inside one program: then
each has the bits of a run of its own, in float32, where its rank and layers are the pack's largest, its batches are as
long as the longest of the step, and all or none drop out; else sums are over more zeros and may round otherwise.
Elsewhere all members' rows go through each product at once: the base is read and dequantized once for all, and sums
round as the device does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_jax import lora
from qlora_jax.checksums import Input
from qlora_jax.errors import InputError
from qlora_jax.io.peft import write_arrays
from qlora_jax.io.peft_config import read_config
from qlora_jax.mesh.axes import Axes
from qlora_jax.optim.schedules import paging
from qlora_jax.packs.files import PackFolder
from qlora_jax.packs.members import PlannedMember, check_equal, learning_rates, pack_key
from qlora_jax.packs.run import MemberResult, PackRun
from qlora_jax.packs.warm import Base, Warm
from qlora_jax.settings import config_hash, resolved
from qlora_jax.train.checks import check_config
from qlora_jax.train.kinds.labels import with_labels
from qlora_jax.train.kinds.pair import check_data, check_kind
from qlora_jax.train.loggers import refuse_loggers
from qlora_jax.train.setup import read_lora_config, start_input, step_count

__all__ = ["MemberResult", "PackRunner", "export_member", "pack_key", "train_pack"]


def train_pack(
    configs: Sequence[Any],
    workdir: Path | None = None,
    say: Callable[[str], None] = print,
    on_row: Callable[[int, dict[str, Any]], None] = lambda member, row: None,
    *,
    runner: "PackRunner | None" = None,
    write_members: bool = False,
) -> list[MemberResult]:
    """Trains one adapter for each config, or goes on where a killed pack stopped.

    Args:
      configs: as configs/base.py, equal in what `pack_key` hashes but for row lengths and having dropout at all.
      workdir: the pack's folder: config.json, members.json (the configs), metrics.jsonl (rows name their member's hash)
        and checkpoints/. None keeps everything in memory.
      say: takes lines for the user.
      on_row: takes (member, row) as training goes; rows are those of a run's metrics.jsonl. `seconds` is a member's
        share of its step.
      runner: keeps bases, data and programs between packs of one process; None makes one for this pack.
      write_members: also write workdir/members/HASH/ as the folder of a finished run.
    Returns:
      A result each, in the order of configs.
    Raises:
      InputError: a mistake in configs, data or model, or members that cannot share a pack.
    """
    return (runner or PackRunner()).train(configs, workdir, say, on_row, write_members)


def export_member(result: MemberResult, out: Path) -> None:
    """Writes a member's adapter as a PEFT folder of its own rank and layers."""
    write_arrays(out, result.adapter, result.lora, result.base, kind=result.kind, head=result.head)


def refuse_paging(optimizer: Any) -> None:
    """Raises InputError where the config's optimizer pages always."""
    if paging(optimizer) == "always":
        raise InputError(
            "optimizer.paging is always (or the optimizer's name says so), but a pack's state stays on the device: "
            "set optimizer.paging=auto and a name without paged_, or train one by one"
        )


def refuse_whole_matrices(lora_config: lora.LoRAConfig, data: Any) -> None:
    """Raises InputError where more than adapters would train."""
    if lora_config.modules_to_save or data.added_tokens or data.added_special_tokens:
        raise InputError(
            "a pack trains adapters alone, but lora.modules_to_save or data.added_tokens train whole matrices: "
            "leave them out, or train such a run by itself (experiments.train)"
        )


def refuse_residual(init_from: str) -> None:
    """Raises InputError where a member would need a base of its own."""
    if init_from and (residual := read_config(Path(init_from)).residual):
        raise InputError(
            f"lora.init_from is {init_from}, whose init_lora_weights is {residual!r}: its base lacks what the adapter "
            "took out, but a pack's members share one base: train such a run by itself (experiments.train)"
        )


def _inputs(base: Base, member: PlannedMember) -> dict[str, Input]:
    """What a member's names of files stand for."""
    init_from = member.config.lora.init_from
    start = {"lora.init_from": start_input(init_from)} if init_from else {}
    return {"model.path": base.input} | member.data.inputs | start


class PackRunner:
    """Trains packs, and keeps what they share: frozen models, tokenized data and compiled programs.

    Args:
      over: how a program goes over members: "map", one after the other, "vmap", all at once, or "auto": map on CPUs.
    """

    def __init__(self, over: str = "auto"):
        self.warm = Warm(over)

    def train(
        self,
        configs: Sequence[Any],
        workdir: Path | None,
        say: Callable[[str], None],
        on_row: Callable[[int, dict[str, Any]], None],
        write_members: bool = False,
    ) -> list[MemberResult]:
        """See train_pack."""
        if write_members and workdir is None:
            raise ValueError("write_members needs a workdir")
        plains = [resolved(config) for config in configs]
        check_equal(plains)
        for config in configs:
            check_config(config)
            refuse_loggers(config.train.loggers)
            Axes.of_one(config.mesh, "a pack trains on")
        refuse_paging(configs[0].optimizer)
        folder = None if workdir is None else PackFolder(workdir, plains, say)
        try:
            base = self.warm.base(configs[0], say)
            members = [self._plan(config, plain, base, say) for config, plain in zip(configs, plains, strict=True)]
            sizes = sorted({member.data.batches.batch_size for member in members})
            if len(sizes) > 1:
                raise InputError(f"the data of a pack's members have batches of {sizes} sequences; expected one size")
            if folder is not None:
                folder.begin([_inputs(base, member) for member in members])
            results = PackRun(self.warm, base, members, folder, say, on_row).finish()
            if folder is not None and write_members:
                folder.write_members(members, results)
            return results
        finally:
            if folder is not None:
                folder.close()

    def _plan(self, config: Any, plain: dict[str, Any], base: Base, say: Callable[[str], None]) -> PlannedMember:
        lora_config = read_lora_config(config.lora, adds_tokens=False, tied=base.sizes.tied)
        refuse_whole_matrices(lora_config, config.data)
        lora_config = with_labels(lora_config, config, base.sizes)
        refuse_residual(config.lora.init_from)
        targets = lora.select_targets(lora_config.targets, base.sizes)
        check_kind(config, base.sizes)
        data, heldout = self.warm.data(config, base, say)
        check_data(data, base.sizes)
        steps = step_count(config, data)
        o = config.optimizer
        rates = learning_rates(o.schedule, o.learning_rate, steps, o.warmup_steps)
        return PlannedMember(
            config, plain, config_hash(plain), lora_config, tuple(targets), data, heldout, steps, rates
        )
