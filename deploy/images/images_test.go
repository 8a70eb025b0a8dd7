package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// project makes a small project with one command, at a path of its own.
func project(t *testing.T, says string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":               "module example.test/project\n\ngo 1.26\n",
		"LICENSE":              "do what you like\n",
		"cmd/thing/main.go":    "package main\n\nvar version string\n\nfunc main() { println(" + says + ", version) }\n",
		"cmd/other/main.go":    "package main\n\nvar version string\n\nfunc main() { println(version) }\n",
		"unrelated/README.txt": t.Name(),
	} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

var small = image{name: "thing", title: "A thing", programs: []string{"thing", "other"}, user: "65532:65532"}

// build builds the image of a project, and gives its digest and archive.
func build(t *testing.T, source string) (v1.Hash, string) {
	t.Helper()
	out := t.TempDir()
	r := release{
		version: "v1.2.3", repository: "localhost", source: source, work: t.TempDir(),
		platforms: []v1.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64"}},
	}
	digest, err := r.build(t.Context(), small, out)
	if err != nil {
		t.Fatal(err)
	}
	return digest, filepath.Join(out, "thing.tar")
}

// Defends users from a build machine that they need to trust: whoever builds
// the same sources, elsewhere and later, gets the same bytes, and others with
// another source.
func TestSameSourcesSameImage(t *testing.T) {
	one, first := build(t, project(t, `"one"`))
	time.Sleep(1100 * time.Millisecond) // times in files have seconds
	two, second := build(t, project(t, `"one"`))
	if one != two {
		t.Errorf("%s, then %s", one, two)
	}
	a, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(second)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the archives differ")
	}
	if three, _ := build(t, project(t, `"three"`)); three == one {
		t.Error("another source gave the same digest")
	}
}

// open unpacks an archive and gives the image of each architecture.
func open(t *testing.T, archive string) map[string]v1.Image {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "tar", "-xf", archive, "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v %s", err, out)
	}
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != 1 || m.Manifests[0].Annotations["io.containerd.image.name"] != "localhost/thing:v1.2.3" {
		t.Fatalf("the archive holds %+v", m.Manifests)
	}
	index, err := top.ImageIndex(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	if m, err = index.IndexManifest(); err != nil {
		t.Fatal(err)
	}
	images := map[string]v1.Image{}
	for _, d := range m.Manifests {
		i, err := index.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		images[d.Platform.Architecture] = i
	}
	return images
}

// Defends the programs in an image from each other, and users from not knowing
// what they run: every file is root's and nobody else can write it, there is a
// list of components that names the libraries, the image says who it is.
func TestImageContents(t *testing.T) {
	_, archive := build(t, project(t, `"one"`))
	images := open(t, archive)
	if len(images) != 2 {
		t.Fatalf("%d architectures", len(images))
	}
	for arch, i := range images {
		config, err := i.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		c := config.Config
		if config.Architecture != arch || c.User != "65532:65532" || !slices.Equal(c.Entrypoint, []string{"/usr/bin/thing"}) ||
			c.Labels["org.opencontainers.image.version"] != "v1.2.3" || !config.Created.Equal(epoch) {
			t.Errorf("%s: %+v", arch, config)
		}
		layers, err := i.Layers()
		if err != nil || len(layers) != 1 {
			t.Fatal(len(layers), err)
		}
		in, err := layers[0].Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		var list []byte
		for r := tar.NewReader(in); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			names = append(names, h.Name)
			if h.Uid != 0 || h.Gid != 0 || h.Mode&0o022 != 0 || !h.ModTime.Equal(epoch) {
				t.Errorf("%s: %s is %d:%d %o %s", arch, h.Name, h.Uid, h.Gid, h.Mode, h.ModTime)
			}
			if h.Name == "sbom.spdx.json" {
				if list, err = io.ReadAll(r); err != nil {
					t.Fatal(err)
				}
			}
		}
		if want := []string{"licenses/", "licenses/LICENSE", "sbom.spdx.json", "usr/", "usr/bin/", "usr/bin/other", "usr/bin/thing"}; !slices.Equal(names, want) {
			t.Errorf("%s holds %q, want %q", arch, names, want)
		}
		var d spdxDocument
		if err := json.Unmarshal(list, &d); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"thing", "other", "stdlib"} {
			if !slices.ContainsFunc(d.Packages, func(p spdxPackage) bool { return p.Name == name && p.Version != "" }) {
				t.Errorf("%s: the list of components lacks %s: %s", arch, name, list)
			}
		}
		beside, err := os.ReadFile(filepath.Join(filepath.Dir(archive), "thing-linux-"+arch+".spdx.json"))
		if err != nil || !bytes.Equal(beside, list) {
			t.Errorf("%s: the list beside the archive is another: %v", arch, err)
		}
	}
}

// Defends nodes from an image that does not start: Envoy runs with nothing but
// what the image has of the C library, and a library that is missing is found
// when the image is built.
func TestEnvoyStartsWithWhatIsLinked(t *testing.T) {
	name := os.Getenv("SIGNET_ENVOY")
	if name == "" {
		t.Fatal("SIGNET_ENVOY is not set; run make test")
	}
	program, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{} // in place of Debian's package
	for _, pattern := range []string{"/lib/*-linux-gnu/*.so*", "/lib64/*.so*", "/lib/ld-*.so*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range found {
			if base := path.Base(name); !strings.HasPrefix(base, "lib") || slices.Contains([]string{"libc", "libm", "librt", "libdl", "libpthread"}, strings.SplitN(base, ".", 2)[0]) {
				if files[name], err = os.ReadFile(name); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	tree, err := linked(program, files)
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.add("/usr/bin/envoy", program, true); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	for name, f := range tree {
		to := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if f.program {
			mode = 0o755
		}
		if err := os.WriteFile(to, f.content, mode); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "/usr/bin/envoy", "--version")
	cmd.Path, cmd.Err, cmd.Dir, cmd.Env = "/usr/bin/envoy", nil, "/", []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "version") {
		t.Errorf("in an empty root: %v %s", err, out)
	}

	for name := range files {
		if strings.HasPrefix(path.Base(name), "libm.") {
			delete(files, name)
		}
	}
	if _, err := linked(program, files); err == nil || !strings.Contains(err.Error(), "libm.so.6") {
		t.Errorf("without libm: %v", err)
	}
}

// Defends the layer from files that hide each other or lie elsewhere.
func TestTreeRefuses(t *testing.T) {
	for _, name := range []string{"relative", "/a/../b", "/", "", "/a/", "//a"} {
		if err := (tree{}).add(name, nil, false); err == nil {
			t.Errorf("%q was taken", name)
		}
	}
	twice := tree{}
	if err := errors.Join(twice.add("/a", nil, false), twice.add("/a", nil, false)); err == nil {
		t.Error("a path was taken twice")
	}
	both := tree{}
	if err := errors.Join(both.add("/a", nil, false), both.add("/a/b", nil, false)); err != nil {
		t.Fatal(err)
	}
	if _, err := both.tar(); err == nil {
		t.Error("a file was a folder too")
	}
}

// Defends releases from a typing error that builds too little or nothing.
func TestArguments(t *testing.T) {
	for _, c := range []struct {
		args []string
		says string
	}{
		{nil, "-version"},
		{[]string{"-version", "v1"}, "-envoy"},
		{[]string{"-version", "v1", "-envoy", "1.40.0", "-platforms", "linux/riscv64"}, "linux/riscv64"},
		{[]string{"-version", "v1", "-envoy", "1.40.0", "-platforms", "windows/amd64"}, "windows/amd64"},
		{[]string{"-version", "v1", "-envoy", "1.40.0", "-only", "signet-contrl"}, "signet-contrl"},
	} {
		if err := run(t.Context(), c.args); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v", c.args, err)
		}
	}
}
