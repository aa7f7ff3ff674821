"""One pack from its newest checkpoint to its end: calls of a few steps each, rows, evaluation, results."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax import lora
from qlora_jax.finite import first_not_finite
from qlora_jax.io.adapters.head import read_head
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.kind import Kind
from qlora_jax.packs import members as pack_members
from qlora_jax.packs.files import PackFolder
from qlora_jax.packs.members import PlannedMember
from qlora_jax.packs.step import MemberState, Steps, initial_optimizer
from qlora_jax.packs.warm import Base, Warm
from qlora_jax.train.cut import Cut, choose, default_cut, described
from qlora_jax.train.kinds.pair import limit_rows, row_limits
from qlora_jax.train.memory import memory_limit, peak_device_bytes, peak_host_bytes
from qlora_jax.train.setup import read_start, rows_to_cut

STEPS_A_CALL = 16  # at most
CALL_SECONDS = 1.0  # what a call is meant to take: rows come out, and checkpoints are due, between calls


@dataclasses.dataclass(frozen=True, eq=False)
class MemberResult:
    """What came of a member."""

    config_hash: str
    status: str  # done | not_finite: stopped before the update that would have spoiled it, or spoiled by the last one
    reason: str | None  # of not_finite, with its step
    summary: dict[str, Any]  # as a run's summary.json, with final_eval_accuracy, status and members (of the pack)
    rows: list[dict[str, Any]]  # as a run's metrics.jsonl
    adapter: dict[str, tuple[np.ndarray, np.ndarray]]  # {"self_attn.q_proj": (A [L, R, I], B [L, O, R])}
    lora: LoRAConfig
    base: str  # path or name of the frozen model
    kind: Kind  # of it
    head: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of an encoder, as lora.head_arrays has it


class PackRun:
    """State of a pack under way; see train_pack."""

    def __init__(
        self,
        warm: Warm,
        base: Base,
        members: Sequence[PlannedMember],
        folder: PackFolder | None,
        say: Callable[[str], None],
        on_row: Callable[[int, dict[str, Any]], None],
    ):
        self.base, self.members, self.folder, self.say, self.on_row = base, members, folder, say, on_row
        self.config = members[0].config
        self.rows: list[list[dict[str, Any]]] = [[] for _ in members]
        self.stopped: dict[int, dict[str, Any]] = {}  # member -> row that says why
        self.step_seconds = 0.0  # of the last call, a step
        # where an idle place costs nothing, packs of any size share a few programs
        self.slots = 1 << (len(members) - 1).bit_length() if warm.over == "map" else len(members)
        self.settings = pack_members.stacked_settings(members, self.slots)
        self.limits = row_limits(base.sizes, [member.config.data for member in members])
        model = self._stacked_model()
        _, adapter, self.frozen = lora.split(model)
        self.state = MemberState(
            adapter, initial_optimizer(self.config.optimizer, adapter), jax.numpy.ones(self.slots, bool)
        )
        side_by_side = self.slots if warm.over == "vmap" else 1
        self.cut = self._choose_cut(side_by_side)
        model.remat = self.cut.remat
        graph = lora.split(model)[0]
        has_dropout = any(member.lora.dropout for member in members)
        labels, targets = members[0].lora.labels, pack_members.all_targets(members, base.sizes)
        structure = (base.key, self.rank, targets, labels, *self.limits.items())
        self.train_program, self.eval_program = warm.programs(
            structure, graph, self.cut.remat, self.config, has_dropout
        )

    def finish(self) -> list[MemberResult]:
        every, saving = self.config.eval.every, self.config.train.checkpoint_every
        step = self._resume()
        if every and step == 0:
            self._log_evaluation(0)
        last = max(member.steps for member in self.members)
        while step < last and any(self._trains(member, step) for member in range(len(self.members))):
            step += self._advance(step, self._limit(step, last))
            if every and step % every == 0:
                self._log_evaluation(step)
            if self.folder is not None and (step % saving == 0 or step == last):
                self._save(step)
        return self._results()

    @property
    def rank(self) -> int:
        return max(member.lora.rank for member in self.members)

    def _choose_cut(self, side_by_side: int) -> Cut:
        """How each member's rows are cut: as the pack's folder says if it goes on, else the fastest that should fit."""
        longest = max(member.data.batches.max_length for member in self.members)
        largest = dataclasses.replace(self.members[0].lora, rank=self.rank)
        to_cut = rows_to_cut(self.config, self.base.sizes, largest, self.members[0].data)._replace(T=longest)
        if not to_cut.is_open:
            return default_cut(to_cut)
        adapter, state = _bytes(self.state.adapter), _bytes(self.state.optimizer)
        held = self.base.bytes + (3 if self.slots > 1 else 2) * adapter + state  # a pack's program holds one more copy
        kept = None if self.folder is None else self.folder.workdir.kept_cut(to_cut, self.say)
        choice = kept or choose(to_cut, held, memory_limit(), members=side_by_side)
        self.say(described(to_cut, choice))
        if self.folder is not None:
            self.folder.workdir.keep_cut(to_cut, choice)
        return choice.cut

    def _stacked_model(self) -> Decoder:
        """The model with the adapters of all members, [slots, L, ...]."""
        model = self.base.model()
        limit_rows(model, self.limits)
        names = pack_members.all_targets(self.members, model.config)
        own = [
            read_start(model, Path(member.config.lora.init_from), member.lora).arrays
            if member.config.lora.init_from
            else lora.fresh_adapter(model, member.lora, jax.random.key(member.config.train.seed))
            for member in self.members
        ]
        own += [{}] * (self.slots - len(own))
        each = [pack_members.padded(arrays, model.config, names, self.rank) for arrays in own]
        for name in names:
            a, b = (jax.numpy.asarray(np.stack([arrays[name][i] for arrays in each])) for i in range(2))
            lora.set_adapter(model, name, a, b, 1.0)
        if self.members[0].lora.labels:
            heads = [self._start_of_head(model, member) for member in self.members]
            heads += [heads[0]] * (self.slots - len(heads))
            lora.train_head(model, {name: jax.numpy.stack([head[name] for head in heads]) for name in heads[0]})
        return model

    def _start_of_head(self, model: Decoder, member: PlannedMember) -> dict[str, jax.Array]:
        if start := member.config.lora.init_from:
            return {name: jax.numpy.asarray(value) for name, value in read_head(model.config, Path(start)).items()}
        return lora.start_of_head(model, member.lora.labels, jax.random.key(member.config.train.seed))

    def _trains(self, member: int, step: int) -> bool:
        return member not in self.stopped and step < self.members[member].steps

    def _limit(self, step: int, last: int) -> int:
        """The step that the next call must not go beyond."""
        due = [last]
        if self.config.eval.every:
            due.append((step // self.config.eval.every + 1) * self.config.eval.every)
        if self.folder is not None:
            saving = self.config.train.checkpoint_every
            due.append((step // saving + 1) * saving)
        few = 1 if not self.step_seconds else max(1, int(CALL_SECONDS / self.step_seconds))
        return min(*due, step + min(few, STEPS_A_CALL))

    def _advance(self, first: int, limit: int) -> int:
        """Steps from `first` on, all of batches of one length, to `limit` at most. Returns how many were taken."""
        batches: dict[tuple[int, int], dict[str, np.ndarray]] = {}  # (data set, step): shared by those with equal data
        length, count = 0, 0
        for step in range(first, limit):
            training = [member for member in range(len(self.members)) if self._trains(member, step)]
            for member in training:
                data = self.members[member].data.batches
                if (id(data), step) not in batches:
                    batches[id(data), step] = data.batch(step)
            T = max((self._batch(batches, member, step)["tokens"].shape[1] for member in training), default=length)
            if count and length != T:
                break
            length, count = T, count + 1
        steps = self._steps(batches, first, count, length)
        program = self.train_program.compile(self.state, self.frozen, self.settings, steps)
        begun = time.perf_counter()
        self.state, taken = program(self.state, self.frozen, self.settings, steps)
        columns = [np.asarray(column) for column in taken]
        seconds = time.perf_counter() - begun
        self.step_seconds = seconds / count
        self._record(batches, first, count, columns, seconds)
        return count

    def _batch(self, batches: dict, member: int, step: int) -> dict[str, np.ndarray]:
        return batches[id(self.members[member].data.batches), step]

    def _steps(self, batches: dict, first: int, count: int, T: int) -> Steps:
        B = self.cut.rows
        G = self.members[0].data.batches.batch_size // B
        shape = (self.slots, STEPS_A_CALL, G, B, T)
        rates = np.zeros(shape[:2], np.float32)
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        segments = np.zeros(shape, np.int32) if self.members[0].data.is_packed else None
        for index, member in enumerate(self.members):
            for k in range(count):
                if not self._trains(index, first + k):
                    break
                batch = self._batch(batches, index, first + k)
                rates[index, k] = member.rates.used[first + k]
                own = batch["tokens"].shape[1]
                tokens[index, k, :, :, :own] = batch["tokens"].reshape(G, B, own)
                mask[index, k, :, :, :own] = batch["loss_mask"].reshape(G, B, own)
                if segments is not None:
                    segments[index, k, :, :, :own] = batch["segments"].reshape(G, B, own)
        return Steps(rates, tokens, mask, segments, np.int32(first), np.int32(count))

    def _record(self, batches: dict, first: int, count: int, columns: list[np.ndarray], seconds: float) -> None:
        """Rows of the steps that were taken; members whose loss or gradient was not finite are stopped."""
        loss, norm, targets = columns
        trained = [[self._trains(index, first + k) for k in range(count)] for index in range(len(self.members))]
        share = seconds / max(sum(map(sum, trained)), 1)
        for k in range(count):
            for index, member in enumerate(self.members):
                step = first + k
                if not self._trains(index, step):
                    continue
                if not (math.isfinite(loss[index, k]) and math.isfinite(norm[index, k])):
                    where = member.data.batches.describe(step)
                    what = f"loss {float(loss[index, k])}, gradient norm {float(norm[index, k])}"
                    self._stop(index, step + 1, f"{what} on batch [{where}]; stopped before the update")
                    continue
                if (step + 1) % member.config.train.log_every == 0 or step + 1 == member.steps:
                    self._log(
                        index,
                        {
                            "step": step + 1,
                            "loss": float(loss[index, k]),
                            "grad_norm": float(norm[index, k]),
                            "learning_rate": member.rates.logged[step],
                            "target_tokens": int(targets[index, k]),
                            "tokens": self._batch(batches, index, step)["tokens"].size,
                            "seconds": round(share, 6),
                        },
                    )

    def _stop(self, index: int, step: int, what: str) -> None:
        """Ends a member in its step number `step`, from 1."""
        reason = f"step {step}: {what}"
        self.stopped[index] = {"step": step, "status": "not_finite", "reason": reason}
        self._log(index, self.stopped[index])
        self.say(f"member {index} ({self.members[index].hash[:12]}): {reason}; the others go on")

    def _log(self, index: int, row: dict[str, Any]) -> None:
        self.rows[index].append(row)
        if self.folder is not None:
            self.folder.log(index, row)
        self.on_row(index, row)

    def _log_evaluation(self, step: int) -> None:
        """Of the members that go on after this step, as a run does."""
        members = [index for index in range(len(self.members)) if self._trains(index, step)]
        for index, (loss, accuracy) in self._evaluate(members).items():
            if math.isfinite(loss):
                self._log(index, {"step": step, "eval_loss": loss, "eval_accuracy": accuracy})
            else:
                self.say(f"member {index} ({self.members[index].hash[:12]}): step {step}: held-out loss {loss}")

    def _evaluate(self, members: Sequence[int]) -> dict[int, tuple[float, float]]:
        """Held-out loss in nats and share of target tokens that are the likeliest, of those that hold out examples."""
        groups: dict[str, list[int]] = {}
        for index in members:
            if self.members[index].data.heldout:
                groups.setdefault(self.members[index].heldout, []).append(index)
        found = {}
        for group in groups.values():
            data, B = self.members[group[0]].data, self.config.eval.batch_size
            wanted = np.isin(np.arange(self.slots), group)
            totals = np.zeros((3, self.slots))
            for batch in data.eval_batches(data.heldout, B):
                sums = self.eval_program(
                    self.state.adapter, self.frozen, self.settings.scale, wanted, batch["tokens"], batch["loss_mask"],
                    batch.get("segments"),
                )  # fmt: skip
                totals += np.stack([np.asarray(column, np.float64) for column in sums])
            for index in group:
                nats, hits, count = totals[:, index]
                found[index] = (nats / max(count, 1), hits / max(count, 1))
        return found

    def _save(self, step: int) -> None:
        assert self.folder is not None
        self.folder.checkpoints.save(step, self.state.adapter, [self.state.optimizer, self.state.alive])

    def _resume(self) -> int:
        if self.folder is None:
            return 0
        found = self.folder.checkpoints.restore(self.state.adapter, [self.state.optimizer, self.state.alive])
        for index, row in self.folder.rows_until(-1 if found is None else found[0]):
            self.rows[index].append(row)
            if row.get("status"):
                self.stopped[index] = row
            self.on_row(index, row)
        if found is None:
            return 0
        start, adapter, states = found
        optimizer, alive = jax.tree.map(jax.numpy.asarray, states)
        self.state = MemberState(adapter, optimizer, alive)
        self.say(f"pack: resumed, {start} steps done")
        return start

    def _results(self) -> list[MemberResult]:
        if self.folder is not None:
            self.folder.checkpoints.close()
        evaluated = self._evaluate(range(len(self.members)))
        arrays = {name: tuple(map(np.asarray, pair)) for name, pair in lora.adapter_arrays(self.state.adapter).items()}
        for index, member in enumerate(self.members):
            loss, _ = evaluated.get(index, (0.0, 0.0))
            mine = [*(array for pair in arrays.values() for array in pair), *self._heads().values()]
            is_whole = all(first_not_finite(array[index]) is None for array in mine)
            if index not in self.stopped and not (is_whole and math.isfinite(loss)):
                what = f"held-out loss {loss}" if is_whole else "the adapter holds NaN or inf"
                self._stop(index, member.steps, f"{what} after the update")
        return [self._result(index, arrays, evaluated.get(index)) for index in range(len(self.members))]

    def _result(self, index: int, arrays: dict, evaluated: tuple[float, float] | None) -> MemberResult:
        member = self.members[index]
        mine = {name: (a[index], b[index]) for name, (a, b) in arrays.items()}
        if evaluated is not None and not math.isfinite(evaluated[0]):
            evaluated = None
        stopped = self.stopped.get(index)
        rows = [row for row in self.rows[index] if "loss" in row]
        speeds = [row["tokens"] / row["seconds"] for row in rows if row["seconds"]]
        peak = max(self.train_program.peak_bytes, self.eval_program.peak_bytes)
        device_bytes, source = peak_device_bytes(peak)
        trainable = member.trainable_params(self.base.model())
        summary = {
            "config_hash": member.hash,
            "steps": member.steps if stopped is None else stopped["step"] - 1,
            "micro_batch_rows": self.cut.rows,
            "remat": self.cut.remat,
            "final_train_loss": rows[-1]["loss"] if rows else None,
            "final_eval_loss": None if evaluated is None else evaluated[0],
            "final_eval_accuracy": None if evaluated is None else evaluated[1],
            "tokens_per_second": round(float(np.median(speeds)), 1) if speeds else None,
            "peak_device_bytes": device_bytes,
            "peak_device_bytes_source": source,
            "peak_host_bytes": peak_host_bytes(),
            "base_bytes": self.base.bytes,
            "base_bits_per_param": round(self.base.bits_per_param, 4),
            "trainable_params": trainable,
            "total_params": self.base.params + trainable,
            "members": len(self.members),
            "status": (status := "done" if stopped is None else "not_finite"),
        }
        reason = None if stopped is None else stopped["reason"]
        return MemberResult(
            member.hash, status, reason, summary, self.rows[index], pack_members.cut(mine, member),
            member.lora, str(self.config.model.path), self.base.sizes.kind,
            {name: np.array(value[index]) for name, value in self._heads().items()},
        )  # fmt: skip

    def _heads(self) -> dict[str, np.ndarray]:
        """Of all members, with a leading A; {} of decoders."""
        return {name: np.asarray(value) for name, value in lora.head_arrays(self.state.adapter).items()}


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
