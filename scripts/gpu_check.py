"""Are the kernels right on this machine's GPU, and how fast? python scripts/gpu_check.py [--minutes=8]; make gpu-check

Runs `pytest -m gpu`, then a short benchmark of fixed products, in the Python that runs it, and stays within the
minutes: what time did not allow is said. Writes results/GPU/gpu_check.json (versions, counts, failures) and
results/GPU/bench_kernels.json. Exits with 1 if a test failed or none passed, or if the benchmark broke off.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS_SHARE = 0.6  # of the time, at most; what the tests leave is the benchmark's
SHUTDOWN = 20  # seconds that a command gets after it was told to stop
SHAPES, ROWS, REPEATS = "llama-7b/down,llama-65b/attention", "1,16,256,4096", 5
ASK = """
import importlib.util, json, jax
device = jax.devices()[0]
missing = [name for name in ("jax_triton", "triton", "pytest") if importlib.util.find_spec(name) is None]
print(json.dumps([device.platform, device.device_kind, missing]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: 8)")
    minutes = parser.parse_args().minutes
    began = time.monotonic()
    end = began + 60 * minutes
    os.chdir(REPOSITORY)
    os.environ |= {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if asked.returncode:
        return refuse(f"JAX is missing or finds no GPU ({last_line(asked.stderr)}): install the extra cuda13 or cuda12")
    platform, gpu, missing = json.loads(asked.stdout.splitlines()[-1])
    if platform != "gpu":
        return refuse(f"JAX computes on {gpu}, no GPU: install the extra cuda13 or cuda12")
    if missing:
        return refuse(f"missing: {', '.join(missing)}: pip install -c constraints.txt jax-triton triton pytest")
    folder = REPOSITORY / "results" / gpu.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)

    tests = run_tests(end - began)
    bench = run_benchmark(folder / "bench_kernels.json", end - time.monotonic())
    is_right = tests["exit"] == 0 and tests["passed"] > 0 and not tests["failed"]
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "gpu": gpu,
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 1),
        "tests": tests,
        "benchmark": bench,
    }
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"gpu-check on {gpu}: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        f"{', out of time' if tests['timed_out'] else ''}; benchmark "
        f"{'written' if bench['exit'] == 0 else 'broke off: ' + bench['error']}; {folder.relative_to(REPOSITORY)}/"
    )
    return 0 if is_right and bench["exit"] == 0 else 1


def run_tests(seconds: float) -> dict:
    """Counts and names of what failed, read from pytest's lines, so that they stand when time runs out too."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    processors = os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is not None and processors >= 4:  # most of the time is compiling
        command += ["-n", str(min(8, processors // 2))]
    found = run(command, TESTS_SHARE * seconds)
    return summary(command, found) | counts(found["output"])


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


def run_benchmark(out: Path, seconds: float) -> dict:
    """Leaves the command time to compile its last product."""
    flags = {"shapes": SHAPES, "rows": ROWS, "repeats": REPEATS, "out": out.relative_to(REPOSITORY)}
    flags["minutes"] = f"{max(0.2, (seconds - 60) / 60):.1f}"
    command = [
        sys.executable,
        "-m",
        "experiments.bench_kernels",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    found = run(command, max(60.0, seconds))
    error = "" if found["exit"] == 0 else "out of time" if found["timed_out"] else last_line(found["output"])
    return summary(command, found) | {"error": error}


def run(command: list[str], seconds: float) -> dict:
    """Runs a command, showing what it prints; after so long it is interrupted, and then killed."""
    began = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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


def summary(command: list[str], found: dict) -> dict:
    shown = shlex.join(["python", *command[1:]])
    return {"command": shown} | {key: found[key] for key in ("exit", "timed_out", "seconds")}


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
