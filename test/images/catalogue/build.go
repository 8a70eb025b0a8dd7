package catalogue

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Options says where Build works. The zero value is good in the project.
type Options struct {
	// Dir gets the archives. Empty: .cache/test-images in the project.
	Dir string
	// Log gets lines of progress; nil means none are written.
	Log io.Writer
}

// Image is an image that was built.
type Image struct {
	Name      string // as in Names
	Reference string // as pods name it
	Archive   string // path of the archive, as docker save writes it
}

// format is of the code that turns a recipe into an image: another number
// builds every image again.
const format = 1

// Build builds the images with these names, all for none, in this order, if
// what they are made of is not what their archives were made of. The archives
// appear whole or not at all. It works in the project's folder or below, and
// waits while another process builds there.
func Build(ctx context.Context, o Options, names ...string) ([]Image, error) {
	chosen, err := choose(names)
	if err != nil {
		return nil, err
	}
	root, err := projectRoot()
	if err != nil {
		return nil, err
	}
	b := &builder{root: root, work: filepath.Join(root, ".cache/test-images"), out: o.Dir, log: o.Log}
	if b.out == "" {
		b.out = b.work
	}
	if b.out, err = filepath.Abs(b.out); err != nil {
		return nil, err
	}
	if b.log == nil {
		b.log = io.Discard
	}
	for _, dir := range []string{b.out, b.debs(), b.programs()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	lock, err := os.OpenFile(filepath.Join(b.work, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", b.work, err)
	}
	var images []Image
	for _, r := range chosen {
		archive, err := b.build(ctx, r)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", r.Name, err)
		}
		images = append(images, Image{Name: r.Name, Reference: r.Reference, Archive: archive})
	}
	return images, nil
}

type builder struct {
	root, work, out string
	log             io.Writer
}

func (b *builder) debs() string     { return filepath.Join(b.work, "debs") }
func (b *builder) programs() string { return filepath.Join(b.work, "bin") }

// build returns the archive of an image.
func (b *builder) build(ctx context.Context, r recipe) (string, error) {
	var debs []deb
	if len(r.Packages) > 0 {
		var err error
		if debs, err = closure(ctx, b.work, r.Packages); err != nil {
			return "", err
		}
	}
	programs, err := b.compile(ctx, r)
	if err != nil {
		return "", err
	}
	key, err := fingerprint(r, debs, programs)
	if err != nil {
		return "", err
	}
	archive := filepath.Join(b.out, r.Name+".tar")
	if have, err := os.ReadFile(archive + ".key"); err == nil && string(have) == key {
		if _, err := os.Stat(archive); err == nil {
			return archive, nil
		}
	}
	_, _ = fmt.Fprintf(b.log, "images: building %s\n", r.Reference)
	tree, err := os.MkdirTemp(b.work, "tree-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tree)
	if err := b.fill(ctx, tree, r, debs, programs); err != nil {
		return "", err
	}
	if err := write(archive, r, tree); err != nil {
		return "", err
	}
	return archive, os.WriteFile(archive+".key", []byte(key), 0o644)
}

// compile builds the project's own programs: path in the image -> file.
func (b *builder) compile(ctx context.Context, r recipe) (map[string]string, error) {
	built := map[string]string{}
	for _, at := range slices.Sorted(maps.Keys(r.Programs)) {
		file := filepath.Join(b.programs(), r.Name+"-"+filepath.Base(at))
		if _, err := tool(ctx, b.root, "env", "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64",
			"go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", file, r.Programs[at]); err != nil {
			return nil, err
		}
		built[at] = file
	}
	return built, nil
}

// fingerprint is a digest of all that an image is made of.
func fingerprint(r recipe, debs []deb, programs map[string]string) (string, error) {
	h := sha256.New()
	sums := map[string]string{}
	for at, file := range programs {
		content, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		sum := sha256.Sum256(content)
		sums[at] = hex.EncodeToString(sum[:])
	}
	err := json.NewEncoder(h).Encode(map[string]any{"format": format, "recipe": r, "packages": debs, "programs": sums, "passwd": passwd, "group": group})
	return hex.EncodeToString(h.Sum(nil)), err
}

// fill puts everything of an image into a tree.
func (b *builder) fill(ctx context.Context, tree string, r recipe, debs []deb, programs map[string]string) error {
	if err := get(ctx, b.debs(), debs); err != nil {
		return err
	}
	for _, d := range debs {
		if err := unpack(ctx, b.debs(), tree, d); err != nil {
			return err
		}
	}
	if err := applets(ctx, tree); err != nil {
		return err
	}
	put := func(name string, content []byte, mode os.FileMode) error {
		file := filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return os.WriteFile(file, content, mode)
	}
	for at, file := range programs {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := put(at, content, 0o755); err != nil {
			return err
		}
	}
	for at, content := range r.Files {
		if err := put(at, []byte(content), 0o755); err != nil {
			return err
		}
	}
	for at, content := range map[string]string{"/etc/passwd": passwd, "/etc/group": group} {
		if err := put(at, []byte(content), 0o644); err != nil {
			return err
		}
	}
	for at, target := range r.Links {
		file := filepath.Join(tree, at)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, file); err != nil {
			return err
		}
	}
	for _, at := range append(slices.Sorted(maps.Keys(r.Folders)), "/tmp", "/run", "/etc") {
		if err := os.MkdirAll(filepath.Join(tree, at), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// projectRoot finds the folder of the project's go.mod, above the working one.
func projectRoot() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		content, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(content), "module github.com/signet-mesh/signet\n") {
			return dir, nil
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not in the project: run it in there", start)
		}
	}
}
