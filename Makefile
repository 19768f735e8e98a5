# Every target sets up .venv by itself: Python 3.11 or newer, make and pip are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.adaptive-spec-installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-sglang stack test lint bench benchmarks docs dashboards vendor manifests images clean

help:
	@echo "make demo [ARGS=\"--duration 90 --compare\"]  see it work on a real engine"
	@echo "make test | lint | bench | docs             check, measure, write docs/{configuration,metrics}.md anew"
	@echo "make benchmarks                             policies against each other, simulated; writes docs/benchmarks.md"
	@echo "make stack [ARGS=\"--duration 90\"]            demo, Prometheus and Alertmanager with the shipped configuration"
	@echo "make dashboards                             write the Grafana dashboards of dashboards/ anew"
	@echo "make manifests                              the alerts as a Kubernetes object, anew"
	@echo "make images                                 build both images without a container engine and run them (root; 3 GB)"
	@echo "make vendor                                 the status page's plotting library anew (needs npm)"
	@echo "make demo-sglang [ARGS=...]                 the same on a real SGLang server on the CPU (2.7 GB, once)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d; say make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[engine,dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/adaptive-spec demo $(ARGS)

demo-sglang: $(STAMP)
	@$(BIN)/adaptive-spec demo --engine sglang $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(ARGS)

benchmarks: $(STAMP)
	$(BIN)/python -m benchmarks.decisions --write $(ARGS)

stack: $(STAMP)
	@$(BIN)/python -m deploy.stack $(ARGS)

dashboards: $(STAMP)
	$(BIN)/python -m dashboards.build

docs: $(STAMP)
	$(BIN)/python -m docs.reference_pages.configuration > docs/configuration.md
	$(BIN)/python -m docs.reference_pages.metrics > docs/metrics.md

manifests: $(STAMP)
	$(BIN)/python deploy/kubernetes/rules.py > deploy/kubernetes/monitoring/prometheus-rule.yaml

images: $(STAMP)
	@$(BIN)/python -m deploy.images $(ARGS)

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
