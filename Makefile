# Needs Python 3.11 or newer with its pip, and nothing else: no root, no system packages.
# Everything is made inside this directory: .venv/ (packages) and .belfry/ (data).

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PIP    := --disable-pip-version-check install --no-cache-dir --quiet
LOCKED := --require-hashes -r requirements-dev.lock
UV     := .belfry/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
          --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'

.PHONY: help setup demo run web worker flask test check bench chaos drill lint screenshots lock clean

help:
	@echo 'make demo     the whole path once: 10,000 members, a message, who was notified; leaves nothing behind'
	@echo 'make run      a web process and a worker until Ctrl-C; prints tokens and commands to paste'
	@echo 'make web      the web process alone; it shares its data with `make worker` and `make run`'
	@echo 'make worker   a worker alone, for a second terminal'
	@echo 'make flask    a command on the data of `make run`      (ARGS="runs list")'
	@echo 'make test     the test suite, three files at once   (ARGS="-k inbox -x" goes to pytest, which runs one at a time)'
	@echo 'make check    the fast tests, ruff, mypy, and the imports: under two minutes'
	@echo 'make bench    the benchmarks                     (ARGS="--only large small --json FILE --charts DIR")'
	@echo 'make chaos    kill processes repeatedly, then audit   (ARGS="--kills 1000 --seed 7")'
	@echo 'make drill    fan-outs to 1,000,000, SIGTERM, Redis down, attacks, …       (ARGS="stop slow_clients"; see README.md)'
	@echo 'make lint     ruff, mypy, and the import contracts'
	@echo 'make screenshots   docs/screenshots/ again, by Chromium'
	@echo 'make lock     requirements*.lock again from requirements*.txt   (ARGS="--upgrade" for newer versions of the rest)'
	@echo 'make setup    .venv only; the others do it when it is missing or out of date'
	@echo 'make clean    remove .venv, .belfry (the data of `make run`) and caches'
	@echo
	@echo 'PYTHON=python3.12 chooses the interpreter for .venv, PORT where the web process listens.'
	@echo 'DATABASE_URL and REDIS_URL name servers to use in place of the embedded ones.'

setup: $(STAMP)

flask: $(STAMP)
	@$(PY) -m tools.dev flask $(ARGS)

demo run web worker screenshots: $(STAMP)
	@$(PY) -m tools.dev $@

test: $(STAMP)
	@$(PY) -m tools.dev test $(or $(ARGS),-n 3 --dist loadfile)

check: lint
	@$(PY) -m tools.dev test -q -n 3 --dist loadfile -m 'not slow'

bench: $(STAMP)
	@$(PY) -m tools.bench $(ARGS)

chaos: $(STAMP)
	@$(PY) -m tools.chaos $(ARGS)

drill: $(STAMP)
	@$(PY) -m tools.bench.drills $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy .
	$(VENV)/bin/lint-imports

# The short lists stay as they are; the lock files get the versions and hashes of all that they pull in.
lock:
	$(PYTHON) -m pip $(PIP) --upgrade --target .belfry/uv uv==0.13.9
	$(UV) $(ARGS) requirements.txt -o requirements.lock
	$(UV) $(ARGS) -c requirements.lock requirements-dev.txt -o requirements-dev.lock

# A .venv whose interpreter is gone (removed, or upgraded in its place) is made anew.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Belfry needs Python 3.11 or newer, and $(PYTHON) is not. Choose one: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; }
	$(PYTHON) -m venv --without-pip --clear $(VENV)

# The interpreter's own pip installs into .venv: works where ensurepip, which would put one into it, is
# missing, as on Debian without python3-venv. A pip older than 22.3 cannot do that, and needs ensurepip.
$(STAMP): requirements-dev.lock $(PY)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Belfry needs Python 3.11 or newer, and $(VENV) has an older one. Run: make clean'; exit 1; }
	@echo 'Installing what requirements-dev.lock lists …'
	@if $(PYTHON) -m pip --python $(PY) --version >/dev/null 2>&1; \
	  then $(PYTHON) -m pip --python $(PY) $(PIP) $(LOCKED); \
	  else $(PY) -m ensurepip >/dev/null && $(PY) -m pip $(PIP) $(LOCKED); \
	  fi || { echo 'Installing failed. Belfry needs a $(PYTHON) with pip, and the package index in reach.'; exit 1; }
	@touch $(STAMP)

clean:
	@if [ -e $(STAMP) ] && [ -d .belfry ]; then $(PY) -m tools.dev clean; fi
	rm -rf $(VENV) .belfry .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
