"""mypy, as `make lint` runs it. Among the tests, so that the other core goes on with them."""

import subprocess
import sys

from tests.conftest import REPOSITORY


def test_types():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
