"""Runs with added tokens: a new token is learned, a run resumes, and what is exported is the model that was trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from configs import base
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.io.merge import merge_folder
from qlora_jax.io.peft import load_adapter, write_adapter
from qlora_jax.models.layers import Frozen
from qlora_jax.settings import resolved
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.checkpoints import Checkpoints
from qlora_jax.train.loop import Run, finetune
from qlora_jax.train.setup import prepare
from qlora_jax.train.workdir import Workdir
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

TOKEN, CONTROL = "<think>", "<|im_start|>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """V = 401: one row beyond the tokenizer's 400."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "tiny", V=401)


@pytest.fixture
def config(checkpoint, tmp_path):
    """The answer is the new token, always; it stands in the question too."""
    rows = [{"input": f"a {TOKEN} {word}", "output": f"{TOKEN}{TOKEN}"} for word in ("one", "two", "three", "four")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = base.get_config()
    c.model.path, c.model.compute_dtype = str(checkpoint), "float32"
    c.quant.format, c.lora.rank, c.lora.dropout, c.lora.targets = "none", 2, 0.0, ("q_proj",)
    c.data.path, c.data.format = str(tmp_path / "rows.jsonl"), "input-output"
    c.data.added_tokens, c.data.added_special_tokens = (TOKEN,), (CONTROL,)
    c.data.eval_examples, c.data.pad_to_multiple_of, c.data.group_by_length = 0, 32, False
    c.data.max_source_len, c.data.max_target_len = 24, 8
    c.optimizer.learning_rate, c.optimizer.max_grad_norm = 3e-2, 0.0
    c.train.steps, c.train.batch_size, c.train.grad_accum, c.train.checkpoint_every = 16, 4, 2, 3
    return c


def train(config, path):
    lines = []
    summary = finetune(config, resolved(config), path, say=lines.append)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return summary, [row["loss"] for row in rows], "\n".join(lines)


def adapter_of(path):
    return load_file(path / "adapter" / "adapter_model.safetensors")


def test_a_new_token_is_learned_and_exported(config, checkpoint, tmp_path, monkeypatch):
    summary, losses, text = train(config, tmp_path / "whole")
    assert losses[-1] < 0.2 * losses[0]
    assert f"tokens: added {TOKEN!r} = 400, {CONTROL!r} = 401, '<pad>' = 402; pad is '<pad>'" in text
    assert "embedding and head grow from 401 to 403 rows" in text
    assert "embed_tokens and lm_head train whole (lora.modules_to_save), 25,792 of these parameters: 0.1 MiB" in text
    assert summary["trainable_params"] == 2 * 403 * 32 + 2 * 2 * (32 + 32)

    # cut off after step 4, whose checkpoint is of step 3: the same to the last bit
    original = Run._step

    def interrupted(self, index):
        if index == 4:
            raise RuntimeError("power cut")
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config, tmp_path / "cut")
    assert train(config, tmp_path / "cut")[1] == losses
    stored, again = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert stored.keys() == again.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(value, again[key])

    # the tokenizer beside the adapter has the tokens, and a pad token that is not the end token
    folder = tmp_path / "whole" / "adapter"
    tokenizer = Tokenizer.from_folder(folder, checkpoint)
    ids = tokenizer.encode(f"a{TOKEN}b {CONTROL}")
    assert ids.count(400) == 1 and 401 not in ids and tokenizer.id_of(CONTROL) == 401
    assert tokenizer.decode([400, 401, 402]) == TOKEN
    assert json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == "<pad>"
    assert tokenizer.id_of("<pad>") == 402 != tokenizer.eos_id

    # adapter on base and merged checkpoint: one model
    merge_folder(checkpoint, folder, tmp_path / "merged", QuantSpec("none"), dtype="float32")
    assert load_config(tmp_path / "merged").V == 403
    assert Tokenizer.from_folder(tmp_path / "merged").id_of(TOKEN) == 400
    model = load_model(checkpoint, QuantSpec("none"), jnp.float32)
    load_adapter(model, folder)
    merged = load_model(tmp_path / "merged", compute_dtype=jnp.float32)
    tokens = jnp.asarray([tokenizer.encode(f"a {TOKEN} one", bos=True)])
    logits_of = jax.jit(lambda model: model.logits(model(tokens)[0]))
    np.testing.assert_allclose(logits_of(model), logits_of(merged), atol=1e-4)
    assert int(logits_of(model)[0, -1].argmax()) == 400
    np.testing.assert_array_equal(merged.embedding.get_value(), stored["base_model.model.model.embed_tokens.weight"])


def test_frozen_matrices_do_not_learn_it_and_are_exported_even_so(config, tmp_path):
    config.lora.modules_to_save = ()
    _, losses, text = train(config, tmp_path / "run")
    assert losses[-1] > 0.5 * losses[0]
    assert "lora.modules_to_save leaves out embed_tokens and lm_head: new rows there do not train" in text
    stored = adapter_of(tmp_path / "run")
    embedding = stored["base_model.model.model.embed_tokens.weight"]
    source = load_file(f"{config.model.path}/model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding[:400], source[:400])
    np.testing.assert_allclose(embedding[400:], np.stack([source[:400].mean(0)] * 3), atol=1e-6)
    assert stored["base_model.model.lm_head.weight"].shape == (403, 32)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["modules_to_save"] is None


def test_a_tied_model_that_grew_and_does_not_train_is_exported_whole(config, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "tied")
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]  # a head of its own would untie it
    save_file(tensors, folder / "model.safetensors")
    config.model.path, config.lora.modules_to_save = str(folder), ()
    prepared = prepare(config, lambda line: None, lambda done, total: None)
    write_adapter(tmp_path / "adapter", prepared.adapter, prepared.lora_config, str(folder), prepared.grown_matrices())
    model = load_model(folder, QuantSpec("none"), jnp.float32)
    load_adapter(model, tmp_path / "adapter")
    grown = nnx.merge(prepared.graph, prepared.adapter, prepared.base)
    assert model.config.V == 403 and model.head is None
    np.testing.assert_array_equal(model.head_weight(), grown.head_weight())


def test_starts_from_an_adapter_with_matrices(config, tmp_path):
    config.train.steps = config.train.checkpoint_every = 2
    train(config, tmp_path / "first")
    first = adapter_of(tmp_path / "first")
    config.lora.init_from = str(tmp_path / "first" / "adapter")
    prepared = prepare(config, lambda line: None, lambda done, total: None)
    np.testing.assert_array_equal(prepared.adapter["head"].get_value(), first["base_model.model.lm_head.weight"])
    assert not any(isinstance(x, Frozen) for x in (prepared.adapter["embedding"], prepared.adapter["head"]))
    before = [np.array(leaf) for leaf in jax.tree.leaves(prepared.base)]
    workdir = Workdir(tmp_path / "second", resolved(config))
    Run(config, resolved(config), prepared, workdir, Checkpoints(workdir.checkpoints, 1), lambda line: None).finish()
    workdir.close()
    for old, new in zip(before, jax.tree.leaves(prepared.base), strict=True):
        np.testing.assert_array_equal(old, new)  # what is frozen stays as it is
    for key, value in adapter_of(tmp_path / "second").items():
        assert not np.array_equal(value, first[key]), key
    for changes, message in (
        ({"data.added_special_tokens": ()}, "embed_tokens has 403 rows there, 402 here"),
        ({"lora.modules_to_save": ("lm_head",)}, "embed_tokens trains whole there and not in the config"),
        ({"data.added_tokens": ("<other>",)}, "token '<other>' has id None there, 400 here"),
    ):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        with pytest.raises(InputError, match=message):
            prepare(changed, lambda line: None, lambda done, total: None)
