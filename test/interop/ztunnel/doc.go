// Package ztunnel tests this mesh against Istio's ztunnel, the other program
// that speaks its wire. The tests are not part of the ordinary ones, since the
// other program has to be brought along: see `make interop`.
package ztunnel
