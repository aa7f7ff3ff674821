"""Tuning: a wrong program is never ranked, the fastest right one is found in few compilations, time can run out."""

import fcntl

import jax.numpy as jnp
import pytest

from pallas_kernels.nf4_matmul import Codec, config, dense_matmul, dequantize, measure, tune
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton import few_rows, scratch

pytestmark = pytest.mark.quick_compile

GPU = config.Gpu("a GPU", 80, 10)
CODEC = Codec((64, 512), 64, tuple(k / 8 - 1 for k in range(16)), tuple(k / 255 for k in range(256)))
MOST = 40  # programs of one case


def case(op: config.Op = "forward", rows: int = 3) -> measure.Case:
    return measure.Case(op, Shape(64, 512), rows, block_size=64, dtype="bfloat16")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU whose kernels XLA computes: which tiles are broken or wrong, and how long each takes, is set here."""

    class Machine:
        broken, wrong = set(), set()
        seconds = {"xla": 3.0, "scratch": 2.0}
        compiled: list = []

        def time(self, tiles):
            return 1 + (tiles.block_o != 32) + (tiles.num_stages != 2)

    state = Machine()

    def product(op, name, x, packed, codec):
        state.compiled.append(name)
        if name in state.broken:
            raise RuntimeError("out of registers\nand more")
        y = dense_matmul(x, dequantize(packed, codec, x.dtype), 1 if op == "forward" else 0)
        return y.at[0, 0].add(5 * jnp.std(y)) if name in state.wrong else y

    def interleaved(runs, repeats, copies):
        def seconds(choice):
            return state.time(choice.tiles) if choice.tiles else state.seconds[choice.backend]

        return {choice: seconds(choice) for choice in runs}

    monkeypatch.setattr(few_rows, "forward", lambda x, p, c, tiles: product("forward", tiles, x, p, c))
    for op in config.OPS:
        monkeypatch.setattr(scratch, op, lambda x, p, c, op=op: product(op, "scratch", x, p, c))
    monkeypatch.setattr(config, "TUNED", tmp_path)
    monkeypatch.setattr(measure, "interleaved", interleaved)
    monkeypatch.setattr(measure, "copies_that_pass_the_cache", lambda case, on_gpu: 1)
    state.compiled = []
    return state


def test_those_who_tune_take_turns(machine):
    lock = config.table_file("a GPU").with_suffix(".lock")
    with tune.alone("a GPU"), lock.open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with tune.alone("a GPU"):
        pass


def test_the_fastest_tiles_are_found(machine):
    found = tune.tune(case(), CODEC, GPU, repeats=1, say=lambda line: None)
    assert found.choice.backend == "triton" and (found.choice.tiles.block_o, found.choice.tiles.num_stages) == (32, 2)
    assert found.seconds == {"xla": 3.0, "scratch": 2.0, "triton": 1.0}
    tiles = [name for name in machine.compiled if name != "scratch"]
    assert len(set(tiles)) == len(tiles) <= MOST


def test_what_is_wrong_or_does_not_compile_is_never_ranked(machine):
    machine.time = lambda tiles: 1
    start = config.heuristic(Shape(64, 512), 64, GPU)
    machine.wrong = {start}
    machine.broken = {"scratch"}
    said: list[str] = []
    found = tune.tune(case(), CODEC, GPU, repeats=1, say=said.append)
    assert found.choice.tiles not in (None, start)
    assert "left out, does not run: scratch: RuntimeError: out of registers" in said
    assert any(line.startswith("left out, wrong by") and str(start) in line for line in said)


def test_another_backend_wins_without_tiles(machine):
    machine.time = lambda tiles: 4
    assert tune.tune(case(), CODEC, GPU, 1, lambda line: None).choice == config.Choice("scratch")


@pytest.mark.parametrize(("op", "rows"), [("forward", 17), ("backward", 3)])
def test_products_that_triton_has_no_kernel_for_try_no_tiles(op, rows, machine):
    found = tune.tune(case(op, rows), CODEC, GPU, 1, lambda line: None)
    assert found.choice == config.Choice("scratch") and set(found.seconds) == {"xla", "scratch"}
    assert set(machine.compiled) == {"scratch"}


def test_weights_that_kernels_refuse_take_what_is_left(machine):
    codec = CODEC._replace(shape=(33, 64))  # an odd number of rows
    odd = measure.Case("forward", Shape(33, 64), 3, 64, "bfloat16")
    said: list[str] = []
    found = tune.tune(odd, codec, GPU, 1, said.append)
    assert found.choice == config.Choice("scratch") and set(found.seconds) == {"xla", "scratch"}
    assert any("left out, triton: O is 33" in line for line in said)


def test_nothing_right_is_an_error(machine, monkeypatch):
    monkeypatch.setattr(tune, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="no backend computes"):
        tune.tune(case(), CODEC, GPU, 1, lambda line: None)


def test_time_runs_out_between_two_compilations(machine):
    with pytest.raises(TimeoutError):
        tune.tune(case(), CODEC, GPU, 1, lambda line: None, is_over=lambda: len(machine.compiled) >= 3)
    assert len(machine.compiled) == 3
