"""Times attention's forms, forward and backward, side by side.

    python -m experiments.bench_attention --tokens=128 --heads=4,2,64

Of each case (heads, tokens of a row, padded or packed or windowed) every form is timed in turns in one run, by slope,
beside a large matrix product. A form that fails, or whose gradients are not those of plain XLA, stands in the table
with what is wrong. --write_table (GPU) writes what attention=auto goes by: where flash attention is the fastest in
every case that was timed, it is the default on this GPU.
"""

import shlex
import sys
import time
from pathlib import Path

from absl import flags

from experiments.support import cli

HEADS = flags.DEFINE_multi_string("heads", None, "N,K,H; may be repeated. Without it: those of Llama 7B, 3 8B, Gemma.")
TOKENS = flags.DEFINE_list("tokens", None, "Of a row. Without it: 512, 1024, 2048 on a GPU; 128 on a CPU.")
MASKS = flags.DEFINE_list("masks", "padded,packed,window", "padded, packed, window, or some of them.")
SOFTCAP = flags.DEFINE_float("softcap", 0.0, "Of the scores; 0 is none.", lower_bound=0)
TOTAL = flags.DEFINE_integer(
    "total", None, "Tokens of all rows. Without it: 8192 on a GPU; 512 on a CPU.", lower_bound=1
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns, whose median counts.", lower_bound=1)
MINUTES = flags.DEFINE_float("minutes", None, "Stop timing after so long; what is left out is said.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "JSON file to write.")
WRITE_TABLE = flags.DEFINE_bool("write_table", False, "Write the GPU's table (GPU only).")

GPU_HEADS, CPU_HEADS = ("32,32,128", "32,8,128", "32,8,64", "8,4,256"), ("4,2,64",)


def main() -> None:
    import jax

    from experiments.support import versions
    from pallas_kernels.attention import config
    from pallas_kernels.nf4_matmul import measure
    from qlora_jax.bench import attention
    from qlora_jax.errors import InputError
    from qlora_jax.files import write_json

    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    if WRITE_TABLE.value and not on_gpu:
        raise InputError(f"--write_table is of a GPU, this process computes on {device.device_kind}: run it on a GPU")
    dtype = "bfloat16" if on_gpu else "float32"
    names = tuple(config.FORMS) if on_gpu else ("xla", "chunked")
    cases = _cases(on_gpu)
    print(f"bench_attention: {len(cases)} cases, {dtype}, {device.device_kind}, median of {REPEATS.value} turns")
    ceilings = measure.Ceilings(dtype, on_gpu)
    deadline = float("inf") if MINUTES.value is None else time.monotonic() + 60 * MINUTES.value
    report: dict = {
        "command": shlex.join(["python", "-m", "experiments.bench_attention", *sys.argv[1:]]),
        "versions": versions.installed(),
        "device": device.device_kind,
        "dtype": dtype,
        "method": "slope: (many rounds - one round) / (many - 1), forward and backward; median over the turns",
        "results": [],
        "left_out": [],
    }
    for case in cases:
        if time.monotonic() > deadline:
            report["left_out"].append(case._asdict())
            continue
        running, failing = measure.split_failing(attention.forms(case, dtype, names))
        running, wrong = attention.split_wrong(running)
        seconds = measure.interleaved({"matmul": ceilings.runs["matmul"]} | running, REPEATS.value, 1)
        timed = {form: seconds[form] for form in running if seconds[form] > 0}
        failing |= wrong | dict.fromkeys(running.keys() - timed.keys(), "lost in the noise of this machine")
        peak = ceilings.rates({"copy": 1.0, "matmul": max(seconds["matmul"], 1e-12)}, 1)[1]
        rates = {form: case.flops / value for form, value in timed.items()}
        found = {"seconds": timed, "failures": failing, "flops_per_second": rates, "matmul_flops_per_second": peak}
        report["results"].append(case._asdict() | found)
        print(_lines(case, timed, failing, rates), flush=True)
        if OUT.value:
            write_json(Path(OUT.value).expanduser(), report)  # after each, so that an interruption loses one
    if not report["results"]:
        raise InputError(f"--minutes={MINUTES.value}: over before anything was timed; give more")
    if report["left_out"]:
        print(f"--minutes={MINUTES.value} was over: {len(report['left_out'])} of {len(cases)} cases were not timed")
    if OUT.value:
        print(f"written: {OUT.value}")
    if WRITE_TABLE.value:
        path = config.table_file(device.device_kind)
        config.write_table(
            path, device.device_kind, config.table(device.device_kind) | attention.entries(report["results"])
        )
        print(f"written: {path}")


def _cases(on_gpu: bool) -> list:
    from qlora_jax.bench.attention import Case
    from qlora_jax.errors import InputError

    heads = [_counts("heads", text.split(",")) for text in HEADS.value or (GPU_HEADS if on_gpu else CPU_HEADS)]
    if wrong := next((found for found in heads if len(found) != 3 or found[0] % found[1]), None):
        raise InputError(f"--heads={','.join(map(str, wrong))}: expected N,K,H, N a multiple of K, as 32,8,128")
    if unknown := set(MASKS.value) - {"padded", "packed", "window"}:
        raise InputError(f"--masks={min(unknown)}: expected padded, packed or window")
    tokens = _counts("tokens", TOKENS.value or ([512, 1024, 2048] if on_gpu else [128]))
    total = TOTAL.value or (8192 if on_gpu else 512)
    return [
        Case(max(1, total // T), T, N, K, H, mask, SOFTCAP.value)
        for T in tokens
        for N, K, H in heads
        for mask in MASKS.value
    ]


def _counts(flag: str, wanted: list) -> list[int]:
    from qlora_jax.errors import InputError

    if not all(str(count).isdigit() and int(count) > 0 for count in wanted):
        raise InputError(f"--{flag}={','.join(map(str, wanted))}: expected whole numbers above 0, split by commas")
    return [int(count) for count in wanted]


def _lines(case, seconds: dict, failing: dict, rates: dict) -> str:
    cap = f", cap {case.softcap:g}" if case.softcap else ""
    head = f"{case.B} x {case.T} tokens, heads {case.N} of {case.H} ({case.K} of keys), {case.mask}{cap}"
    lines = [
        f"  {form:<10}{value * 1e6:>10.0f} us{rates[form] / 1e12:>9.2f} TFLOP/s" for form, value in seconds.items()
    ]
    return "\n".join([head, *lines, *(f"  {form:<10}not timed: {reason}" for form, reason in failing.items())])


if __name__ == "__main__":
    cli.run(main)
