"""Finds the fastest right way to compute a product on this GPU: every backend, and tile sizes of "triton" by search.

The search starts from the heuristic's tiles and varies two fields at a time around the best so far (config.SWEEPS):
some 30 programs to compile instead of the 180 of the whole product. What differs between one pair of fields and the
next is not seen. A program that computes something else than the reference is never ranked.

Most of the time goes into compiling Triton's kernels. Several processes may tune side by side: what runs on the GPU,
runs under a lock that they share, so that nobody is timed beside another. So does the compiling of the other backends,
in which XLA times matrix products on the GPU.
"""

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.finite import largest_magnitude
from pallas_kernels.nf4_matmul import api, config, measure
from pallas_kernels.nf4_matmul.config import Choice
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.measure import Case, Run
from pallas_kernels.nf4_matmul.operands import Codec, dequantize
from pallas_kernels.nf4_matmul.triton import few_rows

TOLERANCE = 0.05  # of the root mean square; a wrong index is off by about 1, the roundings of 16 bits by 0.01


@contextmanager
def alone(gpu_name: str) -> Iterator[None]:
    """Holds the lock of those that tune this GPU on this machine."""
    path = config.table_file(gpu_name).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Tuned(NamedTuple):
    """The fastest choice, and the seconds of a product by each backend (triton's with its best tiles)."""

    choice: Choice
    seconds: Mapping[str, float]


def tune(
    case: Case,
    codec: Codec,
    gpu: config.Gpu,
    repeats: int,
    say: Callable[[str], None],
    is_over: Callable[[], bool] = lambda: False,
) -> Tuned:
    """The fastest choice that computes what the reference computes.

    Args:
      case, codec: the product.
      gpu: this process's.
      repeats: turns whose median counts.
      say: takes lines on what was left out and what was found.
      is_over: asked before each program is compiled.
    Raises:
      RuntimeError: nothing computes the product rightly.
      TimeoutError: is_over said so.
    """
    with alone(gpu.name):
        trials = _Trials(case, codec, gpu.name, say, is_over)
    for backend in config.MEASURED:
        if backend != "triton" and (backend != "mosaic" or gpu.compute_capability == 90):
            trials.add(Choice(backend))
    if config.is_few(case.op, case.rows):
        if (refusal := api.refusal(codec._replace(backend="triton"), jnp.dtype(case.dtype))) is None:
            _search_tiles(trials, case, gpu, repeats)
        else:
            say(f"left out, triton: {refusal}")
    if not trials.runs:
        raise RuntimeError(f"no backend computes {case} rightly on {gpu.name}")
    seconds = trials.time(repeats)
    return Tuned(min(seconds, key=seconds.__getitem__), {choice.backend: found for choice, found in seconds.items()})


def _search_tiles(trials: "_Trials", case: Case, gpu: config.Gpu, repeats: int) -> None:
    """Leaves the best tiles of "triton" among the trials, if any are right."""
    call = (case.shape, case.block_size, gpu)
    tiles = config.heuristic(*call)
    trials.add(Choice("triton", tiles))
    for fields in config.SWEEPS:
        found = [Choice("triton", varied) for varied in config.variations(*call, tiles, fields)]
        for choice in found:
            trials.add(choice)
        if best := trials.keep_fastest("triton", repeats):
            tiles = best
            trials.say(f"after {' and '.join(fields)}: {tiles}")


class _Trials:
    """Compiled and checked programs by choice."""

    def __init__(
        self, case: Case, codec: Codec, gpu_name: str, say: Callable[[str], None], is_over: Callable[[], bool]
    ) -> None:
        self.say, self._gpu_name = say, gpu_name
        self.runs: dict[Choice, Run] = {}
        self._is_over, self._case, self._codec = is_over, case, codec
        self._tried: set[Choice] = set()
        self._copies = measure.copies_that_pass_the_cache(case, on_gpu=True)
        self._packed = [measure.random_packed(codec, seed) for seed in range(self._copies)]
        columns = case.shape.in_features if case.op == "forward" else case.shape.out_features
        self._x = jax.random.normal(jax.random.key(0), (case.rows, columns), jnp.dtype(case.dtype))
        w = dequantize(self._packed[0], codec, jnp.dtype(jnp.float32))
        self._expected = dense_matmul(self._x.astype(jnp.float32), w, 1 if case.op == "forward" else 0)
        self._size = float(jnp.sqrt(jnp.mean(jnp.square(self._expected))))

    def add(self, choice: Choice) -> None:
        """Compiles and checks a choice, once; says why it is left out."""
        if choice in self._tried:
            return
        if self._is_over():
            raise TimeoutError
        self._tried.add(choice)
        codec = self._codec._replace(backend=choice.backend)
        if (refusal := api.refusal(codec, jnp.dtype(self._case.dtype))) is not None:
            self.say(f"left out, {choice.backend}: {refusal}")
            return
        products: Any = measure.products(self._case.op, codec)
        if choice.tiles is not None:
            tiles = choice.tiles
            product = lambda x, packed: few_rows.forward(x, packed, codec, tiles)  # noqa: E731
            products = measure.in_rounds(product, codec.shape[0])
        try:
            lowered = products.lower(self._x, self._packed, np.int32(1))
            with nullcontext() if choice.tiles else alone(self._gpu_name):
                program = lowered.compile()
            with alone(self._gpu_name):
                found = program(self._x, self._packed, np.int32(1))[0].astype(jnp.float32)
                worst = float(largest_magnitude(found - self._expected)) / self._size
        except Exception as error:  # whatever the compiler says of this choice, the next may do
            self.say(f"left out, does not run: {_name(choice)}: {measure.first_line(error)}")
            return
        if not worst < TOLERANCE:
            self.say(f"left out, wrong by {worst:.2g} of the root mean square: {_name(choice)}")
            return
        self.runs[choice] = partial(program, self._x, self._packed)

    def time(self, repeats: int) -> dict[Choice, float]:
        """Median seconds of one product of every choice."""
        with alone(self._gpu_name):
            return measure.interleaved(self.runs, repeats, self._copies)

    def keep_fastest(self, backend: str, repeats: int) -> config.Tiles | None:
        """Drops all but the fastest of a backend's choices; its tiles."""
        runs = {choice: run for choice, run in self.runs.items() if choice.backend == backend}
        if not runs:
            return None
        with alone(self._gpu_name):
            seconds = measure.interleaved(runs, repeats, self._copies)
        best = min(seconds, key=seconds.__getitem__)
        self.runs = {choice: run for choice, run in self.runs.items() if choice.backend != backend or choice == best}
        return best.tiles


def _name(choice: Choice) -> str:
    return choice.backend if choice.tiles is None else str(choice.tiles)
