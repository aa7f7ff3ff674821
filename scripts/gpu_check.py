"""Are the kernels right on this machine's GPU, and how fast? python scripts/gpu_check.py [--minutes=9]; make gpu-check

Goes through the stages below in their order, which is that of what they decide: tests of the kernels first, then what
was never measured. Each stage writes its own file under results/GPU/ as soon as it has something, and
results/GPU/gpu_check.json, after every stage, says how each ended. What the minutes do not allow is said, and
--from=N goes on with it. A stage of training fails where its peak is over 5% from the plan made on this card.

--list prints the stages and runs nothing. --tiny runs them all on a CPU with small sizes, into a folder of its own: it
shows that the script holds, and no figure of it means anything. Exits with 1 if a stage failed.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHUTDOWN = 20  # seconds that a command gets after it was told to stop
LEAST, MOST = 0.6, 1.25  # of a stage's seconds: with less left it is not begun, and it is stopped after the second
PLAN_WITHIN = 0.05  # of the measured peak
LOOPS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE"}
TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
ASK = """
import importlib.util, json, jax
device = jax.devices()[0]
missing = [name for name in ("jax_triton", "triton", "pytest") if importlib.util.find_spec(name) is None]
print(json.dumps([device.platform, device.device_kind, missing]))
"""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command: what it finds out, its arguments after `python`, and the seconds that it gets."""

    title: str
    command: list[str]
    seconds: int
    out: str = ""  # the file that it writes in the folder of results
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def stages(folder: Path, tiny: Path | None) -> list[Stage]:
    """All of them, in order. `tiny`: the folder of a small model, for a CPU."""

    def bench(title: str, name: str, out: str, seconds: int, *flags: str, environment: dict | None = None) -> Stage:
        command = ["-m", f"experiments.{name}", *flags, f"--out={folder / out}"]
        return Stage(title, command, seconds, out, environment or {})

    def train(
        title: str, out: str, seconds: int, rows: int, *flags: str, size: str = "7b", environment: dict | None = None
    ) -> Stage:
        small = ["--config.data.max_source_len=8", "--config.data.max_target_len=8", "--config.lora.rank=4"]
        small += [f"--config.model.path={tiny}", "--config.model.compute_dtype=float32"]
        common = [f"--config=configs/guanaco_{size}.py", "--steps=3", f"--config.train.grad_accum={16 // rows}"]
        common += ["--config.data.eval_examples=0", *(small if tiny else ["--config.model.kernel=scratch"])]
        common += [] if any("remat" in flag for flag in flags) else ["--config.model.remat=block"]
        return bench(title, "bench_train", out, seconds, *common, *flags, environment=environment)

    pytest = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    flash = "chunked" if tiny else "flash"
    if tiny:
        new = rest = ["tests/test_gpu_check.py", "-k", "counted"]
        products = ["--shapes=tinyllama-1b/attention", "--rows=1", "--repeats=1"]
        attention = ["--tokens=24", "--total=24", "--heads=2,1,16", "--repeats=1"]
        large, generate = [], ["--size=tiny", "--rows=1", "--repeats=1"]
        graphs = [*generate, "--forms=xla"]
    else:
        new = ["-m", "gpu", "tests/kernels/test_attention_on_gpu.py", "tests/kernels/test_on_gpu.py"]
        new += ["tests/generate/test_compiled.py", "-k", "attention or training or down or launch or graphs"]
        new, rest = [*new, *_workers()], ["-m", "gpu", *_workers()]
        products = ["--shapes=llama-7b/down,llama-65b/attention", "--rows=1,16,576,2304,9216", "--repeats=3"]
        products.append("--minutes=1.2")
        attention = ["--tokens=576,2048", "--heads=32,32,128", "--heads=32,8,64", "--repeats=3", "--minutes=0.6"]
        attention.append("--write_table")
        large = ["--config.model.kernel=xla", "--gpu_bytes=48GiB"]
        generate = ["--size=7b", "--rows=1,8,32", "--rank=64", "--repeats=2", "--minutes=1"]
        graphs = ["--size=7b", "--rows=1,8", "--rank=64", "--repeats=2", "--minutes=0.8"]
        graphs.append("--forms=mosaic,mosaic+graphs,triton,triton+graphs")
    return [
        Stage("what is new is right", [*pytest, *new], 120),
        bench("ceilings and products", "bench_kernels", "bench_kernels.json", 100, *products),
        train("7B, 1 row a micro-batch, profiled", "train_7b_1_row.json", 50, 1, "--trace"),
        train("the same, loops as CUDA graphs", "train_7b_1_row_graphs.json", 65, 1, environment=LOOPS),
        train("7B, 4 rows", "train_7b_4_rows.json", 40, 4),
        train("7B, 16 rows, profiled", "train_7b_16_rows.json", 40, 16, "--trace"),
        train("16 rows, no dropout", "train_7b_16_rows_no_dropout.json", 35, 16, "--config.lora.dropout=0"),
        train("16 rows, flash attention", "train_7b_16_rows_flash.json", 40, 16, f"--config.model.attention={flash}"),
        train("16 rows, flash attention, no product again", "train_7b_16_rows_selective.json", 40, 16,
              f"--config.model.attention={flash}", "--config.model.remat=selective"),
        bench("attention's forms", "bench_attention", "bench_attention.json", 60, *attention),
        train("65B, 4 rows, 48 GiB", "train_65b_4_rows_48gib.json", 95, 4, *large, size="65b"),
        bench("7B generates", "bench_generate", "bench_generate.json", 90, *generate),
        bench("the same, a token as one CUDA graph", "bench_generate", "bench_generate_graphs.json", 75, *graphs),
        Stage("everything is right", [*pytest, *rest], 240),
    ]  # fmt: skip


def _workers() -> list[str]:
    """Most of the tests' time is compiling."""
    processors = os.cpu_count() or 1
    has_xdist = importlib.util.find_spec("xdist") is not None
    return ["-n", str(min(8, processors // 2))] if has_xdist and processors >= 4 else []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, help="for everything (default: 9; with --tiny 60)")
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="N", help="begin with stage N")
    parser.add_argument("--list", action="store_true", help="print the stages, run nothing")
    parser.add_argument("--tiny", action="store_true", help="all stages on a CPU, with small sizes")
    asked = parser.parse_args()
    minutes = asked.minutes or (60.0 if asked.tiny else 9.0)
    end = time.monotonic() + 60 * minutes
    os.chdir(REPOSITORY)
    if asked.list:
        for number, stage in enumerate(stages(Path("results/GPU"), None), 1):
            print(f"{number:>2}  {stage.seconds:>3} s  {stage.title}\n          {shown(stage)}")
        return 0
    if asked.tiny:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
            (Path(scratch) / "config.json").write_text(json.dumps(TINY_MODEL))
            os.environ["JAX_PLATFORMS"] = "cpu"
            slow = [
                dataclasses.replace(stage, seconds=4 * stage.seconds) for stage in stages(Path(scratch), Path(scratch))
            ]
            return check(slow, asked.first, Path(scratch), "a CPU, tiny sizes", end)

    cache = Path(tempfile.gettempdir()) / "gpu-check-programs"  # what is compiled is kept for --from
    defaults = {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    os.environ |= {"JAX_PLATFORMS": "cuda"} | {key: os.environ.get(key, value) for key, value in defaults.items()}
    found = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if found.returncode:
        return refuse(f"JAX is missing or finds no GPU ({last_line(found.stderr)}): install the extra cuda13 or cuda12")
    platform, gpu, missing = json.loads(found.stdout.splitlines()[-1])
    if platform != "gpu":
        return refuse(f"JAX computes on {gpu}, no GPU: install the extra cuda13 or cuda12")
    if missing:
        return refuse(f"missing: {', '.join(missing)}: pip install -c constraints.txt jax-triton triton pytest")
    folder = Path("results") / gpu.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return check(stages(folder, None), asked.first, folder, gpu, end)


def check(wanted: list[Stage], first: int, folder: Path, gpu: str, end: float) -> int:
    """Runs the stages from `first` on until `end`, a time of time.monotonic(). 0 where all that ran were right."""
    if not 1 <= first <= len(wanted):
        return refuse(f"--from={first}: there are stages 1 to {len(wanted)}")
    file = folder / "gpu_check.json"
    earlier = json.loads(file.read_text())["stages"] if first > 1 and file.exists() else []
    report = {"command": shlex.join(["python", *sys.argv]), "gpu": gpu, "versions": versions()}
    done = [stage for stage in earlier if stage["number"] < first]
    next_stage = None
    for number, stage in enumerate(wanted, 1):
        if number < first:
            continue
        left = end - time.monotonic()
        if left < LEAST * stage.seconds:
            next_stage = number
            break
        print(f"\n[{number}/{len(wanted)}] {stage.title}: {shown(stage)}", flush=True)
        (folder / stage.out).unlink(missing_ok=True) if stage.out else None
        found = run([sys.executable, *stage.command], min(left, MOST * stage.seconds), os.environ | stage.environment)
        done.append({"number": number, "title": stage.title} | judged(stage, found, folder))
        file.write_text(json.dumps(report | {"stages": done, "next": None}, indent=1) + "\n")
    file.write_text(json.dumps(report | {"stages": done, "next": next_stage}, indent=1) + "\n")
    print(f"\ngpu-check on {gpu}; {folder}/")
    for stage in done:
        print(f"{stage['number']:>3}  {'right ' if stage['right'] else 'FAILED'}  {stage['title']}: {stage['said']}")
    if next_stage is not None:
        print(f"out of time: go on with --from={next_stage} ({wanted[next_stage - 1].title})")
    return 0 if done and all(stage["right"] for stage in done) else 1


def judged(stage: Stage, found: dict, folder: Path) -> dict:
    """{"right", "said" in a line, "command", "exit", "seconds", ...} of a stage that ran."""
    report = {"command": shown(stage)} | {key: found[key] for key in ("exit", "timed_out", "seconds")}
    if not stage.out:
        tests = counts(found["output"])
        right = found["exit"] == 0 and tests["passed"] > 0 and not tests["failed"]
        said = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        said += ", out of time" if found["timed_out"] else ""
        return report | tests | {"right": right, "said": said}
    file = folder / stage.out
    measured = json.loads(file.read_text()) if file.exists() else {}
    if found["exit"] or not measured:
        said = "out of time" if found["timed_out"] else last_line(found["output"])
        return report | {"right": False, "said": said + (f"; what there was is in {stage.out}" if measured else "")}
    if "plan_to_measured" not in measured:
        return report | {"right": True, "said": f"written: {stage.out}"}
    ratio = measured["plan_to_measured"]
    right = abs(ratio - 1) <= PLAN_WITHIN
    said = f"{measured['tokens_per_second']:,.0f} tokens/s, peak {measured['peak_device_bytes'] / 1e9:.2f} GB"
    said += f", the plan says {ratio:.1%} of it" + ("" if right else f": over {PLAN_WITHIN:.0%} off")
    return report | {"right": right, "said": said}


def counts(output: str) -> dict:
    """Of `pytest -v`, with or without -n: how many passed, failed and were skipped, and what failed."""
    outcome = "(PASSED|FAILED|ERROR|SKIPPED)"
    alone = re.findall(rf"^(\S+::.+?) {outcome}\b", output, re.MULTILINE)
    of_workers = re.findall(rf"^\[gw\d+\] \[ *\d+%\] {outcome} (\S+::.+?) *$", output, re.MULTILINE)
    outcomes = [*alone, *((name, outcome) for outcome, name in of_workers)]
    failed = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    return {
        "passed": sum(outcome == "PASSED" for _, outcome in outcomes),
        "failed": len(failed),
        "skipped": sum(outcome == "SKIPPED" for _, outcome in outcomes),
        "failures": failed,
    }


def run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> dict:
    """Runs a command, showing what it prints; after so long it is interrupted, and then killed."""
    began = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace"
    )
    timed_out = False

    def stop(signum, frame):
        nonlocal timed_out
        process.send_signal(signal.SIGKILL if timed_out else signal.SIGINT)
        timed_out = True
        signal.alarm(SHUTDOWN)

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, int(seconds)))
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    signal.alarm(0)
    return {
        "exit": status,
        "timed_out": timed_out,
        "seconds": round(time.monotonic() - began, 1),
        "output": "".join(lines),
    }


def shown(stage: Stage) -> str:
    before = [f"{key}={shlex.quote(value)}" for key, value in stage.environment.items()]
    return " ".join([*before, shlex.join(["python", *stage.command])])


def versions() -> dict:
    script = "import json; from experiments.support import versions; print(json.dumps(versions.installed()))"
    return json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "no output")


def refuse(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
