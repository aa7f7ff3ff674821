"""Reports of synthetic sweeps, built once."""

from pathlib import Path

import pytest

from qlora_jax.report.build import Report
from tests.report import synthetic


@pytest.fixture(scope="session")
def running(tmp_path_factory) -> Path:
    """Workdir of a sweep of 93 points under way, with its report."""
    workdir = synthetic.write(tmp_path_factory.mktemp("sweeps") / "grid & <b>", synthetic.grid(3), done=70)
    Report(workdir, workdir, "final_eval_loss").build(reload_seconds=30)
    return workdir
