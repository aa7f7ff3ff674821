"""Compiling for a GPU that is not here: XLA takes a description of it and gives a device to compile for.

XLA:GPU's compiler comes with jax-cuda13-plugin, the ptxas and libdevice that it calls with nvidia-cuda-nvcc and
nvidia-nvvm; neither a GPU nor the rest of CUDA is needed.
"""

import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src.lib import cuda_path
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from qlora_jax.errors import InputError
from qlora_jax.planning.gpus import PlannedGpu


def missing() -> str | None:
    """What there is not of all that compiling for a GPU takes which is not here; None: nothing.

    XLA ends the process where it finds no ptxas, so that is looked for first, in the places where XLA looks.
    """
    if importlib.util.find_spec("jax_plugins") is None or not any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (13, 12)
    ):
        return "XLA's compiler for GPUs"
    if _ptxas() is None:
        return "CUDA's ptxas"
    return None if _libdevice() is not None else "CUDA's libdevice"


def _ptxas() -> Path | None:
    found = next((path for root in _roots() if (path := root / "bin" / "ptxas").is_file()), shutil.which("ptxas"))
    return None if found is None else Path(found)


def _libdevice() -> Path | None:
    return next((path for root in _roots() if (path := root / _LIBDEVICE).is_file()), None)


def _roots() -> list[Path]:
    return [Path(root) for root in (cuda_path, *_CUDA_ROOTS.findall(os.environ.get("XLA_FLAGS", "")), *_USUAL) if root]


_CUDA_ROOTS = re.compile(r"--xla_gpu_cuda_data_dir=(\S+)")
_USUAL = ("/usr/local/cuda", "/opt/cuda")
_LIBDEVICE = Path("nvvm", "libdevice", "libdevice.10.bc")


def is_installed() -> bool:
    """Whether programs can be compiled for a GPU that is not here."""
    return missing() is None


def described_device(gpu: PlannedGpu) -> Any:
    """A jax device to lower and compile for. Raises InputError where XLA:GPU's compiler is not installed."""
    return described_devices(gpu, 1)[0]


@functools.cache
def described_devices(gpu: PlannedGpu, count: int) -> Any:
    """So many of one host."""
    if (what := missing()) is not None:
        raise InputError(f"planning for a GPU needs {what}, which is not here: pip install 'qlora_jax[plan]'")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=gpu.target_config
        )
    except Exception as error:  # whatever the plugin raises, the user's question is whether this GPU can be planned
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"XLA cannot compile for {gpu.device_kind} here: {reason}") from error
    return topology.devices


def on_gpu(gpu: PlannedGpu, tree: Any, shardings: Any = None) -> Any:
    """The shapes of `tree` (arrays or ShapeDtypeStructs), placed on the described device.

    `shardings`: of described_devices, one for each array, where there are several.
    """
    if shardings is not None:
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)
    if gpu.is_here:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    sharding = jax.sharding.SingleDeviceSharding(described_device(gpu))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


@contextlib.contextmanager
def traced_for(gpu: PlannedGpu, devices: Mesh | None = None) -> Iterator[None]:
    """What is chosen while tracing is chosen for `gpu`; `devices`: where programs are of several."""
    if gpu.is_here:
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind=gpu.device_kind, num_cores=gpu.cores, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)  # an explicit axis would be part of the types of what is made while tracing
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    if devices is not None:
        mesh = devices.abstract_mesh.update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


# Nothing runs these programs, and buffers are assigned before machine code is made: it need not be good, and there is
# no card to tune products on. The bytes are the same, in a fifth less of the time.
_UNRUN = {"xla_backend_optimization_level": 0, "xla_gpu_autotune_level": 0}

KERNELS = "kernels_of_absent_gpus"  # a file in the folder of JAX's cache
MOST_KEPT = 2**28  # bytes of it; a larger one is begun anew
_DAMAGED = ("DATA_LOSS", "OUT_OF_RANGE")  # what XLA says of a file that it cannot read

# XLA fuses a product with what makes its operand (a fused projection's gradient, joined from three) and tunes that on
# the card; without one it has no setting for it at all. Not fused, the operand takes a buffer of its own.
_UNTUNED = "No supported config found for HLO"


def compile_for(
    gpu: PlannedGpu,
    function: Any,
    *arguments: Any,
    compiler_options: dict[str, str] | None = None,
    donate_argnums: tuple[int, ...] = (),
    devices: Mesh | None = None,
    assembled: bool = False,
) -> Any:
    """`function` jitted, lowered and compiled for shapes that `on_gpu` placed: a jax.stages.Compiled.

    `devices`: described ones, of a program for several. `assembled`: with machine code, also for a GPU that is not
    here: XLA's answers are the same without, but an assembler would refuse a kernel that it cannot make.
    """
    if gpu.is_here:  # jitted as train/memory.Program does it: what a run of this process compiled is found again
        jitted = jax.jit(function, compiler_options=compiler_options, donate_argnums=donate_argnums)
        return jitted.lower(*arguments).compile()
    jitted = jax.jit(function, donate_argnums=donate_argnums)
    with traced_for(gpu, devices), _uncached():
        try:
            traced = jitted.trace(*arguments)
        except RuntimeError as error:  # of a kernel that is not for this GPU
            raise InputError(f"{gpu.device_kind}: {str(error).splitlines()[0]}") from error
        lowered = traced.lower(lowering_platforms=("cuda",))
        options = _UNRUN | (compiler_options or {})
        try:
            return _compile(lowered, options, assembled)
        except jax.errors.JaxRuntimeError as error:
            if _UNTUNED not in str(error):
                raise
            return _compile(lowered, options | {"xla_gpu_enable_triton_gemm": False}, assembled)


def _compile(lowered: Any, options: dict[str, Any], assembled: bool) -> Any:
    with _temporary_folder() as folder:
        if assembled:
            return lowered.compile(compiler_options=options)
        return _compile_with_kept(lowered, options | _without_assembler(folder), folder)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Where there is room: XLA writes files beside it, and ends the process by a signal where it cannot."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="qlora_jax_plan_")
        try:
            room = Path(folder.name, "room")
            room.write_bytes(bytes(_ROOM))
            room.unlink()
        except BaseException:
            folder.cleanup()
            raise
    except OSError as error:
        raise InputError(
            f"planning for a GPU writes some MB into the temporary folder, {tempfile.gettempdir()}: {error.strerror} "
            "(TMPDIR names another)"
        ) from error
    with folder:
        yield Path(folder.name)


_ROOM = 2**23  # bytes, several times what was seen


def _without_assembler(root: Path) -> dict[str, str]:
    """The option for XLA to find, in place of CUDA's ptxas, a script in `root` that assembles nothing.

    Some 300 processes of ptxas are two fifths of compiling a step, and no plan asks for what they write.
    """
    ptxas, libdevice = _ptxas(), _libdevice()
    assert ptxas is not None and libdevice is not None, "as `missing` found"
    script, linked = root / "bin" / "ptxas", root / _LIBDEVICE
    for made in (script, linked):
        made.parent.mkdir(parents=True)
    linked.symlink_to(libdevice.absolute())
    script.write_text(_ASSEMBLES_NOTHING.format(ptxas=shlex.quote(str(ptxas.absolute()))))
    script.chmod(0o700)
    try:
        subprocess.run([script, "-o", root / "tried"], check=True)
    except (OSError, subprocess.CalledProcessError):  # a folder whose files may not be executed
        return {}
    return {"xla_gpu_cuda_data_dir": str(root)}


# asked for its version it lets ptxas answer: XLA writes PTX as that version reads it
_ASSEMBLES_NOTHING = """#!/bin/sh
for argument in "$@"; do
    if [ "$last" = -o ]; then echo nothing > "$argument"; exit; fi
    last=$argument
done
exec {ptxas} "$@"
"""


def _compile_with_kept(lowered: Any, options: dict[str, Any], folder: Path) -> Any:
    """Compiled, with kernels of earlier programs, which are kept in the folder of JAX's cache if there is one.

    JAX's cache cannot hold these programs (`_uncached`), but a third of compiling one is its kernels. XLA writes the
    file in place, so it is given a copy in `folder`; the kept one is replaced in one step.
    """
    kept = Path(jax.config.jax_compilation_cache_dir or "", KERNELS)
    if not jax.config.jax_compilation_cache_dir or not kept.parent.is_dir():
        return lowered.compile(compiler_options=options)
    try:
        copy = folder / KERNELS
        if kept.exists() and kept.stat().st_size <= MOST_KEPT:
            shutil.copyfile(kept, copy)
        compiled = lowered.compile(compiler_options=options | {"xla_gpu_kernel_cache_file": str(copy)})
        if copy.exists():
            _replace(kept, copy)
        return compiled
    except (OSError, jax.errors.JaxRuntimeError) as error:  # a damaged file, a full disk: a plan does without
        if not isinstance(error, OSError) and not any(said in str(error) for said in (*_DAMAGED, KERNELS)):
            raise
        with contextlib.suppress(OSError):
            kept.unlink(missing_ok=True)
        return lowered.compile(compiler_options=options)


def _replace(kept: Path, copy: Path) -> None:
    """Whole or not at all, also where the disk is full: a plan is no poorer for it."""
    beside = kept.with_name(f"{KERNELS}-{os.getpid()}")
    try:
        shutil.copyfile(copy, beside)
        beside.replace(kept)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's cache of compiled programs: what it keeps for a GPU that is not here it cannot load again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether there is one is asked once, at the first program
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
