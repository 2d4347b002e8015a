# make video   environment + a video from the model that ships with the package, dense and sparse compared
# make test    environment + lint, types, whole test suite
# make bench   tables of the kernels on this machine; gpu-bench the same on a GPU, in an environment of your own
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt
PROMPT ?= a red star moving right on a navy background

.PHONY: video test lint types tests bench gpu-bench clean

$(VENV)/.base: pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[test]'
	@touch $@

video: $(VENV)/.base
	$(VENV)/bin/attnproc generate "$(PROMPT)" --attention radial --preset shapes-video --compare --output video.mp4

test: lint types tests

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.test
	$(RUN) -m mypy

tests: $(VENV)/.test
	$(RUN) -m pytest --numprocesses auto

bench: $(VENV)/.test
	$(RUN) -m benchmarks.attention
	$(RUN) -m benchmarks.kernels

# Runs in any environment with CUDA, torch and triton: make gpu-bench RUN=python3
gpu-bench:
	$(RUN) -m benchmarks.attention --repeats 5
	$(RUN) -m benchmarks.kernels

clean:
	rm -rf $(VENV) build dist *.egg-info
