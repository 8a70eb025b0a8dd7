package test

import (
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/signet-mesh/signet"

// rule says what the code of a package, without its tests, may import beside
// the standard library. A name that ends in "/..." allows everything below.
type rule struct {
	own     []string // packages of this project, without the module's path
	outside []string // packages of others
	// banned are packages of the standard library that it may not import.
	banned []string
	why    string
}

// Groups of packages of others.
const (
	spiffe   = "github.com/spiffe/go-spiffe/v2/..."
	envoy    = "github.com/envoyproxy/go-control-plane/envoy/..."
	grpc     = "google.golang.org/grpc/..."
	protobuf = "google.golang.org/protobuf/..."
	unix     = "golang.org/x/sys/unix"
	metrics  = "github.com/prometheus/client_golang/..."
)

// rules has every package of the project. Data flows one way: a package that
// has to import against the direction is in the wrong place.
var rules = map[string]rule{
	"api/v1alpha1": {outside: []string{"k8s.io/apimachinery/..."},
		why: "users' documents are read by tools that want nothing else of the mesh"},
	"api/node/v1": {outside: []string{grpc, protobuf},
		why: "generated; a protocol knows no implementation"},
	"api/sdk/v1": {outside: []string{grpc, protobuf},
		why: "generated; a protocol knows no implementation"},
	"api/admin/v1": {own: []string{"authz"},
		why: "what the sockets answer is in the words of authz, and is read by programs that run no mesh"},

	"authz": {own: []string{"api/v1alpha1"}, outside: []string{spiffe}, banned: []string{"net", "net/http", "os", "os/exec", "io", "io/fs", "time", "crypto/x509", "log/slog"},
		why: "pure: the same question has the same answer in the control plane, the agent, the CLI and a test, whatever the clock, the network or the disk"},
	"internal/mesh": {own: []string{"api/v1alpha1", "authz", "internal/bundle"}, outside: []string{spiffe}, banned: []string{"net", "net/http", "os", "os/exec"},
		why: "parsed facts, which everybody imports, so they import nearly nothing"},
	"internal/manifest": {own: []string{"api/v1alpha1", "authz", "internal/mesh"},
		outside: []string{spiffe, "k8s.io/apimachinery/...", "go.yaml.in/yaml/v3", "sigs.k8s.io/yaml/...", "github.com/fsnotify/fsnotify"},
		why:     "the one place where YAML becomes facts; it knows nothing of who acts on them"},

	"xds": {own: []string{"authz", "internal/mesh"}, outside: []string{envoy, protobuf, spiffe, "google.golang.org/genproto/googleapis/api/expr/..."}, banned: []string{"net", "net/http", "os", "os/exec"},
		why: "pure: the same model and state give the same bytes, which is how nodes know whether anything changed"},
	"xds/xdsserver": {own: []string{"xds"}, outside: []string{envoy, grpc, protobuf},
		why: "serves resources to whoever it is told to; what is in them is not its business"},

	"ca": {own: []string{"internal/wholefile"}, outside: []string{spiffe, unix}, banned: []string{"net/http", "os/exec"},
		why: "the keys that everything hangs on stay with little code; it does not even know what a workload is"},
	"ca/pkcs11": {own: []string{"ca", "internal/wholefile"}, outside: []string{"github.com/miekg/pkcs11"}, banned: []string{"net", "net/http", "os/exec"},
		why: "the only code that runs a library of somebody else's in the control plane, so it is little and does nothing else"},
	"ca/certmanager": {own: []string{"ca"}, outside: []string{"github.com/cert-manager/cert-manager/pkg/apis/...", "github.com/cert-manager/cert-manager/pkg/client/...", "k8s.io/apimachinery/..."}, banned: []string{"net/http", "os", "os/exec"},
		why: "asks cert-manager and reads its answers; ca judges them"},
	"ca/caserver": {own: []string{"ca", "internal/bundle", "internal/mesh", "internal/x509check", "internal/wholefile", "api/node/v1", "api/admin/v1", "authz"}, outside: []string{spiffe, grpc, protobuf, "golang.org/x/time/rate"},
		why: "decides for whom the authority signs, from the state alone; it has no part in proxies"},

	"agent": {own: []string{"agent/...", "api/admin/v1", "api/node/v1", "authz", "internal/bundle", "internal/mesh", "internal/adminserver", "internal/proxy/instance", "internal/unixsocket", "internal/wholefile", "xds", "ca", "ca/caserver"},
		outside: []string{spiffe, grpc, protobuf, envoy, metrics, unix, "golang.org/x/sync/..."},
		why:     "composition only: what it composes does not know of each other; of ca it has the names of identities, of ca/caserver the client's side of the connection"},
	"agent/accesslog": {own: []string{"agent/audit", "authz", "xds"},
		why: "between the lines that xds has the proxy write and the records that audit keeps"},
	"agent/attest": {own: []string{"internal/mesh", "agent/attest/hostcgroup", "agent/attest/procfs"}, outside: []string{unix}, banned: []string{"net/http"},
		why: "who a process is follows from the kernel's facts alone; it never sees a key"},
	"agent/audit": {own: []string{"api/admin/v1"}, outside: []string{spiffe, unix, "go.etcd.io/bbolt/..."}, banned: []string{"net/http"},
		why: "evidence is kept by code that cannot reach out, and nobody else opens its files"},
	"agent/capture": {own: []string{"internal/mesh", "agent/capture/nft"}, outside: []string{unix, "golang.org/x/net/bpf", "github.com/cilium/ebpf/...", "github.com/google/nftables/...", "github.com/mdlayher/netlink/...", "github.com/vishvananda/..."}, banned: []string{"net/http", "os/exec"},
		why: "the kernel's rules are set by netlink and bpf, so that no program on the machine can be put in its place"},
	"agent/attest/procfs": {outside: []string{unix}, banned: []string{"net/http", "os/exec"},
		why: "identities rest on what it reads: it opens files and understands none"},
	"agent/attest/hostcgroup": {own: []string{"agent/attest/procfs"}, outside: []string{unix}, banned: []string{"net/http", "os/exec"},
		why: "reads the kernel's cgroup facts, for whoever has to judge them"},
	"agent/capture/nft": {own: []string{"internal/mesh"}, outside: []string{unix, "github.com/google/nftables/...", "github.com/mdlayher/netlink/..."}, banned: []string{"net/http", "os/exec"},
		why: "the words that packet rules are made of, in a pod and on its node"},
	"agent/csi": {own: []string{"agent/refusal", "agent/svid", "internal/mesh", "internal/svidfiles", "internal/unixsocket", "internal/wholefile"}, outside: []string{spiffe, grpc, protobuf, unix, "golang.org/x/sync/errgroup", "github.com/container-storage-interface/spec/...", "k8s.io/kubelet/pkg/apis/pluginregistration/v1"}, banned: []string{"net/http", "os/exec"},
		why: "mounts what svid has for the pod that kubelet names; who that pod is, is the agent's to say"},
	"agent/cni": {own: []string{"api/cni/v1", "internal/unixsocket"},
		why: "the gate that a pod waits behind; what it waits for is the agent's to say"},
	"agent/netns": {outside: []string{unix, "github.com/vishvananda/..."}, banned: []string{"net/http", "os/exec"},
		why: "which namespace is whose follows from the kernel's facts alone"},
	"agent/probe": {own: []string{"agent/attest/hostcgroup", "agent/capture", "agent/capture/nft", "internal/mesh"}, outside: []string{unix, "github.com/google/nftables/...", "github.com/mdlayher/netlink/...", "github.com/vishvananda/..."}, banned: []string{"net/http", "os/exec"},
		why: "the node's packet rules are set by netlink, so that no program on the machine can be put in its place"},
	"api/cni/v1": {why: "what the plugin and the agent say to each other; it knows neither"},
	"agent/relay": {own: []string{"agent/svid", "api/node/v1", "internal/bundle", "internal/mesh", "internal/unixsocket", "xds", "xds/xdsserver"}, outside: []string{spiffe, envoy, grpc, protobuf},
		why: "passes on what the control plane decided; it cannot decide, so it must not have authz"},
	"agent/svid": {own: []string{"api/admin/v1", "api/node/v1", "internal/bundle", "internal/jwtcheck", "internal/mesh", "internal/x509check"}, outside: []string{spiffe, grpc, unix, "golang.org/x/sync/...", "golang.org/x/time/rate"}, banned: []string{"net/http", "os/exec"},
		why: "private keys live here; nothing that talks to the network's other side is near them"},
	"agent/refusal": {own: []string{"agent/attest", "internal/tally"}, banned: []string{"net", "net/http", "os", "os/exec"},
		why: "any process can fill it, so it is bounded and keeps nothing itself: who writes is handed in"},
	"agent/workloadapi": {own: []string{"agent/attest", "agent/refusal", "agent/svid", "internal/jwtcheck", "internal/mesh"}, outside: []string{spiffe, grpc, protobuf, unix, "golang.org/x/time/rate"},
		why: "any process on the machine can call it, so it holds little: attest says who, svid has what"},

	"agent/sdkapi": {own: []string{"agent/attest", "agent/audit", "agent/refusal", "api/sdk/v1", "authz", "internal/mesh"}, outside: []string{spiffe, grpc, protobuf, "golang.org/x/time/rate"}, banned: []string{"net", "net/http", "os", "os/exec"},
		why: "any process on the machine can call it: attest says who, audit keeps what; it decides nothing"},
	"sdk": {own: []string{"api/sdk/v1", "authz", "internal/x509check"}, outside: []string{spiffe, grpc, protobuf},
		why: "part of users' programs, so it brings little along; it decides as the mesh does, with authz and x509check"},

	"conformance": {outside: []string{"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload", grpc, protobuf}, banned: []string{"os", "os/exec"},
		why: "judges any implementation, this one too, so it shares no code with any: of go-spiffe it has the messages of the protocol and nothing that reads what is in them"},

	"internal/adminclient": {own: []string{"agent/audit", "api/admin/v1"},
		why: "asks a running mesh; it must not be able to answer for it"},
	"internal/adminserver": {own: []string{"api/admin/v1", "internal/x509check"}, outside: []string{spiffe, "golang.org/x/net/netutil"},
		why: "the manners of both admin sockets, without what they answer"},
	"internal/bundle": {outside: []string{spiffe}, banned: []string{"net", "net/http", "os", "os/exec"},
		why: "reads what strangers show, and needs the name that it is given"},
	"internal/federation": {own: []string{"ca", "internal/bundle", "internal/mesh", "internal/wholefile", "internal/x509check"}, outside: []string{spiffe, "golang.org/x/net/netutil"},
		why: "between trust domains there are bundles and nothing else; it has no part in who may do what"},
	"internal/cniconf": {outside: []string{unix, "github.com/containernetworking/cni/...", "github.com/fsnotify/fsnotify"}, banned: []string{"net/http", "os/exec"},
		why: "puts a plugin into a node's CNI configuration, and takes it away; what the plugin does is not its business"},
	"internal/fanout": {own: []string{"agent/audit", "api/admin/v1", "internal/adminclient", "internal/adminserver", "internal/mesh", "internal/x509check"}, outside: []string{spiffe, "golang.org/x/sync/..."},
		why: "asks agents and merges what they say; it decides nothing"},
	"internal/incluster": {why: "small, for programs on every node: the standard library only"},
	"internal/jwtcheck": {outside: []string{spiffe}, banned: []string{"net", "net/http", "os", "os/exec"},
		why: "judges what strangers send; it needs the keys it is given, and the clock"},
	"internal/kubeclient": {own: []string{"internal/adminclient", "api/admin/v1"}, outside: []string{"k8s.io/..."},
		why: "the operator's way to the control plane through the API server; it answers nothing itself"},
	"internal/control": {own: []string{"api/...", "authz", "ca", "ca/caserver", "ca/pkcs11", "internal/adminserver", "internal/fanout", "internal/federation", "internal/manifest", "internal/mesh", "internal/tally", "internal/unixsocket", "xds", "xds/xdsserver"},
		outside: []string{spiffe, grpc, protobuf, envoy, metrics, "golang.org/x/sync/..."},
		why:     "composition of the control plane; nothing of the agent's"},
	"internal/kube": {own: []string{"api/node/v1", "api/v1alpha1", "authz", "ca", "ca/caserver", "internal/fanout", "internal/federation", "internal/mesh", "internal/wholefile"},
		outside: []string{spiffe, "k8s.io/...", "golang.org/x/sync/errgroup", "golang.org/x/time/rate"},
		why:     "objects of an API server become facts, and what became of them is written back; it serves nobody"},
	"internal/lab": {outside: []string{unix, "github.com/vishvananda/..."},
		why: "makes namespaces for tests and examples, which must not depend on what they test"},
	"internal/output": {outside: []string{"golang.org/x/term", "sigs.k8s.io/yaml"},
		why: "prints any document and knows none"},
	"internal/proxy": {own: []string{"internal/mesh", "internal/proxy/instance", "internal/supervise", "internal/unixsocket", "xds"}, outside: []string{unix},
		why: "keeps an Envoy, whose configuration and meaning are others' business; the agent may be away"},
	"internal/proxy/instance": {outside: []string{unix},
		why: "what a proxy's parent and the agent have in common: directories"},
	"internal/supervise": {outside: []string{unix},
		why: "keeps processes running, whatever they are"},
	"internal/tally": {outside: []string{"golang.org/x/time/rate"}, banned: []string{"net", "net/http", "os", "os/exec"},
		why: "counts what strangers cause, for the agent and the control plane alike; what it counts it does not know"},
	"internal/unixsocket": {outside: []string{unix},
		why: "opens sockets, whoever serves on them"},
	"internal/svidfiles": {own: []string{"internal/wholefile"}, outside: []string{spiffe},
		why: "writes an identity to files, whoever gave it"},
	"internal/wholefile": {why: "replaces files, whatever is in them"},
	"internal/x509check": {outside: []string{spiffe}, banned: []string{"net", "net/http", "os", "os/exec"},
		why: "judges what strangers present; it needs the roots it is given, and the clock"},
}

// free packages are programs and tests, which may import anything.
var free = []string{"cmd/...", "deploy/...", "examples/...", "test/..."}

// sole packages of others may be imported by one part of the project only.
var sole = map[string]struct {
	by  []string
	why string
}{
	"go.etcd.io/bbolt":               {[]string{"agent/audit"}, "the store's files are opened by the package that keeps their promises, or by nobody"},
	"github.com/miekg/pkcs11":        {[]string{"ca/pkcs11"}, "cgo stays in one place, and the default build has none"},
	"k8s.io/client-go":               {[]string{"internal/kube", "internal/kubeclient", "cmd", "test"}, "everything else runs, and is tested, without Kubernetes"},
	"sigs.k8s.io/controller-runtime": {[]string{"internal/kube"}, "everything else runs, and is tested, without Kubernetes"},
	"github.com/spf13/cobra":         {[]string{"cmd"}, "flags are the business of programs"},
	"log":                            {nil, "logs are structured: a *slog.Logger is handed in"},
	"io/ioutil":                      {nil, "deprecated"},
	"plugin":                         {nil, "programs are static"},
	"C":                              {nil, "programs are static"},
}

// listed is what `go list` says of a package.
type listed struct {
	ImportPath, Name, Dir string
	GoFiles, CgoFiles     []string
	TestGoFiles           []string
	XTestGoFiles          []string
	Imports               []string
	Module                *struct{ Path string }
	Standard              bool
}

// packages lists the project, and what it imports directly.
func packages(t *testing.T, args ...string) (all []listed) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Name,Dir,GoFiles,CgoFiles,TestGoFiles,XTestGoFiles,Imports,Module,Standard"}, args...)...)
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p listed
		if err := dec.Decode(&p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func (p *listed) short() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

func matches(name string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		below, tree := strings.CutSuffix(p, "/...")
		return name == p || tree && (name == below || strings.HasPrefix(name, below+"/"))
	})
}

func (r rule) allows(imported string) bool {
	if own, ok := strings.CutPrefix(imported, module+"/"); ok {
		return matches(own, r.own)
	}
	if first, _, _ := strings.Cut(imported, "/"); strings.Contains(first, ".") {
		return matches(imported, r.outside)
	}
	return !slices.Contains(r.banned, imported)
}

// Defends the other tests: a rule that allows everything holds nothing.
func TestRulesRefuse(t *testing.T) {
	r := rule{own: []string{"xds", "agent/..."}, outside: []string{grpc, unix}, banned: []string{"os"}}
	for imported, want := range map[string]bool{
		module + "/xds": true, module + "/agent": true, module + "/agent/svid": true, "google.golang.org/grpc/codes": true, "google.golang.org/grpc": true, unix: true, "io": true, "os/exec": true,
		module + "/xds/xdsserver": false, module + "/agents": false, module + "/ca": false, "golang.org/x/sys/unix/more": false, "google.golang.org/grpcother": false, "os": false,
	} {
		if r.allows(imported) != want {
			t.Errorf("%s: allowed %v", imported, !want)
		}
	}
}

// TestImports holds the arrows of docs/ARCHITECTURE.md.
func TestImports(t *testing.T) {
	all := packages(t, "./...")
	there := map[string]bool{}
	for _, p := range all {
		name := p.short()
		there[name] = true
		if matches(name, free) {
			continue
		}
		r, ok := rules[name]
		if !ok {
			t.Errorf("%s has no rule: say in test/deps_test.go what it may import and why, and name it in docs/ARCHITECTURE.md", name)
			continue
		}
		for _, imported := range p.Imports {
			if !r.allows(imported) {
				t.Errorf("%s imports %s, but may not.\n\tWhy: %s.", name, strings.TrimPrefix(imported, module+"/"), r.why)
			}
		}
	}
	for name := range rules {
		if !there[name] {
			t.Errorf("the rule for %s is about a package that does not exist; remove it", name)
		}
	}
}

// TestSoleImporters holds what only one place may use.
func TestSoleImporters(t *testing.T) {
	for _, p := range packages(t, "./...") {
		for _, imported := range p.Imports {
			for prefix, s := range sole {
				if imported != prefix && !(strings.Contains(prefix, ".") && strings.HasPrefix(imported, prefix+"/")) {
					continue
				}
				if !slices.ContainsFunc(s.by, func(by string) bool { return matches(p.short(), []string{by + "/..."}) }) {
					t.Errorf("%s imports %s, which only %v may.\n\tWhy: %s.", p.short(), imported, s.by, s.why)
				}
			}
		}
	}
}

// Test code must not get into programs: it weakens what it helps to test.
func TestProgramsHoldNoTestCode(t *testing.T) {
	for _, p := range packages(t, "-deps", "./cmd/...") {
		if p.Standard && p.ImportPath == "testing" || p.short() == "internal/lab" || strings.HasPrefix(p.short(), "test/") {
			t.Errorf("a program in cmd imports %s, directly or not", p.ImportPath)
		}
	}
}

// TestPackageComments: each package says once what it is.
func TestPackageComments(t *testing.T) {
	for _, p := range packages(t, "./...") {
		var documented []string
		files := slices.Concat(p.GoFiles, p.CgoFiles, p.TestGoFiles, p.XTestGoFiles)
		for _, name := range files {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Error(err)
				continue
			}
			if f.Doc == nil {
				continue
			}
			documented = append(documented, name)
			want := "Package " + p.Name + " "
			if p.Name == "main" {
				want = "Command " + filepath.Base(p.ImportPath) + " "
			}
			if text := f.Doc.Text(); !strings.HasPrefix(text, want) {
				t.Errorf("%s/%s: the comment of the package must begin with %q", p.short(), name, want)
			}
		}
		if generated := len(p.GoFiles) > 0 && !slices.ContainsFunc(p.GoFiles, func(f string) bool { return !strings.HasSuffix(f, ".pb.go") }); generated {
			continue // the .proto file documents it
		}
		if len(documented) != 1 {
			t.Errorf("%s must have one comment that says what the package is, and has %d %v", p.short(), len(documented), documented)
		}
	}
}
