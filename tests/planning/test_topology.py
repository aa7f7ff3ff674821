"""Compiling for a GPU that is not here, where XLA would want to try things on it."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qlora_jax.errors import InputError
from qlora_jax.planning import topology
from qlora_jax.planning.gpus import GPUS

if not topology.is_installed():
    pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin", allow_module_level=True)

GPU = GPUS["rtx4090"]
FUSES = "xla_gpu_enable_triton_gemm"


@pytest.fixture
def asked(monkeypatch):
    """Options of each try. The compiler says of the first what it said of Phi 4's fused projections."""
    found = []
    compile = jax.stages.Lowered.compile

    def stand_in(self, compiler_options):
        found.append({name: value for name, value in compiler_options.items() if "cache" not in name})
        if len(found) == 1:
            raise jax.errors.JaxRuntimeError(stand_in.said)
        return compile(self, compiler_options)

    stand_in.said = "INTERNAL: No supported config found for HLO: %gemm_fusion_dot_general.78 = bf16[7680,16]{1,0} ..."
    monkeypatch.setattr(jax.stages.Lowered, "compile", stand_in)
    return found, stand_in


@pytest.fixture
def cache(tmp_path):
    """An empty folder for JAX's cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def compiled():
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    return topology.compile_for(GPU, lambda x: x @ x, *topology.on_gpu(GPU, (x,)), compiler_options={"xla_dump_to": ""})


@pytest.mark.parametrize("what", ["ptxas", "libdevice"])
def test_without_a_part_of_cuda_it_says_which(monkeypatch, tmp_path, what):
    """XLA would end the process by a signal."""
    (tmp_path / "bin").mkdir()
    if what != "ptxas":
        (tmp_path / "bin" / "ptxas").touch()
    monkeypatch.setattr(topology, "cuda_path", None)
    monkeypatch.setattr(topology, "_USUAL", (str(tmp_path),))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    topology.described_devices.cache_clear()
    with pytest.raises(InputError, match=f"needs CUDA's {what}, which is not here: pip install 'qlora_jax\\[plan\\]'"):
        topology.described_device(GPU)


def test_a_product_that_only_a_card_can_tune_is_not_fused(asked):
    assert compiled().memory_analysis().argument_size_in_bytes == 64 * 64 * 2
    first, second = asked[0]
    assert FUSES not in first and second == first | {FUSES: False} and "xla_dump_to" in second


def test_other_errors_are_said(asked):
    asked[1].said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiled()
    assert len(asked[0]) == 1


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: bytes(100), lambda data: data + b"more"])
def test_kernels_are_kept_beside_jaxs_cache_and_a_damaged_file_costs_nothing(monkeypatch, cache, damage):
    kept = cache / topology.KERNELS
    first = compiled().memory_analysis().temp_size_in_bytes
    whole = kept.read_bytes()
    assert compiled().memory_analysis().temp_size_in_bytes == first and kept.read_bytes() == whole
    kept.write_bytes(damage(whole))
    assert compiled().memory_analysis().temp_size_in_bytes == first
    compiled()
    assert len(kept.read_bytes()) >= len(whole) and list(cache.iterdir()) == [kept]
    monkeypatch.setattr(topology, "MOST_KEPT", 10)
    compiled()
    assert kept.read_bytes() == whole


def test_no_folder_is_made_for_them(cache):
    cache.rmdir()
    compiled()
    assert not cache.exists()
