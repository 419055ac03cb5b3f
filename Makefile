# make demo    create the environment from pinned versions and run the default sweep
# make test    lint, types and tests
# make paper   the paper from records: sources always, the PDF where LaTeX is installed
# make env     only the environment; VENV=<folder> and PYTHON=<3.11 or newer> choose where and with what

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml setup.py | cksum | cut -d' ' -f1)
WORKERS ?= 2
SWEEP ?=

.PHONY: demo test paper env lint types pytest clean

demo: env
	$(PY) -m peftbench sweep $(SWEEP)

test: lint types pytest

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: env
	$(PY) -m mypy

# The PDF is kept beside its prose: paper/peftbench.pdf.
paper: env
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m peftbench paper
	@if test -f paper/build/peftbench.pdf; then cp paper/build/peftbench.pdf paper/peftbench.pdf && \
		echo "kept: paper/peftbench.pdf"; fi

# One thread a worker: two workers with two threads each on two cores wait for each other.
pytest: env
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(PY) -m pytest -n $(WORKERS) --dist worksteal

env: $(STAMP)

# A venv without pip is filled by the machine's own pip where Python lacks ensurepip.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; make $(MAKECMDGOALS) PYTHON=<path>" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install -q pip; }
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	@rm -f $(VENV)/.installed-*
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
