"""The cut of a batch into micro-batches: the fastest that fits, printed, kept by a run that goes on."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec
from qlora_jax.lora import LoRAConfig
from qlora_jax.mesh.axes import Axes
from qlora_jax.models.known import known_config
from qlora_jax.optim.residency import reserved
from qlora_jax.settings import resolved
from qlora_jax.train import loop
from qlora_jax.train.backward import kept_bytes
from qlora_jax.train.cut import (
    TOKENS,
    Cut,
    ToCut,
    attention_of,
    choose,
    cuts,
    default_cut,
    step_seconds,
    temporary_bytes,
)
from qlora_jax.train.loop import Run, finetune
from qlora_jax.train.shapes import ModelSpec

pytestmark = pytest.mark.quick_compile

GIB = 2**30


def to_cut(rows=16, T=576, grad_accum="auto", remat="auto", sequence_chunk=0) -> ToCut:
    sizes = known_config("huggyllama/llama-7b")
    assert sizes is not None
    model = ModelSpec(sizes, QuantSpec(), LoRAConfig(), sequence_chunk=sequence_chunk)
    return ToCut(model, rows, T, 1024, grad_accum, remat)


def test_more_memory_never_makes_a_slower_cut_and_every_cut_fits():
    rows, before = to_cut(), np.inf
    for limit in range(7, 80):
        cut, reason = choose(rows, 5 * GIB, limit * GIB)
        assert temporary_bytes(rows, cut) <= (limit - 5) * GIB - reserved(limit * GIB) and "fastest that fits" in reason
        seconds = step_seconds(rows, cut)
        assert seconds <= before
        before = seconds
    assert cut == Cut(16, "selective")


def test_large_micro_batches_come_first_then_what_is_not_computed_again():
    """A 7B on 24 GB: eight rows of which products are kept, where sixteen would have to be computed again."""
    assert choose(to_cut(), int(5.1e9), int(24e9)).cut == Cut(8, "selective")
    assert choose(to_cut(), int(5.1e9), int(11.9e9)).cut == Cut(16, "block")
    assert choose(to_cut(), int(5.1e9), int(5.8e9)).cut.remat == "block+offload"  # only where nothing else fits


def test_devices_that_divide_rows_hold_their_tokens_and_all_keys_and_values():
    one = to_cut(rows=1, T=65537)
    many = one._replace(model=one.model.of_one(Axes(sequence=4)))
    assert many.model.part(65537) == 16385 and not many.model.is_chunked(65537)
    kept = kept_bytes(one.model.sizes, "block", 1, 16385, 2)
    keys_values = 2 * one.model.sizes.K * one.model.sizes.H * 65537 * 2
    for remat in ("block", "selective"):
        whole, part = (temporary_bytes(rows, Cut(1, remat)) for rows in (one, many))
        assert kept + keys_values < part < whole / 2
    assert attention_of(many.model, 2048) == "xla" and attention_of(many.model, 2049) == "chunked"


def test_what_the_config_says_stays():
    limit = 80 * GIB
    assert choose(to_cut(grad_accum=4, remat="block"), 0, limit).cut == Cut(4, "block")
    assert choose(to_cut(grad_accum=4), 0, limit).cut == Cut(4, "selective")
    assert choose(to_cut(remat="block+offload"), 0, limit).cut == Cut(16, "block+offload")
    assert {cut.remat for cut in cuts(to_cut(sequence_chunk=128))} == {"block", "block+offload"}
    assert all(16 % cut.rows == 0 for cut in cuts(to_cut()))
    assert all(cut.remat != "none" for cut in cuts(to_cut()))


def test_where_none_fits_it_is_the_one_that_takes_least():
    cut, reason = choose(to_cut(), 30 * GIB, 24 * GIB)
    assert cut == Cut(1, "block+offload") and reason == "auto: model and gradients leave no room; this takes least"
    cut, reason = choose(to_cut(), 5 * GIB, 80 * GIB, lambda cut: False)
    assert cut == Cut(1, "block+offload") and "none fits 7" in reason


def test_a_cut_that_does_not_fit_after_all_gives_way_to_the_next():
    tried = []

    def fits(cut):
        tried.append(cut)
        return len(tried) == 3

    assert choose(to_cut(), 5 * GIB, 80 * GIB, fits).cut == tried[-1] == cuts(to_cut())[2]
    assert choose(to_cut(), 5 * GIB, 80 * GIB, lambda cut: False).cut == Cut(1, "block+offload")


def test_bytes_are_linear_in_rows_and_members():
    rows = to_cut(grad_accum=1)
    for remat in ("selective", "block", "block+offload"):
        sizes = [temporary_bytes(rows, Cut(number, remat)) for number in (4, 8, 12)]
        assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=1e-6)
        once = temporary_bytes(rows, Cut(4, remat))
        assert once < temporary_bytes(rows, Cut(4, remat), members=2) < 2 * once


@pytest.mark.parametrize(("T", "rows"), [(16, 16), (576, 2), (4096, 1)])
def test_without_a_stated_limit_micro_batches_have_so_many_tokens(T, rows):
    cut, reason = choose(to_cut(T=T), 0, None)
    assert cut == default_cut(to_cut(T=T)) == Cut(rows, "block") and "no memory limit" in reason
    assert rows == 1 or rows * T <= TOKENS


def train(config, path) -> list[str]:
    said: list[str] = []
    finetune(config, resolved(config), path, said.append)
    return said


def test_a_run_says_its_cut_and_keeps_it_when_it_goes_on(tiny_config, tmp_path, monkeypatch):
    """Begun on a device with room, gone on with where nothing is known of it: the same bits as without a stop."""
    tiny_config.train.grad_accum = tiny_config.model.remat = "auto"

    def stop(self, index, step=Run._step):
        if index == 3:
            raise RuntimeError("power cut")
        return step(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "memory_limit", lambda: GIB)
        begun = train(tiny_config, tmp_path / "whole")
        patch.setattr(Run, "_step", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tiny_config, tmp_path / "run")
    assert any("cut: 1 micro-batch of 4 rows a step, remat selective (auto: the fastest" in line for line in begun)
    kept = json.loads((tmp_path / "run" / "cut.json").read_text())
    assert (kept["micro_batch_rows"], kept["remat"]) == (4, "selective")
    again = train(tiny_config, tmp_path / "run")
    assert any("remat selective (kept: the run began with it)" in line for line in again)
    whole, resumed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "run"))
    for key, value in whole.items():
        np.testing.assert_array_equal(value, resumed[key])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["micro_batch_rows"], summary["remat"]) == (4, "selective")
    for rows, remat in [(0, "selective"), (3, "selective"), (4.0, "selective"), (4, "selectivf"), ("4", "block")]:
        (tmp_path / "run" / "cut.json").write_text(json.dumps({"micro_batch_rows": rows, "remat": remat}))
        with pytest.raises(InputError, match="cut.json is damaged"):
            train(tiny_config, tmp_path / "run")
    (tmp_path / "run" / "cut.json").write_text("{")
    with pytest.raises(InputError, match="cut.json is damaged"):
        train(tiny_config, tmp_path / "run")
    (tmp_path / "run" / "cut.json").unlink()
    assert any("cut.json is missing: batches are cut anew" in line for line in train(tiny_config, tmp_path / "run"))


def test_what_is_kept_of_a_layer_stands_in_for_what_would_be_computed():
    import jax
    from jax.ad_checkpoint import checkpoint_name

    from qlora_jax.models.kept import keeping, with_kept

    def layer(w, x):
        y = checkpoint_name(jnp.sin(x * w), "y")
        return jnp.sum(y * y * w)

    w, x = jnp.asarray(0.7), jnp.arange(4.0)
    out, kept = keeping(layer, {"y"})(w, x)
    np.testing.assert_array_equal(kept["y 0"], jnp.sin(x * w))
    again, pullback = jax.vjp(with_kept(layer, kept), w, x)
    assert float(again) == float(out)
    for a, b in zip(pullback(jnp.asarray(1.0)), jax.grad(layer, (0, 1))(w, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    other = with_kept(layer, {"y 0": 2 * kept["y 0"]})  # the value is taken from what is kept
    assert float(other(w, x)) == pytest.approx(4 * float(out), rel=1e-6)
    twice = keeping(lambda x: checkpoint_name(checkpoint_name(x, "y") + 1, "y"), {"y"})(x)[1]
    assert [list(twice), float(twice["y 1"][0])] == [["y 0", "y 1"], 1.0]
