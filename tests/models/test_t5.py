"""The encoder-decoder against transformers, and what its config.json may say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io import peft
from qlora_jax.io.load import load_model
from qlora_jax.models.config import parse_config
from qlora_jax.models.kind import Kind
from qlora_jax.models.t5.pair import Pair
from qlora_jax.models.t5.positions import bucket_of
from qlora_jax.models.t5.rows import split_rows
from qlora_jax.train.step import make_gradient
from tests.t5 import FAST, FOLDERS, golden, logits_of

pytestmark = pytest.mark.quick_compile
NAMES = ("v10", "v11", "mt5")


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    """Of three prompts and answers of different lengths in one padded batch."""
    found = golden(name)
    model = load_model(FOLDERS / name, compute_dtype=jnp.float32)
    logits = logits_of(model, found["tokens"], found["loss_mask"])
    np.testing.assert_allclose(logits[:, : found["logits"].shape[1]], found["logits"], atol=1e-4, rtol=0)


def test_gradient_is_that_of_torch():
    """The step's gradient, in two micro-batches of unlike lengths, with an adapter of PEFT on every linear layer."""
    name = "v11"
    found = golden(name)
    model = load_model(FOLDERS / name, compute_dtype=jnp.float32)
    config = peft.load_adapter(model, FOLDERS / name / "adapter")
    graph, adapter, base = lora.split(model)
    rows = [0, 1, 2, 2]  # the last again, with nothing to learn
    tokens, mask = (found[key][rows].reshape(2, 2, -1) for key in ("tokens", "loss_mask"))
    mask[1, 1] = False
    gradient = jax.jit(make_gradient(graph, 16, 0.0), compiler_options=FAST)
    sums, metrics = gradient(adapter, base, tokens, mask, None)
    assert metrics.target_tokens == found["loss_mask"].sum()
    for target, (a, b) in lora.adapter_arrays(sums).items():
        for index, (own_a, own_b) in enumerate(zip(a, b, strict=True)):
            for letter, mine in (("A", own_a), ("B", own_b)):
                key = f"gradient/base_model.model.{Pair.module(index, target)}.lora_{letter}.weight"
                theirs = found.pop(key)
                assert np.abs(theirs).max() > 1e-3
                np.testing.assert_allclose(mine, theirs, atol=5e-4 * np.abs(theirs).max(), rtol=1e-3)
    assert not [key for key in found if key.startswith("gradient/")]
    assert config.targets == tuple(model.config.linears)


@pytest.mark.parametrize("setting", ["encoder_32_128", "decoder_32_128", "encoder_12_20", "decoder_12_20"])
def test_buckets(setting):
    stack, buckets, distance = setting.split("_")
    with np.load(FOLDERS / "buckets.npz") as file:
        found = bucket_of(jnp.asarray(file["distances"]), int(buckets), int(distance), stack == "encoder")
        np.testing.assert_array_equal(found, file[setting])


def test_rows():
    tokens = jnp.asarray([[5, 6, 7, 8, 9, 0], [5, 8, 9, 1, 3, 4], [0] * 6, [2, 3, 4, 5, 6, 7]])
    mask = jnp.asarray([[0, 0, 0, 1, 1, 0], [1, 1, 1, 0, 1, 1], [0] * 6, [0, 0, 0, 0, 0, 1]], bool)
    rows = split_rows(tokens, mask, Pair(1, 1, 8, 16, False, pad_id=0, start_id=2), source_len=5, target_len=5)
    assert rows.source.tolist() == [[5, 6, 7, 0, 0], [5, 0, 0, 0, 0], [0] * 5, [2, 3, 4, 5, 6]]
    assert rows.seen.sum(1).tolist() == [3, 1, 0, 5]
    assert [row[:2] for row in rows.inputs.tolist()] == [[2, 8], [2, 8], [2, 0], [2, 7]]
    labels, which = np.asarray(rows.labels), np.asarray(rows.counted)
    counted = [row[own].tolist() for row, own in zip(labels, which, strict=True)]
    assert counted == [[8, 9], [8, 9, 3, 4], [], [7]] and int(rows.counted.sum()) == int(mask[:, 1:].sum())


def config_with(**changes):
    raw = json.loads((FOLDERS / "v11" / "config.json").read_text())
    return parse_config({key: value for key, value in (raw | changes).items() if value != "absent"}, "config.json")


def test_config():
    sizes = config_with()
    assert isinstance(sizes.kind, Kind) and sizes.kind.pair == Pair(3, 2, 12, 20, True, 0, 0)
    assert (sizes.L, sizes.D, sizes.F, sizes.N, sizes.H, sizes.V) == (5, 24, 24, 4, 12, 41)
    assert sizes.kind.logit_scale == 1 and sizes.kind.activation == "gelu_new"
    assert config_with(scale_decoder_outputs="absent").kind.logit_scale == 24**-0.5
    assert config_with(scale_decoder_outputs="absent", tie_word_embeddings=False).kind.logit_scale == 1
    assert config_with(feed_forward_proj="gated-silu").kind.activation == "silu"
    assert config_with(num_decoder_layers=None).kind.pair.decoder_layers == 3
    keys = [key for name in sizes.linears for key in sizes.slots(name)]
    assert len({*keys}) == len(keys) == 3 * 7 + 2 * 11
    assert "encoder.block.2.layer.1.DenseReluDense.wi_1.weight" in keys
    assert "decoder.block.1.layer.1.EncDecAttention.o.weight" in keys


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feed_forward_proj": "gated-gello"}, "feed_forward_proj is 'gated-gello'; expected ACTIVATION"),
        ({"num_heads": 0}, "num_heads is 0; expected a positive integer"),
        ({"decoder_start_token_id": 41}, "decoder_start_token_id is 41; expected a token's number below vocab_size"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets is 7; expected an even number"),
        ({"architectures": ["UMT5ForConditionalGeneration"]}, "unknown architecture UMT5ForConditionalGeneration"),
    ],
)
def test_what_no_model_can_be_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        config_with(**changes)


def test_targets_by_name():
    sizes = config_with()
    attention = lora.select_targets(["q", "v"], sizes)
    assert len(attention) == 6 and attention[0] == "encoder.layer.0.SelfAttention.q"
    assert lora.select_targets(["EncDecAttention.o"], sizes) == ["decoder.layer.1.EncDecAttention.o"]
    assert len(lora.select_targets([r"decoder\..*"], sizes)) == 11
    with pytest.raises(InputError, match="'lm_head' matches no linear layer"):
        lora.select_targets(["lm_head"], sizes)
