# Two commands set everything up on a machine with Python 3.10+ and a C compiler:
#   make train   virtual environment, installation, the main job on two ranks and again on one
#   make test    the same, and the test suite
# And `make site` builds the documentation into site/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs
STAMP := $(VENV)/.installed

.PHONY: install train test test-slow test-chaos test-libraries test-mpi test-services lint parity detection align-reference docs site clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "xtrain needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

# The same global batch on two ranks, and on one rank with twice the accumulation.
train: $(STAMP)
	rm -rf $(RUNS)/two_ranks $(RUNS)/one_rank
	$(BIN)/xtrain launch run_dir=$(RUNS)/two_ranks cluster.ranks_per_node=2
	$(BIN)/xtrain launch run_dir=$(RUNS)/one_rank cluster.ranks_per_node=1
	$(BIN)/xtrain align $(RUNS)/two_ranks $(RUNS)/one_rank --policy relative:0.02 --plot $(RUNS)/curves.png

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two files at a time; those that make Slurm or hosts of their own one after another.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not services and not libraries"

# Runs that lose a rank, a node and the like; `python -m tests.chaos` makes many.
test-chaos: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/chaos

# Hugging Face's Trainer, Accelerate, TRL, PEFT and Lightning with xtrain as their DeepSpeed; tiny models, no downloads.
test-libraries: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[libraries]'
	$(BIN)/python -m pytest -m libraries tests/libraries

# The MPI process group, under the mpiexec of the MPICH that is installed here.
test-mpi: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[mpi]'
	$(BIN)/python -m pytest tests/comm/test_mpi.py tests/launch/test_mpi_launch.py

# Real Slurm, and real hosts with sshd, on this machine; as root on Debian, what they need is installed first.
test-services: $(STAMP)
	.ci/services
	$(BIN)/python -m pytest -m services

# Real DeepSpeed, next to xtrain: compares live with what tests/parity/golden.json has recorded.
# `make parity RECORD=1` records it anew, and the names for docs/compat.md with it.
parity: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ninja py-cpuinfo psutil
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[deepspeed]'
	$(BIN)/python -m tests.parity.record $(if $(RECORD),,--check)
	$(BIN)/python -m tests.deepspeed_api.record $(if $(RECORD),,--check)

# Trains glm_tiny about 80 times (half an hour) and writes the tables of docs/alignment.md; runs are kept in $(RUNS)/detection.
detection: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.detection --folder $(RUNS)/detection

# The reference and the envelope that tests/align/test_curves.py compares with, measured anew on this machine.
align-reference: $(STAMP)
	$(BIN)/python -m tests.align.small_glm

# Writes the pages that are made of code.
docs: $(STAMP)
	$(BIN)/python -m xtrain.config.document docs/config.md
	$(BIN)/python -m tests.deepspeed_api.document docs/compat.md
	$(BIN)/python -m tests.migrate.surface

# The documentation as a site; a broken link, or a page in no menu, is an error.
site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
