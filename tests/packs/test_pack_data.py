"""Members whose batches differ in length, and their evaluation, against runs of their own."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from configs import base
from qlora_jax.feed.batches import eval_batches
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.peft import load_adapter
from qlora_jax.packs.pack import PackRunner, export_member, train_pack
from qlora_jax.settings import resolved
from qlora_jax.train.loop import finetune
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of 3 steps whose batches have 32 or 64 tokens, with held-out examples and dropout."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"input": "say " * (1 + 6 * (k % 2)), "output": f"{'word ' * (1 + 3 * (k % 2))}{k}"} for k in range(16)]
    (folder / "rows.json").write_text(json.dumps(rows))
    c = base.get_config()
    c.model.path = str(write_tiny_checkpoint(folder / "model"))
    c.model.compute_dtype, c.model.remat = "float32", "none"
    c.lora.update(rank=2, dropout=0.2, targets=("q_proj", "down_proj"))
    c.data.update(path=str(folder / "rows.json"), format="input-output", eval_examples=5, pad_to_multiple_of=32)
    c.optimizer.learning_rate = 1e-2
    c.train.update(steps=3, batch_size=2, grad_accum=1)
    c.eval.update(batch_size=8, every=2)
    return c


def test_longer_batches_of_others_change_nothing_but_rounding(config, tmp_path):
    """Padding takes no part in loss, gradient or dropout; each member is evaluated on what it holds out."""
    configs = [config.copy_and_resolve_references() for _ in range(3)]
    configs[1].data.seed = 6
    configs[2].data.update(seed=6, train_on_source=True)
    runner = PackRunner("map")
    results = train_pack(configs, say=quiet, runner=runner)
    lengths = [[row["tokens"] for row in result.rows if "loss" in row] for result in results]
    assert lengths[0] != lengths[1]
    for number, (config, result) in enumerate(zip(configs, results, strict=True)):
        run = tmp_path / str(number)
        finetune(config, resolved(config), run, say=quiet)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
        assert [row["step"] for row in result.rows] == [row["step"] for row in rows]
        for found, expected in zip(result.rows, rows, strict=True):
            for key in ("loss", "eval_loss", "grad_norm"):
                assert found.get(key, 0) == pytest.approx(expected.get(key, 0), rel=2e-5), key
            assert found.get("tokens") == expected.get("tokens")
            assert found.get("target_tokens") == expected.get("target_tokens")
        assert result.summary["final_eval_loss"] == pytest.approx(summary["final_eval_loss"], rel=1e-5)
        mine = export_and_read(result, tmp_path / "adapter")
        theirs = load_file(run / "adapter" / "adapter_model.safetensors")
        for key in theirs:
            np.testing.assert_allclose(mine[key], theirs[key], atol=5e-4, err_msg=key)
        heldout = runner.warm.data(config, runner.warm.base(config, quiet), quiet)[0].heldout
        assert result.summary["final_eval_accuracy"] == accuracy(config, tmp_path / "adapter", heldout)


def export_and_read(result, folder):
    export_member(result, folder)
    return load_file(folder / "adapter_model.safetensors")


def accuracy(config, adapter, heldout) -> float:
    """Share of the target tokens that are the likeliest, from whole logits."""
    model = load_model(Path(config.model.path), QuantSpec(), jnp.float32)
    load_adapter(model, adapter)
    hits = count = 0
    logits_of = nnx.jit(lambda model, tokens: model.logits(model(tokens)[0]))
    for batch in eval_batches(heldout, 8, 32, 0):
        logits = np.asarray(logits_of(model, jnp.asarray(batch["tokens"])))
        targets = batch["loss_mask"][:, 1:]
        hits += int(((logits[:, :-1].argmax(-1) == batch["tokens"][:, 1:]) & targets).sum())
        count += int(targets.sum())
    return hits / count
