"""What a run takes, measured where the backend measures it and said by the compiler where it does not."""

import os
import resource
import sys
from typing import Any

import jax

MEMORY_FRACTION = 0.95  # of a GPU, for JAX's allocator; XLA_CLIENT_MEM_FRACTION says otherwise


class Program:
    """A jitted function compiled once a shape, so that each program's own memory figures are at hand."""

    def __init__(
        self, function: Any, compiler_options: dict[str, str] | None = None, donate_argnums: tuple[int, ...] = ()
    ):
        self._jitted = jax.jit(function, compiler_options=compiler_options, donate_argnums=donate_argnums)
        self._compiled: dict[Any, Any] = {}
        self.peak_bytes = 0  # largest program so far: arguments, results and temporaries

    def __call__(self, *arguments: Any) -> Any:
        return self.compile(*arguments)(*arguments)

    def compile(self, *arguments: Any) -> Any:
        """The program for arrays of these shapes, whose memory then counts in peak_bytes."""
        key = (jax.tree.structure(arguments), *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments)))
        if key not in self._compiled:
            compiled = self._jitted.lower(*arguments).compile()
            self._compiled[key] = compiled
            memory = compiled.memory_analysis()
            if memory is not None:
                used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
                self.peak_bytes = max(self.peak_bytes, used - memory.alias_size_in_bytes)
        return self._compiled[key]


def memory_limit() -> int | None:
    """Bytes that the first device's allocator may give out; None on backends that state none (CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_device_bytes(compiled_peak: int) -> tuple[int, str]:
    """(bytes, where the figure comes from): the allocator's peak on accelerators; on CPUs the largest compiled
    program."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "allocator"
    return compiled_peak, "compiler"


def peak_host_bytes() -> int:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
