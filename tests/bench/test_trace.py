"""Seconds by kernel: a GPU's streams alone, of the file that JAX's profiler writes."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.bench import trace


def test_streams_of_the_gpu_are_added_up(tmp_path, monkeypatch):
    def meta(kind, name, pid, tid=0):
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    def ran(name, pid, tid, microseconds):
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": 0, "dur": microseconds}

    events = [
        meta("process_name", "/device:GPU:0 NVIDIA H200", 1), meta("process_name", "/host:CPU", 2),
        meta("thread_name", "Stream #13(Compute)", 1, 13), meta("thread_name", "XLA Ops", 1, 14),
        meta("thread_name", "Stream of thoughts", 2, 13),
        ran("gemm", 1, 13, 3), ran("gemm", 1, 13, 4), ran("copy", 1, 13, 2), ran("add", 1, 13, 1),
        ran("gemm", 1, 14, 100), ran("python", 2, 13, 100), {"ph": "X", "name": "no time", "pid": 1, "tid": 13},
    ]  # fmt: skip
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    monkeypatch.setattr(trace, "MOST", 2)
    found = trace.kernel_seconds(tmp_path)
    assert found == pytest.approx({"gemm": 7e-6, "copy": 2e-6, trace.OTHERS: 1e-6})
    assert list(found) == ["gemm", "copy", trace.OTHERS]


def test_what_jax_writes_is_read(tmp_path):
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(jnp.ones(8) * 2)
    assert list(tmp_path.rglob("*.trace.json.gz"))
    found = trace.kernel_seconds(tmp_path)
    assert bool(found) == (jax.default_backend() == "gpu")
