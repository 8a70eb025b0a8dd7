package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"time"
)

// Image is an image with static programs and nothing else.
type Image struct {
	// Name has the registry and the tag too, such as "cluster.test/pause:1".
	Name string
	// Programs are paths in the image to files on this machine.
	Programs map[string]string
	// Entrypoint is what runs.
	Entrypoint []string
}

// WriteImage writes the image as an archive that LoadImage takes, in the format
// of docker save. The same programs make the same bytes.
func WriteImage(archive string, image Image) (err error) {
	layer, err := image.layer()
	if err != nil {
		return fmt.Errorf("cluster: image %s: %w", image.Name, err)
	}
	sum := sha256.Sum256(layer)
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": image.Entrypoint, "Env": []string{"PATH=/"}},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum[:])}},
	})
	if err != nil {
		return fmt.Errorf("cluster: image %s: %w", image.Name, err)
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{image.Name}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return fmt.Errorf("cluster: image %s: %w", image.Name, err)
	}
	f, err := os.Create(archive)
	if err != nil {
		return fmt.Errorf("cluster: image %s: %w", image.Name, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	for _, file := range []struct {
		name string
		data []byte
	}{{"layer.tar", layer}, {"config.json", config}, {"manifest.json", manifest}} {
		if err := addFile(w, file.name, 0o644, bytes.NewReader(file.data), int64(len(file.data))); err != nil {
			return fmt.Errorf("cluster: image %s: %w", image.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("cluster: image %s: %w", image.Name, err)
	}
	return nil
}

func (image Image) layer() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range sortedKeys(image.Programs) {
		if err := addProgram(w, name, image.Programs[name]); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func addProgram(w *tar.Writer, name, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return addFile(w, path.Clean("/" + name)[1:], 0o755, f, info.Size())
}

func addFile(w *tar.Writer, name string, mode int64, r io.Reader, size int64) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: size, ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err := io.Copy(w, r)
	return err
}
