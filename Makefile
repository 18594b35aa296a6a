# make serve   set up, build, convert the demo model, start Triton, stream a completion, serve until Ctrl-C
# make test    set up and run every test        (one file: make test ARGS=tests/test_engine.py)
# make clean   remove what these made
# Settings: PYTHON HOST HTTP_PORT GRPC_PORT METRICS_PORT ARGS, CUDA=ON|OFF (serve: ON with a GPU and nvcc; test: ON, to compile it)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: serve test clean always

PYTHON ?= python3
HOST ?= 127.0.0.1
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
NVCC := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
PIP_NVCC := $$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
GPU := $(wildcard /dev/nvidia0 /dev/dxg)
SOURCES := $(shell find native backend_src -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
DEMO := tools/demo/checkpoint
WEIGHTS := model_repository/generator/1

# A build with CUDA serves without a GPU as well.
BUILD := $(strip $(or $(CUDA),$(if $(filter test,$(MAKECMDGOALS)),ON,\
           $(if $(wildcard $(STAMPS)/native-ON),ON,$(if $(and $(NVCC),$(GPU)),ON,OFF)))))

serve: $(STAMPS)/native-$(BUILD) $(STAMPS)/client $(STAMPS)/demo
	@exec $(BIN)/python tools/serve.py --demo --host $(HOST) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) \
	  --metrics-port $(METRICS_PORT) $(ARGS)

test: $(STAMPS)/native-$(BUILD) $(STAMPS)/client $(STAMPS)/test
	@$(BIN)/python -m pytest $(ARGS)

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON); set PYTHON to a Python >= 3.10" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is $$($(PYTHON) --version); 3.10 or newer is needed (set PYTHON)" >&2; exit 1; }
	@command -v tritonserver >/dev/null || $(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' \
	  || { echo "$$($(PYTHON) --version): the tritonserver of the nvidia-pytriton wheel needs numpy 1, which has no wheel for it;" \
	  "set PYTHON to a Python 3.10, 3.11 or 3.12" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "no C++ compiler (Debian, Ubuntu: apt-get install g++)" >&2; exit 1; }
	@echo "== Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "could not make it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build-tools: | $(STAMPS)/venv
	@$(PIP) install --quiet 'pip>=23.1' 'scikit-build-core>=0.10' 'pybind11>=2.13' 'flit_core>=3.4' 'cmake>=3.24' ninja setuptools wheel
	@touch $@

# nvcc where the machine has none; its wheels lack two names that CMake looks for.
$(STAMPS)/nvcc: | $(STAMPS)/venv
	@echo "== nvcc"
	@$(PIP) install --quiet $(foreach p,cuda-nvcc cuda-crt cuda-runtime cuda-cccl nvvm,'nvidia-$(p)==13.0.*')
	@cd $(VENV)/lib/python3*/site-packages/nvidia/cu13 && ln -sfn lib lib64 && ln -sfn libcudart.so.13 lib/libcudart.so
	@touch $@
$(if $(NVCC),,$(STAMPS)/native-ON: $(STAMPS)/nvcc)

# With what serving needs: tritonserver, the tokenizers; no torch.
$(STAMPS)/native-ON $(STAMPS)/native-OFF: $(STAMPS)/native-%: $(SOURCES) $(STAMPS)/build-tools
	@echo "== packages (tritonserver is the big one) and the native engine, CUDA $*"
	@rm -f $(STAMPS)/native-*
	@log=$(STAMPS)/build.log; : > $$log; export CUDACXX=$(or $(NVCC),$(PIP_NVCC)) PATH="$(CURDIR)/$(BIN):$$PATH"; \
	  setsid $(PIP) install -v --no-build-isolation '.[server]' -C build-dir=build/$* -C cmake.define.CODEFUSE_CUDA=$* \
	  > $$log 2>&1 & build=$$!; trap 'kill -- -$$build 2>/dev/null || true' EXIT; \
	  tail -n +1 -s 0.2 -f --pid=$$build $$log | sed -unE 's/^ *(Downloading [^ ]+) (\(.*)/\1 \2/p; s/.*(\[[0-9]+\/[0-9]+\] .*)/\1/p'; \
	  wait $$build || { tail -60 $$log >&2; echo "the build failed; all of it: $$log$(if $(filter ON,$*), (CUDA=OFF builds without CUDA))" >&2; exit 1; }
	@touch $@

$(STAMPS)/client: $(shell find client -type f -not -name '*.pyc') | $(STAMPS)/native-$(BUILD)
	@echo "== client"
	@$(PIP) install --quiet --no-build-isolation ./client
	@touch $@

# The stamp is a copy of the config.json written here: weights of another origin are left alone.
$(STAMPS)/demo: $(wildcard $(DEMO)/* tools/convert.py tools/checkpoint.py tools/hf_models.py tools/rounding.py tools/weights_writer.py) \
    $(if $(wildcard $(WEIGHTS)/config.json),,always) | $(STAMPS)/native-$(BUILD)
	@if [ -e $(WEIGHTS)/config.json ] && ! cmp -s $(WEIGHTS)/config.json $@; then \
	  echo "== keeping the weights in $(WEIGHTS)"; \
	else \
	  echo "== converting the demo model"; \
	  $(BIN)/python tools/convert.py $(DEMO) $(WEIGHTS) && cp $(WEIGHTS)/config.json $@; \
	fi
always:

$(STAMPS)/test: pyproject.toml | $(STAMPS)/native-$(BUILD)
	@echo "== packages of the tests (torch)"
	@$(PIP) install 'codefuse-triton[test]' | grep --line-buffered -v '^Requirement already' || true
	@$(BIN)/python -c 'import torch, pytest'
	@touch $@

clean:
	rm -rf $(VENV) build
	if [ -e $(WEIGHTS)/config.json ]; then echo "kept: the weights in $(WEIGHTS)"; fi
