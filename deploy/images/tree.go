package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// epoch is the time of everything in an image: a clock would make each build
// another image.
var epoch = time.Unix(0, 0).UTC()

// file is one file of an image. Its owner is root, so that no program in the
// image can change another, whoever it runs as.
type file struct {
	content []byte
	program bool // may be executed
}

// tree is what a layer holds: absolute, clean paths.
type tree map[string]file

// add puts a file into the tree; a path that is taken is an error.
func (t tree) add(name string, content []byte, program bool) error {
	if !path.IsAbs(name) || path.Clean(name) != name || name == "/" {
		return fmt.Errorf("%q is no clean absolute path", name)
	}
	if _, ok := t[name]; ok {
		return fmt.Errorf("%s is there twice", name)
	}
	t[name] = file{content: content, program: program}
	return nil
}

// layer gives the tree as an image's layer. The same tree gives the same bytes.
func (t tree) layer() (v1.Layer, error) {
	raw, err := t.tar()
	if err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(raw)), nil
	}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
}

// tar writes folders before what is in them, and both in the order of names.
func (t tree) tar() ([]byte, error) {
	entries := map[string]bool{} // path -> is a folder
	for name := range t {
		entries[name] = false
		for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
			if _, ok := t[dir]; ok {
				return nil, fmt.Errorf("%s is a file and a folder", dir)
			}
			entries[dir] = true
		}
	}
	names := make([]string, 0, len(entries))
	for name := range entries {
		names = append(names, name)
	}
	slices.Sort(names)

	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range names {
		h := tar.Header{Name: strings.TrimPrefix(name, "/"), Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(t[name].content)), ModTime: epoch, Format: tar.FormatUSTAR}
		switch {
		case entries[name]:
			h.Name, h.Typeflag, h.Mode = h.Name+"/", tar.TypeDir, 0o755
		case t[name].program:
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if _, err := w.Write(t[name].content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
