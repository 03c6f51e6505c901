# doppel: two commands do everything: `make demo` and `make test`.
VERSION  ?= $(shell sed -n 's/^var Version = "\(.*\)"/\1/p' internal/buildinfo/buildinfo.go)
REGISTRY ?= ghcr.io/doppel-dev
LDFLAGS  := -s -w -X github.com/doppel-dev/doppel/internal/buildinfo.Version=$(VERSION)
PROGRAMS := doppel doppel-rootd traffic-manager traffic-agent
GO       := CGO_ENABLED=0 go

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
	bin/lab image build --binary bin/traffic-manager --name $(REGISTRY)/traffic-manager:$(VERSION) -o dist/traffic-manager.tar
	bin/lab image build --binary bin/traffic-agent --name $(REGISTRY)/traffic-agent:$(VERSION) -o dist/traffic-agent.tar
	bin/lab image build --binary bin/colors --name $(REGISTRY)/colors:$(VERSION) -o dist/colors.tar

images-push: images ## push them: make images-push REGISTRY=registry.example.com/team
	for i in traffic-manager traffic-agent colors; do bin/lab image push dist/$$i.tar $(REGISTRY)/$$i:$(VERSION) || exit 1; done

clean:
	rm -rf bin dist
