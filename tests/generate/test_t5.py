"""Generation of an encoder-decoder: greedy ids are transformers', a batch's rows do not see each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.generate.decode import check_prompt, complete, generate, room_for
from qlora_jax.generate.sampling import Sampling
from qlora_jax.io.load import load_model
from tests.t5 import FOLDERS, golden

pytestmark = pytest.mark.quick_compile
NEW = 12


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDERS / "v11", compute_dtype=jnp.float32)


def test_greedy_ids_are_those_of_transformers(model):
    """Three prompts of different lengths, decoded together; one ends by itself."""
    found = golden("v11")
    rows = zip(found["tokens"], found["loss_mask"], strict=True)
    prompts = [row[: int(mask.argmax())].tolist() for row, mask in rows]
    ends = complete(model, prompts, Sampling(NEW, temperature=0), [1])
    expected = [row[: int((row == 1).argmax()) if (row == 1).any() else NEW].tolist() for row in found["generated"]]
    assert [end.tokens for end in ends] == expected
    assert [end.reason for end in ends] == ["eos" if len(row) < NEW else "length" for row in expected]
    assert {end.reason for end in ends} == {"eos", "length"}
    drawn = [generate(model, prompts, NEW, 1.0, 1.0, seed, [1]) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_may_be_longer_than_what_it_was_made_for(model):
    long = np.random.default_rng(0).integers(2, 41, model.config.context + 50).tolist()
    check_prompt(long, model, "the prompt")
    assert room_for(model, len(long), NEW) == 64
