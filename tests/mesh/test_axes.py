"""What a config says of its devices."""

import jax
import numpy as np
import pytest

from configs import base
from qlora_jax.errors import InputError
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.rules import Cut, cut_of
from qlora_jax.settings import config_hash, differing_keys, resolved
from qlora_jax.train.checks import check_values


def config(**values):
    c = base.get_config()
    with c.unlocked():
        c.mesh.update(values)
    return c


@pytest.mark.parametrize(
    "values, axes",
    [
        ({}, (1, 1)),
        ({"devices": 4}, (1, 4)),
        ({"devices": 4, "data": 2}, (2, 2)),
        ({"fsdp": 3}, (1, 3)),
        ({"data": 2, "fsdp": 1}, (2, 1)),
        ({"devices": 8, "data": 2, "fsdp": 4}, (2, 4)),
        ({"expert": 4}, (1, 1, 4)),
        ({"devices": 8, "expert": 4}, (1, 2, 4)),
        ({"devices": 8, "data": 2, "fsdp": 1, "expert": 4}, (2, 1, 4)),
        ({"tensor": 2}, (1, 1, 1, 2)),
        ({"devices": 8, "data": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"devices": 4, "fsdp": 1, "tensor": 4}, (1, 1, 1, 4)),
        ({"devices": 8, "sequence": 4}, (1, 2, 1, 1, 4)),
        ({"data": 2, "tensor": 2, "sequence": 2}, (2, 1, 1, 2, 2)),
    ],
)
def test_what_is_left_open_is_fsdp(values, axes):
    assert Axes.of(config(**values).mesh) == Axes(*axes)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"devices": 0}, "mesh.devices is 0; expected at least 1"),
        ({"fsdp": -1}, "mesh.fsdp is -1; expected devices, or 0"),
        ({"devices": 6, "data": 4}, "mesh.data = 4 does not divide"),
        ({"devices": 6, "data": 2, "fsdp": 2}, "take 4: change one of them"),
        ({"expert": 0}, "mesh.expert is 0; expected at least 1"),
        ({"devices": 8, "data": 2, "expert": 3}, "mesh.data = 2 x mesh.expert = 3 does not divide"),
        ({"devices": 4, "fsdp": 2, "expert": 4}, "mesh.data = 1 x mesh.fsdp = 2 x mesh.expert = 4 take 8"),
        ({"tensor": 0}, "mesh.tensor is 0; expected at least 1"),
        ({"devices": 6, "tensor": 4}, "mesh.data = 1 x mesh.tensor = 4 does not divide"),
        ({"devices": 4, "fsdp": 4, "tensor": 2}, "x mesh.tensor = 2 take 8: change one of them"),
        ({"expert": 2, "tensor": 2}, "mesh.expert is 2 and mesh.tensor 2"),
        ({"sequence": 0}, "mesh.sequence is 0; expected at least 1"),
        ({"devices": 6, "sequence": 4}, "mesh.data = 1 x mesh.sequence = 4 does not divide"),
    ],
)
def test_what_is_no_mesh_is_refused(values, said):
    with pytest.raises(InputError, match=said):
        Axes.of(config(**values).mesh)


def test_what_a_mesh_does_not_do_is_refused_and_how_to_mend_it_said():
    c = config(devices=2)
    c.model.remat = "none"
    with pytest.raises(InputError, match="keeps every layer that was gathered") as refused:
        check_values(c, "cpu")
    assert "set " in str(refused.value) and "\n" not in str(refused.value)


def test_attention_that_takes_whole_rows_is_refused_where_devices_divide_them():
    c = config(sequence=2)
    c.model.attention = "cudnn"
    with pytest.raises(InputError, match="takes whole rows alone, and mesh.sequence = 2 .* set model.attention=auto"):
        check_values(c, "gpu")


def test_devices_along_sequence_share_their_rows_and_the_model():
    axes = Axes(2, 2, sequence=3)
    assert (axes.devices, axes.row_parts, axes.rows(8)) == (12, 4, 2)
    assert str(axes) == "data 2 x fsdp 2 x sequence 3"
    leaf = jax.ShapeDtypeStruct((2, 24, 4), np.float32)
    assert cut_of("blocks.q_proj.weight", leaf, axes) == Cut(-2, among=("fsdp", "sequence"))
    assert cut_of("blocks.q_proj.weight", leaf, Axes(2, 2)) == Cut(-2)


def test_a_batch_must_give_each_device_as_many_rows():
    with pytest.raises(InputError, match="batches of 6 sequences cannot be divided among 4 devices"):
        Axes(1, 4).rows(6)


def test_devices_along_tensor_share_their_rows():
    axes = Axes(2, 2, tensor=2)
    assert (axes.devices, axes.row_parts, axes.rows(8)) == (8, 4, 2)
    assert str(axes) == "data 2 x fsdp 2 x tensor 2"


def test_where_a_run_computes_is_not_what_it_is():
    one, many = resolved(config()), resolved(config(devices=8, data=2))
    assert config_hash(one) == config_hash(many) and differing_keys(one, many) == []
    old = one | {"mesh": {"devices": 1}}  # as written before there were axes
    assert config_hash(old) == config_hash(one)
