"""One contract for flash attention: values and gradients against the plain form, with every mask, on unfit shapes too.

The kernels run in Triton's interpreter, behind the custom gradient and vmap.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")

from pallas_kernels.attention import Scoring, api, config, flash_attention, reference  # noqa: E402
from tests.kernels.attention_interpreter import in_the_interpreter, normal  # noqa: E402

pytestmark = pytest.mark.quick_compile
UNIT_ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


def packed(*lengths: int) -> np.ndarray:
    """Starts of a row whose examples have these lengths."""
    begins = np.cumsum([0, *lengths[:-1]])
    return np.repeat(begins, lengths).astype(np.int32)


def windowed(starts: np.ndarray, window: int) -> np.ndarray:
    return np.maximum(starts, np.arange(len(starts)) - window + 1).astype(np.int32)


T = 37  # no multiple of any tile
WHOLE, TWO, MANY = packed(T), packed(23, 14), packed(1, 16, 5, 5, 10)
CASES = {  # N, K, H, dtype, starts, scoring, whether there are sinks
    "plain": (2, 2, 64, "bfloat16", None, Scoring(), False),
    "packed, grouped": (4, 2, 16, "float16", [TWO, MANY], Scoring(), False),
    "80 wide, one key head": (2, 1, 80, "bfloat16", [WHOLE, TWO], Scoring(0.1), False),
    "96 wide": (1, 1, 96, "float16", None, Scoring(), False),
    "128 wide, a window": (2, 2, 128, "bfloat16", [windowed(WHOLE, 17), windowed(WHOLE, 1)], Scoring(), False),
    "256 wide, cap and window": (
        2,
        1,
        256,
        "bfloat16",
        [windowed(TWO, 9), windowed(MANY, 9)],
        Scoring(0.3, 2.0),
        False,
    ),
    "cap": (2, 2, 32, "float16", None, Scoring(softcap=1.5), False),
    "sinks, packed, grouped": (4, 2, 64, "bfloat16", [MANY, TWO], Scoring(), True),
    "sinks and a window": (2, 2, 64, "float16", [windowed(WHOLE, 5), windowed(TWO, 5)], Scoring(), True),
    "ALiBi": (2, 2, 64, "float16", [WHOLE, MANY], Scoring(slopes=(0.5, 0.125)), False),
}


def arguments(name: str) -> tuple:
    N, K, H, dtype, starts, scoring, has_sinks = CASES[name]
    B = 1 if starts is None else len(starts)
    q, k, v, d_out = (normal(B, T, heads, H, seed=seed, dtype=dtype) for seed, heads in enumerate((N, K, K, N)))
    sinks = jnp.linspace(-2.0, 3.0, N) if has_sinks else None
    return (q, k, v, sinks), None if starts is None else jnp.asarray(np.stack(starts)), scoring, d_out


def value_and_gradients(attend, primals: tuple, starts, scoring: Scoring, d_out):
    """The output, and the gradients of q, k, v and the sinks, if there are any."""

    @jax.jit
    def both(primals, starts, d_out):
        out, pull = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, starts, sinks, scoring), *primals)
        return out, pull(d_out)

    out, gradients = jax.block_until_ready(both(primals, starts, d_out))
    return [np.asarray(x, np.float32) for x in jax.tree.leaves((out, gradients))]


def check(found: list, expected: list, dtype: str) -> None:
    """Weights and d scores are rounded to dtype before they are summed over keys or queries."""
    for mine, theirs in zip(found, expected, strict=True):
        size = np.sqrt(np.mean(theirs**2)) + np.abs(theirs)
        assert np.all(np.isfinite(mine)) and np.all(np.abs(mine - theirs) <= 20 * UNIT_ROUNDOFF[dtype] * size)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, monkeypatch):
    ran = in_the_interpreter(monkeypatch)
    primals, starts, scoring, d_out = arguments(name)
    found = value_and_gradients(flash_attention, primals, starts, scoring, d_out)
    wide = tuple(None if x is None else x.astype(jnp.float32) for x in primals)
    expected = value_and_gradients(reference.attention, wide, starts, scoring, d_out.astype(jnp.float32))
    assert len(found) == (5 if primals[3] is not None else 4)
    check(found, expected, CASES[name][3])
    assert ran == ["attention_forward", "attention_queries", "attention_keys"]


def test_a_pack_of_adapters_is_more_rows(monkeypatch):
    """vmap over q, k and v; starts are the batch's, or each member's own; sinks and slopes are shared."""
    ran = in_the_interpreter(monkeypatch)
    N, H = 2, 16
    q, k, v, d_out = (normal(2, 1, T, N, H, seed=seed) for seed in range(4))
    sinks, scoring = jnp.asarray([0.5, -1.0]), Scoring(slopes=(0.5, 0.25))
    starts = jnp.asarray(np.stack([TWO, MANY]))[:, None]

    def gradients(q, k, v, d_out, starts):
        out, pull = jax.vjp(lambda q, k, v: flash_attention(q, k, v, starts, sinks, scoring), q, k, v)
        return out, *pull(d_out)

    own = jax.block_until_ready(jax.jit(jax.vmap(gradients))(q, k, v, d_out, starts))
    shared = jax.block_until_ready(jax.jit(jax.vmap(gradients, (0, 0, 0, 0, None)))(q, k, v, d_out, starts[1]))
    assert len(ran) == 6  # once for all members
    one = jax.jit(gradients)
    for member, starts_of_member in enumerate(starts):
        for found, like in ((own, starts_of_member), (shared, starts[1]))[: 2 - member]:
            alone = one(q[member], k[member], v[member], d_out[member], like)
            for mine, theirs in zip(found, alone, strict=True):
                assert np.array_equal(mine[member], theirs)


def test_where_output_and_sums_are_kept_nothing_is_computed_again(monkeypatch):
    from qlora_jax.models.kept import NAMES, keeping, with_kept

    ran = in_the_interpreter(monkeypatch)
    q, k, v, d_out = (normal(1, T, 2, 16, seed=seed) for seed in range(4))
    attend = lambda q: flash_attention(q, k, v)  # noqa: E731
    out, kept = jax.jit(lambda q: keeping(attend, NAMES)(q))(q)
    assert set(kept) == {"attention 0", "log_sums 0"} and kept["log_sums 0"].shape == (1, 2, T)
    jax.block_until_ready(out)
    ran.clear()
    again = jax.jit(lambda q, kept, d_out: jax.vjp(with_kept(attend, kept), q)[1](d_out))(q, kept, d_out)
    assert len(jax.block_until_ready(again)) == 1 and set(ran) <= {"attention_queries", "attention_keys"}
    whole = jax.jit(lambda q, d_out: jax.vjp(attend, q)[1](d_out))(q, d_out)
    assert np.array_equal(again[0], whole[0])


def test_what_lies_before_a_start_is_not_read(monkeypatch):
    in_the_interpreter(monkeypatch)
    q, k, v = (normal(1, 64, 1, 16, seed=seed) for seed in range(3))
    starts = jnp.asarray(packed(32, 32))[None]
    spoiled = [x.at[:, :32].set(jnp.nan) for x in (q, k, v)]
    attend = jax.jit(lambda q, k, v: flash_attention(q, k, v, starts))
    assert np.array_equal(attend(*spoiled)[:, 32:], attend(q, k, v)[:, 32:])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float32"}, "activations are float32: flash attention takes bfloat16 and float16"),
        ({"H": 12}, "heads are 12 wide: flash attention takes multiples of 8 from 16 to 256"),
        ({"H": 320}, "heads are 320 wide"),
        ({"K": 3}, r"q is \[2, 8, 4, 16\], k \[2, 8, 3, 16\]"),
        ({"starts": jnp.zeros((2, 9), jnp.int32)}, r"starts is \[2, 9\]; expected \[2, 8\]"),
        ({"sinks": jnp.zeros(2)}, r"sinks is \[2\]; expected \[4\]"),
        ({"scoring": Scoring(slopes=(1.0,))}, "there are 1 slopes; expected one for each of 4 heads"),
    ],
)
def test_mistakes_are_named(changed, message):
    has = {"dtype": "bfloat16", "H": 16, "K": 2, "starts": None, "sinks": None, "scoring": Scoring()} | changed
    q, k = (jnp.zeros((2, 8, heads, has["H"]), has["dtype"]) for heads in (4, has["K"]))
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, k, has["starts"], has["sinks"], has["scoring"])


def test_without_a_gpu_it_says_so():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    q = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    with pytest.raises(RuntimeError, match='backend "flash" needs an NVIDIA GPU, this process computes on cpu'):
        flash_attention(q, q, q)


def test_rows_too_large_for_their_addresses_are_refused():
    assert api.refusal(2**18, 64, 128, jnp.bfloat16) == "a row has 262144 x 64 x 128 values, more than 2^31"
    assert api.refusal(2**17, 64, 128, jnp.bfloat16) is None


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Writes what was measured on this device: {(head width, tokens): {form: seconds}}."""
    monkeypatch.setattr(config, "TUNED", tmp_path)
    monkeypatch.setattr(api, "has_jax_triton", lambda: True)
    kind = jax.devices()[0].device_kind

    def write(entries: config.Table) -> None:
        config.write_table(config.table_file(kind), kind, entries)
        config.table.cache_clear()

    config.table.cache_clear()
    yield write
    config.table.cache_clear()


def test_it_is_the_fastest_where_it_was_measured_to_be(measured):
    asked = lambda T=600, H=128, dtype=jnp.bfloat16: api.is_fastest(T, 32, H, dtype)  # noqa: E731
    assert not asked()
    measured({(128, 1024): {"flash": 1.0, "xla": 2.0, "cudnn": 0.5}, (128, 512): {"flash": 3.0, "xla": 2.0}})
    assert asked() and asked(1024) and asked(513)
    assert not asked(512) and not asked(1025) and not asked(H=64) and not asked(dtype=jnp.float32)
    measured({(128, 1024): {"flash": 2.0, "xla": 3.0, "chunked": 1.0}})
    assert not asked()
    measured({(128, 1024): {"flash": 2.0, "cudnn": 3.0}})  # what it would replace was not measured
    assert not asked()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "list indices"),
        ('{"entries": [{"tokens": 8, "seconds": {}}]}', "'head_width' is missing"),
        ('{"entries": [{"head_width": 8, "tokens": 9, "seconds": {}}]}', "tokens is 9, expected a power of two"),
        (
            '{"entries": [{"head_width": 8, "tokens": 8, "seconds": {"flsh": 1.0}}]}',
            "form 'flsh', expected some of flash",
        ),
        ('{"entries": [{"head_width": 8, "tokens": 8, "seconds": {"xla": -1.0}}]}', "expected numbers above 0"),
    ],
)
def test_a_broken_table_is_named(text, problem, tmp_path):
    (tmp_path / "a-gpu.json").write_text(text)
    with pytest.raises(ValueError, match=f"a-gpu.json: .*{problem}.*; mend it, or measure again"):
        config.read_table(tmp_path / "a-gpu.json")
