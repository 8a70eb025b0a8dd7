package manifest

import (
	"bytes"
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/mesh"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata/bad")

func TestLoad(t *testing.T) {
	m, err := Load("testdata/good", "here")
	if err != nil {
		t.Fatal(err)
	}
	root := uint32(0)
	want := &mesh.State{
		TrustDomain:   spiffeid.RequireTrustDomainFromString("mesh.example"),
		SVIDTTL:       10 * time.Minute,
		RefuseUnknown: true,
		RootNotBefore: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Namespaces:    map[string]mesh.Mode{"shop": mesh.ModeEnforce, "ops": mesh.ModeOff},
		Workloads: []mesh.Workload{
			{
				Namespace: "shop", Name: "client", ServiceAccount: "client", Node: "far",
				ID:      spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/client"),
				Capture: &mesh.Capture{NetNS: "/proc/1234/ns/net", Addrs: []netip.Addr{netip.MustParseAddr("10.9.0.3")}},
			},
			{
				Namespace: "shop", Name: "web", ServiceAccount: "web", Node: "here",
				ID: spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/web"),
				Attest: &mesh.Attest{
					UID: &root, Path: "/usr/bin/nginx",
					SHA256:      "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
					SystemdUnit: "nginx.service", Cgroup: "/system.slice/nginx.service",
				},
				Capture: &mesh.Capture{NetNS: "/run/netns/web", Addrs: []netip.Addr{netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd00::2")}},
			},
		},
		Services: []mesh.Service{{
			Namespace: "shop", Name: "web", VIPs: []netip.Addr{netip.MustParseAddr("10.99.0.1")},
			Ports:     []mesh.ServicePort{{Name: "http", Port: 80, Target: 8080}, {Port: 443, Target: 443}},
			Endpoints: []mesh.Endpoint{{Workload: "shop/web"}, {Workload: "shop/client"}, {Addr: netip.MustParseAddr("192.0.2.7")}},
		}},
	}
	if !reflect.DeepEqual(m.State, want) {
		t.Errorf("state\n got %+v\nwant %+v", m.State, want)
	}
	if len(m.Policies) != 2 || m.Policies[0].Name != "allow-client" || m.Policies[1].Name != "ops" ||
		m.Policies[0].Spec.From[1].ServiceAccount != "ops/backup" || m.Policies[0].Spec.Ports[0] != 8080 {
		t.Errorf("policies %+v", m.Policies)
	}
	if len(m.Revision) != 16 {
		t.Errorf("revision %q", m.Revision)
	}
	if findings := Check([]string{"testdata/good"}); findings != nil {
		t.Errorf("Check finds %v", findings)
	}
}

func TestDefaults(t *testing.T) {
	m, err := Load(write(t, meshConfig), "here")
	if err != nil {
		t.Fatal(err)
	}
	if m.State.SVIDTTL != time.Hour || m.State.RefuseUnknown || len(m.State.Namespaces) != 0 {
		t.Errorf("%+v", m.State)
	}
}

// What is refused, and in which words: every file in testdata/bad with the
// report beside it.
func TestGoldenErrors(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		m, err := Load(file, "here")
		var e *Error
		if m != nil || !errors.As(err, &e) {
			t.Errorf("%s: accepted, or not an *Error: %v", file, err)
			continue
		}
		var got bytes.Buffer
		for _, f := range e.Findings {
			got.WriteString(f.Code + " " + strings.TrimPrefix(f.String(), "testdata/bad/") + "\n")
		}
		golden := strings.TrimSuffix(file, ".yaml") + ".golden"
		if *update {
			if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != string(want) {
			t.Errorf("%s:\n got\n%swant\n%s", file, got.String(), want)
		}
	}
}

const meshConfig = `apiVersion: signet.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: mesh.example}
`

// write makes a file of the given content and returns its path.
func write(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "m.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// The revision names what documents mean. If it changed with comments, every
// save would look like a new policy; if it missed a change, proxies would keep
// an old one.
func TestRevision(t *testing.T) {
	load := func(dir string) string {
		t.Helper()
		m, err := Load(dir, "here")
		if err != nil {
			t.Fatal(err)
		}
		return m.Revision
	}
	base := load("testdata/good")
	var all []string
	for _, name := range []string{"10-mesh.yaml", "20-workloads.yml", "30-policies.yaml"} {
		data, err := os.ReadFile(filepath.Join("testdata/good", name))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(data))
	}
	turned := all[2] + "---\n# a comment\n" + all[1] + "---\n" + strings.ReplaceAll(all[0], "team: shop", "team: other")
	if got := load(write(t, turned)); got != base {
		t.Errorf("order, comments or labels change the revision: %s, %s", got, base)
	}
	one := strings.Join(all, "---\n")
	for _, edit := range [][2]string{
		{"mesh.example", "mesh2.example"}, {"10m", "11m"}, {"unknownDestinations: refuse", "unknownDestinations: plain"},
		{"signet.dev/mesh: enforce", "signet.dev/mesh: observe"}, {"name: ops\n", "name: ops\n  annotations: {signet.dev/mesh: enforce}\n"},
		{"uid: 0", "uid: 1"}, {"path: /usr/bin/nginx", "path: /usr/bin/nginx2"}, {"sha256: 01", "sha256: 02"},
		{"systemdUnit: nginx.", "systemdUnit: nginx2."}, {"cgroup: /system", "cgroup: /system2"},
		{"networkNamespace: web", "networkNamespace: web2"}, {"10.9.0.2", "10.9.0.22"}, {"node: far", "node: farther"},
		{"10.99.0.1", "10.99.0.11"}, {"targetPort: 8080", "targetPort: 8081"}, {"192.0.2.7", "192.0.2.8"},
		{"ports: [8080, 443]", "ports: [8080]"}, {"target: {serviceAccount: web}", "target: {}"}, {"ns/*/sa/monitor", "ns/*/sa/monitor2"},
		{"serviceAccount: ops/backup", "serviceAccount: ops/backup2"}, {"name: allow-client", "name: allow-client2"},
	} {
		n := 1
		if edit[0] == "mesh.example" {
			n = -1 // policies name it too
		}
		edited := strings.Replace(one, edit[0], edit[1], n)
		if edited == one {
			t.Fatalf("%q is not in the text", edit[0])
		}
		if got := load(write(t, edited)); got == base {
			t.Errorf("%q -> %q does not change the revision", edit[0], edit[1])
		}
	}
}

// A directory of policies may be on a shared disk, or given by mistake: what
// cannot be read must end in an error soon, not in a hang or an empty mesh.
func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "pipe.yaml")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "link.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "sub.yaml"), 0o700); err != nil {
		t.Fatal(err)
	}
	big := write(t, "# "+strings.Repeat("x", maxFileSize))
	for _, test := range []struct {
		path string
		want []string
	}{
		{dir, []string{"link.yaml: no such file", "pipe.yaml: not a regular file", "sub.yaml: not a regular file"}},
		{fifo, []string{"pipe.yaml: not a regular file"}},
		{t.TempDir(), []string{"directory holds no *.yaml or *.yml file"}},
		{"testdata/absent", []string{"testdata/absent: no such file"}},
		{big, []string{"file is larger than 4 MiB"}},
		{"/dev/zero", []string{"not a regular file"}},
	} {
		_, err := Load(test.path, "here")
		var e *Error
		if !errors.As(err, &e) || len(e.Findings) != len(test.want) {
			t.Errorf("%s: %v", test.path, err)
			continue
		}
		for i, want := range test.want {
			if f := e.Findings[i]; f.Code != CodeFile || !strings.Contains(f.String(), want) {
				t.Errorf("%s: %v, want %q", test.path, f, want)
			}
		}
	}
	if err := os.WriteFile(big, []byte(meshConfig+"#"+strings.Repeat("x", maxFileSize-len(meshConfig)-1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(big, "here"); err != nil {
		t.Errorf("a file of exactly the limit is refused: %.100v", err)
	}
}

// Hostile text of the largest size must not take long, and the report must
// stay small.
func TestHostileSizeIsBounded(t *testing.T) {
	head := "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n"
	fill := func(s string, bytes int) string { return strings.Repeat(s, bytes/len(s)) }
	const size = 256 << 10
	for name, text := range map[string]string{
		"keys":      head + fill("x: y\n", size),
		"list":      head + "spec: [" + fill("1,", size) + "]\n",
		"flow":      head + "spec: " + fill("[", size),
		"maps":      head + "spec: " + fill("{a: ", size),
		"indent":    fill("- ", size),
		"documents": fill("---\na: b\n", size),
		"comments":  fill("#\n", size),
		"anchors":   head + "labels: [" + fill("&a x,", size) + "]",
		"value":     "kind: " + fill("x", size),
		"key":       fill("x", size) + ": 1",
		"quotes":    fill(`"`, size),
		"items":     "apiVersion: signet.dev/v1alpha1\nkind: AllowPolicy\nmetadata: {name: a}\nspec: {ports: [" + fill("1,", size) + "]}\n",
		"NUL":       fill("\x00", size),
		"merge":     head + fill("<<: {}\n", size),
	} {
		start := time.Now()
		_, err := Load(write(t, text), "here")
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		t.Logf("%s: %v, report of %d bytes", name, time.Since(start).Round(time.Millisecond), len(err.Error()))
		var e *Error
		if !errors.As(err, &e) || len(e.Findings) > maxFindings {
			t.Errorf("%s: a report of %d bytes", name, len(err.Error()))
		}
		for _, finding := range e.Findings {
			if len(finding.Field) > 1000 || len(finding.Message) > 2*maxMessage {
				t.Errorf("%s: a finding of %d bytes", name, len(finding.String()))
			}
		}
	}
}

// A list is bounded, so that what is built from one file is.
func TestListIsBounded(t *testing.T) {
	list := func(n int) []Finding {
		return Check([]string{write(t, "apiVersion: signet.dev/v1alpha1\nkind: AllowPolicy\nmetadata: {name: a, namespace: a}\nspec: {ports: ["+
			strings.TrimSuffix(strings.Repeat("80,", n), ",")+"], from: [{namespace: a}]}\n")})
	}
	if f := list(maxItems); f != nil {
		t.Errorf("the longest list is refused: %v", f)
	}
	if f := list(maxItems + 1); len(f) != 1 || f[0].Field != "spec.ports" || f[0].Code != CodeValue {
		t.Errorf("got %v", f)
	}
}

// A policy file alone has no MeshConfig, no namespaces and no workloads; what
// is wrong within it is found all the same.
func TestCheckPart(t *testing.T) {
	policy := func(body string) string {
		return write(t, "apiVersion: signet.dev/v1alpha1\nkind: AllowPolicy\nmetadata: {name: p, namespace: shop}\nspec: {from: ["+body+"]}\n")
	}
	if f := Check([]string{policy("{namespace: ops}, {spiffeID: spiffe://td/x}")}); f != nil {
		t.Errorf("a good policy alone: %v", f)
	}
	if f := Check([]string{policy("{spiffeID: spiffe://td/x}, {spiffeID: spiffe://td2/x}")}); len(f) != 1 || f[0].Field != "spec.from[1].spiffeID" {
		t.Errorf("two trust domains: %v", f)
	}
	if f := Check([]string{write(t, "apiVersion: signet.dev/v1alpha1\nkind: Quarantine\nmetadata: {name: q}\nspec: {reason: r, identities: ['spiffe://td/x']}\n")}); f != nil {
		t.Errorf("a good quarantine alone: %v", f)
	}
	if f := Check([]string{policy("{namespace: OPS}")}); len(f) != 1 || f[0].Field != "spec.from[0].namespace" || f[0].Line != 4 || f[0].Code != CodePolicy {
		t.Errorf("a bad policy: %v", f)
	}
	// Two files that are each good, but not together.
	a, b := policy("{namespace: a}"), policy("{namespace: b}")
	if f := Check([]string{a, b}); len(f) != 1 || f[0].Code != CodeDuplicate {
		t.Errorf("two policies with one name: %v", f)
	}
	// The same file twice is one file.
	if f := Check([]string{a, a}); f != nil {
		t.Errorf("a file given twice: %v", f)
	}
	// As soon as namespaces are declared, they have to be complete.
	ns := write(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")
	if f := Check([]string{a, ns}); len(f) != 1 || f[0].Code != CodeReference {
		t.Errorf("a peer in an undeclared namespace: %v", f)
	}
	service := write(t, "apiVersion: signet.dev/v1alpha1\nkind: ServiceEntry\nmetadata: {name: s, namespace: shop}\nspec: {vips: [10.0.0.1], ports: [{port: 80}], endpoints: [{workload: w}]}\n")
	if f := Check([]string{service}); f != nil {
		t.Errorf("a service alone: %v", f)
	}
	if f := Check([]string{"testdata/absent"}); len(f) != 1 || f[0].Code != CodeFile {
		t.Errorf("an absent file: %v", f)
	}
	if _, err := Load(a, "here"); err == nil {
		t.Error("Load accepts a part of a mesh")
	}
}

// Without a node name a workload would be placed nowhere in silence.
func TestNodeIsNeeded(t *testing.T) {
	_, err := Load("testdata/good", "")
	if err == nil || !strings.Contains(err.Error(), "spec.node: is missing") {
		t.Errorf("got %v", err)
	}
}

func FuzzLoad(f *testing.F) {
	files, _ := filepath.Glob("testdata/*/*.y*ml")
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(meshConfig))
	path := filepath.Join(f.TempDir(), "m.yaml")
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		r := &report{}
		m := newBuilder(r, parse(r, path, data), path, "here").build()
		again := &report{}
		m2 := newBuilder(again, parse(again, path, data), path, "here").build()
		if (m == nil) != (len(r.findings) > 0) {
			t.Fatalf("manifest %v with findings %v", m, r.findings)
		}
		if !reflect.DeepEqual(r.sorted(), again.sorted()) || m != nil && m.Revision != m2.Revision {
			t.Fatal("the same input is read in two ways")
		}
		for _, finding := range r.findings {
			if finding.Line < 0 || finding.Line > bytes.Count(data, []byte("\n"))+bytes.Count(data, []byte("\r"))+bytes.Count(data, []byte("\u0085"))+bytes.Count(data, []byte("\u2028"))+bytes.Count(data, []byte("\u2029"))+2 || finding.Message == "" || finding.Code == "" {
				t.Fatalf("finding %+v", finding)
			}
			if strings.ContainsAny(finding.Field, "\n\x00\x1b") || strings.ContainsAny(finding.Message, "\n\x00\x1b") {
				t.Fatalf("finding %+v holds text that could fake output", finding)
			}
		}
		if m == nil {
			return
		}
		if m.State.TrustDomain.IsZero() || m.State.SVIDTTL < minTTL || m.State.SVIDTTL > maxTTL {
			t.Fatalf("state %+v", m.State)
		}
		for _, w := range m.State.Workloads {
			if w.ID.IsZero() || !w.ID.MemberOf(m.State.TrustDomain) || w.Attest == nil && w.Capture == nil {
				t.Fatalf("workload %+v", w)
			}
			if w.Capture != nil && (!filepath.IsAbs(w.Capture.NetNS) || strings.Contains(w.Capture.NetNS, "..") && filepath.Clean(w.Capture.NetNS) != w.Capture.NetNS || len(w.Capture.Addrs) == 0) {
				t.Fatalf("capture %+v", w.Capture)
			}
			if _, declared := m.State.Namespaces[w.Namespace]; !declared {
				t.Fatalf("workload %+v in no namespace", w)
			}
		}
	})
}
