"""Run by test_peaks.py in a process of its own: memory that loading a folder takes beyond what stood there before.

python load_peak.py SMALL FOLDER: SMALL holds one layer of the same sizes and compiles most programs beforehand.
"""

import json
import sys
from pathlib import Path

from qlora_jax.io.load import QuantSpec, load_model


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


small, folder, quant = sys.argv[1:]
spec = QuantSpec() if quant == "nf4" else None
load_model(Path(small), spec)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
model = load_model(Path(folder), spec)
print(json.dumps({"peak": status("VmHWM") - before, "kept": status("VmRSS") - before}))
