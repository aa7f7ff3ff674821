"""How arrays are cut by their names, where some of a mesh's devices keep experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.io.load import load_config, load_model
from qlora_jax.mesh.axes import EXPERT, FSDP, Axes
from qlora_jax.mesh.place import by_rules
from qlora_jax.mesh.rules import Cut, cut_of, is_of_experts
from qlora_jax.mesh.shards import Shards
from qlora_jax.models.mixtures.across import check_experts
from qlora_jax.models.mixtures.experts import Stack
from tests.families import FAST, FOLDERS

pytestmark = pytest.mark.quick_compile


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


@pytest.mark.parametrize(
    ("name", "sizes", "axes", "each"),
    [
        ("blocks.mlp.experts.up_proj.weight.codes", (3, 8, 64), Axes(1, 2, 4), [(), (EXPERT, FSDP), ()]),
        ("blocks.mlp.experts.up_proj.weight.codes", (3, 8, 64), Axes(1, 1, 4), [(), (EXPERT,), ()]),
        ("blocks.mlp.experts.up_proj.weight.offset", (3, 8), Axes(1, 2, 4), [(), (EXPERT, FSDP)]),
        ("blocks.mlp.experts.up_proj.bias", (3, 8, 16), Axes(2, 2, 2), [(), (EXPERT, FSDP), ()]),
        ("blocks.mlp.experts.up_proj.lora_b", (3, 8, 16, 2), Axes(1, 1, 2), [(), (EXPERT,), (), ()]),
        ("blocks.mlp.experts.up_proj.lora_b", (3, 8, 16, 2), Axes(1, 2, 1), [(), (FSDP,), (), ()]),
        ("blocks.self_attn.q_proj.weight.codes", (3, 64), Axes(1, 2, 4), [(), (FSDP, EXPERT)]),
        ("blocks.self_attn.q_proj.weight.codes", (3, 64), Axes(1, 2, 1), [(), (FSDP,)]),
        ("blocks.self_attn.q_proj.lora_a", (3, 4, 64), Axes(1, 2, 4), [(), (), ()]),  # 4 ranks, 8 devices
        ("blocks.mlp.gate.weight", (3, 8, 64), Axes(1, 1, 4), [(), (FSDP, EXPERT), ()]),
        ("embedding", (64, 16), Axes(1, 2, 4), [(FSDP, EXPERT), ()]),
        ("blocks.input_layernorm.weight", (3, 64), Axes(1, 2, 4), [(), ()]),
    ],
)
def test_experts_are_kept_and_all_else_is_gathered(name, sizes, axes, each):
    leaf = shape(*sizes)
    cut = cut_of(name, leaf, axes)
    assert cut.of_each(len(sizes)) == each
    assert (cut == Cut()) == (each == [()] * len(sizes))
    held = Shards(axes, ((name, cut),)).of_one({name: leaf})[name].shape
    assert held == tuple(size // axes.along(names) for size, names in zip(sizes, each, strict=True))
    mesh = jax.sharding.AbstractMesh(tuple(axes), Axes._fields)
    assert by_rules(mesh, name, leaf).shard_shape(sizes) == held


def test_every_mixtures_names_are_known_as_experts_and_no_others():
    sizes = [load_config(folder) for folder in sorted(FOLDERS.iterdir())]
    assert sum(config.sparse for config in sizes) >= 8
    for config in sizes:
        for name in config.linears:
            assert is_of_experts(f"blocks.{name}.weight") == config.is_expert(name), name


@pytest.mark.parametrize(
    ("folder", "axes", "said"),
    [
        ("llama_a", Axes(1, 1, 2), "this model has no experts: set mesh.expert=1 and mesh.fsdp=2"),
        ("qwen3_moe_a", Axes(1, 1, 4), "6 experts cannot be divided among mesh.expert = 4 x mesh.fsdp = 1"),
        ("qwen3_moe_a", Axes(1, 2, 2), "set mesh.expert=1 and mesh.fsdp=4"),
    ],
)
def test_experts_that_are_not_there_or_not_equally_many_are_refused(folder, axes, said):
    config = load_config(FOLDERS / folder)
    check_experts(Axes(2, 3, 1), config)
    if config.sparse:
        check_experts(Axes(2, 3, 2), config)
    with pytest.raises(InputError, match=said) as refused:
        check_experts(axes, config)
    assert "\n" not in str(refused.value)


def test_a_layer_knows_its_number_where_its_arrays_were_gathered():
    """GPT-2's scores are divided by it."""
    model = load_model(FOLDERS / "gpt2_by_layer_a", compute_dtype=jnp.float32)
    block, *state = model.layers(nnx.LoRAParam, ...)
    second = tuple(jax.tree.map(lambda stack: stack[1], part) for part in state)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, model.config.D)), jnp.float32)

    def layer(x, number, stacks):
        context = model.context(jnp.zeros(x.shape[:2], jnp.int32))
        return model.apply_layer(block, context, None, second, x, number, stacks=stacks)[0]

    def all_three(x):
        stacks = nnx.state(model.blocks, Stack)
        return layer(x, jnp.int32(1), None), layer(x, jnp.int32(1), stacks), layer(x, jnp.int32(0), None)

    own, gathered, other = jax.jit(all_three, compiler_options=FAST)(x)
    np.testing.assert_array_equal(own, gathered)
    assert np.abs(own - other).max() > 1e-3
