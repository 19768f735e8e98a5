# Every target sets up .venv by itself: Python 3.11 or newer, make and pip are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.adaptive-spec-installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: bench benchmarks clean dashboards demo demo-sglang demo-vllm docs fuzz gpu-report help images lint manifests nightly release-check setup sglang-matrix site soak stack test vendor vllm-matrix wheel

help:
	@echo "make demo [ARGS=\"--duration 90 --compare\"]  see it work on a real engine"
	@echo "make test | lint | bench | docs             check, measure, write docs/{configuration,metrics}.md"
	@echo "make site                                   the documentation as HTML in build/site; fails on a dead link"
	@echo "make wheel                                  dist/adaptive_spec-VERSION-py3-none-any.whl, to install elsewhere"
	@echo "make release-check                          build the release and try it in a fresh environment (minutes)"
	@echo "make benchmarks [ARGS=\"--seed 7\"]            policies against each other, simulated; writes docs/benchmarks.md"
	@echo "make soak [ARGS=\"--seconds 1200\"]           an hour of the demo and a week of records: what grows, the worst call"
	@echo "make fuzz [ARGS=\"csv --seconds 60\"]         fuzz what is read from outside the process"
	@echo "make gpu-report OUT=DIR                     verify latency, boundaries, overhead, K on this device (CUDA, or the CPU)"
	@echo "make stack [ARGS=\"--duration 90\"]            demo, Prometheus and Alertmanager with the shipped configuration"
	@echo "make dashboards                             write the Grafana dashboards of dashboards/"
	@echo "make manifests                              write the alerts as a Kubernetes object"
	@echo "make images                                 build the images without a container engine and run them (root; 3 GB)"
	@echo "make vendor                                 fetch the status page's plotting library (needs npm)"
	@echo "make sglang-matrix                          all that the plugin uses of SGLang, checked in wheels of several releases"
	@echo "make vllm-matrix                            the same for vLLM"
	@echo "make nightly                                what is too slow for every change, or needs a package registry"
	@echo "make demo-sglang [ARGS=...]                 the same on a real SGLang server on the CPU (2.7 GB, once)"
	@echo "make demo-vllm [ARGS=...]                   the same on a real vLLM server on the CPU (2.5 GB, once)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d; say make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[engine,dev,docs,release]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/adaptive-spec demo $(ARGS)

demo-vllm: $(STAMP)
	@$(BIN)/adaptive-spec demo --engine vllm $(ARGS)

demo-sglang: $(STAMP)
	@$(BIN)/adaptive-spec demo --engine sglang $(ARGS)

# All of it on two processes, file by file: half the time of one on the two cores of CI.
test: $(STAMP)
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),--numprocesses 2 --dist loadfile)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak $(ARGS)

benchmarks: $(STAMP)
	$(BIN)/python -m benchmarks.decisions --write $(ARGS)

OUT ?= build/gpu-report
gpu-report: $(STAMP)
	@$(BIN)/python -m benchmarks.gpu_report --out $(OUT) $(ARGS)

stack: $(STAMP)
	@$(BIN)/python -m deploy.stack $(ARGS)

dashboards: $(STAMP)
	$(BIN)/python -m dashboards.build

docs: $(STAMP)
	$(BIN)/python -m docs.reference_pages.configuration > docs/configuration.md
	$(BIN)/python -m docs.reference_pages.metrics > docs/metrics.md

site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "written to build/site, begin with build/site/index.html"

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist .

release-check: $(STAMP)
	$(BIN)/python -m release.check $(ARGS)

manifests: $(STAMP)
	$(BIN)/python deploy/kubernetes/rules.py > deploy/kubernetes/monitoring/prometheus-rule.yaml

images: $(STAMP)
	@$(BIN)/python -m deploy.images $(ARGS)

vllm-matrix: $(STAMP)
	@$(BIN)/python -m tests.engines.release_matrix vllm $(ARGS)

# --inputs and --seconds of each target: whichever is first ends it.
fuzz: $(STAMP)
	@$(BIN)/python -m tests.fuzz $(ARGS)

sglang-matrix: $(STAMP)
	@$(BIN)/python -m tests.engines.release_matrix sglang $(ARGS)

# Checks that are not part of `make test`: the releases of SGLang and vLLM, tests with the marker `nightly`, and a long fuzzing run.
nightly: sglang-matrix vllm-matrix
	$(BIN)/python -m pytest -m nightly $(ARGS)
	$(BIN)/python -m tests.fuzz --inputs 1000000 --seconds 0 --jobs 2

# The plots of the status page; npm checks what it fetches against the registry's own checksum.
UPLOT := 1.6.32
VENDOR := adaptive_spec/sidecar/page/vendor
vendor:
	fetched=$$(mktemp -d) && trap 'rm -rf "$$fetched"' EXIT && npm pack --silent --pack-destination "$$fetched" uplot@$(UPLOT) \
		&& tar -xzf "$$fetched"/uplot-*.tgz -C "$$fetched" && cd $(VENDOR) \
		&& cp "$$fetched"/package/dist/uPlot.iife.min.js "$$fetched"/package/dist/uPlot.min.css . \
		&& cp "$$fetched"/package/LICENSE uPlot.LICENSE && sha256sum uPlot.* > SHA256SUMS

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
