"""The largest page's update, compiled for a GPU that is not here: in place, and within its page."""

import jax
import jax.numpy as jnp
import optax
import pytest

from qlora_jax.optim.pages import Pages
from qlora_jax.planning import topology
from qlora_jax.planning.gpus import GPUS

if not topology.is_installed():
    pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin", allow_module_level=True)

ADAPTER = {  # of a 7B's four attention projections and its MLP, r 64
    f"{name}.{half}": jax.ShapeDtypeStruct((32, *shape), jnp.float32)
    for name, I, O in (("q", 4096, 4096), ("up", 4096, 11008), ("down", 11008, 4096))
    for half, shape in (("lora_a", (64, I)), ("lora_b", (O, 64)))
}


@pytest.mark.parametrize("tx", [optax.adamw(2e-4), optax.lion(2e-4)], ids=["adamw", "lion"])
def test_an_update_takes_its_page_and_nothing_like_its_parameters(tx):
    pages = Pages(tx, ADAPTER, page_bytes=64 << 20)
    program = pages.update_program(pages.largest)
    gpu = GPUS["a6000"]
    compiled = topology.compile_for(
        gpu, program.function, *topology.on_gpu(gpu, program.arguments), donate_argnums=program.donate_argnums
    )
    memory = compiled.memory_analysis()
    page, params = pages.bytes[pages.largest], sum(x.size * 4 for x in program.arguments[1])
    assert page <= 64 << 20 < 2 * page and params > page / 2
    assert params + page <= memory.alias_size_in_bytes <= params + page + 1024 * len(jax.tree.leaves(program.arguments))
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096
    assert memory.temp_size_in_bytes <= page
    print(f"page {page:,}, temporaries {memory.temp_size_in_bytes:,}")
