package catalogue

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// epoch is the time of everything in an image, so that the same input makes
// the same image.
var epoch = time.Unix(0, 0).UTC()

// unread are folders of Debian packages that no container looks into.
var unread = []string{"usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian", "usr/share/bug"}

// write writes a tree as the archive of an image.
func write(archive string, r recipe, tree string) (err error) {
	layer := archive + ".layer"
	defer func() {
		if e := os.Remove(layer); !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}()
	if err := writeLayer(layer, r, tree); err != nil {
		return err
	}
	l, err := tarball.LayerFromFile(layer)
	if err != nil {
		return err
	}
	image, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Created = "linux", "amd64", v1.Time{Time: epoch}
	file.Config = v1.Config{
		User: fmt.Sprintf("%d:%d", r.User, r.User), Entrypoint: r.Entrypoint, WorkingDir: "/",
		Env: append([]string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}, r.Env...),
	}
	if image, err = mutate.ConfigFile(image, file); err != nil {
		return err
	}
	tag, err := name.NewTag(r.Reference)
	if err != nil {
		return err
	}
	tmp := archive + ".new"
	if err := tarball.WriteToFile(tmp, tag, image); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, archive)
}

func writeLayer(file string, r recipe, tree string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	// WalkDir goes in the order of names.
	err = filepath.WalkDir(tree, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == tree {
			return err
		}
		at, err := filepath.Rel(tree, path)
		if err != nil {
			return err
		}
		for _, dir := range unread {
			if at == dir {
				return fs.SkipDir
			}
		}
		return add(w, r, path, at, e)
	})
	return errors.Join(err, w.Close())
}

// add writes one entry: the owner is root, but in the recipe's own folders, and
// nothing gives its caller another user.
func add(w *tar.Writer, r recipe, path, at string, e fs.DirEntry) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	} else if !info.Mode().IsRegular() && !info.IsDir() {
		return fmt.Errorf("/%s is neither a file, a folder nor a link", at)
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	owner := r.owner("/" + at)
	*h = tar.Header{Name: at, Linkname: target, Typeflag: h.Typeflag, Size: h.Size, Mode: int64(info.Mode().Perm()), ModTime: epoch, Uid: owner, Gid: owner, Format: tar.FormatPAX}
	if info.IsDir() {
		h.Name += "/"
	}
	if at == "tmp" {
		h.Mode = 0o1777
	}
	if err := w.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, in)
	return errors.Join(err, in.Close())
}

func (r recipe) owner(at string) int {
	for dir, user := range r.Folders {
		if at == dir || strings.HasPrefix(at, dir+"/") {
			return user
		}
	}
	return 0
}
