// Package hostile shows a corpus of certificates and certificate requests that
// nobody may accept to everybody who judges such things in a mesh: this
// project, go-spiffe, and the real proxy with the configuration that nodes have.
// Who disagrees with whom is listed in docs/hostile.md, and with reasons; the
// tests hold that list to what happens.
package hostile
