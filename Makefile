# What can be done with a checkout. All of it lives in .venv; stamp files make a second run instant.
# ARGS goes to the command behind a target: make test ARGS="-k cache", make tune ARGS="--grid cpu".
PYTHON ?= python3
COMMA := ,
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OLDEST_TRITON := 3.6.0
NEWEST_TRITON := 3.9.0
# What developers install beside the package, with what loads its exports: `nvcc` too where the machine has none.
EXTRAS := dev,consumers,frameworks,cuda$(if $(shell command -v nvcc 2>/dev/null),,$(COMMA)nvcc)

TOGETHER := tests/unit tests/golden tests/exports tests/compile tests/end_to_end

.PHONY: tune test gpu browser newest-triton lint types imports format golden bench clean

tune: $(VENV)/installed  ## exit 3 (nothing beat the default) is an answer, not a failure
	$(BIN)/autoflash tune $(ARGS) || test $$? -eq 3

# What asserts something of times, or kills processes, runs by itself. pytest's 5: ARGS chose no test of a part.
test: $(VENV)/developed
	$(BIN)/pytest --numprocesses 2 --dist loadfile $(TOGETHER) $(ARGS) || test $$? -eq 5
	$(BIN)/pytest $(addprefix --ignore=,$(TOGETHER)) $(ARGS) || test $$? -eq 5

gpu: $(VENV)/developed
	$(BIN)/pytest -m gpu $(ARGS)

browser: $(VENV)/developed  ## Debian's where this user may install it, else Playwright's own
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || { test "$$(id -u)" = 0 && apt-get -qq update \
	       && apt-get -qq install --yes --no-install-recommends chromium >/dev/null; } \
	  || $(BIN)/playwright install --only-shell chromium

newest-triton: $(VENV)/developed $(VENV)/triton-$(NEWEST_TRITON)
	PYTHONPATH=$(VENV)/triton-$(NEWEST_TRITON) $(BIN)/pytest tests/compile \
	  tests/exports/test_triton_configs.py -k "not cuda" $(ARGS)

lint: $(VENV)/developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/developed
	$(BIN)/mypy

imports: $(VENV)/developed
	$(BIN)/lint-imports

format: $(VENV)/developed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(VENV)/developed
	$(BIN)/pytest -q tests/golden --update-golden

bench: $(VENV)/installed
	$(BIN)/autoflash bench $(ARGS)

clean:  # the cache of kernels and the database are the user's: autoflash doctor says where
	rm -rf $(VENV)

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch  # first, so that nothing that depends on it brings another build
	$(BIN)/python -c 'import triton' 2>/dev/null \
	  || $(PIP) "triton==$(OLDEST_TRITON); platform_system == 'Linux' and platform_machine == 'x86_64'"
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/developed: $(VENV)/installed
	$(PIP) --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/triton-$(NEWEST_TRITON): $(VENV)/torch
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$(NEWEST_TRITON)
