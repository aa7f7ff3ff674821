"""The run: steps, metrics, checkpoints, evaluation, and an end that is the same however often it was interrupted.

Batches and dropout are pure functions of (seed, step), so a run resumed from the checkpoint of step s goes on bit for
bit as the uninterrupted one (on CPU; on a GPU as far as its kernels are deterministic). Batches are made ahead, in a
thread: their state is the number of the next step, which the checkpoint's name is.
"""

import itertools
import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.finite import all_finite
from qlora_jax.checksums import Input
from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError, full_disk_said, one_line
from qlora_jax.feed.batches import Batches
from qlora_jax.feed.pipeline import prefetched, step_dataset
from qlora_jax.generate.trained import template_of, write_template
from qlora_jax.io.peft import write_adapter
from qlora_jax.mesh import processes
from qlora_jax.mesh.shards import bytes_of_one, share_of_one
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages
from qlora_jax.optim.residency import decide, reserved
from qlora_jax.optim.schedules import paging
from qlora_jax.progress import Progress
from qlora_jax.settings import config_hash
from qlora_jax.text.added_tokens import write_tokenizer
from qlora_jax.train.backward import compiler_options
from qlora_jax.train.checkpoints import Checkpoints, SharedCheckpoints
from qlora_jax.train.checks import check_config
from qlora_jax.train.cut import Choice, Cut, ToCut, choose, described
from qlora_jax.train.loggers import Loggers
from qlora_jax.train.memory import Program, memory_limit, memory_said, peak_device_bytes, peak_host_bytes
from qlora_jax.train.mmlu import MMLU
from qlora_jax.train.setup import Base, Prepared, prepare
from qlora_jax.train.step import arrays_of, evaluation_of, gradient_of, mean_loss
from qlora_jax.train.workdir import Workdir, refuse_other_config

_RECENT = 50  # steps whose speed is shown


class Stopped(Exception):
    """SIGTERM was received; the state is saved."""


def finetune(
    config: Any,
    plain: dict[str, Any],
    path: Path,
    say: Callable[[str], None] = print,
    base: Base | None = None,
) -> dict[str, Any]:
    """Runs, or resumes, the finetuning a config describes.

    Args:
      config: as configs/base.py. plain: the same as plain values (settings.resolved): saved, hashed and compared.
      path: the workdir. It gets config.json, inputs.json, metrics.jsonl, checkpoints/, adapter/ (PEFT), summary.json.
      say: takes lines for the user; the line of progress goes to stderr.
      base: the config's model, where it is in memory already.
    Returns:
      The summary, as in summary.json.
    Raises:
      InputError: whatever the user can mend, before training starts; or a loss that is not finite, with step and batch.
      Stopped: after SIGTERM, once the state is saved.
    """
    tell = processes.quiet(say)
    with full_disk_said(), processes.own_folder(path) as own:
        # a line may quote a stranger's file
        return _finetune(config, plain, own, lambda line: tell(one_line(line)), base)


def _finetune(
    config: Any, plain: dict[str, Any], path: Path, say: Callable[[str], None], base: Base | None
) -> dict[str, Any]:
    check_config(config)
    refuse_other_config(path, plain)
    workdir = Workdir(path, plain)

    def check(inputs: dict[str, Input]) -> None:
        for key, value in inputs.items():
            processes.same(key, value.content)
        workdir.check(inputs, say)

    try:
        make = SharedCheckpoints if processes.are_several() else Checkpoints
        checkpoints = make(workdir.checkpoints, config.train.keep_checkpoints, say)
        if checkpoints.latest is not None:
            workdir.go_on(say)
        # of the model, and of the residual base that an adapter may need
        with Progress("loading", unit="tensor") as loading:
            prepared = prepare(config, say, loading.to, check, base)
        workdir.begin(say)
        run = Run(config, plain, prepared, workdir, checkpoints, say)
        try:
            with processes.lost_said(checkpoints.settle):
                return run.finish()
        finally:
            run.close()
            checkpoints.settle()  # what is being written is worth having, whatever ended the run
    finally:
        workdir.close()


class Run:
    """One run of the loop; `finish` takes it from its newest checkpoint to its end."""

    def __init__(
        self,
        config: Any,
        plain: dict,
        prepared: Prepared,
        workdir: Workdir,
        checkpoints: Checkpoints | SharedCheckpoints,
        say: Callable[[str], None],
    ):
        self.config, self.plain, self.prepared, self.say = config, plain, prepared, say
        self.workdir, self.checkpoints = workdir, checkpoints
        self.adapter = prepared.adapter
        self.pages = Pages(prepared.tx, self.adapter, config.optimizer.page_bytes)
        self.cut, self.gradient = self._choose_cut()
        self.evaluation = Program(evaluation_of(prepared.graph, config.train.loss_chunk, prepared.devices))
        self.mmlu = None
        if prepared.mmlu is not None:
            self.mmlu = MMLU(prepared.graph, prepared.mmlu, prepared.devices, prepared.given)
        self.optimizer = self._make_optimizer()
        self.states = self.optimizer.init(self.adapter)
        self.speeds: deque[float] = deque(maxlen=_RECENT)  # tokens/s of steps that compiled nothing
        self.stop = threading.Event()
        self.ahead = ThreadPoolExecutor(1, thread_name_prefix="compiling")
        self.feed: Any = None  # the batches to come; `finish` knows where they begin

    def finish(self) -> dict[str, Any]:
        start = self._resume()
        loggers = self.config.train.loggers if processes.is_first() else ()
        self.loggers = Loggers(loggers, self.workdir.path, self.plain, start, self.say)
        summary = None
        try:
            self._train(start)
            self.checkpoints.close()
            summary = self._finish_files()
            self.loggers.finish(summary)
            return summary
        finally:
            self.loggers.close(done=summary is not None)

    def _train(self, start: int) -> None:
        steps = self.prepared.steps
        # a process takes whole batches, of which it puts its own rows on its devices: they are a few kilobytes
        self.feed = prefetched(step_dataset(self.prepared.data.batches, steps, shard_index=0, shard_count=1), start)
        self._compile_ahead(start)
        with _on_sigterm(self.stop):
            if self.config.eval.every and start == 0:
                self._log_evaluation(0, self.say)
            if self.config.eval.mmlu_every and start == 0:
                self._log_mmlu(0, self.say)
            with Progress("training", steps, start, brief=start == steps) as progress:
                for step in range(start, steps):
                    self._go(step, progress)

    def _go(self, step: int, progress: Progress) -> None:
        """A step, and what is due after it."""
        config, steps, waits = self.config, self.prepared.steps, self._waits()
        row = self._step(step)
        done = step + 1
        if done % config.train.log_every == 0 or done == steps:
            self._log(row)
        typical = self._waits() == waits
        if typical:
            self.speeds.append(row["tokens"] / row["seconds"])
        progress.step(self._status(row), typical=typical)
        if config.eval.every and done % config.eval.every == 0 and done < steps:
            self._log_evaluation(done, progress.write)
        if config.eval.mmlu_every and done % config.eval.mmlu_every == 0 and done < steps:
            self._log_mmlu(done, progress.write)
        if done % config.train.checkpoint_every == 0 or done == steps:
            self._save(done)
        if processes.stop_is_due(self.stop.is_set()) and done < steps:
            progress.close()
            self._save(done, wait=True)
            raise Stopped(
                f"stopped by SIGTERM after step {done} of {steps}; saved, the same command goes on from there"
            )

    def _save(self, step: int, wait: bool = False) -> None:
        """A checkpoint of the state after `step` steps: one that a run can go on from, or none."""
        if not all_finite(self.adapter):
            raise self._not_finite(step, "the adapter holds NaN or inf after the update", "not saved")
        self.checkpoints.save(step, self.adapter, self.states, wait)

    def _log(self, row: dict[str, Any]) -> None:
        self.workdir.log(row)
        self.loggers.log(row)

    def close(self) -> None:
        """Ends what reads and compiles ahead."""
        self.ahead.shutdown(cancel_futures=True)
        if self.feed is not None:
            self.feed.close()

    def _choose_cut(self) -> tuple[Cut, Program]:
        """How a step's rows are cut, and the program of its gradient: as the run's folder says if it goes on, else the
        fastest cut that fits where the config leaves it open."""
        prepared, paged = self.prepared, paging(self.config.optimizer)
        to_cut, limit = prepared.to_cut, memory_limit()
        programs: dict[Cut, Program] = {}
        state = sum(self.pages.bytes) if paged == "never" else 0

        def fits(cut: Cut) -> bool:
            programs[cut] = self._gradient_program(cut)
            programs[cut].compile(*self._gradient_shapes(prepared.data.batches.max_length, cut))
            return limit is None or programs[cut].peak_bytes + state <= limit - reserved(limit)

        choice = self._kept_cut(to_cut)
        if choice is None:
            shards = None if prepared.devices is None else prepared.devices.shards
            adapter = bytes_of_one(shards, self.adapter)
            choice = choose(to_cut, prepared.base_bytes + 2 * adapter + state, limit, fits)
        if to_cut.is_open or to_cut.rows // choice.cut.rows != to_cut.grad_accum:
            self.say(described(to_cut, choice))
        if to_cut.is_open:
            self.workdir.keep_cut(to_cut, choice)
        return choice.cut, programs.get(choice.cut) or self._gradient_program(choice.cut)

    def _kept_cut(self, to_cut: ToCut) -> Choice | None:
        """As the run's folder has it, which the first process holds."""
        kept = self.workdir.kept_cut(to_cut, self.say) if processes.is_first() else None
        found = processes.told(None if kept is None else [*kept.cut, kept.reason])
        return None if found is None else Choice(Cut(found[0], found[1]), found[2])

    def _gradient_program(self, cut: Cut) -> Program:
        graph = self.prepared.graph_with(cut.remat)
        o = self.config.optimizer
        gradient = gradient_of(graph, self.config.train.loss_chunk, o.max_grad_norm, devices=self.prepared.devices)
        return Program(gradient, compiler_options(cut.remat))

    def _make_optimizer(self) -> PagedOptimizer:
        """With as much of its state on the device as optimizer.paging says."""
        section, limit = self.config.optimizer, memory_limit()
        if paging(section) == "auto" and limit is not None:
            self._compile_largest()
        shards = None if self.prepared.devices is None else self.prepared.devices.shards
        share = share_of_one(shards, self.adapter)
        residency = decide(paging(section), self.pages, limit, self._program_bytes(), share)
        self.say(residency.reason)
        return PagedOptimizer(self.pages, self.adapter, residency.resident_bytes)

    def _compile_largest(self) -> None:
        """The programs of the longest batches, which training and evaluation come to in any case."""
        config, prepared = self.config, self.prepared
        self.gradient.compile(*self._gradient_shapes(prepared.data.batches.max_length, self.cut))
        heldout = prepared.data.eval_batches(prepared.data.heldout, config.eval.batch_size)
        for batch in itertools.islice(heldout, 1):  # the longest first
            self.evaluation.compile(self.adapter, prepared.base, *arrays_of(batch, prepared.row_parts))
        if self.mmlu is not None:
            self.mmlu.compile_largest(self.adapter, prepared.base)

    def _compile_ahead(self, start: int) -> None:
        """The gradients of all lengths to come, in the order in which they come, beside evaluation and steps.

        Not on GPUs: there compiling tries products out on the device, which then has the training on it.
        """
        batches = self.prepared.data.batches
        if jax.default_backend() != "cpu" or not isinstance(batches, Batches):
            return
        lengths = batches.padded(self.prepared.steps)[1][start:].tolist()
        for length in dict.fromkeys(lengths):
            self.ahead.submit(self.gradient.compile, *self._gradient_shapes(length, self.cut))

    def _gradient_shapes(self, length: int, cut: Cut) -> list[Any]:
        """Arguments of the gradient for batches of rows of `length` tokens."""
        prepared = self.prepared
        shape = (prepared.to_cut.rows // cut.rows, cut.rows * prepared.row_parts, length)
        tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.bool_))
        key = jax.random.key(0) if self.config.lora.dropout else None
        # a step gives its adapter away: while another thread compiles, only shapes are sure to be there
        adapter = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.adapter)
        return [adapter, prepared.base, tokens, mask, key, *([tokens] if prepared.data.is_packed else [])]

    def evaluate(self, examples: Sequence[Example]) -> float | None:
        """Mean loss over the target tokens of held-out examples, nats; None without any."""
        batches = self.prepared.data.eval_batches(examples, self.config.eval.batch_size) if examples else ()
        prepared = self.prepared
        return mean_loss(self.evaluation, self.adapter, prepared.base, batches, prepared.row_parts, prepared.given)

    def _heldout_loss(self, step: int) -> float | None:
        loss = self.evaluate(self.prepared.data.heldout)
        if loss is not None and not math.isfinite(loss):
            raise InputError(
                f"the held-out loss after {step} steps is {loss}: a held-out example leads to numbers beyond float32. "
                "Try a lower optimizer.learning_rate, or look at the held-out examples"
            )
        return loss

    def _log_evaluation(self, step: int, write: Callable[[str], None]) -> None:
        loss = self._heldout_loss(step)
        if loss is not None:
            self._log({"step": step, "eval_loss": loss})
            write(f"step {step}: held-out loss {loss:.4f}")

    def _log_mmlu(self, step: int, write: Callable[[str], None]) -> None:
        if self.mmlu is not None:
            found = self.mmlu(self.adapter, self.prepared.base)
            self._log({"step": step, **found})
            write(f"step {step}: {self.mmlu.describe(found)}")

    def _resume(self) -> int:
        found = self.checkpoints.restore(self.adapter, self.states)
        if found is None:
            self.workdir.keep_metrics_until(-1)
            return 0
        start, adapter, states = found
        self.adapter = self.prepared.on_devices(adapter)
        self.states = self.optimizer.place(states)
        self.workdir.keep_metrics_until(start)
        done = "finished: its files are written again" if start == self.prepared.steps else "resumed"
        self.say(f"run: {done}, {start} of {self.prepared.steps} steps done")
        return start

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step; its line of metrics.jsonl."""
        config, prepared = self.config, self.prepared
        begun = time.perf_counter()
        batch = next(self.feed)
        micro = lambda x: x.reshape(-1, self.cut.rows * prepared.row_parts, x.shape[-1])  # noqa: E731
        key = None
        if config.lora.dropout:
            key = prepared.given(jax.random.fold_in(jax.random.key(config.train.seed + 1), step))
        tokens, loss_mask, *segments = map(prepared.given, map(micro, arrays_of(batch)))
        grads, metrics = self.gradient(self.adapter, prepared.base, tokens, loss_mask, key, *segments)
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(step + 1, f"loss {loss}, gradient norm {norm}", "stopped before the update")
        self.adapter, self.states = self.optimizer.update(self.adapter, grads, self.states, metrics.factor)
        jax.block_until_ready(self.adapter)
        return {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": float(prepared.schedule(step)),
            "target_tokens": int(metrics.target_tokens),
            "tokens": batch["tokens"].size,
            "seconds": max(round(time.perf_counter() - begun, 4), 1e-4),
        }

    def _not_finite(self, step: int, what: str, done: str) -> InputError:
        """Of step number `step`, from 1."""
        self.checkpoints.close()
        kept = self.checkpoints.latest
        good = f"the checkpoint of step {kept} is whole" if kept else "no checkpoint was written yet"
        return InputError(
            f"step {step}: {what} on batch [{self.prepared.data.batches.describe(step - 1)}]; {done}, {good}. "
            "Try a lower optimizer.learning_rate, or look at that batch"
        )

    def _status(self, row: dict[str, Any]) -> str:
        """Speed counts padding, as the summary's does."""
        speed = [f"{statistics.median(self.speeds):,.0f} tokens/s"] if self.speeds else []
        return ", ".join([f"loss {row['loss']:.4f}", *speed, memory_said()])

    def _waits(self) -> int:
        """Times that a step had to wait for the compiler."""
        return self.gradient.waits + self.optimizer.programs_compiled

    def _device_bytes(self) -> tuple[int, str]:
        return peak_device_bytes(self._program_bytes() + self.optimizer.resident_bytes)

    def _program_bytes(self) -> int:
        """Of the largest program that was compiled so far."""
        programs = [self.gradient, self.evaluation, *([self.mmlu.program] if self.mmlu else [])]
        return max(program.peak_bytes for program in programs)

    def _finish_files(self) -> dict[str, Any]:
        """Adapter, held-out loss and summary: made from the last checkpoint's state, however often this is run."""
        prepared, workdir = self.prepared, self.workdir
        added = prepared.added
        base, grown = self.config.model.path, prepared.grown_matrices()

        def write_beside(folder: Path) -> None:
            if added is not None and added.new:
                write_tokenizer(added, folder)
            if prepared.tokenizer is not None and not prepared.kind.bidirectional:
                write_template(folder, template_of(prepared.data.sources))

        adapter = jax.tree.map(processes.on_host, self.adapter) if processes.are_several() else self.adapter
        write_adapter(workdir.adapter, adapter, prepared.lora_config, base, grown, write_beside, prepared.kind)
        eval_loss = self._heldout_loss(prepared.steps)
        rows = [row for row in workdir.metrics() if "loss" in row]
        device_bytes, source = self._device_bytes()
        speeds = [row["tokens"] / row["seconds"] for row in rows if row["seconds"]]
        summary = {
            "config_hash": config_hash(self.plain),
            "steps": prepared.steps,
            "micro_batch_rows": self.cut.rows,
            "remat": self.cut.remat,
            "final_train_loss": rows[-1]["loss"] if rows else None,
            "final_eval_loss": eval_loss,
            "tokens_per_second": round(float(np.median(speeds)), 1) if speeds else None,
            "peak_device_bytes": device_bytes,
            "peak_device_bytes_source": source,
            "peak_host_bytes": peak_host_bytes(),
            "base_bytes": prepared.base_bytes,
            "base_bits_per_param": round(prepared.base_bits_per_param, 4),
            "trainable_params": prepared.trainable_params,
            "total_params": prepared.total_params,
        }
        if prepared.lora_config.labels:
            summary["labels"] = prepared.lora_config.labels  # losses are of rows, not of tokens
        if self.mmlu is not None:
            found = self.mmlu(self.adapter, prepared.base)
            self.say(f"run: {self.mmlu.describe(found)}")
            summary |= {f"final_{name}": value for name, value in found.items()}
        workdir.write_summary(summary)
        return summary


class _on_sigterm:
    """Sets the event on SIGTERM instead of dying; outside the main thread (a sweep's worker) signals stay as they
    are."""

    def __init__(self, event: threading.Event):
        self.event = event
        self.main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self.main:
            self.before = signal.signal(signal.SIGTERM, lambda *_: self.event.set())

    def __exit__(self, *_: Any) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)
