// Command images builds the container images that the tests of a cluster and
// examples/shop run, without a container engine:
//
//	go run ./test/images [-o DIR] [NAME...]
//
// It prints one line for each image: its reference, a tab, and the archive.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/signet-mesh/signet/test/images/catalogue"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("images", flag.ContinueOnError)
	o := catalogue.Options{Log: os.Stderr}
	f.StringVar(&o.Dir, "o", "", "folder for the archives (default .cache/test-images in the project)")
	if err := f.Parse(args); err != nil {
		return err
	}
	images, err := catalogue.Build(ctx, o, f.Args()...)
	if err != nil {
		return err
	}
	for _, i := range images {
		fmt.Printf("%s\t%s\n", i.Reference, i.Archive)
	}
	return nil
}
