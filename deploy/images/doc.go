// Command images builds the container images of a release without a container
// engine: Go programs, Envoy and the C library that Envoy is linked with, on
// nothing else. Each image is one archive for all architectures in the layout
// of the Open Container Initiative, and the same sources give the same digest,
// on any machine.
package main
