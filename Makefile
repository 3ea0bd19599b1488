# conntrackd: `make help` lists the targets. Everything a target needs it sets up itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BENCH  := $(VENV)/.installed-bench
SERVERS := build/servers/.done
TOOLS  := $(VENV)/.installed-tools

.DEFAULT_GOAL := help
.PHONY: help setup servers compile demo install uninstall deb test-deb bench bench-policy bench-table profile test test-unit test-compiled bench-flows bench-handover bench-snapshot screenshots man soak soak-flood soak-restart soak-stop soak-kill test-life test-differential fuzz check lock clean

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

$(STAMP): requirements/debian.txt requirements/debian-build.txt requirements/build.lock requirements/dev.lock pyproject.toml
	@$(call debian,requirements/debian.txt requirements/debian-build.txt)
	@echo "Making $(VENV) with locked dependencies"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/build.lock
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes --no-build-isolation -r requirements/dev.lock
	@# compat: a path that Python goes by, not a finder that each of its starts has to load.
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . --config-settings editable_mode=compat
	@touch $@

demo: setup ## the main job on real packets in a private network (STAY=1 leaves it up)
	@$(BIN)/python -m tests.demo $(if $(STAY),--stay)

screenshots: compile ## take the pictures of the README anew, of a real daemon
	@PYTHONPATH=build/compiled $(BIN)/python -m tests.screenshots

man: setup ## write what the man pages say of commands and options anew
	@$(BIN)/python -m tests.manpages

COMPILED := build/compiled/.done
compile: setup $(COMPILED) ## the package with its packet path compiled by mypyc, in build/compiled

$(COMPILED): setup.py pyproject.toml $(shell find conntrackd -name '*.py')
	@echo "Compiling the packet path (a minute)"
	@rm -rf build/compiled
	@$(BIN)/python setup.py -q build_py --build-lib build/compiled build_ext --build-lib build/compiled --build-temp build/temp
	@touch $@

PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
UNITDIR    ?= $(PREFIX)/lib/systemd/system
LIB        := $(PREFIX)/lib/conntrackd
WHEELS     ?= build/wheels

# What is installed: the locked dependencies and this package, compiled where a compiler is there.
PACKAGER = $(WHEELS)/venv/bin/pip --disable-pip-version-check -q
$(WHEELS)/.dependencies: requirements/debian-build.txt requirements/build.lock requirements/run.lock
	@$(call debian,requirements/debian-build.txt)
	@echo "Building the packages that conntrackd needs"
	@rm -rf $(WHEELS)
	@$(PYTHON) -m venv $(WHEELS)/venv
	@$(PACKAGER) install --require-hashes -r requirements/build.lock
	@$(PACKAGER) wheel --require-hashes --no-build-isolation -w $(WHEELS) -r requirements/run.lock
	@$(PACKAGER) install --isolated --no-index --no-deps $(WHEELS)/*.whl # the compiler reads their types
	@touch $@

$(WHEELS)/.done: $(WHEELS)/.dependencies pyproject.toml setup.py $(shell find conntrackd -type f -not -name '*.pyc')
	@echo "Building conntrackd"
	@rm -rf $(WHEELS)/conntrackd-*.whl build/lib* build/bdist*
	@$(PACKAGER) wheel --no-deps --no-build-isolation -w $(WHEELS) .
	@touch $@

install: $(WHEELS)/.done ## install under PREFIX=/usr/local, below DESTDIR: program, unit, user, manual; the configuration only if there is none
	@rm -rf $(DESTDIR)$(LIB)
	@$(PYTHON) -m venv --without-pip $(DESTDIR)$(LIB)
	@$(PACKAGER) --python $(DESTDIR)$(LIB)/bin/python3 --isolated install --root-user-action ignore --no-deps --no-index \
	    --no-compile $(WHEELS)/*.whl
	@rm -rf $(addprefix $(DESTDIR)$(LIB)/,include share) && find $(DESTDIR)$(LIB)/bin -type f -delete
	@sed -i '/^command/d' $(DESTDIR)$(LIB)/pyvenv.cfg
	@$(DESTDIR)$(LIB)/bin/python3 -m compileall -q -s '$(DESTDIR)' $(DESTDIR)$(LIB)/lib
	@install -d $(DESTDIR)$(PREFIX)/sbin
	@sed 's,@LIB@,$(LIB),' packaging/conntrackd.py > $(DESTDIR)$(PREFIX)/sbin/conntrackd && chmod 755 $(DESTDIR)$(PREFIX)/sbin/conntrackd
	@install -d $(DESTDIR)$(UNITDIR) $(addprefix $(DESTDIR)$(PREFIX)/lib/,sysusers.d tmpfiles.d)
	@sed 's,/usr/sbin/,$(PREFIX)/sbin/,' systemd/conntrackd.service > $(DESTDIR)$(UNITDIR)/conntrackd.service
	@install -m 644 systemd/system-conntrackd.slice $(DESTDIR)$(UNITDIR)
	@install -m 644 systemd/sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/conntrackd.conf
	@install -m 644 systemd/tmpfiles.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/conntrackd.conf
	@for page in man/*.[1-8]; do install -D -m 644 $$page $(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}; done
	@[ -e $(DESTDIR)$(SYSCONFDIR)/conntrackd/conntrackd.toml ] || \
	    install -D -m 644 config/conntrackd.toml $(DESTDIR)$(SYSCONFDIR)/conntrackd/conntrackd.toml
	@[ -n "$(DESTDIR)" ] || echo "Next: systemd-sysusers, adapt $(SYSCONFDIR)/conntrackd/conntrackd.toml, conntrackd check, systemctl enable --now conntrackd"

# What the tests start under a systemd; as Python, which is quicker to build.
INSTALLED := build/installed.done
$(INSTALLED): Makefile requirements/debian-systemd.txt packaging/conntrackd.py $(wildcard systemd/*) requirements/build.lock requirements/run.lock $(shell find conntrackd -name '*.py')
	@$(call debian,requirements/debian-systemd.txt)
	@rm -rf build/installed
	@$(MAKE) -s install DESTDIR=$(CURDIR)/build/installed PREFIX=/usr WHEELS=build/wheels-pure PYTHON=/usr/bin/python3 CONNTRACKD_PURE=1
	@touch $@
# With WHEELS set to it, the rule above is the one that makes it.
ifneq ($(WHEELS),build/wheels-pure)
endif

# The Debian package, for the Python of this Debian. VERSION and MAINTAINER are what changelog and control say.
VERSION     = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
MAINTAINER ?= conntrackd maintainers <conntrackd@users.noreply.github.com>
DEB         = build/deb/conntrackd-firewall-$(VERSION)
deb: ## a Debian package in build/deb, looked through by lintian
	@$(call debian,requirements/debian-deb.txt)
	@$(MAKE) -s build/wheels-deb/.done WHEELS=build/wheels-deb PYTHON=/usr/bin/python3
	@rm -rf build/deb && mkdir -p $(DEB)
	@cp -a Makefile CHANGELOG.md config conntrackd man packaging pyproject.toml requirements setup.py systemd $(DEB)
	@mv $(DEB)/packaging/debian $(DEB)/debian && sed -i 's/@MAINTAINER@/$(MAINTAINER)/' $(DEB)/debian/control $(DEB)/debian/changelog
	@cd $(DEB) && WHEELS=$(CURDIR)/build/wheels-deb dpkg-buildpackage -b -us -uc >../build.log 2>&1 || { tail -20 ../build.log; exit 1; }
	@lintian --allow-root --fail-on error --display-level error build/deb/*.changes
	@ls build/deb/*.deb

test-deb: deb ## the package in a Debian that debootstrap makes: installed, run, upgraded, removed and purged
	@[ -e build/debian.done ] || { rm -rf build/debian && \
	    debootstrap --variant=minbase --include=iptables,libnetfilter-queue1,python3,systemd bookworm build/debian >build/debian.log && touch build/debian.done; }
	@packaging/test-deb.sh build/deb/conntrackd-firewall_$(VERSION)_*.deb build/debian

uninstall: ## remove what install put there; the configuration and the state stay
	rm -rf $(DESTDIR)$(LIB)
	rm -f $(DESTDIR)$(PREFIX)/sbin/conntrackd $(addprefix $(DESTDIR)$(UNITDIR)/,conntrackd.service system-conntrackd.slice)
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/lib/,sysusers.d/conntrackd.conf tmpfiles.d/conntrackd.conf)
	for page in man/*.[1-8]; do rm -f $(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}; done

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

bench-flows: compile $(BENCH) ## listing 200,000 flows while 5,000 packets a second go through (FLOWS=200000 OUT=DIR)
	@$(BIN)/python -m benchmarks.flows $(if $(FLOWS),--flows $(FLOWS)) $(if $(OUT),--out $(OUT))

bench-handover: compile $(BENCH) ## how long packets wait for a restart, with up to a million connections (FLOWS="1000 100000")
	@$(BIN)/python -m benchmarks.handover $(if $(FLOWS),--flows $(FLOWS))

bench-snapshot: compile $(BENCH) ## what a snapshot and a restore of many connections cost the loop (CONNECTIONS="200000 1000000" PURE=1)
	@$(BIN)/python -m benchmarks.snapshot $(if $(CONNECTIONS),--connections $(CONNECTIONS)) $(if $(PURE),--core compiled --core pure)

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

test: setup $(BENCH) $(SERVERS) $(TOOLS) $(INSTALLED) ## all tests
	$(BIN)/pytest -q tests

test-life: setup ## a million random operations on the table against a naive account of them (OPERATIONS=1000000)
	$(BIN)/python -m tests.property.test_life --operations $(or $(OPERATIONS),1000000)

test-differential: setup ## the core against the live kernel, packet by packet, for ten minutes (SECONDS=600)
	$(BIN)/python -m tests.differential --seconds $(or $(SECONDS),600)

soak: compile ## much traffic for long: memory stays, nothing is left behind, counters add up (SECONDS=600 CORE=pure)
	$(BIN)/python -m tests.soak.overload churn --seconds $(or $(SECONDS),600) --core $(or $(CORE),compiled)

soak-flood: compile ## more than can be judged: it answers, counts and recovers (SECONDS=30 CORE=pure; as a rule both cores)
	$(BIN)/python -m tests.soak.overload flood --seconds $(or $(SECONDS),30) $(addprefix --core ,$(or $(CORE),compiled pure))

soak-restart: setup ## restarts under load: no connection broken, no packet lost (ROUNDS=10)
	$(BIN)/python -m tests.soak restart --rounds $(or $(ROUNDS),10)

soak-stop: setup ## stops and starts under load: no connection broken (ROUNDS=10)
	$(BIN)/python -m tests.soak stop --rounds $(or $(ROUNDS),10)

soak-kill: setup ## SIGKILL at random moments under load: it starts, with what its snapshot has (ROUNDS=50 SEED=N)
	$(BIN)/python -m tests.soak kill --rounds $(or $(ROUNDS),50) $(if $(SEED),--seed $(SEED))

fuzz: setup ## look for packets that break the tracker (SECONDS=60; CORPUS=folder keeps what it learns)
	$(BIN)/python -m tests.fuzz.run --seconds $(or $(SECONDS),60) $(if $(CORPUS),--corpus $(CORPUS))

# --import-mode=append: the compiled package comes before the checkout.
test-compiled: compile $(BENCH) $(SERVERS) $(TOOLS) $(INSTALLED) ## unit, property and network tests with the packet path compiled
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
	$(LOCK) --upgrade --extra top pyproject.toml -o requirements/top.lock
	$(LOCK) --upgrade --extra dev pyproject.toml -o requirements/dev.lock
	$(LOCK) --upgrade --extra bench pyproject.toml -o requirements/bench.lock

clean: ## remove what the other targets made
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/results/partial benchmarks/results/profile
