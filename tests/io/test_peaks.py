"""What loading is said to take holds: against the memory of a real load, and against what the compiler takes."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from qlora_jax.errors import InputError
from qlora_jax.io.folder import TensorFiles
from qlora_jax.io.load import QuantSpec, expected_shapes, load_config, load_model
from qlora_jax.io.peaks import FORMS, load_device_peak_bytes, load_host_peak_bytes, model_bytes
from qlora_jax.models.config import ModelConfig
from qlora_jax.planning import topology
from qlora_jax.planning.gpus import GPUS
from qlora_jax.quant.blockwise import CHUNK, quantize_packed, temporary_bytes
from qlora_jax.quant.codebooks import codebook
from tests import forked
from tests.llama_names import EMBEDDING

UNRUN = {"xla_backend_optimization_level": 0}  # buffers are assigned before LLVM begins
SLACK = 32 * 2**20  # of the process beside the loader: new programs, the allocator's and the interpreter's own
LLAMA_65B = ModelConfig(
    D=8192, F=22016, L=80, N=64, K=64, H=128, V=32000, context=2048, norm_eps=1e-6, rope_theta=10000.0,
    rope_scaling=(), tied=False, eos_ids=(2,), bos_id=1,
)  # fmt: skip


def write_checkpoint(folder: Path, L: int) -> Path:
    """16-bit weights, 27 MB a layer and 33 MB of embedding and head; layers hold the same values."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": L,
        "num_attention_heads": 16, "vocab_size": 8192,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng, shapes = np.random.default_rng(0), expected_shapes(load_config(folder))
    values = {
        shape: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for shape in set(shapes.values())
    }
    save_file({key: values[shape] for key, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak is told by Linux alone")
def test_a_16_bit_model_never_sits_in_memory(tmp_path: Path) -> None:
    """Memory of a real load of 302 MB, quantized on its way: on a CPU host and device are one."""
    small, folder = write_checkpoint(tmp_path / "small", 1), write_checkpoint(tmp_path / "model", 10)
    result = forked.run(Path(__file__).with_name("load_peak.py").read_text(), small, folder)
    assert result.returncode == 0, result.stderr
    measured, config = json.loads(result.stdout), load_config(folder)
    promised = load_host_peak_bytes(config) + load_device_peak_bytes(config, QuantSpec())
    assert promised + SLACK < 0.8 * model_bytes(config, QuantSpec("none")), "this test could not fail"
    assert model_bytes(config, QuantSpec()) < measured["kept"] + SLACK
    assert model_bytes(config, QuantSpec()) - SLACK < measured["peak"] < promised + SLACK


@pytest.mark.quick_compile  # what is counted are arrays that stay
@pytest.mark.parametrize("quant", [QuantSpec(), QuantSpec("fp4", 32, False), QuantSpec("none")])
@pytest.mark.parametrize("name", ["llama1", "llama2", "llama3"])  # llama1: float32; llama3: tied
def test_bytes_of_a_model_are_those_of_its_arrays(golden: Path, name: str, quant: QuantSpec) -> None:
    stored = TensorFiles(golden / "llama" / name).dtypes[EMBEDDING]
    model, itemsize = load_model(golden / "llama" / name, quant, "float32"), {"float32": 4, "bfloat16": 2}[stored]
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert model_bytes(load_config(golden / "llama" / name), quant, itemsize) == found


@pytest.mark.parametrize(
    ("shape", "block_size", "double_quant"),
    [
        *((shape, 64, True) for shape in ((2048, 1024), (2049, 1023), (4096, 4096), (11008, 4096), (22016, 8192))),
        *((shape, *scales) for shape in ((2049, 1023), (22016, 8192)) for scales in ((32, True), (64, False))),
    ],
)
def test_quantizing_takes_what_is_said(shape: tuple[int, int], block_size: int, double_quant: bool) -> None:
    w, n = jax.ShapeDtypeStruct(shape, "bfloat16"), shape[0] * shape[1]
    compiled = quantize_packed.lower(w, codebook("nf4"), block_size, double_quant).compile(UNRUN)
    said = temporary_bytes(n, block_size)
    assert compiled.memory_analysis().temp_size_in_bytes <= said
    if n > 8 * CHUNK:
        assert said < 2 * n, "the weight itself is larger"


def test_quantizing_takes_what_is_said_on_a_gpu() -> None:
    if not topology.is_installed():
        pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin")
    for shape in ((4096, 4096), (22016, 8192)):
        w = topology.on_gpu(GPUS["h200"], jax.ShapeDtypeStruct(shape, "bfloat16"))
        compiled = topology.compile_for(GPUS["h200"], lambda w: quantize_packed(w, codebook("nf4"), 64, True), w)
        assert compiled.memory_analysis().temp_size_in_bytes <= temporary_bytes(shape[0] * shape[1], 64)


def test_a_65b_loads_into_its_card() -> None:
    """Host: three pieces of 32 MiB. Device: the model, one tensor of 361 MB, and about half of that to quantize it."""
    assert load_host_peak_bytes(LLAMA_65B) == 3 * 32 * 2**20
    peak, kept = load_device_peak_bytes(LLAMA_65B, QuantSpec()), model_bytes(LLAMA_65B, QuantSpec())
    tensor = 2 * 22016 * 8192
    assert tensor < peak - kept < 1.6 * tensor
    assert load_device_peak_bytes(LLAMA_65B, QuantSpec(), "native") - kept == 2 * 32 * 2**20
    assert load_device_peak_bytes(LLAMA_65B, QuantSpec("none")) > 4 * 30e9
    assert load_host_peak_bytes(LLAMA_65B, "bnb") == 2.5 * 22016 * 8192
    assert load_host_peak_bytes(LLAMA_65B, remote=True) == 4 * 32 * 2**20
    with pytest.raises(InputError, match="form 'gguf' of a folder; expected one of unquantized, native, bnb"):
        load_host_peak_bytes(LLAMA_65B, "gguf")
    assert FORMS[0] == "unquantized"
