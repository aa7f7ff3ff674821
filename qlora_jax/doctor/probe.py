"""`python -m qlora_jax.doctor.probe` prints what JAX sees as one line of JSON. As a process it may crash or hang."""

import importlib
import json
import logging
import sys
from typing import Any

# what training imports, in the order in which one needs the other
_MODULES = ("numpy", "jaxlib", "jax", "flax.nnx", "optax", "qlora_jax.train.loop", "qlora_jax.generate.decode")


def probe() -> dict[str, Any]:
    """{"imports": {module: error or None}, "jax", "devices": [...], "device_error", "kernels": {...}, "warnings"}."""
    warnings = _Lines()
    logging.getLogger("jax").addHandler(warnings)
    found: dict[str, Any] = {"imports": {name: _import(name) for name in _MODULES}, "warnings": warnings.lines}
    if found["imports"]["jax"] is not None:
        return found
    import jax

    found["jax"] = jax.__version__
    try:
        found["devices"] = [_device(device) for device in jax.local_devices()]
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))))  # a driver too old shows here
    except Exception as error:
        found["device_error"] = _first_line(error)
        return found
    try:
        found["kernels"] = _kernels(found["devices"][0])
    except Exception as error:
        found["kernel_error"] = _first_line(error)
    return found


def _import(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except BaseException as error:  # a broken extension may raise anything
        return _first_line(error)
    return None


def _device(device: Any) -> dict[str, Any]:
    try:
        stats = device.memory_stats() or {}
    except Exception:
        stats = {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "compute_capability": str(getattr(device, "compute_capability", "")) or None,
        "memory_bytes": limit,
        "memory_free_bytes": None if limit is None else limit - used,
    }


def _kernels(device: dict[str, Any]) -> dict[str, Any]:
    """What `kernel=auto` takes: {"training": {backend: products}, "generation": {...}, "table": file or None}."""
    from collections import Counter

    from pallas_kernels.nf4_matmul import config

    table = config.tuned_table(device["kind"])
    training = Counter(choice.backend for key, choice in table.items() if not config.is_few("forward", key[3]))
    generation = Counter(choice.backend for key, choice in table.items() if config.is_few(key[0], key[3]))
    file = config.table_file(device["kind"])
    return {"training": training, "generation": generation, "table": file.name if file.exists() else None}


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().splitlines()[0])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    answer = json.dumps(probe())
    print(f"\n{answer}", flush=True)
    sys.exit(0)
