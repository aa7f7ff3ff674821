"""Updates of pages, compiled for a GPU that is not here: in place, and within one page whatever number they are of."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from qlora_jax.mesh.wire import ENTRY, computations
from qlora_jax.optim.eightbit import adamw8bit
from qlora_jax.optim.pages import Pages, RowWise
from qlora_jax.planning import topology
from qlora_jax.planning.gpus import GPUS
from qlora_jax.planning.program import compile_updates

if not topology.is_installed():
    pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin", allow_module_level=True)

ADAPTER = {  # of a 7B's four attention projections and its MLP, r 64
    f"{name}.{half}": jax.ShapeDtypeStruct((32, *shape), jnp.float32)
    for name, I, O in (("q", 4096, 4096), ("up", 4096, 11008), ("down", 11008, 4096))
    for half, shape in (("lora_a", (64, I)), ("lora_b", (O, 64)))
}
PARAMETERS = sum(x.size * 4 for x in ADAPTER.values())


@pytest.mark.parametrize("tx", [RowWise(*optax.adamw(2e-4)), RowWise(*optax.lion(2e-4))], ids=["adamw", "lion"])
def test_an_update_takes_its_pages_and_nothing_like_its_parameters(tx):
    """Of what stays on the device, by one program, and of a page that travels."""
    pages = Pages(tx, ADAPTER, page_bytes=64 << 20)
    stays = (False, *(True,) * (len(pages) - 1))
    together, alone = compile_updates(GPUS["a6000"], pages, stays)
    page = pages.bytes[0]
    assert page <= 64 << 20 < 2 * page
    touched = ADAPTER["down.lora_a"].size * 4
    for compiled, params, state in ((alone, touched, page), (together, PARAMETERS, sum(pages.bytes[1:]))):
        memory = compiled.memory_analysis()
        assert params > page / 2
        assert params + state <= memory.alias_size_in_bytes <= params + state + 512 * len(pages)
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096
        assert memory.temp_size_in_bytes <= page
        assert " copy(" not in compiled.as_text()
        print(f"page {page:,}, temporaries {memory.temp_size_in_bytes:,}")


@pytest.mark.parametrize(
    ("tx", "page_bytes"),
    [
        (RowWise(*optax.adamw(2e-4, weight_decay=0.0)), 16 << 20),
        (RowWise(*adamw8bit(2e-4, 0.9, 0.999, 1e-8, 0.0)), 4 << 20),
    ],
    ids=["adamw", "8-bit"],
)
def test_many_pages_take_the_kernels_and_the_temporaries_of_one(tx, page_bytes):
    """So a GPU rounds alike wherever a page lives. 8-bit moments are read and written by kernels of their own."""
    pages = Pages(tx, {"q": ADAPTER["q.lora_a"]}, page_bytes)
    together, alone = (compile_updates(GPUS["h200"], pages, (stays,) * len(pages))[0] for stays in (True, False))
    assert len(pages) == 8
    assert sorted(kernels(together.as_text())) == sorted(8 * kernels(alone.as_text()))
    taken, of_one = together.memory_analysis(), alone.memory_analysis()
    assert taken.temp_size_in_bytes <= 1.1 * of_one.temp_size_in_bytes + 8 * 1024
    assert taken.alias_size_in_bytes >= ADAPTER["q.lora_a"].size * 4 + sum(pages.bytes)


def kernels(text: str) -> list[str]:
    """What each fusion of a program computes, values named as they come, whatever the order of its parameters."""
    bodies = computations(text)
    entry = next(lines for name, lines in bodies.items() if name.startswith(ENTRY))
    called = [match[1] for line in entry if (match := re.search(r" fusion\(.*calls=%?([\w.\-]+)", line))]

    def plain(name: str) -> str:
        names: dict[str, str] = {}
        body = "\n".join(re.sub(r", metadata=\{.*?\}(?=$|,)|(?<= parameter)\(\d+\)", "", line) for line in bodies[name])
        return re.sub(r"%[\w.\-]+", lambda match: names.setdefault(match[0], f"%{len(names)}"), body)

    return [plain(name) for name in called]
