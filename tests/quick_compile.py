"""What the mark `quick_compile` changes in how programs are compiled: LLVM's optimizations and XLA:CPU's emitters.

JAX_DISABLE_MOST_OPTIMIZATIONS leaves the first out. What is left of compiling is then mostly the emitters of fusions,
which go through MLIR: the older ones, which write LLVM's code directly, need a third of it. A step of the quickstart
compiles in 9.1 CPU s, in 5.3 without optimizations, in 1.9 with the older emitters too. An option chooses them that JAX
has no setting for: it is added to what JAX hands to the compiler, so that files with and without the mark may stand in
one process. Commands that a test starts read it from XLA_FLAGS. Two programs of the same sums may round otherwise then:
files that hold a pack's bits against a run's do not have the mark.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from experiments.support.process import OPTIONS

NOT_OPTIMIZED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
_OLD_EMITTERS = "xla_cpu_disable_new_fusion_emitters"


def is_on() -> bool:
    return os.environ.get(NOT_OPTIMIZED) == "1"


def switch(on: bool) -> None:
    """For all that is compiled from now on, here and by commands; what was compiled otherwise is dropped."""
    import jax
    from jax._src import compiler

    os.environ[NOT_OPTIMIZED] = "1" if on else "0"
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(OPTIONS)]
    options = "xla_cpu_disable_loop_unrolling" + f",{_OLD_EMITTERS}" * on
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{OPTIONS}={options}"])
    jax.config.update(NOT_OPTIMIZED.lower(), on)
    usual = getattr(compiler.get_compile_options, "__wrapped__", compiler.get_compile_options)
    compiler.get_compile_options = _quick(usual) if on else usual
    jax.clear_caches()


def _quick(usual: Callable[..., Any]) -> Callable[..., Any]:
    """JAX's get_compile_options, with the older emitters."""

    @functools.wraps(usual)
    def options(*arguments: Any, **named: Any) -> Any:
        return _with_old_emitters(usual(*arguments, **named))

    return options


def _with_old_emitters(options: Any) -> Any:
    # of protobuf, that one message after the other is both of them merged: executable_build_options.debug_options
    # .xla_backend_extra_options[_OLD_EMITTERS] = ""
    entry = _field(1, _OLD_EMITTERS.encode()) + _field(2, b"")
    more = _field(3, _field(3, _field(500, entry)))
    return type(options).ParseFromString(options.SerializeAsString() + more)


def _field(number: int, content: bytes) -> bytes:
    """A field of protobuf that has a length."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
