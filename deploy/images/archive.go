package main

import (
	"archive/tar"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// archive writes an image for several platforms as a tar of the OCI layout,
// under its name: `ctr images import`, `docker load` and `skopeo` read it. It
// gives the image's digest. The archive appears whole or not at all.
func archive(name, reference string, image v1.ImageIndex) (digest v1.Hash, err error) {
	dir := filepath.Dir(name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return v1.Hash{}, err
	}
	tmp, err := os.MkdirTemp(dir, "layout-*")
	if err != nil {
		return v1.Hash{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()

	index := mutate.AppendManifests(mutate.IndexMediaType(v1.ImageIndex(empty.Index), types.OCIImageIndex), mutate.IndexAddendum{
		Add: image,
		Descriptor: v1.Descriptor{
			MediaType: types.OCIImageIndex,
			// containerd names the image by the first, others by the second.
			Annotations: map[string]string{"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference},
		},
	})
	laid := filepath.Join(tmp, "layout")
	if _, err := layout.Write(laid, index); err != nil {
		return v1.Hash{}, err
	}
	packed := filepath.Join(tmp, "archive")
	if err := pack(packed, laid); err != nil {
		return v1.Hash{}, err
	}
	if digest, err = image.Digest(); err != nil {
		return v1.Hash{}, err
	}
	return digest, os.Rename(packed, name)
}

// pack writes a folder as a tar with nothing of this machine in it.
func pack(name, dir string) (err error) {
	out, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	w := tar.NewWriter(out)
	// WalkDir goes in the order of names.
	err = filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err != nil || file == dir {
			return err
		}
		inside, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		if e.IsDir() {
			return w.WriteHeader(&tar.Header{Name: inside + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: epoch, Format: tar.FormatUSTAR})
		}
		in, err := os.Open(file)
		if err != nil {
			return err
		}
		info, err := in.Stat()
		if err == nil {
			err = w.WriteHeader(&tar.Header{Name: inside, Typeflag: tar.TypeReg, Mode: 0o644, Size: info.Size(), ModTime: epoch, Format: tar.FormatUSTAR})
		}
		if err == nil {
			_, err = io.Copy(w, in)
		}
		return errors.Join(err, in.Close())
	})
	return errors.Join(err, w.Close())
}

// replace writes a file that appears whole or not at all.
func replace(name string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	tmp := name + ".new"
	if err := os.WriteFile(tmp, content, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}
