# make demo    compile a GPT-OSS model with backend="mxfp4" (CHECKPOINT: where its files are;
#              FAMILY=qwen3_moe, mixtral, deepseek_v3, ...: a model of another family)
# make test    run the tests, within six minutes on two cores
# make test-all  run them and those marked exhaustive: all tiles, all Tritons, all dtypes
# make lint    check style, types and the imports between rooms
# make bench   measure the CPU's kernels beside others: build/cpu.json and a plot
# make bench-gpu  measure a GPU's kernels beside others: build/gpu.json and a plot
# make bench-full-size  gpt-oss-20b's sizes on two cores: memory, and tokens a second beside others,
#              in hours, with 14 GB on the disk (40 beside llama.cpp) and 16 GiB of memory:
#              build/full-size.json and a plot
# make bench-start  measure where the time of a start goes: build/start.json and a plot, in hours
# make quality  train a small GPT-OSS and measure what MXFP4 costs it: build/quality.json and a plot
# make versions  run some tests with each minor release of transformers, torch, Triton and kernels,
#              and write the table in README: in an hour, with 2 GB on the disk and 3 GB of downloads
# make clean   remove build/ and the caches; make distclean removes .venv too
#
# The first of these commands sets up .venv. It needs python3 (3.10 or newer, with venv and headers)
# and a C++ compiler, because torch.compile and the CPU kernels build C++ on first use.
# `make PYTHON=...` chooses the Python.

PYTHON ?= python3
FAMILY ?= gpt_oss
CHECKPOINT ?= build/$(subst gpt_oss,gpt-oss,$(FAMILY))-2-layers
STAMP := .venv/.stamp
CXX_FILES := $(wildcard mxfp4_fx/ops/cpu_kernels/*.h mxfp4_fx/ops/cpu_kernels/*.cpp tests/native/*.cpp benchmarks/*.cpp)
TORCH := $(shell grep '^torch==' constraints.txt)
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/build/torchinductor
export TRITON_CACHE_DIR ?= $(CURDIR)/build/triton
# The oldest supported Triton, beside the newest: tests compile the kernels with both.
OLDEST_TRITON := build/triton-3.6
# Intel's Triton, the newest that PyPI has. Not every Python has one; tests that need it skip then.
INTEL_TRITON := build/triton-xpu

# A worker is a process with a compiler and threads of its own. The number of threads is the same on
# every machine, because torch.compile generates other code for one thread than for several.
WORKERS = $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores : 4)))
test test-all versions: export OMP_NUM_THREADS := 2
# There are more threads than cores, so a thread that waits yields its core instead of spinning.
test test-all versions: export OMP_WAIT_POLICY := passive
test test-all versions: export TORCHINDUCTOR_COMPILE_THREADS := 1
# Tests start processes, which find what was compiled of this package and of the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint bench bench-gpu bench-full-size bench-start quality versions clean distclean

demo: $(STAMP)
	.venv/bin/python examples/compile_model.py --checkpoint $(CHECKPOINT) --family $(FAMILY)

test test-all: export MXFP4_FX_OLDEST_TRITON := $(OLDEST_TRITON)
test-all: export MXFP4_FX_INTEL_TRITON := $(INTEL_TRITON)
# Each worker runs neighbouring tests, so that a file is set up once; an idle one takes from others.
PYTEST = .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal

test: $(STAMP) $(OLDEST_TRITON)/triton/__init__.py
	$(PYTEST) -m "not exhaustive"

# One run, which starts, collects and sets up files once.
test-all: $(STAMP) $(OLDEST_TRITON)/triton/__init__.py $(INTEL_TRITON)/triton/__init__.py
	$(PYTEST)

lint: $(STAMP)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

bench: $(STAMP)
	.venv/bin/python -m benchmarks.cpu --output build/cpu.json --plot build/cpu.svg

bench-gpu: $(STAMP)
	.venv/bin/python -m benchmarks.gpu --output build/gpu.json --plot build/gpu.svg

bench-full-size: $(STAMP)
	.venv/bin/python -m benchmarks.full_size --output build/full-size.json --plot build/full-size.svg

bench-start: $(STAMP)
	.venv/bin/python -m benchmarks.start --output build/start.json --plot build/start.svg

quality: $(STAMP)
	.venv/bin/python -m benchmarks.quality --output build/quality.json --plot build/quality.svg

versions: $(STAMP)
	PYTHONPATH=tests .venv/bin/python -m versions

clean:
	rm -rf build .import_linter_cache .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find mxfp4_fx tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

old_python = error: '$(PYTHON)' is missing or older than 3.10; name a newer one: make PYTHON=...
no_venv = error: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt install python3-venv)
no_compiler = error: '$(CXX)' cannot compile C++ that includes Python.h; install a compiler and \
	Python's headers (Debian, Ubuntu: apt install g++ python3-dev) or name another: make CXX=...
or_stop = || { echo "$(1)" >&2; exit 1; }

# torch goes first and alone, so that no other package's wider range decides which build is fetched.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' $(call or_stop,$(old_python))
	@$(PYTHON) -c 'import ensurepip, venv' $(call or_stop,$(no_venv))
	@include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
	echo '#include <Python.h>' | $(CXX) -fsyntax-only -x c++ -I"$$include" - \
		$(call or_stop,$(no_compiler))
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt $(TORCH)
	.venv/bin/python -m pip install -c constraints.txt \
		-e '.[dev,transformers,triton,kernels,benchmarks]'
	@touch $@

$(OLDEST_TRITON)/triton/__init__.py: $(STAMP)
	.venv/bin/python -m pip install --no-deps --upgrade --target $(OLDEST_TRITON) triton==3.6.0
	@touch $@

$(INTEL_TRITON)/triton/__init__.py: $(STAMP)
	-.venv/bin/python -m pip install --no-deps --upgrade --target $(INTEL_TRITON) triton-xpu==3.3.0b1
	@-touch $@
