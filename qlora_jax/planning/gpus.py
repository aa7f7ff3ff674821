"""The GPUs that a plan can be made for: what XLA must know of them to compile, and their rates.

Sources: NVIDIA's architecture papers and data sheets (bf16 with float32 sums, dense, boost clock), and the CUDA
programming guide's table of technical specifications by compute capability.
"""

import dataclasses

from qlora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PlannedGpu:
    """One card."""

    device_kind: str  # what JAX would call it
    compute_capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    memory_bytes: int  # what the driver shows
    bytes_per_second: float  # of its memory
    flops_per_second: float  # bfloat16 products, float32 sums
    l2_bytes: int
    clock_ghz: float
    is_here: bool = False  # this process's own device, which programs are compiled for as always

    @property
    def link_bytes_per_second(self) -> float:
        """To other cards of the machine, one direction: NVLink where the card has it, else PCIe 4.0 x16."""
        return next((rate for kind, rate in _LINKS.items() if kind in self.device_kind), 25 * 10**9)

    @property
    def target_config(self) -> str:
        """XLA's GpuTargetConfig in text form."""
        major, minor = self.compute_capability
        shared, shared_optin, threads = _CORES[self.compute_capability]
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  core_count: {self.cores} fpus_per_core: {64 if self.compute_capability == (8, 0) else 128}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_optin}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {self.bytes_per_second:.0f} l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{self.device_kind}"
"""


# compute capability -> bytes of shared memory a core, the same a block may ask for, threads a core
_CORES = {
    (8, 0): (167_936, 166_912, 2048),
    (8, 6): (102_400, 101_376, 1536),
    (8, 9): (102_400, 101_376, 1536),
    (9, 0): (233_472, 232_448, 2048),
    (10, 0): (233_472, 232_448, 2048),
    (12, 0): (102_400, 101_376, 1536),
}
# NVLink of the cards in the table, and PCIe 5.0 x16 of the RTX 5090
_LINKS = {"A100-SXM4": 300e9, "H100": 450e9, "H200": 450e9, "B200": 900e9, "RTX 5090": 50e9}
_MIB, _GB, _TERA = 2**20, 10**9, 10**12
GPUS = {
    "rtx3090": PlannedGpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 24_268 * _MIB, 936 * _GB, 71 * _TERA, 6 * _MIB, 1.695),
    "rtx4090": PlannedGpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 24_080 * _MIB, 1008 * _GB, 165 * _TERA, 72 * _MIB, 2.52
    ),
    "rtx5090": PlannedGpu(
        "NVIDIA GeForce RTX 5090", (12, 0), 170, 32_110 * _MIB, 1792 * _GB, 209 * _TERA, 96 * _MIB, 2.407
    ),
    "a10": PlannedGpu("NVIDIA A10", (8, 6), 72, 22_731 * _MIB, 600 * _GB, 125 * _TERA, 6 * _MIB, 1.695),
    "a6000": PlannedGpu("NVIDIA RTX A6000", (8, 6), 84, 48_677 * _MIB, 768 * _GB, 155 * _TERA, 6 * _MIB, 1.8),
    "l40s": PlannedGpu("NVIDIA L40S", (8, 9), 142, 45_589 * _MIB, 864 * _GB, 362 * _TERA, 96 * _MIB, 2.52),
    "a100-40gb": PlannedGpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 40_442 * _MIB, 1555 * _GB, 312 * _TERA, 40 * _MIB, 1.41
    ),
    "a100-80gb": PlannedGpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 81_152 * _MIB, 2039 * _GB, 312 * _TERA, 40 * _MIB, 1.41
    ),
    "h100": PlannedGpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 81_004 * _MIB, 3350 * _GB, 989 * _TERA, 50 * _MIB, 1.98),
    "h200": PlannedGpu("NVIDIA H200", (9, 0), 132, 143_156 * _MIB, 4800 * _GB, 989 * _TERA, 50 * _MIB, 1.98),
    "b200": PlannedGpu("NVIDIA B200", (10, 0), 148, 182_642 * _MIB, 7700 * _GB, 2250 * _TERA, 126 * _MIB, 1.965),
}


def gpu_of_kind(device_kind: str) -> PlannedGpu | None:
    """The GPU that JAX calls `device_kind`; None where its data sheet is not here."""
    return next((gpu for gpu in GPUS.values() if gpu.device_kind == device_kind), None)


def planned_gpu(name: str) -> PlannedGpu:
    """The GPU called `name` ("a6000", also "A6000", "RTX A6000"). Raises InputError that lists the known ones."""
    plain = name.lower().removeprefix("nvidia").strip().replace("geforce", "").replace("_", "-").strip()
    for key in (plain, plain.replace(" ", ""), plain.replace(" ", "-"), plain.removeprefix("rtx").strip()):
        if key in GPUS:
            return GPUS[key]
    raise InputError(f"--gpu={name}: no such GPU here; known: {', '.join(GPUS)}")
