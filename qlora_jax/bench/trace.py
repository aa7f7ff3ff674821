"""What each kernel took, read from a profile that jax.profiler.trace wrote.

The profile has a file in Chrome's format: events with a name, a duration in us and a process, and other events that
name the processes. A GPU's is called "/device:GPU:0 ...", and its lanes of streams "Stream #13(...)"; other lanes
repeat the same time by operation and by module. On a CPU there is none of these.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

MOST = 60  # kernels that are listed; what the others take is added up under OTHERS
OTHERS = "all others"


def kernel_seconds(folder: Path) -> dict[str, float]:
    """Seconds by kernel, all its launches together, the longest first; empty where nothing ran on a GPU."""
    total: Counter[str] = Counter()
    for file in folder.rglob("*.trace.json.gz"):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        named = [event for event in events if event.get("ph") == "M" and "name" in event.get("args", {})]
        devices = {e["pid"] for e in named if e["name"] == "process_name" and "/device:GPU" in e["args"]["name"]}
        streams = {(e["pid"], e["tid"]) for e in named if e["name"] == "thread_name" and "Stream" in e["args"]["name"]}
        for event in events:
            lane = (event.get("pid"), event.get("tid"))
            if event.get("ph") == "X" and lane[0] in devices and lane in streams:
                total[event["name"]] += event.get("dur", 0)
    listed = {name: duration / 1e6 for name, duration in total.most_common(MOST)}
    rest = sum(duration for _, duration in total.most_common()[MOST:]) / 1e6
    return listed | ({OTHERS: rest} if rest else {})
