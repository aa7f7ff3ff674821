"""Run by test_peaks.py in a process of its own: memory that loading a folder takes beyond what stood there before.

Its arguments are SMALL and FOLDER: SMALL holds one layer of the same sizes and compiles most programs beforehand.
"""

import json
import sys
from pathlib import Path

from qlora_jax.io.load import QuantSpec, load_model


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


small, folder = map(Path, sys.argv[1:])
load_model(small, QuantSpec())
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
model = load_model(folder, QuantSpec())
print(json.dumps({"peak": status("VmHWM") - before, "kept": status("VmRSS") - before}))
