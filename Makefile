# Everything that is done with this project. `make` lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

GO ?= go
ENVOY_VERSION := 1.40.0
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
# How long one fuzz target runs.
FUZZTIME ?= 30s
# More flags for go test, such as TESTFLAGS="-run TestX -v".
TESTFLAGS ?=
# What `make bench` hands on.
BENCHFLAGS ?=
# A ztunnel program, for interop and bench.
ZTUNNEL ?=
# 1: quickstart leaves its mesh running.
KEEP ?=

LINT := $(GO) tool -modfile=test/tools/go.mod golangci-lint
BUILD := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags "-X main.version=$(VERSION)"
PROTOS := $(shell find api -name '*.proto')
ENVOY := $(CURDIR)/.tools/envoy/bin/envoy

.PHONY: help
help: ## List what there is to do
	@echo "Signet. make TARGET, where TARGET is one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/signet, bin/signet-control and bin/signet-agent
	@echo "build: bin/"
	@mkdir -p bin
	@$(BUILD) -o bin/ ./cmd/signet ./cmd/signet-control ./cmd/signet-agent

.PHONY: tools
tools: ## Get Envoy into .tools/
	@test/tools/envoy.sh $(ENVOY_VERSION)

.PHONY: deps-debian
deps-debian: ## Install the Debian packages that tests need, if any is missing
	@test/tools/debian.sh

.PHONY: quickstart
quickstart: tools build ## Show a mesh at work in throwaway namespaces; KEEP=1 leaves it running
	@$(BUILD) -o .cache/quickstart ./examples/quickstart
	@SIGNET_ENVOY="$(ENVOY)" KEEP="$(KEEP)" .cache/quickstart

# Some tests make network namespaces and run programs as other users.
.PHONY: root
root:
	@if [ "$$(id -u)" -ne 0 ]; then echo "The tests need root: they make network namespaces." >&2; exit 1; fi

.PHONY: test
test: root deps-debian tools build ## Run every test, with the race detector
	@echo "test: go vet"
	@$(GO) vet ./...
	@echo "test: go test -race"
	@SIGNET_ENVOY="$(ENVOY)" $(GO) test -race -count=1 -timeout=40m $(TESTFLAGS) ./...

.PHONY: test-short
test-short: root tools ## Run the tests that take seconds, without the race detector
	@SIGNET_ENVOY="$(ENVOY)" $(GO) test -short -timeout=10m $(TESTFLAGS) ./...

.PHONY: test-long
test-long: root deps-debian tools build ## Run every test at its full length
	@SIGNET_ENVOY="$(ENVOY)" SIGNET_TEST_LONG=1 $(GO) test -race -count=1 -timeout=80m $(TESTFLAGS) ./...

.PHONY: check
check: generate-check ## Check format, vet, lint and generated files
	@echo "check: gofmt"
	@files=$$(find . -name '*.go' -not -path './.*' -print0 | xargs -0 gofmt -l); \
	  if [ -n "$$files" ]; then echo "Not formatted; run gofmt -w on:"; echo "$$files"; exit 1; fi
	@echo "check: go vet"
	@$(GO) vet ./...
	@echo "check: golangci-lint (the first run builds it, which takes minutes)"
	@$(LINT) run ./...

# protoc,DIR: generate all into a directory.
define protoc
	@command -v protoc >/dev/null || { echo "protoc is needed; on Debian and Ubuntu: apt-get install protobuf-compiler" >&2; exit 1; }
	@protoc -I . \
	  --plugin=protoc-gen-go="$$($(GO) tool -n protoc-gen-go)" \
	  --plugin=protoc-gen-go-grpc="$$($(GO) tool -n protoc-gen-go-grpc)" \
	  --go_out=$(1) --go_opt=paths=source_relative \
	  --go-grpc_out=$(1) --go-grpc_opt=paths=source_relative \
	  $(PROTOS)
endef

.PHONY: generate
generate: ## Generate Go from the .proto files
	$(call protoc,.)

.PHONY: generate-check
generate-check: ## Check that generated files are what the .proto files say
	@echo "check: generated files"
	@rm -rf .cache/generate && mkdir -p .cache/generate
	$(call protoc,.cache/generate)
	@# The line with protoc's own version differs from machine to machine.
	@cd .cache/generate && find . -type f | while read -r f; do \
	  diff -u -I '^//.*protoc  *v[0-9]' "../../$$f" "$$f" || { echo "$$f is not up to date; run make generate" >&2; exit 1; }; done
	@rm -rf .cache/generate

.PHONY: bench
bench: root tools build ## Measure the mesh against raw TCP, static Envoy and ztunnel (ZTUNNEL=PATH)
	@SIGNET_ENVOY="$(ENVOY)" ZTUNNEL="$(ZTUNNEL)" $(GO) run ./test/bench $(BENCHFLAGS)

.PHONY: interop
interop: root tools build ## Run calls between this mesh and a ztunnel, ZTUNNEL=PATH
	@if [ ! -x "$(ZTUNNEL)" ]; then echo "Name a ztunnel program: make interop ZTUNNEL=/path/to/ztunnel" >&2; exit 2; fi
	@SIGNET_ENVOY="$(ENVOY)" ZTUNNEL="$(abspath $(ZTUNNEL))" $(GO) test -count=1 -timeout=10m -v -tags=interop $(TESTFLAGS) ./test/interop/

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME
	@grep -rlE '^func Fuzz' --include='*_test.go' . | while read -r file; do \
	  for target in $$(sed -nE 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/p' "$$file"); do \
	    echo "fuzz: $$(dirname "$$file") $$target"; \
	    $(GO) test -run='^$$' -fuzz="^$$target\$$" -fuzztime=$(FUZZTIME) "$$(dirname "$$file")"; \
	  done; \
	done

.PHONY: clean
clean: ## Remove what was built and got
	rm -rf bin .cache .tools
