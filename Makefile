# conntrackd: `make help` lists the targets. Everything a target needs it sets up itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BENCH  := $(VENV)/.installed-bench
SERVERS := build/servers/.done
TOOLS  := $(VENV)/.installed-tools

.DEFAULT_GOAL := help
.PHONY: help setup servers compile demo bench bench-policy bench-table profile test test-unit test-compiled test-differential fuzz check lock clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install what is missing: Debian packages, .venv with locked dependencies

# Install the Debian packages of a list that are missing.
define debian
missing=$$(for p in $$(cat $(1)); do \
    dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
if [ -n "$$missing" ]; then \
    echo "Installing Debian packages:" $$missing; \
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null || exit 1; \
fi
endef

$(STAMP): requirements/debian.txt requirements/build.lock requirements/dev.lock pyproject.toml
	@$(call debian,requirements/debian.txt)
	@echo "Making $(VENV) with locked dependencies"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/build.lock
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes --no-build-isolation -r requirements/dev.lock
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## the main job on real packets in a private network (STAY=1 leaves it up)
	@$(BIN)/python -m tests.demo $(if $(STAY),--stay)

COMPILED := build/compiled/.done
compile: setup $(COMPILED) ## the package with its packet path compiled by mypyc, in build/compiled

$(COMPILED): setup.py pyproject.toml $(shell find conntrackd -name '*.py')
	@echo "Compiling the packet path (a minute)"
	@rm -rf build/compiled
	@$(BIN)/python setup.py -q build_py --build-lib build/compiled build_ext --build-lib build/compiled --build-temp build/temp
	@touch $@

test-unit: setup ## tests without a network, on this Python
	$(BIN)/pytest -q tests/unit tests/property

$(BENCH): $(STAMP) requirements/debian-bench.txt requirements/bench.lock
	@$(call debian,requirements/debian-bench.txt)
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/bench.lock
	@touch $@

bench: compile $(BENCH) ## everything side by side (QUICK=1, WORK=udp,tcp-1 CONTESTANTS=c,g ROUNDS=3 SECONDS=5 OUT=DIR)
	@$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(if $(WORK),--work $(WORK)) \
	    $(if $(CONTESTANTS),--contestants $(CONTESTANTS)) $(if $(ROUNDS),--rounds $(ROUNDS)) \
	    $(if $(SECONDS),--seconds $(SECONDS)) $(if $(OUT),--out $(OUT))

bench-policy: compile ## what judging a NEW packet costs with 10 and with 10,000 rules, and how long loading takes
	@$(BIN)/python -m benchmarks.policy

bench-table: compile $(BENCH) ## the table at a million connections (CONNECTIONS=1000000 PURE=1 measures pure Python too)
	@$(BIN)/python -m benchmarks.table $(if $(CONNECTIONS),--connections $(CONNECTIONS)) \
	    $(if $(PURE),--core compiled --core pure) $(if $(OUT),--out $(OUT))

profile: compile $(BENCH) ## where the time of conntrackd goes (WORK=udp|full|conns CONTESTANTS=f,g SECONDS=5 OUT=DIR)
	@$(BIN)/python -m benchmarks.profile $(if $(WORK),--work $(WORK)) $(if $(CONTESTANTS),--contestants $(CONTESTANTS)) \
	    $(if $(SECONDS),--seconds $(SECONDS)) $(if $(OUT),--out $(OUT))

# Unpacked, not installed: installing a server starts it.
servers: $(SERVERS) ## the servers that tests run in their own networks, promtool and a munin plugin, in build/servers
$(SERVERS): requirements/debian-servers.txt
	@echo "Unpacking Debian packages:" $$(cat $<)
	@rm -rf build/servers && mkdir -p build/servers
	@apt-get update -qq
	@cd build/servers && apt-get download -qq $$(cat ../../$<) 2>/dev/null && for p in *.deb; do dpkg -x $$p . && rm $$p; done
	@touch $@

# What tests run besides: shells that complete our command line, programs that read what we write.
$(TOOLS): $(STAMP) requirements/debian-tools.txt
	@$(call debian,requirements/debian-tools.txt)
	@touch $@

test: setup $(BENCH) $(SERVERS) $(TOOLS) ## all tests
	$(BIN)/pytest -q tests

test-differential: setup ## the core against the live kernel, packet by packet, for ten minutes (SECONDS=600)
	$(BIN)/python -m tests.differential --seconds $(or $(SECONDS),600)

fuzz: setup ## look for packets that break the tracker (SECONDS=60; CORPUS=folder keeps what it learns)
	$(BIN)/python -m tests.fuzz.run --seconds $(or $(SECONDS),60) $(if $(CORPUS),--corpus $(CORPUS))

# --import-mode=append: the compiled package comes before the checkout.
test-compiled: compile $(BENCH) $(SERVERS) $(TOOLS) ## unit, property and network tests with the packet path compiled
	PYTHONPATH=build/compiled CONNTRACKD_EXPECT=compiled $(BIN)/pytest -q --import-mode=append tests/unit tests/property tests/netns

check: setup ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

LOCK = $(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-annotate --custom-compile-command "make lock"
lock: setup ## write requirements/*.lock anew from requirements/build.in and pyproject.toml
	$(LOCK) --upgrade requirements/build.in -o requirements/build.lock
	$(LOCK) --upgrade --extra metrics pyproject.toml -o requirements/run.lock
	$(LOCK) --upgrade --extra dev pyproject.toml -o requirements/dev.lock
	$(LOCK) --upgrade --extra bench pyproject.toml -o requirements/bench.lock

clean: ## remove what the other targets made
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/results/partial benchmarks/results/profile
