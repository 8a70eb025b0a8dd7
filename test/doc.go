// Package test holds what is true of the whole project: which package may
// import which, and how packages are documented.
package test
