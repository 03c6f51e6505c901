# doppel: two commands do everything: `make demo` and `make test`.
VERSION  ?= $(shell sed -n 's/^var Version = "\(.*\)"/\1/p' internal/buildinfo/buildinfo.go)
REGISTRY ?= ghcr.io/doppel-dev
LDFLAGS  := -s -w -X github.com/doppel-dev/doppel/internal/buildinfo.Version=$(VERSION)
PROGRAMS := doppel doppel-rootd traffic-manager traffic-agent
GO       := CGO_ENABLED=0 go
SHELL    := /bin/bash

.PHONY: build images images-push demo demo-down test clean $(PROGRAMS) lab colors

build: $(PROGRAMS) lab colors ## every program in bin/

$(PROGRAMS):
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/$@ ./cmd/$@

colors:
	$(GO) build -trimpath -ldflags '-s -w' -o bin/colors ./examples/colors/cmd/colors

lab:
	cd lab && $(GO) build -trimpath -ldflags '-s -w' -o ../bin/lab ./cmd/lab

images: traffic-manager traffic-agent colors lab ## image archives in dist/, built without Docker
	mkdir -p dist
	bin/lab image build --user 65532 --binary bin/traffic-manager --name $(REGISTRY)/traffic-manager:$(VERSION) -o dist/traffic-manager.tar
	bin/lab image build --user 65532 --binary bin/traffic-agent --name $(REGISTRY)/traffic-agent:$(VERSION) -o dist/traffic-agent.tar
	bin/lab image build --user 65532 --binary bin/colors --name $(REGISTRY)/colors:$(VERSION) -o dist/colors.tar

images-push: images ## push them: make images-push REGISTRY=registry.example.com/team
	for i in traffic-manager traffic-agent colors; do bin/lab image push dist/$$i.tar $(REGISTRY)/$$i:$(VERSION) || exit 1; done

## ---- packages ----

NFPM      := bin/tools/nfpm-v2.45.2
DIST_ARCH ?= amd64 arm64

.PHONY: dist dist-here
dist: $(NFPM) ## tarballs, .deb, .rpm and checksums in dist/release; the same commit gives the same bytes
	VERSION='$(VERSION)' LDFLAGS='$(LDFLAGS)' NFPM='$(CURDIR)/$(NFPM)' packaging/dist.sh $(DIST_ARCH)

dist-here: ## make dist, for this machine's architecture alone
	+$(MAKE) --no-print-directory dist DIST_ARCH=$$(go env GOARCH)

$(NFPM):
	GOBIN=$(CURDIR)/bin/tools $(GO) install github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.2
	mv bin/tools/nfpm $@

demo: build images ## the main job on a lab of its own, each step with its real output; leaves it running
	hack/demo.sh

demo-down: lab
	hack/demo.sh down

## ---- tests: `make test` runs every one of them ----

LINT      := bin/tools/golangci-lint-v2.15.0
TESTSUM   := bin/tools/gotestsum-v1.13.0
FUZZTIME  ?= 3s
CHART_TESTS := ^Test(Chart|ChartChild|Policy)$$
NET_TESTS   := ^Test(Credentials|DNS|DNSResolved|Outbound|Package|Privilege|Reach|Run|Seeing|SessionsLast|Several|Subnets|Transports)$$
TAKE_TESTS  := ^Test(Requests|Team|Workloads)$$
# What the tests use beside Go; the lab installs its own packages.
TEST_PKGS := curl dbus-daemon dnsutils iproute2 iputils-ping nftables procps sudo netcat-openbsd openssl

RESOLVED  := bin/tools/resolved
NGINX     := bin/tools/nginx

.PHONY: deps lint unit fuzz bench cross lab-test e2e e2e-lab e2e-doppel e2e-net e2e-take e2e-chart

test: deps build images lint unit lab-test fuzz bench cross e2e ## everything: lint, unit with the race detector, fuzz smoke, end to end on a real Kubernetes
	@echo "make test: all green"

deps: ## the system packages that the tests use
	@missing=$$(for p in $(TEST_PKGS); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing; fi
# systemd-resolved is unpacked and not installed: installed, it would take over this machine's resolv.conf.
	@if ! [ -x /lib/systemd/systemd-resolved ] && ! [ -x $(RESOLVED)/lib/systemd/systemd-resolved ]; then \
	  mkdir -p $(RESOLVED) && cd $(RESOLVED) && apt-get update -qq && apt-get download -qq systemd-resolved libsystemd-shared libnss-resolve && \
	  for d in *.deb; do dpkg -x $$d . && rm $$d; done; fi
# And nginx, which would start a service.
	@if ! [ -x /usr/sbin/nginx ] && ! [ -x $(NGINX)/usr/sbin/nginx ]; then \
	  mkdir -p $(NGINX) && cd $(NGINX) && apt-get update -qq && apt-get download -qq nginx && \
	  for d in *.deb; do dpkg -x $$d . && rm $$d; done; fi

$(LINT):
	GOBIN=$(CURDIR)/bin/tools $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
	mv bin/tools/golangci-lint $@

$(TESTSUM):
	GOBIN=$(CURDIR)/bin/tools $(GO) install gotest.tools/gotestsum@v1.13.0
	mv bin/tools/gotestsum $@

lint: $(LINT)
	go mod tidy -diff
	$(LINT) run --timeout 15m ./...

unit: $(TESTSUM) ## unit and one-process tests, race detector on
	$(TESTSUM) --format pkgname --format-hide-empty-pkg -- -race -shuffle=on -timeout 15m $$(go list ./... | grep -v /e2e$$)

lab-test: $(TESTSUM)
	cd lab && ../$(TESTSUM) --format pkgname --format-hide-empty-pkg -- -shuffle=on ./...

fuzz: ## every fuzz target for $(FUZZTIME)
	@for f in $$(grep -rlE '^func Fuzz' --include=*_test.go internal); do \
	  for t in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$f); do \
	    go test -run='^$$' -fuzz="^$$t$$" -fuzztime=$(FUZZTIME) ./$$(dirname $$f) || exit 1; \
	  done; \
	done

bench: ## every benchmark runs once
	@go test -run='^$$' -bench=. -benchtime=1x $$(go list ./internal/...) | grep -v 'no test files' | grep -E '^(Benchmark|ok|FAIL|---)' ; test $${PIPESTATUS[0]} -eq 0

cross: ## the laptop's programs compile for the other systems
	GOOS=darwin $(GO) build -o /dev/null ./cmd/doppel
	GOOS=darwin $(GO) build -o /dev/null ./cmd/doppel-rootd
	GOOS=windows $(GO) build -o /dev/null ./cmd/doppel
	GOOS=windows $(GO) build -o /dev/null ./cmd/doppel-rootd
	for s in darwin windows; do GOOS=$$s $(GO) vet ./internal/tundev ./internal/osroute ./internal/osdns || exit 1; done

## The parts wait more than they compute: two run beside each other, each on a lab of its own.
e2e: $(TESTSUM) build images dist-here ## end to end: the lab itself, the README's commands (and so the demo), doppel on a lab
	+$(MAKE) --no-print-directory -j2 --output-sync=target e2e-net e2e-doppel e2e-take e2e-lab e2e-chart

e2e-lab:
	cd lab && DOPPEL_LAB_E2E=1 ../$(TESTSUM) --format testname -- -count=1 -timeout 25m ./e2e
	DOPPEL_E2E=1 $(TESTSUM) --format testname -- -count=1 -timeout 25m -run TestShellBlocks ./internal/docstest

e2e-doppel:
	DOPPEL_E2E=1 $(TESTSUM) --format testname -- -count=1 -timeout 25m -skip '$(CHART_TESTS)|$(NET_TESTS)|$(TAKE_TESTS)' ./e2e

e2e-net:
	DOPPEL_E2E=1 DOPPEL_E2E_LAB=e2e-net $(TESTSUM) --format testname -- -count=1 -timeout 25m -run '$(NET_TESTS)' ./e2e

e2e-take:
	DOPPEL_E2E=1 DOPPEL_E2E_LAB=e2e-take $(TESTSUM) --format testname -- -count=1 -timeout 25m -parallel 6 -run '$(TAKE_TESTS)' ./e2e

e2e-chart:
	DOPPEL_E2E=1 DOPPEL_E2E_LAB=e2e-chart $(TESTSUM) --format testname -- -count=1 -timeout 25m -run '$(CHART_TESTS)' ./e2e

clean:
	rm -rf bin dist
