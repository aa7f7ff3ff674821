"""Times a pack of runs against the same runs one by one.

    python -m experiments.bench_packs --random --members=4 --steps=10

Three ways to train the config's run with --members seeds, held-out evaluation included:

    pack     one program trains all of them; a second pack, of other learning rates, finds everything compiled
    loop     one process, one run after the other through programs that are compiled once
    process  a process for each run, start and compilation included (measured on --processes of them)

Prints seconds a model, of the clock and of all processors together, and the ratios; --out writes them as JSON.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from experiments.support import cli
from qlora_jax.config_file import REPOSITORY
from qlora_jax.embedded import located

CONFIG = cli.config_flag("configs/quickstart.py")
MEMBERS = flags.DEFINE_integer("members", 8, "Adapters in the pack.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 20, "Optimizer steps of each.", lower_bound=1)
PROCESSES = flags.DEFINE_integer("processes", 1, "Runs in processes of their own; 0 leaves them out.", lower_bound=0)
RANDOM = flags.DEFINE_bool("random", False, "A random model of 0.25 million parameters in place of the config's.")
OUT = flags.DEFINE_string("out", None, "JSON file of the figures.")

RANDOM_SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = CONFIG.value
        config.train.steps = STEPS.value
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, STEPS.value - 1)
        config.eval.every = 0
        if RANDOM.value:
            config.model.path = str(random_sibling(located(config.model.path), Path(scratch) / "model"))
        found = measure(config, MEMBERS.value, PROCESSES.value, Path(scratch))
    print_table(found)
    if OUT.value:
        from qlora_jax.files import write_json

        write_json(Path(OUT.value), found)
        print(f"written: {OUT.value}")


def measure(config: Any, members: int, processes: int, scratch: Path) -> dict[str, Any]:
    """{"pack", "pack_first", "loop", "process": {"seconds", "cpu_seconds"} a model, "ratios", ...}."""
    import jax

    from qlora_jax.packs.pack import PackRunner, train_pack

    seconds: dict[str, dict[str, float]] = {}
    runner = PackRunner()
    for name, rate in (("pack_first", 1.0), ("pack", 0.5)):
        configs = [seeded(config, seed, rate) for seed in range(members)]
        pack = lambda configs=configs: train_pack(configs, None, lambda line: None, runner=runner)  # noqa: E731
        seconds[name] = timed(pack, members)
    loop = WarmLoop(config)
    loop.train(seeded(config, 0, 1.0))
    seconds["loop"] = timed(lambda: [loop.train(seeded(config, seed, 0.5)) for seed in range(members)], members)
    if processes:
        seconds["process"] = timed(lambda: run_processes(config, scratch, processes), processes)
    return {
        "device": jax.devices()[0].device_kind,
        "processors": len(os.sched_getaffinity(0)),
        "members": members,
        "steps": config.train.steps,
        "model": Path(config.model.path).name if not RANDOM.value else "random, 0.25 million parameters",
        "members_go": runner.warm.over,
        "a_model": seconds,
        "ratios": {
            f"{name}_to_pack": {unit: seconds[name][unit] / seconds["pack"][unit] for unit in seconds["pack"]}
            for name in ("loop", "process")
            if name in seconds
        },
    }


def timed(action: Callable[[], Any], models: int) -> dict[str, float]:
    """Seconds a model: of the clock, and of processors in this process and its children."""
    used = lambda: sum(os.times()[:4])  # noqa: E731
    begun, before = time.perf_counter(), used()
    action()
    return {"seconds": (time.perf_counter() - begun) / models, "cpu_seconds": (used() - before) / models}


def seeded(config: Any, seed: int, rate: float) -> Any:
    """The run with other random numbers, and its learning rate times `rate`."""
    copied = config.copy_and_resolve_references()
    copied.train.seed = seed
    copied.optimizer.learning_rate *= rate
    return copied


class WarmLoop:
    """Single runs through programs that are compiled once; they keep nothing on disk."""

    def __init__(self, config: Any):
        from qlora_jax.optim.paged import PagedOptimizer
        from qlora_jax.optim.pages import Pages
        from qlora_jax.train.cut import default_cut
        from qlora_jax.train.memory import Program
        from qlora_jax.train.setup import prepare
        from qlora_jax.train.step import evaluation_of, gradient_of

        self.prepared = prepare(config, lambda line: None, lambda done, total: None)
        cut, chunk = default_cut(self.prepared.to_cut), config.train.loss_chunk
        self.rows, graph = cut.rows, self.prepared.graph_with(cut.remat)
        self.gradient = Program(gradient_of(graph, chunk, config.optimizer.max_grad_norm))
        self.evaluation = Program(evaluation_of(graph, chunk))
        pages = Pages(self.prepared.tx, self.prepared.adapter, config.optimizer.page_bytes)
        self.optimizer = PagedOptimizer(pages, self.prepared.adapter)

    def train(self, config: Any) -> float:
        """Trains as a run does, from its own seed; returns the held-out loss."""
        import jax
        from flax import nnx

        from qlora_jax import lora
        from qlora_jax.feed.batches import eval_batches

        prepared = self.prepared
        model = nnx.merge(prepared.graph, prepared.adapter, prepared.base)
        lora.attach(model, prepared.lora_config, jax.random.key(config.train.seed))
        adapter = lora.split(model)[1]
        states = self.optimizer.init(adapter)
        for step in range(prepared.steps):
            batch = prepared.data.batches.batch(step)
            tokens, mask = (
                batch[name].reshape(-1, self.rows, batch[name].shape[1]) for name in ("tokens", "loss_mask")
            )
            key = jax.random.fold_in(jax.random.key(config.train.seed + 1), step) if config.lora.dropout else None
            grads, metrics = self.gradient(adapter, prepared.base, tokens, mask, key)
            float(metrics.loss), float(metrics.grad_norm)
            adapter, states = self.optimizer.update(adapter, grads, states, metrics.factor)
            jax.block_until_ready(adapter)
        data, total, count = prepared.data, 0.0, 0.0
        for batch in eval_batches(data.heldout, config.eval.batch_size, config.data.pad_to_multiple_of, data.pad_id):
            nats, targets = self.evaluation(adapter, prepared.base, batch["tokens"], batch["loss_mask"])
            total, count = total + float(nats), count + float(targets)
        return total / max(count, 1)


def run_processes(config: Any, scratch: Path, count: int) -> None:
    """experiments.train as a user starts it, one after the other, without a cache of compiled programs."""
    from qlora_jax.settings import flatten

    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    for seed in range(count):
        keys = flatten(seeded(config, seed, 1.0))
        flags_of_run = [f"--config.{key}={value}" for key, value in keys.items()]
        flags_of_run += ["--config=configs/base.py", f"--workdir={scratch / f'run{seed}'}"]
        command = [sys.executable, "-m", "experiments.train", *flags_of_run]
        subprocess.run(command, check=True, env=environment, cwd=REPOSITORY, capture_output=True)


def random_sibling(folder: Path, out: Path) -> Path:
    """A checkpoint of random weights with RANDOM_SIZES, and tokenizer and vocabulary of `folder`."""
    import shutil

    import numpy as np
    from safetensors.numpy import save_file

    from qlora_jax.files import write_json
    from qlora_jax.io.load import expected_shapes, load_config
    from qlora_jax.models.config import read_json

    out.mkdir()
    raw = read_json(folder / "config.json")
    write_json(out / "config.json", raw | RANDOM_SIZES | {"num_key_value_heads": 2, "head_dim": 16})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, out / name)
    random = np.random.default_rng(0)
    tensors = {}
    for key, shape in expected_shapes(load_config(out)).items():
        values = np.ones(shape) if len(shape) == 1 else random.normal(size=shape) / np.sqrt(shape[-1])
        tensors[key] = values.astype(np.float32)
    save_file(tensors, out / "model.safetensors")
    return out


def print_table(found: dict[str, Any]) -> None:
    print(
        f"{found['model']} on {found['device']} ({found['processors']} processors): {found['members']} runs of "
        f"{found['steps']} steps, members by {found['members_go']}"
    )
    print(f"{'way':<12}{'s a model':>12}{'CPU s':>12}{'to pack':>12}{'CPU':>12}")
    pack = found["a_model"]["pack"]
    for name, each in found["a_model"].items():
        ratios = (each[unit] / pack[unit] for unit in ("seconds", "cpu_seconds"))
        print(
            f"{name:<12}{each['seconds']:>12.3f}{each['cpu_seconds']:>12.3f}", *(f"{r:>11.2f}x" for r in ratios), sep=""
        )


if __name__ == "__main__":
    cli.run(main)
