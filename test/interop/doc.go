// Package interop tests this mesh against other programs that speak its wire.
// They are not part of the ordinary tests, since the other program has to be
// brought along: see `make interop`.
package interop
