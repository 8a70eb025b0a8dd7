package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	var r release
	f := flag.NewFlagSet("images", flag.ContinueOnError)
	f.StringVar(&r.version, "version", "", "version of the release, which is the tag of every image (required)")
	f.StringVar(&r.envoy, "envoy", "", "version of Envoy (required)")
	f.StringVar(&r.repository, "repository", "localhost", "what stands before each image's name")
	f.StringVar(&r.source, "source", ".", "the project's folder")
	f.StringVar(&r.work, "work", ".cache/images/src", "keeps what is got and built")
	out := f.String("out", ".cache/images", "folder for the archives")
	only := f.String("only", "", "comma-separated names of the images to build (default: all)")
	platforms := f.String("platforms", "linux/amd64,linux/arm64", "comma-separated platforms")
	if err := f.Parse(args); err != nil {
		return err
	}
	if r.version == "" || r.envoy == "" {
		return errors.New("-version and -envoy are required")
	}
	for p := range strings.SplitSeq(*platforms, ",") {
		parsed, err := v1.ParsePlatform(p)
		if err != nil || parsed.OS != "linux" || parsed.Architecture != "amd64" && parsed.Architecture != "arm64" {
			return fmt.Errorf("-platforms: %q; use linux/amd64, linux/arm64 or both", p)
		}
		r.platforms = append(r.platforms, *parsed)
	}
	images, err := choose(*only)
	if err != nil {
		return err
	}
	for _, image := range images {
		digest, err := r.build(ctx, image, *out)
		if err != nil {
			return fmt.Errorf("%s: %w", image.name, err)
		}
		fmt.Printf("images: %s@%s\n", r.reference(image), digest)
	}
	return nil
}

// choose gives the images with these names, all of them for no name.
func choose(names string) ([]image, error) {
	if names == "" {
		return catalogue, nil
	}
	var chosen []image
next:
	for name := range strings.SplitSeq(names, ",") {
		for _, i := range catalogue {
			if i.name == name {
				chosen = append(chosen, i)
				continue next
			}
		}
		return nil, fmt.Errorf("-only: there is no image %q", name)
	}
	return chosen, nil
}
