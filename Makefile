# `make demo` and `make test` need Python >= 3.11 (for JAX), GCC >= 11, and the network or a local index for pip.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
BIN := $(abspath $(VENV))/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
# pip < 25.3 takes the versions of the build from the first variable, later ones from the second
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all bench sanitize clean
.DELETE_ON_ERROR:

# The main job: a moving scene reconstructed in 4-D by D4RT, with errors, JAX parity and speed. VIDEO=file.mp4 takes your own.
demo: $(VENV)/.installed
	$(BIN)/fourdperf demo d4rt $(if $(VIDEO),--video "$(VIDEO)") --out demo_out

# JOBS processes share the files of tests; JOBS=0 runs them in one, with all its threads
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# And those that take long or much memory, one at a time
test-all: test
	$(BIN)/python -m pytest -m heavy $(ARGS) || test $$? -eq 5  # none of these is heavy

# OP=resize times one; CSV=benchmarks/results/cpu.csv keeps the rows
bench: $(VENV)/.installed
	$(BIN)/fourdperf bench $(if $(OP),--names '["$(OP)"]') $(if $(CSV),--csv $(CSV))

# The ops under AddressSanitizer and UBSan, in a build of their own
sanitize: $(VENV)/.installed
	BIN=$(BIN) bash tests/sanitize.sh

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)  # needs Debian's python3-venv
	$(PIP) install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf build dist $(VENV) fourdperf/_c*.so fourdperf/_build_info.json
