"""Packs of encoders: each member has the bits of a run of its own, its head too."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.errors import InputError
from qlora_jax.packs.members import check_equal, pack_key
from qlora_jax.packs.pack import export_member, train_pack
from qlora_jax.settings import resolved
from tests.roberta import write_glue, write_tiny_roberta
from tests.train.test_encoders import config_of, losses, train


def test_numbers_are_learned_and_members_are_as_runs_alone(tmp_path):
    """A regression, ten steps in 4 bits."""
    write_tiny_roberta(tmp_path / "model")
    write_glue(tmp_path / "glue")
    # few parts compile in a third of the time
    few = {"lora.targets": ("value",), "data.eval_examples": 0, "data.max_examples": 8}
    configs = [
        config_of(tmp_path, "STS-B", **few, **{"train.seed": seed, "optimizer.learning_rate": rate})
        for seed, rate in ((0, 5e-3), (1, 2e-2))
    ]
    results = train_pack(configs, None, lambda line: None)
    train(configs[1], tmp_path / "alone")
    export_member(results[1], tmp_path / "member")
    found = losses(tmp_path / "alone")
    assert len(found) == 10 and found[-1] < 0.5 * found[0]
    alone = load_file(tmp_path / "alone" / "adapter" / "adapter_model.safetensors")
    member = load_file(tmp_path / "member" / "adapter_model.safetensors")
    assert alone.keys() == member.keys()
    for key, value in alone.items():
        np.testing.assert_array_equal(value, member[key], err_msg=key)
    assert not np.array_equal(results[0].head["dense.weight"], results[1].head["dense.weight"])
    assert results[1].summary["trainable_params"] == sum(value.size for value in alone.values())


def test_a_head_of_other_labels_is_no_member(tmp_path):
    plains = [resolved(config_of(tmp_path, name)) for name in ("CoLA", "STS-B", "RTE")]
    keys = [pack_key(plain) for plain in plains]
    assert len(set(keys)) == 3  # rows of other lengths
    check_equal([plains[0], plains[2]])
    with pytest.raises(InputError, match="data.labels: 2 there, 1 here"):
        check_equal(plains[:2])
