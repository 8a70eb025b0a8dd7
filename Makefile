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
# What images are built for, and what stands before their names.
PLATFORMS ?= linux/amd64,linux/arm64
REPOSITORY ?= localhost
# What `make bench` hands on.
BENCHFLAGS ?=
# A ztunnel program, and a directory with spire-server and spire-agent, for
# interop and bench. A program of HashiCorp Vault, for interop.
ZTUNNEL ?=
SPIRE ?=
VAULT ?=
# 1: `make build` builds signet-control with PKCS#11, for which cgo is needed.
PKCS11 ?=
# 1: quickstart leaves its mesh running.
KEEP ?=

LINT := $(GO) tool -modfile=test/tools/go.mod golangci-lint
BUILD := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags "-X main.version=$(VERSION)"
HELM := $(GO) tool -modfile=test/tools/helm/go.mod helm
PROTOS := $(shell find api -name '*.proto')
ENVOY := $(CURDIR)/.tools/envoy/bin/envoy
KUBE_BIN := $(CURDIR)/.tools/kubernetes/bin
CLIENTS := $(CURDIR)/.tools/clients

.PHONY: help
help: ## List what there is to do
	@echo "Signet. make TARGET, where TARGET is one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the programs into bin/; with PKCS11=1 signet up can keep the root's key in a token
	@echo "build: bin/"
	@mkdir -p bin
	@$(BUILD) -o bin/ ./cmd/signet ./cmd/signet-control ./cmd/signet-agent ./cmd/signet-proxy ./cmd/signet-cni
	@# The resolver and the look-up of users stay those of the build without cgo.
	@if [ "$(PKCS11)" = 1 ]; then CGO_ENABLED=1 $(GO) build -trimpath -buildvcs=false -tags netgo,osusergo -ldflags "-X main.version=$(VERSION)" -o bin/ ./cmd/signet-control; fi

.PHONY: tools
tools: ## Get Envoy into .tools/
	@test/tools/envoy.sh $(ENVOY_VERSION)

.PHONY: kube-tools
kube-tools: ## Build the programs of a Kubernetes cluster into .tools/ (twelve minutes, once)
	@test/tools/kubernetes.sh

.PHONY: clients
clients: deps-debian ## Build the programs of test/clients and examples/spiffe into .tools/ (three minutes, once)
	@test/tools/clients.sh

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
test: root deps-debian tools kube-tools clients build ## Run every test, with the race detector
	@echo "test: go vet"
	@$(GO) vet ./...
	@echo "test: go test -race"
	@SIGNET_ENVOY="$(ENVOY)" SIGNET_KUBE_BIN="$(KUBE_BIN)" SIGNET_CLIENTS="$(CLIENTS)" $(GO) test -race -count=1 -timeout=40m $(TESTFLAGS) $(ALONE)
	@$(MAKE) --no-print-directory test-cluster

# The tests of a whole cluster run by themselves: what is measured in seconds
# there must not share the machine with everything else.
ALONE = $(shell $(GO) list ./... | grep -v '/test/kube$$')

.PHONY: test-cluster
test-cluster: PLATFORMS := linux/$(shell $(GO) env GOARCH)
test-cluster: root deps-debian tools kube-tools images ## Run the end-to-end tests on a real cluster of two nodes; KEEP=1 leaves it
	@echo "test-cluster: go test ./test/kube"
	@SIGNET_VERSION="$(VERSION)" KEEP="$(KEEP)" $(GO) test -v -count=1 -timeout=$(if $(SIGNET_TEST_LONG),170m -tags=long,70m) $(TESTFLAGS) ./test/kube/

.PHONY: cluster
cluster: root deps-debian kube-tools ## Start a real Kubernetes cluster of two nodes on this machine
	@$(GO) run ./test/cluster/clusterctl up

.PHONY: cluster-install
cluster-install: PLATFORMS := linux/$(shell $(GO) env GOARCH)
cluster-install: root images test-images build ## Install this VERSION of Signet, and the images of examples/shop, into make cluster
	@$(GO) run ./test/cluster/clusterctl load .cache/images/signet-*.tar .cache/test-images/*.tar
	@ln -sf signet bin/kubectl-signet
	@kubectl="$(KUBE_BIN)/kubectl --kubeconfig=.cache/cluster/kubeconfig"; \
	  $$kubectl apply --server-side -f deploy/manifests/crds.yaml; \
	  $$kubectl wait --for=condition=Established crd --all --timeout=1m >/dev/null; \
	  sed 's/:v0\.1\.0$$/:$(VERSION)/; s/cluster\.local/mesh.example/' deploy/manifests/signet.yaml | $$kubectl apply -f -; \
	  for what in deployment/signet-control daemonset/signet-agent daemonset/signet-proxy; do \
	    $$kubectl -n signet-system rollout status $$what --timeout=2m; done
	@echo "To use it:"; $(GO) run ./test/cluster/clusterctl env; echo "export PATH=$(CURDIR)/bin:\$$PATH"

.PHONY: cluster-down
cluster-down: root ## Remove the cluster of make cluster; nothing of it stays
	@$(GO) run ./test/cluster/clusterctl down

.PHONY: test-short
test-short: root tools kube-tools clients ## Run the tests that take seconds, without the race detector
	@SIGNET_ENVOY="$(ENVOY)" SIGNET_KUBE_BIN="$(KUBE_BIN)" SIGNET_CLIENTS="$(CLIENTS)" $(GO) test -short -timeout=10m $(TESTFLAGS) $(ALONE)

.PHONY: test-long
test-long: root deps-debian tools kube-tools clients build ## Run every test at its full length
	@SIGNET_ENVOY="$(ENVOY)" SIGNET_KUBE_BIN="$(KUBE_BIN)" SIGNET_CLIENTS="$(CLIENTS)" SIGNET_TEST_LONG=1 $(GO) test -race -count=1 -timeout=80m $(TESTFLAGS) $(ALONE)
	@SIGNET_TEST_LONG=1 $(MAKE) --no-print-directory test-cluster

.PHONY: check
check: generate-check manifests-check ## Check format, vet, lint and generated files
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

# objects,PATHS,DIR,MORE: generate what Kubernetes needs of the API types in PATHS:
# copies beside them, CustomResourceDefinitions into a directory.
define objects
	@$(GO) tool -modfile=test/tools/controller-gen/go.mod controller-gen \
	  object crd paths=$(1) output:crd:dir=$(2) $(3)
endef

.PHONY: generate
generate: ## Generate Go from the .proto files, and CRDs from the API types
	$(call protoc,.)
	@rm -f deploy/crds/*.yaml
	$(call objects,./api/v1alpha1,deploy/crds,)

.PHONY: generate-check
generate-check: ## Check that generated files are what their sources say
	@echo "check: generated files"
	@rm -rf .cache/generate && mkdir -p .cache/generate
	$(call protoc,.cache/generate)
	@# The line with protoc's own version differs from machine to machine.
	@cd .cache/generate && find . -type f | while read -r f; do \
	  diff -u -I '^//.*protoc  *v[0-9]' "../../$$f" "$$f" || { echo "$$f is not up to date; run make generate" >&2; exit 1; }; done
	@mkdir -p .cache/generate/crds .cache/generate/v1alpha1
	$(call objects,./api/v1alpha1,.cache/generate/crds,output:object:dir=.cache/generate/v1alpha1)
	@diff -ru deploy/crds .cache/generate/crds || { echo "deploy/crds is not up to date; run make generate" >&2; exit 1; }
	@diff -u api/v1alpha1/zz_generated.deepcopy.go .cache/generate/v1alpha1/zz_generated.deepcopy.go || { echo "api/v1alpha1 is not up to date; run make generate" >&2; exit 1; }
	@rm -rf .cache/generate

.PHONY: images
images: ## Build the container images into .cache/images, for all PLATFORMS
	@mkdir -p .cache/images
	@CGO_ENABLED=0 $(GO) build -o .cache/images/build ./deploy/images
	@.cache/images/build -version "$(VERSION)" -envoy "$(ENVOY_VERSION)" -repository "$(REPOSITORY)" -platforms "$(PLATFORMS)"

.PHONY: test-images
test-images: ## Build the images of examples/shop and of tests into .cache/test-images
	@$(GO) run ./test/images

.PHONY: chart
chart: ## Pack the Helm chart of this VERSION into .cache/chart
	@rm -rf .cache/chart && mkdir -p .cache/chart deploy/chart/signet/crds
	@cp deploy/crds/*.yaml deploy/chart/signet/crds/
	@$(HELM) lint --quiet --strict --set trustDomain=mesh.example deploy/chart/signet
	@# A version between releases, such as v0.1.0-3-gabcdef, is a valid one too; a bare commit is not.
	@version="$(patsubst v%,%,$(VERSION))"; [[ $$version =~ ^[0-9]+\.[0-9]+\.[0-9]+ ]] || version="0.0.0-g$$version"; \
	  $(HELM) package deploy/chart/signet --version "$$version" --app-version "$(VERSION)" --destination .cache/chart

# manifests,DIR: render the chart into a directory, for those who have no Helm.
define manifests
	@mkdir -p $(1)
	@{ echo "# Generated by make manifests from deploy/chart/signet. Edit the trust domain"; \
	  echo "# (cluster.local, twice) and where the images are (localhost). Apply crds.yaml first."; \
	  $(HELM) template signet deploy/chart/signet --namespace signet-system \
	    --set trustDomain=cluster.local --set namespace.create=true; } >$(1)/signet.yaml
	@{ echo "# Generated by make manifests."; cat deploy/crds/*.yaml; } >$(1)/crds.yaml
endef

.PHONY: chart-test
chart-test: PLATFORMS := linux/$(shell $(GO) env GOARCH)
chart-test: root deps-debian images chart ## Install and remove the chart in a real cluster of its own
	@SIGNET_VERSION="$(VERSION)" $(GO) test -count=1 -timeout=40m -tags=chart $(TESTFLAGS) ./test/chart/

.PHONY: manifests
manifests: ## Render the chart as plain YAML into deploy/manifests
	@mkdir -p deploy/chart/signet/crds && rm -f deploy/chart/signet/crds/*.yaml
	@cp deploy/crds/*.yaml deploy/chart/signet/crds/
	$(call manifests,deploy/manifests)

.PHONY: manifests-check
manifests-check: ## Check that the chart's copies and deploy/manifests are up to date
	@echo "check: deploy/manifests"
	@rm -rf .cache/manifests
	$(call manifests,.cache/manifests)
	@diff -ru deploy/crds deploy/chart/signet/crds || { echo "deploy/chart/signet/crds is not up to date; run make manifests" >&2; exit 1; }
	@diff -ru deploy/manifests .cache/manifests || { echo "deploy/manifests is not up to date; run make manifests" >&2; exit 1; }
	@rm -rf .cache/manifests

.PHONY: bench
bench: root tools build ## Measure the mesh against raw TCP, static Envoy, ztunnel (ZTUNNEL=PATH), and issuance, also of SPIRE (SPIRE=DIRECTORY)
	@SIGNET_ENVOY="$(ENVOY)" ZTUNNEL="$(ZTUNNEL)" $(GO) run ./test/bench $(BENCHFLAGS)
	@SIGNET_ENVOY="$(ENVOY)" $(GO) test -run='^$$' -bench='BenchmarkSDK|BenchmarkOriginate|BenchmarkDecide' ./sdk/ ./test/e2e/
	@$(MAKE) --no-print-directory bench-issuance
	@$(if $(SPIRE),$(MAKE) --no-print-directory bench-spire)

.PHONY: bench-issuance
bench-issuance: ## Measure how fast certificates are issued, and 10,000 of them again
	@$(GO) run ./test/bench/issuance -out docs/benchmarks.md

.PHONY: bench-spire
bench-spire: ## Measure how fast certificates are issued beside SPIRE's server, SPIRE=DIRECTORY
	@SPIRE="$(abspath $(SPIRE))" $(GO) run ./test/bench/spire -out docs/benchmarks.md

.PHONY: interop
interop: root tools build ## Run this mesh with others' programs: ZTUNNEL=PATH, SPIRE=DIRECTORY, VAULT=PATH, or several
	@if [ -z "$(ZTUNNEL)$(SPIRE)$(VAULT)" ]; then echo "Name a ztunnel program, a directory with spire-server and spire-agent, a Vault program, or several:" >&2; \
	  echo "make interop ZTUNNEL=/path/to/ztunnel SPIRE=/path/to/bin VAULT=/path/to/vault" >&2; exit 2; fi
	@if [ -n "$(VAULT)" ] && [ ! -f "$(VAULT)" -o ! -x "$(VAULT)" ]; then echo "VAULT=$(VAULT): no program is there; name that of HashiCorp Vault." >&2; exit 2; fi
	@$(if $(ZTUNNEL)$(SPIRE),SIGNET_ENVOY="$(ENVOY)" ZTUNNEL="$(abspath $(ZTUNNEL))" SPIRE="$(abspath $(SPIRE))" $(GO) test -count=1 -timeout=20m -v -tags=interop $(TESTFLAGS) \
	  $(if $(ZTUNNEL),./test/interop/ztunnel/) $(if $(SPIRE),./test/interop/spire/))
	@$(if $(VAULT),$(MAKE) --no-print-directory interop-vault)

.PHONY: interop-vault
interop-vault: kube-tools
	@SIGNET_KUBE_BIN="$(KUBE_BIN)" VAULT="$(abspath $(VAULT))" $(GO) test -count=1 -timeout=20m -v -tags=interop -run='^TestVault' $(TESTFLAGS) ./ca/certmanager/

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
