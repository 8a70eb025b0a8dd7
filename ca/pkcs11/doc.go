// Package pkcs11 keeps the keys of roots in a PKCS#11 token. It needs cgo; without,
// it is there to say so.
package pkcs11
