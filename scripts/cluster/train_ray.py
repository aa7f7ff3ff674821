#!/usr/bin/env python
"""One model on all GPUs of a Ray cluster's nodes: one process a node, the first one's address is where they meet.

    python scripts/cluster/train_ray.py --nodes=2 --gpus=8 -- --config=configs/llama3_70b.py \
      --config.data.path=FILE --config.mesh.devices=16 --workdir=runs/llama3_70b

Behind -- stand the flags of experiments.train. Start it in the repository's folder, which all nodes see at the same
place, as they see data and model (packages: '.[cuda13,sweep]'). What the processes say is said here. One that fails
ends all, with its status. SIGTERM and Ctrl-C save the state of all; started again, the run goes on.
"""

import argparse
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

_PASSED_ON = ("JAX_", "XLA_", "HF_", "QLORA_", "NCCL_", "PYTHONPATH")  # of the environment here
_PATIENCE = 120  # s for a place on the cluster; and for the others to end by themselves once one ended


class Node:
    """The actor: a process of the run, on a node of its own."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process: subprocess.Popen[str] | None = None

    def address(self) -> str:
        """HOST:PORT that is free here."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, command: list[str], folder: str, environment: dict[str, str]) -> int:
        """The status of the command, once it has ended."""
        self._process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        return self._process.wait()

    def news(self) -> list[str]:
        """What the process said since the last call."""
        return [self._lines.get() for _ in range(self._lines.qsize())]

    def stop(self) -> None:
        """SIGTERM: all processes of the run save and end."""
        if self._process is not None:
            self._process.terminate()


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--nodes", type=int, required=True)
    flags.add_argument("--gpus", type=int, default=8, help="of each node, all of them; 0 trains on CPUs")
    flags.add_argument("--address", default="auto", help="of the cluster")
    flags.add_argument("train", nargs="+", help="flags of experiments.train, behind --")
    given = flags.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        ray.init(address=given.address, log_to_driver=False, logging_level=logging.ERROR)
        nodes = placed(given.nodes, given.gpus)
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(f"error: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 2
    coordinator = ray.get(nodes[0].address.remote())
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    together = [f"--coordinator={coordinator}", f"--processes={len(nodes)}"]
    command = [sys.executable, "-m", "experiments.train", *given.train, *together]
    runs = [
        node.run.remote([*command, f"--process={index}"], os.getcwd(), environment) for index, node in enumerate(nodes)
    ]
    return followed(nodes, runs)


def placed(count: int, gpus: int) -> list[Any]:
    """An actor on each of so many nodes. Raises RuntimeError where the cluster has no room for them."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}] * count, strategy="STRICT_SPREAD")
    if not group.wait(_PATIENCE):
        raise RuntimeError(
            f"the cluster has no {count} nodes with a CPU and {gpus} GPUs free after {_PATIENCE} s (--nodes, --gpus)"
        )
    actor: Any = ray.remote(Node)
    return [
        actor.options(
            num_cpus=1, num_gpus=gpus, max_concurrency=4, max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(count)
    ]  # fmt: skip


def followed(nodes: list[Any], runs: list[Any]) -> int:
    """Says what the processes say until all have ended; 0, or the status of the first that failed."""
    import ray

    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    left, status, until = dict(enumerate(runs)), 0, float("inf")
    while left and time.monotonic() < until:
        if asked.is_set():
            asked.clear()
            nodes[min(left)].stop.remote()
        ended, _ = ray.wait(list(left.values()), timeout=0.5)
        for index, run in list(left.items()):
            try:
                for line in ray.get(nodes[index].news.remote()):
                    print(f"{index}: {line}", end="", flush=True)
                found = ray.get(run) if run in ended else None
            except ray.exceptions.RayError as error:  # its node is gone
                print(f"{index}: error: {type(error).__name__}: process {index} of the run is lost", flush=True)
                found = 1
            if found is not None:
                del left[index]
                status = status or found
                until = min(until, time.monotonic() + _PATIENCE)
    for index in left:
        print(f"{index}: error: it did not end with the others", flush=True)
        nodes[index].stop.remote()
    ray.shutdown()
    return status or int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
