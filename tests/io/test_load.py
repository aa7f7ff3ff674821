"""Loading: everything that does not fit in one error, and never more than one unquantized tensor in memory."""

import json
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.folder import TensorFiles, cut
from qlora_jax.io.load import QuantSpec, load_model, stored_quant
from qlora_jax.io.write import quantize_folder
from tests.llama_names import LAYER, LINEARS

pytestmark = pytest.mark.quick_compile


@pytest.fixture
def copy(golden, tmp_path):
    """copy(name, change of tensors, change of config.json): an altered golden checkpoint of one file."""

    def make(name: str, tensors=lambda t: None, config=lambda c: None) -> Path:
        folder = Path(shutil.copytree(golden / name, tmp_path / "model"))
        held, raw = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        tensors(held)
        config(raw)
        save_file(held, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return make


def test_all_that_does_not_fit_in_one_error(copy):
    def damage(tensors):
        del tensors["model.norm.weight"]
        del tensors[LAYER.format(1, "mlp.up_proj")]
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = np.zeros((5, 7), np.float32)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int16)

    with pytest.raises(InputError) as error:
        load_model(copy("llama/llama1", damage))
    message = str(error.value)
    assert "(5 problems)" in message
    for part in (
        "missing model.norm.weight [32]",
        "missing model.layers.1.mlp.up_proj.weight [",
        "unexpected model.extra.weight [3]",
        "lm_head.weight is [5, 7], expected [96, 32]",
        "model.embed_tokens.weight is I16, expected one of float32",
    ):
        assert part in message


def test_unknown_architecture(copy):
    folder = copy("llama/llama1", config=lambda c: c.update(architectures=["RwkvForCausalLM"]))
    with pytest.raises(InputError, match=r"config.json: unknown architecture RwkvForCausalLM; known: LlamaForCausalLM"):
        load_model(folder)


def test_buffers_of_old_checkpoints_are_no_problem(copy):
    load_model(copy("llama/llama1", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)})))


def test_what_is_kept_in_which_dtype(golden):
    model = load_model(golden / "llama" / "llama2", QuantSpec("fp4", 32, False))
    assert model.embedding.get_value().dtype == model.head.get_value().dtype == jnp.bfloat16
    assert model.norm.weight.get_value().dtype == jnp.float32
    assert model.blocks.input_layernorm.weight.get_value().dtype == jnp.float32
    q = lora.linear(model, "mlp.down_proj").weight.get_value()
    assert (q.format, q.block_size, q.double_quant, q.codes.ndim) == ("fp4", 32, False, 2)
    kept = load_model(golden / "llama" / "llama1", QuantSpec("none"), jnp.float32)
    assert lora.linear(kept, "mlp.down_proj").weight.get_value().dtype == jnp.float32
    cut = load_model(golden / "llama" / "llama1", QuantSpec("none"), jnp.bfloat16)
    assert lora.linear(cut, "mlp.down_proj").weight.get_value().dtype == jnp.bfloat16


def test_each_layer_is_quantized_for_itself(golden):
    """A layer's slice of the stack is what `quantize` makes of its tensor."""
    folder = golden / "llama" / "llama2"
    files, model = TensorFiles(folder), load_model(folder, QuantSpec())
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        stack = lora.linear(model, name).weight.get_value()
        for index in range(2):
            alone = qj.quantize(jnp.asarray(files.read(LAYER.format(index, name))))
            layer = jax.tree.map(lambda x, index=index: x[index], stack)
            for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(layer), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["nf4_dq", "nf4", "fp4"])
def test_quantized_folder_says_how(golden, name):
    folder = golden / "bnb4bit" / name
    expected = QuantSpec(name[:3], 64, name.endswith("dq"))
    assert stored_quant(folder) == expected
    assert stored_quant(golden / "llama" / "llama2") is None
    codes = load_file(folder / "model.safetensors")[LAYER.format(1, "mlp.up_proj")].reshape(-1)
    stack = lora.linear(load_model(folder, expected), "mlp.up_proj").weight.get_value()
    layer = jax.tree.map(lambda x: x[1], stack)
    np.testing.assert_array_equal(qj.to_bitsandbytes(layer)["weight"].reshape(-1), codes)


def test_already_quantized_otherwise(golden):
    folder = golden / "bnb4bit" / "nf4"
    for asked in (
        QuantSpec("none"),
        QuantSpec("fp4", 64, False),
        QuantSpec("nf4", 64, True),
        QuantSpec("nf4", 128, False),
    ):
        with pytest.raises(InputError, match=r"already quantized \(nf4, blocks of 64\), not "):
            load_model(folder, asked)


def test_quantized_by_something_else(copy):
    folder = copy("llama/llama1", config=lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(InputError, match="is quantized by 'gptq'; readable are bitsandbytes folders"):
        load_model(folder)


def test_8_bits_that_are_16(copy):
    """As with llm_int8_has_fp16_weight."""
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    folder = copy("llama/llama1", config=lambda c: c.update(quantization_config=eight))
    with pytest.raises(InputError, match=r"config.json names bitsandbytes, but no tensor is quantized"):
        load_model(folder)


def test_our_own_quantization_half_described(copy):
    own = {"quant_method": "qlora_jax", "layout": 2}
    folder = copy("llama/llama1", config=lambda c: c.update(quantization_config=own))
    with pytest.raises(InputError, match="quantization_config lacks format, block_size, double_quant"):
        load_model(folder)


def test_quantized_folder_that_lacks_a_weight(copy):
    key = LAYER.format(1, "mlp.up_proj")

    def remove(tensors):
        for name in [name for name in tensors if name.startswith(key)]:
            del tensors[name]

    with pytest.raises(InputError, match=f"missing {key}, quantized"):
        load_model(copy("bnb4bit/nf4_dq", remove))


def test_quantized_weight_of_another_shape(copy):
    a, b = LAYER.format(0, "mlp.up_proj"), LAYER.format(0, "self_attn.q_proj")

    def swap(tensors):
        for part in [name.removeprefix(a) for name in list(tensors) if name.startswith(a)]:
            tensors[a + part], tensors[b + part] = tensors[b + part], tensors[a + part]

    with pytest.raises(InputError, match=r"self_attn.q_proj.weight is \[170, 48\] once unpacked, expected \[48, 48\]"):
        load_model(copy("bnb4bit/nf4_dq", swap))


@pytest.mark.parametrize("quant", [QuantSpec(), QuantSpec("none")])
@pytest.mark.parametrize("piece_bytes", [500, 2**25])
def test_one_unquantized_tensor_at_a_time(golden, monkeypatch, quant, piece_bytes):
    """When a linear layer's tensor is read, those read before it are gone, buffers of its pieces included."""
    linears, alive, most = {LAYER.format(i, name) for i in range(2) for name in LINEARS}, [], []
    monkeypatch.setattr("qlora_jax.io.folder.PIECE_BYTES", piece_bytes)
    read = TensorFiles._read

    def watched(self, key, first, out):
        if key in linears and first == 0:
            most.append(sum(reference() is not None for of, reference in alive if of != key))
        if key in linears:
            alive.append((key, weakref.ref(out if out.base is None else out.base)))
        return read(self, key, first, out)

    monkeypatch.setattr(TensorFiles, "_read", watched)
    load_model(golden / "llama" / "llama2", quant)
    assert {key for key, _ in alive} == linears and len(most) == len(linears)
    assert max(most) == 0


@pytest.mark.parametrize("name", ["llama/llama3", "bnb4bit/nf4_dq"])
def test_pieces_make_no_difference(golden, monkeypatch, tmp_path, name):
    """Tensors cut into many pieces, within rows too, come out as they are."""
    form = tmp_path / "native"
    quantize_folder(golden / name, form)
    for folder in (golden / name, form):
        whole = load_model(folder, QuantSpec(), "float32")
        with monkeypatch.context() as patched:
            patched.setattr("qlora_jax.io.folder.PIECE_BYTES", 100)
            pieces = load_model(folder, QuantSpec(), "float32")
        for a, b in zip(jax.tree.leaves(nnx.state(whole)), jax.tree.leaves(nnx.state(pieces)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("shape", "most"), [((7, 5, 3), 1), ((7, 5, 3), 20), ((7, 5, 3), 70), ((4, 9), 1000), ((), 1)])
def test_pieces_are_runs_in_order(shape, most):
    values = np.arange(np.prod(shape, dtype=int), dtype=np.int16).reshape(shape)
    again, flat = np.empty_like(values), []
    for corner, size in cut(shape, 2, most):
        box = tuple(slice(at, at + count) for at, count in zip(corner, size, strict=True))
        again[box] = values[box]
        flat.append(values[box].reshape(-1))
        assert flat[-1].size == np.prod(size) and (flat[-1].nbytes <= most or flat[-1].size == 1)
    np.testing.assert_array_equal(again, values)
    np.testing.assert_array_equal(np.concatenate(flat), values.reshape(-1))


def test_progress_counts_every_tensor(golden):
    seen = []
    load_model(golden / "llama" / "llama1", QuantSpec("none"), progress=lambda done, total: seen.append((done, total)))
    total = 3 + 2 * 9
    assert seen[0] == (1, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_kernel_reaches_every_linear_layer(golden):
    model = load_model(golden / "llama" / "llama1", QuantSpec(), kernel="triton")
    assert {lora.linear(model, name).weight.get_value().codec.backend for name in LINEARS} == {"triton"}
