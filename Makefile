# doppel: two commands do everything: `make demo` and `make test`.
VERSION  ?= $(shell sed -n 's/^var Version = "\(.*\)"/\1/p' internal/buildinfo/buildinfo.go)
REGISTRY ?= ghcr.io/doppel-dev
LDFLAGS  := -s -w -X github.com/doppel-dev/doppel/internal/buildinfo.Version=$(VERSION)
PROGRAMS := doppel doppel-helm doppel-rootd doppel-relay traffic-manager traffic-agent
GO       := CGO_ENABLED=0 go
# As the programs are built, so that what they have in common is compiled once.
GOTEST   := $(GO) test -trimpath
SHELL    := /bin/bash
# One compiler, with its latest security fixes, whatever is installed: go fetches it as it does a module.
export GOTOOLCHAIN := $(shell sed -n 's/^toolchain //p' go.mod)

.PHONY: build images images-push demo demo-down test clean $(PROGRAMS) lab colors

build: $(PROGRAMS) lab colors ## every program in bin/

$(PROGRAMS):
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/$@ ./cmd/$@

colors:
	$(GO) build -trimpath -ldflags '-s -w' -o bin/colors ./examples/colors/cmd/colors

lab:
	cd lab && $(GO) build -trimpath -ldflags '-s -w' -o ../bin/lab ./cmd/lab

images: traffic-manager traffic-agent doppel-relay colors lab ## image archives in dist/, built without Docker
	mkdir -p dist
	bin/lab image build --user 65532 --binary bin/traffic-manager --name $(REGISTRY)/traffic-manager:$(VERSION) -o dist/traffic-manager.tar
	bin/lab image build --user 65532 --binary bin/traffic-agent --name $(REGISTRY)/traffic-agent:$(VERSION) -o dist/traffic-agent.tar
	bin/lab image build --user 65532 --binary bin/doppel-relay --name $(REGISTRY)/doppel-relay:$(VERSION) -o dist/doppel-relay.tar
	bin/lab image build --user 65532 --binary bin/colors --name $(REGISTRY)/colors:$(VERSION) -o dist/colors.tar

images-push: images ## push them: make images-push REGISTRY=registry.example.com/team
	for i in traffic-manager traffic-agent doppel-relay colors; do bin/lab image push dist/$$i.tar $(REGISTRY)/$$i:$(VERSION) || exit 1; done

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

demo: ## the main job on a lab of its own, each step with its real output; leaves it running
	hack/demo.sh

demo-down:
	hack/demo.sh down

## ---- tests: `make test` runs every one of them ----

LINT      := bin/tools/golangci-lint-v2.15.0
TESTSUM   := bin/tools/gotestsum-v1.13.0
CRDGEN    := bin/tools/controller-gen-v0.23.0
# A number of runs, not a time: on a busy machine a target that reaches its time-out fails ("context deadline exceeded", golang.org/issue/75804).
FUZZTIME  ?= 5000x
CHART_TESTS := ^Test(Chart|ChartChild|Injection|Namespaced|Policy)$$
NET_TESTS   := ^Test(Credentials|DNS|DNSResolved|Direct|Outbound|Package|Privilege|Reach|Run|Seeing|SessionsLast|Several|Subnets|Transports)$$
TAKE_TESTS  := ^Test(App|Canary|Modes|Requests|TLS|Team)$$
# On a lab with two nodes.
NODES_TESTS := ^Test(Rolling|Rollouts|Workloads)$$
RELAY_TESTS := ^Test(Preview|RelayOutside|RelayReplicas)$$
TORTURE_TESTS := ^Test(Soak|Torture)$$
# The fault that needs two nodes.
CUT_OFF := cut off
SKEW_TESTS  := ^TestSkew$$
# With a small crowd; make scale and make torture have the large one.
SCALE_TESTS := ^TestScale$$
# What the tests use beside Go; the lab installs its own packages.
TEST_PKGS := chromium csh curl dbus-daemon dnsutils fuse3 gcc git iproute2 iputils-ping libc6-dev nftables procps sudo netcat-openbsd openssl sshfs

RESOLVED  := bin/tools/resolved
NGINX     := bin/tools/nginx
POSTGRES  := bin/tools/postgres
GRPCURL   := bin/tools/grpcurl-v1.9.3

.PHONY: deps lint vuln unit fuzz bench-smoke bench-allocs bench-compare cross lab-test e2e e2e-lab e2e-doppel e2e-net e2e-take e2e-chart e2e-nodes e2e-relay e2e-scale e2e-skew e2e-torture

test: deps build images lint vuln unit lab-test fuzz bench-smoke bench-allocs cross e2e ## everything: lint, known vulnerabilities, unit with the race detector, fuzz smoke, end to end on a real Kubernetes
	@echo "make test: all green"

deps: $(GRPCURL) ## the system packages and clients that the tests use
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
# And PostgreSQL, with what it needs and is not there yet.
	@if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && ! ls $(POSTGRES)/usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then \
	  mkdir -p $(POSTGRES)/partial && cd $(POSTGRES) && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends --download-only -o Dir::Cache::archives=$$PWD postgresql && \
	  for d in *.deb; do dpkg -x $$d . && rm $$d; done; fi

$(GRPCURL):
	GOBIN=$(CURDIR)/bin/tools $(GO) install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3
	mv bin/tools/grpcurl $@

$(LINT):
	GOBIN=$(CURDIR)/bin/tools $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
	mv bin/tools/golangci-lint $@

$(CRDGEN):
	GOBIN=$(CURDIR)/bin/tools $(GO) install sigs.k8s.io/controller-tools/cmd/controller-gen@v0.23.0
	mv bin/tools/controller-gen $@

$(TESTSUM):
	GOBIN=$(CURDIR)/bin/tools $(GO) install gotest.tools/gotestsum@v1.13.0
	mv bin/tools/gotestsum $@

lint: $(LINT)
	go mod tidy -diff
	$(LINT) run --timeout 15m ./...
	cd lab && go mod tidy -diff && ../$(LINT) run --timeout 15m ./...

# The database comes as a module, for it is where modules are; pinned, because the same commit gives the same answer.
VULN      := bin/tools/govulncheck-v1.9.0
VULNDB    ?= v0.0.0-20261105234957-e22db6528018
VULNS     := bin/tools/vulndb-$(VULNDB)

vuln: $(VULN) $(VULNS) ## no known vulnerability in what is called, the standard library included; make vuln VULNDB=latest asks the newest list
	$(VULN) -db file://$(CURDIR)/$(VULNS) ./...
	cd lab && ../$(VULN) -db file://$(CURDIR)/$(VULNS) ./...

$(VULN):
	GOBIN=$(CURDIR)/bin/tools $(GO) install golang.org/x/vuln/cmd/govulncheck@v1.9.0
	mv bin/tools/govulncheck $@

$(VULNS):
	GOBIN=$(CURDIR)/bin/tools $(GO) install golang.org/x/vulndb/cmd/indexdb@$(VULNDB)
	d=$$(mktemp -d) && cd $$d && dir=$$(go mod download -json golang.org/x/vulndb@$(VULNDB) | sed -n 's/^\t"Dir": "\(.*\)",*$$/\1/p') && \
	  rm -rf $(CURDIR)/$@ $(CURDIR)/$@.new && $(CURDIR)/bin/tools/indexdb -vulns $$dir/data/osv -out $(CURDIR)/$@.new && rmdir $$d
	rm bin/tools/indexdb && mv $@.new $@

ifeq ($(VULNDB),latest)
.PHONY: $(VULNS)
endif

unit: $(TESTSUM) $(CRDGEN) ## unit and one-process tests, race detector on; lint has vetted them
	$(TESTSUM) --format pkgname --format-hide-empty-pkg -- -race -vet=off -shuffle=on -timeout 15m $$(go list ./... | grep -v /e2e$$)

lab-test: $(TESTSUM)
	cd lab && CGO_ENABLED=0 ../$(TESTSUM) --format pkgname --format-hide-empty-pkg -- -trimpath -vet=off -shuffle=on ./...

fuzz: ## every fuzz target, $(FUZZTIME)
	@for f in $$(grep -rlE '^func Fuzz' --include=*_test.go internal); do \
	  for t in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$f); do \
	    $(GOTEST) -run='^$$' -fuzz="^$$t$$" -fuzztime=$(FUZZTIME) ./$$(dirname $$f) || exit 1; \
	  done; \
	done

bench-smoke: ## every benchmark runs once
	@$(GOTEST) -run='^$$' -bench=. -benchtime=1x -short $$(grep -rlE '^func Benchmark' --include=*_test.go internal | xargs -n1 dirname | sort -u | sed 's,^,./,') | grep -E '^(Benchmark|ok|FAIL|---)' ; test $${PIPESTATUS[0]} -eq 0

# Each stage of a small request's and a packet's way, for allocations and not for time: that is make bench's.
ALLOC_BENCHES := ^Benchmark(Open|Call|Echo100|RelayEcho|RelayConnect|Exchange|Match|Packet)$$
ALLOC_PKGS    := ./internal/tunnel ./internal/resolver ./internal/match ./internal/netstack
BENCHSTAT     := bin/tools/benchstat-20260908

bench-allocs: bench-program ## no stage allocates more than bench/allocs.txt says
	$(GOTEST) -run='^$$' -bench='$(ALLOC_BENCHES)' -benchmem -benchtime=2000x -count=3 $(ALLOC_PKGS) > bin/allocs.txt
	bin/bench allocs bench/allocs.txt bin/allocs.txt

bench-compare: $(BENCHSTAT) bench-allocs ## and the differences, for reading
	$(BENCHSTAT) -filter '.unit:(allocs/op OR B/op)' bench/allocs.txt bin/allocs.txt

$(BENCHSTAT):
	GOBIN=$(CURDIR)/bin/tools $(GO) install golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
	mv bin/tools/benchstat $@

cross: ## the laptop's programs compile for the other systems
	for s in darwin windows; do for p in doppel doppel-helm doppel-rootd; do GOOS=$$s $(GO) build -o /dev/null ./cmd/$$p || exit 1; done; done
	for s in darwin windows; do GOOS=$$s $(GO) vet ./internal/tundev ./internal/osroute ./internal/osdns || exit 1; done

## The parts wait more than they compute: two run beside each other, each on a lab of its own. take and nodes, whose tests run beside each
## other themselves, are kept apart, and from chart: TestChart says how soon an install tells what is wrong. TestSkew builds programs: alone.
e2e: $(TESTSUM) build images dist-here ## end to end: the lab itself, the README's commands (and so the demo), doppel on a lab
	+$(MAKE) --no-print-directory -j2 --output-sync=target e2e-chart e2e-net e2e-take e2e-relay e2e-doppel e2e-lab e2e-nodes e2e-scale
	+$(MAKE) --no-print-directory e2e-skew
	+$(MAKE) --no-print-directory e2e-torture # counts seconds: alone

e2e-lab:
	cd lab && DOPPEL_LAB_E2E=1 CGO_ENABLED=0 ../$(TESTSUM) --format testname -- -trimpath -count=1 -timeout 25m ./e2e
	DOPPEL_E2E=1 CGO_ENABLED=0 $(TESTSUM) --format testname -- -trimpath -count=1 -timeout 25m -run TestShellBlocks ./internal/docstest

## One program for all parts: each go test would link it again.
.PHONY: e2e-program
e2e-program:
	$(GOTEST) -c -ldflags '-s -w' -o bin/e2e.test ./e2e

# $(call in-lab,NAME,flags,variables) runs it on a lab of that name; "" is the tests' own.
in-lab = cd e2e && DOPPEL_E2E=1 $(if $(1),DOPPEL_E2E_LAB=$(1)) $(3) ../$(TESTSUM) --format testname --raw-command -- \
	go tool test2json -t -p e2e ../bin/e2e.test -test.v=test2json -test.timeout 25m $(2)

e2e-doppel: e2e-program
	$(call in-lab,,-test.skip '$(CHART_TESTS)|$(NET_TESTS)|$(TAKE_TESTS)|$(NODES_TESTS)|$(RELAY_TESTS)|$(SKEW_TESTS)|$(TORTURE_TESTS)|$(SCALE_TESTS)')

e2e-net: e2e-program
	$(call in-lab,e2e-net,-test.run '$(NET_TESTS)')

e2e-take: e2e-program
	$(call in-lab,e2e-take,-test.parallel 6 -test.run '$(TAKE_TESTS)')

e2e-nodes: e2e-program
	$(call in-lab,e2e-nodes,-test.parallel 6 -test.run '$(NODES_TESTS)',DOPPEL_E2E_NODES=2)

e2e-relay: e2e-program
	$(call in-lab,e2e-relay,-test.run '$(RELAY_TESTS)')

e2e-scale: e2e-program
	$(call in-lab,e2e-scale,-test.run '$(SCALE_TESTS)')

e2e-skew: $(TESTSUM) e2e-program
	$(call in-lab,e2e-skew,-test.run '$(SKEW_TESTS)')

e2e-torture: $(TESTSUM) e2e-program
	$(call in-lab,e2e-torture,-test.run '$(TORTURE_TESTS)')
	$(call in-lab,e2e-torture,-test.timeout 10m -test.run '^TestTorture$$',DOPPEL_E2E_NODES=2 DOPPEL_TORTURE_ONLY='$(CUT_OFF)')

e2e-chart: e2e-program
	$(call in-lab,e2e-chart,-test.run '$(CHART_TESTS)')

## ---- faults: docs/reliability.md says what they are ----

.PHONY: torture scale torture-report
torture: build images ## a shortened day, every fault many times amid traffic, and a large crowd, in up to 90 minutes, and write docs/reliability.md; go on where an earlier run ended
	DOPPEL_E2E=1 DOPPEL_E2E_LAB=torture DOPPEL_TORTURE=$(CURDIR)/docs/reliability DOPPEL_TORTURE_WITHIN=50m $(GO) test -count=1 -timeout 80m -v -run '$(TORTURE_TESTS)' ./e2e; \
	status=$$?; DOPPEL_E2E=1 DOPPEL_E2E_LAB=torture DOPPEL_E2E_NODES=2 DOPPEL_TORTURE=$(CURDIR)/docs/reliability DOPPEL_TORTURE_ONLY='$(CUT_OFF)' DOPPEL_TORTURE_WITHIN=7m \
	  $(GO) test -count=1 -timeout 10m -v -run '^TestTorture$$' ./e2e || status=$$?; \
	DOPPEL_E2E=1 DOPPEL_E2E_LAB=torture DOPPEL_TORTURE=$(CURDIR)/docs/reliability $(GO) test -count=1 -timeout 20m -v -run '$(SCALE_TESTS)' ./e2e || status=$$?; \
	$(MAKE) --no-print-directory torture-report && exit $$status

scale: build images ## 1,000 sessions and 3,000 intercepts on one traffic-manager, in up to 30 minutes, and write docs/reliability.md
	DOPPEL_E2E=1 DOPPEL_E2E_LAB=torture DOPPEL_TORTURE=$(CURDIR)/docs/reliability $(GO) test -count=1 -timeout 30m -v -run '$(SCALE_TESTS)' ./e2e; \
	status=$$?; $(MAKE) --no-print-directory torture-report && exit $$status

torture-report:
	DOPPEL_TORTURE=$(CURDIR)/docs/reliability $(GO) test -count=1 -run '^TestReliabilityPage$$' ./e2e

## ---- figures: docs/performance.md says what they are ----

KUBECTL    := bin/tools/kubectl-v1.34.4
BENCH_ARGS ?= -rounds 5

.PHONY: bench bench-wan bench-scale bench-report
bench: build images $(KUBECTL) bench-program ## measure doppel beside the other ways, in 20 minutes, and write docs/performance.md; go on where an earlier run ended
	bin/bench run -plan lan -out docs/performance/lan.json $(BENCH_ARGS)
	+$(MAKE) --no-print-directory bench-report

bench-wan: build images $(KUBECTL) bench-program ## the same through lines with delay and loss
	bin/bench run -plan wan -within 60m -out docs/performance/wan.json $(BENCH_ARGS)
	+$(MAKE) --no-print-directory bench-report

bench-scale: build images $(KUBECTL) bench-program ## the same in a large cluster
	bin/bench run -plan scale -within 60m -out docs/performance/scale.json $(BENCH_ARGS)
	+$(MAKE) --no-print-directory bench-report

bench-report: bench-program
	bin/bench report $(wildcard docs/performance/*.json)

.PHONY: bench-program
bench-program:
	$(GO) build -trimpath -ldflags '-s -w' -o bin/bench ./bench

# Of the lab's Kubernetes; what its module does not list is looked up.
$(KUBECTL):
	mkdir -p bin/tools && cp lab/kube/go.mod bin/tools/kubectl.mod && cp lab/kube/go.sum bin/tools/kubectl.sum
	cd lab/kube && $(GO) build -mod=mod -modfile=$(CURDIR)/bin/tools/kubectl.mod -trimpath -ldflags '-s -w' -o $(CURDIR)/$@ k8s.io/kubernetes/cmd/kubectl

clean:
	rm -rf bin dist
