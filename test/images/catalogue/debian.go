package catalogue

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// deb is one package in one version.
type deb struct {
	File string // such as redis-tools_5%3a7.0.15-1_amd64.deb
}

// request names it for apt-get.
func (d deb) request() string {
	parts := strings.Split(strings.TrimSuffix(d.File, ".deb"), "_")
	return parts[0] + ":" + parts[2] + "=" + strings.ReplaceAll(parts[1], "%3a", ":")
}

// closure returns packages and all that they depend on, in order, as apt would
// install them on a machine that has nothing but what is in provided.
func closure(ctx context.Context, work string, packages []string) ([]deb, error) {
	dir, err := os.MkdirTemp(work, "apt-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	var status strings.Builder
	for _, p := range provided {
		fmt.Fprintf(&status, "Package: %s\nStatus: install ok installed\nMaintainer: none\nArchitecture: amd64\nMulti-Arch: foreign\nVersion: 999\nDescription: left out\n\n", p)
	}
	if err := os.WriteFile(filepath.Join(dir, "status"), []byte(status.String()), 0o644); err != nil {
		return nil, err
	}
	// apt says only what it would get, so its store of archives is empty here.
	if err := os.MkdirAll(filepath.Join(dir, "archives", "partial"), 0o755); err != nil {
		return nil, err
	}
	out, err := tool(ctx, "", "apt-get", append([]string{"-qq", "--print-uris", "-y", "--no-install-recommends",
		"-o", "APT::Architecture=amd64", "-o", "Dir::State::status=" + filepath.Join(dir, "status"), "-o", "Dir::Cache::archives=" + filepath.Join(dir, "archives"),
		"install"}, packages...)...)
	if err != nil {
		return nil, fmt.Errorf("%w; if it knows no such package, run apt-get update", err)
	}
	debs, err := readURIs(out)
	if err == nil && len(debs) < len(packages) {
		err = fmt.Errorf("apt-get names %d packages for %q", len(debs), packages)
	}
	return debs, err
}

// readURIs reads what apt-get --print-uris says: 'URI' FILE SIZE HASH.
func readURIs(out []byte) ([]deb, error) {
	var debs []deb
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 3 || !strings.HasPrefix(fields[0], "'") {
			return nil, fmt.Errorf("apt-get says %q, which is no package", s.Text())
		}
		name := fields[1]
		if name != filepath.Base(name) || !strings.HasSuffix(name, ".deb") || strings.Count(name, "_") != 2 {
			return nil, fmt.Errorf("apt-get names the file %q, which is no package's", name)
		}
		debs = append(debs, deb{name})
	}
	slices.SortFunc(debs, func(a, b deb) int { return strings.Compare(a.File, b.File) })
	return debs, nil
}

// get downloads what is not in dir yet. apt-get compares each with the hashes
// in Debian's signed lists.
func get(ctx context.Context, dir string, debs []deb) error {
	var missing []deb
	for _, d := range debs {
		if _, err := os.Stat(filepath.Join(dir, d.File)); err != nil {
			missing = append(missing, d)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	// They appear in dir whole or not at all.
	tmp, err := os.MkdirTemp(dir, "get-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	args := []string{"-q", "-o", "APT::Sandbox::User=root", "download"}
	for _, d := range missing {
		args = append(args, d.request())
	}
	if _, err := tool(ctx, tmp, "apt-get", args...); err != nil {
		return err
	}
	for _, d := range missing {
		if err := os.Rename(filepath.Join(tmp, d.File), filepath.Join(dir, d.File)); err != nil {
			return err
		}
	}
	return nil
}

// unpack puts a package's files below root. No script of the package runs.
func unpack(ctx context.Context, dir, root string, d deb) error {
	_, err := tool(ctx, "", "dpkg-deb", "-x", filepath.Join(dir, d.File), root)
	return err
}

// applets links the commands of busybox that nothing else in the tree has.
func applets(ctx context.Context, root string) error {
	program := filepath.Join(root, "bin/busybox")
	if _, err := os.Stat(program); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	out, err := tool(ctx, "", program, "--list")
	if err != nil {
		return err
	}
next:
	for name := range strings.FieldsSeq(string(out)) {
		for _, dir := range []string{"bin", "sbin", "usr/bin", "usr/sbin"} {
			if _, err := os.Lstat(filepath.Join(root, dir, name)); err == nil {
				continue next
			}
		}
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			return err
		}
	}
	return nil
}

// tool runs a program in a folder and returns what it prints.
func tool(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args[:min(len(cmd.Args), 4)], " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
