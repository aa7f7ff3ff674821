"""What JAX sees here, asked of a process of its own: a broken plugin may end its process or wait for ever."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 180.0
_COMMAND = (sys.executable, "-m", "qlora_jax.doctor.probe")


def devices(command: Sequence[str] = _COMMAND, seconds: float = SECONDS) -> dict[str, Any]:
    """As probe.probe, with "crash": how the process ended where it could not say anything more, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"crash": f"importing and starting JAX took more than {seconds:.0f} s"}
    except OSError as error:
        return {"crash": f"{command[0]} cannot be started: {error.strerror or error}"}
    lines = done.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1])
        return found | {"crash": _end(done.returncode) if done.returncode else None}
    except (IndexError, ValueError, TypeError):
        words = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"crash": f"{_end(done.returncode)}{f' ({words[-1].strip()[:200]})' if words else ''}"}


def _end(status: int) -> str:
    if status < 0:
        try:
            return f"starting JAX ended its process by {signal.Signals(-status).name}"
        except ValueError:
            return f"starting JAX ended its process by signal {-status}"
    return f"starting JAX ended its process with exit status {status}"
