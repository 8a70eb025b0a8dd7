package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// envoyVersion is the proxy that Signet is made for and tested with; other
// patch releases of the same minor version are taken, too.
const envoyVersion = "1.40.0"

var subjectEnvoy = subject{"SIG0110", "envoy", "it is the node proxy"}

// toolsEnvoy is where `make tools` puts the program.
const toolsEnvoy = ".tools/envoy/bin/envoy"

// findEnvoy returns the path of the proxy: the flag, $SIGNET_ENVOY, the
// project's tools beside this program's folder or in the working directory,
// or PATH. A path that was asked for is not replaced by another.
func findEnvoy(flag string, getenv func(string) string) (string, error) {
	for _, asked := range []struct{ by, path string }{{"--envoy", flag}, {"$" + envEnvoy, getenv(envEnvoy)}} {
		if asked.path == "" {
			continue
		}
		path, err := exec.LookPath(asked.path)
		if err != nil {
			return "", fmt.Errorf("%s: %w", asked.by, err)
		}
		return filepath.Abs(path)
	}
	var places []string
	if exe, err := os.Executable(); err == nil {
		places = append(places, filepath.Join(filepath.Dir(filepath.Dir(exe)), toolsEnvoy))
	}
	places = append(places, toolsEnvoy)
	for _, place := range places {
		// Absolute, since LookPath searches PATH for what has no slash and
		// callers may change their working directory.
		place, err := filepath.Abs(place)
		if err != nil {
			return "", err
		}
		if path, err := exec.LookPath(place); err == nil {
			return path, nil
		}
	}
	if path, err := exec.LookPath("envoy"); err == nil {
		return filepath.Abs(path)
	}
	return "", fmt.Errorf("no Envoy at %s or in PATH", strings.Join(places, ", "))
}

var envoyVersionLine = regexp.MustCompile(`version: [0-9a-f]+/(\d+\.\d+\.\d+)[^/]*/`)

// askEnvoyVersion runs the program.
func askEnvoyVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", path, err)
	}
	m := envoyVersionLine.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%s --version: names no version", path)
	}
	return string(m[1]), nil
}

// fitsEnvoy reports whether a version has the expected minor version.
func fitsEnvoy(version string) error {
	minor := envoyVersion[:strings.LastIndexByte(envoyVersion, '.')+1]
	if !strings.HasPrefix(version, minor) {
		return errors.New("not " + minor + "x")
	}
	return nil
}

func (a *app) checkEnvoy(ctx context.Context, flag string) check {
	fix := "run `make tools` in the project's folder, or name a program of version " + envoyVersion + " with --envoy or $" + envEnvoy
	path, err := findEnvoy(flag, a.getenv)
	if err != nil {
		return subjectEnvoy.error(fix, "%v", err)
	}
	version, err := askEnvoyVersion(ctx, path)
	if err != nil {
		return subjectEnvoy.error(fix, "%v", err)
	}
	if err := fitsEnvoy(version); err != nil {
		return subjectEnvoy.error(fix, "%s is version %s, %v", path, version, err)
	}
	return subjectEnvoy.ok("version %s at %s", version, path)
}
