# Stasis. `make` alone lists the targets.

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# go is parallel enough; the order of the prerequisites is meant.
.NOTPARALLEL:

PREFIX   ?= /usr/local
DESTDIR  ?=
WORKLOAD ?= redis
FUZZTIME ?= 60s
# Integration tests at a time. Each has a containerd of its own and waits for half of
# its time: 2 save a fifth on a machine of two CPUs.
PARALLEL ?= 2
RUN      ?=

# The date is the commit's, so that the same commit gives the same binaries.
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT  ?= $(shell git rev-parse -q --verify HEAD || echo unknown)
DATE    ?= $(shell date -u -d "@$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 0)}" +%Y-%m-%dT%H:%M:%SZ)
LDFLAGS = -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT) -X main.date=$(DATE)

PROGRAMS := $(notdir $(wildcard cmd/*))
UNITS    := $(notdir $(wildcard contrib/systemd/*))

# What demo, integration tests and benchmarks find their tools by.
with_env = eval "$$(contrib/setup.sh --env)"; export STASIS_BIN='$(CURDIR)/bin';
run_flag = $(if $(RUN),-run '$(RUN)')

.PHONY: help
help: ## list the targets (this)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  RUN=regexp      only these tests (test, test-unit, test-integration, test-kubernetes, test-vm)'
	@echo '  WORKLOAD=$(WORKLOAD)  what the demo checkpoints'
	@echo '  FUZZTIME=$(FUZZTIME)    how long each fuzz target runs'
	@echo '  PARALLEL=$(PARALLEL)      how many integration tests run at a time'
	@echo '  PREFIX=$(PREFIX)  DESTDIR=$(DESTDIR)  where install and uninstall work'

.PHONY: build
build: ## build static binaries into bin/
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: install
install: ## install bin/* and systemd units below $(DESTDIR)$(PREFIX) (build first)
	@for p in $(PROGRAMS); do [[ -x bin/$$p ]] || { echo "bin/$$p is missing: run 'make build' first" >&2; exit 1; }; done
	install -d '$(DESTDIR)$(PREFIX)/bin'
	install -m 0755 $(PROGRAMS:%=bin/%) '$(DESTDIR)$(PREFIX)/bin'
	install -d '$(DESTDIR)$(PREFIX)/lib/systemd/system'
	@for u in $(UNITS); do sed 's,/usr/local/bin,$(PREFIX)/bin,' contrib/systemd/$$u | install -m 0644 /dev/stdin '$(DESTDIR)$(PREFIX)/lib/systemd/system/'$$u; done

.PHONY: uninstall
uninstall: ## remove what install installed
	cd '$(DESTDIR)$(PREFIX)/bin' && rm -f $(PROGRAMS)
	cd '$(DESTDIR)$(PREFIX)/lib/systemd/system' && rm -f $(UNITS)

.PHONY: setup
setup: ## install what demo, tests and benchmarks need (root)
	@contrib/setup.sh

.PHONY: demo
demo: setup build ## checkpoint and restore a live container, here and now (root)
	@$(with_env) go run ./integration/demo -workload '$(WORKLOAD)'

.PHONY: test
test: setup build lint test-unit test-integration ## set up, build, lint, and run every test (root)

.PHONY: test-unit
test-unit: ## run the unit tests under the race detector
	@packages=$$(go list ./...); \
	go test -race -timeout 30m $(run_flag) $$(grep -v '/integration' <<<"$$packages")

.PHONY: test-integration
test-integration: setup build ## run the tests on real containerd, runc, crun and CRIU (root)
	@packages=$$(go list ./integration/... | grep -v /integration/kubernetes); \
	$(with_env) go test -count=1 -timeout 2h -parallel $(PARALLEL) $(run_flag) $$packages

.PHONY: test-kubernetes
test-kubernetes: build ## run the tests on a real Kubernetes, which it builds (root)
	@contrib/setup.sh --kubernetes
	@$(with_env) go test -count=1 -timeout 40m $(run_flag) ./integration/kubernetes/...

.PHONY: test-vm
test-vm: setup build ## run the core of them in a VM: a stock kernel, cgroup v2, AppArmor (root)
	@contrib/setup.sh --vm
	@$(with_env) go run ./integration/vm $(run_flag)

.PHONY: lint
lint: ## check formatting, go vet, staticcheck
	@unformatted=$$(gofmt -l .); \
	[[ -z $$unformatted ]] || { printf 'not gofmt-ed:\n%s\n' "$$unformatted" >&2; exit 1; }
	go vet ./...
	go tool staticcheck ./...

.PHONY: bench
bench: setup build ## measure checkpoint and restore, ours and the peers' (root)
	@$(with_env) go run ./integration/bench

# Not a part of test, which runs the targets on their seeds only: a search that
# begins elsewhere each time makes one commit pass and fail.
.PHONY: fuzz
fuzz: ## search with every fuzz target for FUZZTIME each
	@contrib/fuzz.sh '$(FUZZTIME)'

.PHONY: clean
clean: ## remove bin/; the cache of setup stays
	rm -rf bin
