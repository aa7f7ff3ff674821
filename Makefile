# Each target does all the set-up it needs: a Python >= 3.12 is looked for, .venv is made, exact versions are installed.
# Run again, the set-up takes no time. ARGS adds flags: make quickstart ARGS=--help, make test ARGS=tests/quant
# GPU users, once, after either target: .venv/bin/pip install -c constraints.txt -e '.[cuda13]' (or cuda12)

PYTHON_IN_VENV = .venv/bin/python
ARGS =

unexport PYTHONPATH
unexport PYTHONHOME
# a process would compile all modules again, and pytest rewrite all tests; `make clean` takes what is kept
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test gpu-check lint constraints clean venv venv-dev

# Quantize, finetune and export a small model, and show what that gained
quickstart: venv
	@$(PYTHON_IN_VENV) -m experiments.quickstart $(ARGS)

# mypy is a test (tests/test_types.py): it takes one core, and the other need not wait for it.
# A file's tests stay in one process, which then sets its fixtures up once. Files go in their order: xdist's own has those
# with few tests last, which are the longest, and one process then waits for the other
test: venv-dev
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# On a machine with an NVIDIA GPU, after installing an extra (cuda13 or cuda12): right first, then how fast; 9 minutes.
# With another Python that has the packages: python scripts/gpu_check.py
gpu-check: venv-dev
	@$(PYTHON_IN_VENV) scripts/gpu_check.py $(ARGS)

lint: venv-dev
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m mypy

venv:
	@scripts/make_venv

venv-dev:
	@scripts/make_venv dev

# Write the versions that .venv has now into constraints.txt
constraints: venv-dev
	$(PYTHON_IN_VENV) scripts/make_constraints.py

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .jax_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
