// Package spire tests this mesh against a trust domain that SPIRE runs, the
// reference implementation of SPIFFE. The tests are not part of the ordinary
// ones, since the other program has to be brought along: see `make interop`.
package spire
