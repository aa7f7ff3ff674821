"""What a run takes, measured where the backend measures it and said by the compiler where it does not."""

import os
import resource
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import jax

from qlora_jax.errors import InputError
from qlora_jax.mesh.processes import wait

MEMORY_FRACTION = 0.95  # of a GPU, for JAX's allocator; XLA_CLIENT_MEM_FRACTION says otherwise


class Program:
    """A jitted function compiled once a shape, so that each program's own memory figures are at hand.

    Several threads may compile and call it: who needs a program that is being compiled waits for it.
    """

    def __init__(
        self, function: Any, compiler_options: dict[str, str] | None = None, donate_argnums: tuple[int, ...] = ()
    ):
        self._jitted = jax.jit(function, compiler_options=compiler_options, donate_argnums=donate_argnums)
        self._compiled: dict[Any, Future] = {}
        self._called: set[Any] = set()
        self._lock = threading.Lock()
        self.waits = 0  # calls whose program was not there yet
        self.peak_bytes = 0  # largest program so far: arguments, results and temporaries

    def __call__(self, *arguments: Any) -> Any:
        key = _key(arguments)
        program = self._compiled.get(key)
        if program is None or not program.done():
            self.waits += 1
        compiled = self.compile(*arguments)
        if key not in self._called:
            self._called.add(key)
            wait("program")  # for processes that compile it for longer
        return compiled(*arguments)

    def compile(self, *arguments: Any) -> Any:
        """The program for arrays of these shapes, whose memory then counts in peak_bytes."""
        key = _key(arguments)
        with self._lock:
            is_mine = key not in self._compiled
            program = self._compiled.setdefault(key, Future())
        if is_mine:
            try:
                program.set_result(self._compile(arguments))
            except BaseException as error:
                with self._lock:
                    del self._compiled[key]  # whoever asks next tries again
                program.set_exception(error)
        return program.result()

    def _compile(self, arguments: tuple) -> Any:
        compiled = self._jitted.lower(*arguments).compile()
        memory = compiled.memory_analysis()
        if memory is not None:
            used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            with self._lock:
                self.peak_bytes = max(self.peak_bytes, used - memory.alias_size_in_bytes)
        return compiled


def _key(arguments: tuple) -> Any:
    return (jax.tree.structure(arguments), *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments)))


@contextmanager
def out_of_memory_said() -> Iterator[None]:
    """Raises InputError with what would help where the device's memory is full. The longest rows are the first, so
    that is soon."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        limit = memory_limit()
        room = "" if limit is None else f" of {limit / 2**30:.2f} GiB"
        raise InputError(
            f"out of device memory{room}: {str(error).splitlines()[0]} (experiments.plan says what would fit: shorter "
            "rows by data.max_source_len and data.max_target_len, fewer at a time by train.grad_accum and "
            "eval.batch_size, ...)"
        ) from error


def memory_limit() -> int | None:
    """Bytes that the first device's allocator may give out; None on backends that state none (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_device_bytes(compiled_peak: int) -> tuple[int, str]:
    """(bytes, where the figure comes from): the allocator's peak on accelerators; on CPUs the largest compiled
    program."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "allocator"
    return compiled_peak, "compiler"


def memory_said() -> str:
    """The most memory taken so far, and of what: the device's where its allocator counts, else the process's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return f"{stats['peak_bytes_in_use'] / 2**30:.2f} GiB device"
    return f"{peak_host_bytes() / 2**30:.2f} GiB host"


def peak_host_bytes() -> int:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
