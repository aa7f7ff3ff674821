"""Attempts at one small training run, each in a process of its own that may be killed at any moment.

Starting Python and importing JAX takes longer than the run: so a parent imports everything, starts no backend, and
every attempt is a fork of it. Programs are compiled once (JAX's compilation cache); then an attempt takes seconds.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 24
DONE, REFUSED, STOPPED = 0, 2, 143
_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def make_inputs(folder: Path) -> None:
    """A random Llama in 4 bits and rows of data, in `folder`."""
    from tests.tiny_checkpoint import write_tiny_checkpoint

    write_tiny_checkpoint(folder / "whole")
    child = os.fork()
    if not child:  # it starts a backend, which this process must not have
        from qlora_jax.io.write import quantize_folder

        quantize_folder(folder / "whole", folder / "model")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the model could not be quantized"
    words = ("one", "two", "three", "four", "cat", "dog", "sings", "reads", "a", "the")
    rows = [
        {"input": f"Say {words[n % 10]} {n}", "output": " ".join(words[(n * k) % 10] for k in range(1, 4 + n % 5))}
        for n in range(64)
    ]
    write_rows(folder, rows)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path, every: int) -> Any:
    """NF4, a paged optimizer, dropout, evaluation: all that a checkpoint must bring back."""
    from configs import base

    c = base.get_config()
    c.model.path, c.data.path, c.data.format = str(folder / "model"), str(folder / "rows.jsonl"), "input-output"
    c.model.compute_dtype = "float32"
    c.data.eval_examples, c.data.max_source_len, c.data.max_target_len = 4, 24, 24
    c.lora.rank, c.lora.targets, c.lora.dropout = 2, ("q_proj", "down_proj"), 0.1
    c.optimizer.name, c.optimizer.learning_rate = "paged_adamw", 1e-2
    c.train.steps, c.train.batch_size, c.train.grad_accum = STEPS, 4, 2
    c.train.checkpoint_every, c.train.keep_checkpoints = every, 3
    c.eval.every = 6
    return c


def warm() -> None:
    """Imports all that an attempt needs; starts no backend, which threads a fork would lose."""
    import gc

    import grain  # noqa: F401
    import jax
    import tokenizers  # noqa: F401

    import qlora_jax.train.loop  # noqa: F401
    import tests.tiny_checkpoint  # noqa: F401

    gc.set_threshold(100_000, 50, 100)  # tracing makes objects by the million, few of them in circles
    gc.freeze()
    assert not jax._src.xla_bridge._backends, "a backend was started before the fork"


class Attempt:
    """A process that trains in `workdir` until it is done or killed. `out`: what it said, all of it."""

    def __init__(self, config: Any, workdir: Path, out: Path, before: Callable[[], None] = lambda: None):
        self.workdir, self.out, self._status = workdir, out, None
        out.write_bytes(b"")  # not by the child, which may be killed before: what is there is the last one's
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process:
            _run(config, workdir, out, before)  # never returns

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        if self._status is None:
            done, status = os.waitpid(self.process, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if done else None
        return self._status

    def poll_alive(self) -> bool:
        return self.poll() is None

    def wait(self, seconds: float = 300.0) -> int:
        """Raises TimeoutError, once it is killed, where it does not end."""
        until = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"an attempt did not end within {seconds:.0f} s: {self.said()[-500:]}")
            time.sleep(0.005)
        return status

    def kill(self, signal_: int) -> None:
        os.kill(self.process, signal_)

    def said(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def steps(self) -> int:
        """Lines of metrics.jsonl that a step wrote, so far."""
        return len(step_rows(self.workdir))


def step_rows(workdir: Path) -> list[dict[str, Any]]:
    """Whole lines with a loss."""
    file, rows = workdir / "metrics.jsonl", []
    if file.exists():
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if "loss" in row]


def _run(config: Any, workdir: Path, out: Path, before: Callable[[], None]) -> None:
    status = 99
    try:
        ctypes.CDLL(None).prctl(_WITH_PARENT, signal.SIGKILL)  # an attempt does not outlive the soak
        handle = os.open(out, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        before()
        from qlora_jax.errors import InputError
        from qlora_jax.settings import resolved
        from qlora_jax.train.loop import Stopped, finetune

        try:
            finetune(config, resolved(config), workdir, say=lambda line: print(line, flush=True))
            status = DONE
        except Stopped as stopped:
            print(stopped)
            status = STOPPED
        except InputError as error:
            print(f"error: {error}")
            status = REFUSED
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
