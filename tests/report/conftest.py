"""Reports of synthetic sweeps, built once."""

from pathlib import Path

import pytest

from qlora_jax.report.build import Report
from tests.report import synthetic


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> Report:
    """Of a sweep of 93 points under way; built once."""
    workdir = synthetic.write(tmp_path_factory.mktemp("sweeps") / "grid & <b>", synthetic.grid(3), done=70)
    made = Report(workdir, workdir, "final_eval_loss")
    made.build(reload_seconds=30)
    return made


@pytest.fixture(scope="session")
def running(report) -> Path:
    """Workdir of that sweep, with its report."""
    return report.workdir
