"""Compiling for a GPU that is not here, where XLA would want to try things on it."""

import tempfile

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
        folders = ("cache", "cuda_data_dir")  # of this try
        found.append({name: value for name, value in compiler_options.items() if not any(x in name for x in folders)})
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


def compiled(assembled=False, **options):
    """A product and a fusion."""
    arguments = topology.on_gpu(GPU, (jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),))
    options = {"xla_dump_to": ""} | options
    return topology.compile_for(GPU, lambda x: (x + 1) @ x, *arguments, compiler_options=options, assembled=assembled)


def test_one_function_is_traced_for_each_gpu_by_itself():
    """Kernels are chosen while tracing, and JAX keeps what it traced by the function, which plans share."""
    kinds = []

    def function(x):
        kinds.append(jax.sharding.get_abstract_mesh().abstract_device.device_kind)
        return x + 1

    for gpu in (GPUS["rtx4090"], GPUS["h100"]):
        topology.compile_for(gpu, function, *topology.on_gpu(gpu, (jax.ShapeDtypeStruct((4,), jnp.float32),)))
    assert kinds == [GPUS["rtx4090"].device_kind, GPUS["h100"].device_kind]


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


def test_without_machine_code_all_that_is_asked_of_a_program_is_the_same():
    made, unmade = [compiled(assembled=assembled) for assembled in (True, False)]
    assert unmade.as_text() == made.as_text()
    assert str(unmade.memory_analysis()) == str(made.memory_analysis())
    assert unmade.cost_analysis() == made.cost_analysis()


def test_machine_code_is_made_where_it_is_asked_for_or_where_no_script_can_run(monkeypatch, cache):
    refused = {"xla_gpu_ptx_compiler_extra_flags": "--no-such-option"}  # XLA hands it to ptxas
    monkeypatch.setattr(topology, "MOST_KEPT", 0)  # else ptxas has nothing to do
    compiled(**refused)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ptxas"):
        compiled(assembled=True, **refused)
    monkeypatch.setattr(topology, "_ASSEMBLES_NOTHING", "#!/nowhere/sh {ptxas}")
    with pytest.raises(jax.errors.JaxRuntimeError, match="ptxas"):
        compiled(**refused)


def test_a_temporary_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    """XLA would end the process by a signal."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(InputError, match=f"temporary folder, {tmp_path}/none: No such file .*TMPDIR names another"):
        compiled()


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
