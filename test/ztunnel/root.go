package ztunnel

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// EnvRoot names a directory with the root of the ztunnel's built-in authority,
// as root-cert.pem and ca-key.pem (the names in ztunnel's own source), for a
// program in which ReadRoot cannot find it.
const EnvRoot = "ZTUNNEL_ROOT"

// Root is the root certificate of a ztunnel's built-in test authority, with its
// key, both PEM.
type Root struct {
	Cert, Key []byte
}

// ReadRoot returns the root under which the program signs when it runs with its
// built-in authority: from the directory that EnvRoot names, or else out of the
// program itself, which carries both as text.
func ReadRoot(program string) (Root, error) {
	if dir := os.Getenv(EnvRoot); dir != "" {
		cert, err := os.ReadFile(filepath.Join(dir, "root-cert.pem"))
		if err != nil {
			return Root{}, fmt.Errorf("%s: %w", EnvRoot, err)
		}
		key, err := os.ReadFile(filepath.Join(dir, "ca-key.pem"))
		if err != nil {
			return Root{}, fmt.Errorf("%s: %w", EnvRoot, err)
		}
		return Root{cert, key}, nil
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return Root{}, err
	}
	r, err := findRoot(data)
	if err != nil {
		return Root{}, fmt.Errorf("%s: %w: build it with --features testing, or set %s to a directory with root-cert.pem and ca-key.pem", program, err, EnvRoot)
	}
	return r, nil
}

// findRoot looks through a program for a self-signed certificate and its key.
func findRoot(data []byte) (Root, error) {
	keys := map[string][]byte{} // PEM by public key
	for block := range blocks(data, "PRIVATE KEY") {
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			continue // something that only looks like one
		}
		if signer, ok := key.(crypto.Signer); ok {
			if pub, err := x509.MarshalPKIXPublicKey(signer.Public()); err == nil {
				keys[string(pub)] = pem.EncodeToMemory(block)
			}
		}
	}
	for block := range blocks(data, "CERTIFICATE") {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil || !cert.IsCA || cert.CheckSignatureFrom(cert) != nil {
			continue
		}
		if key := keys[string(cert.RawSubjectPublicKeyInfo)]; key != nil {
			return Root{pem.EncodeToMemory(block), key}, nil
		}
	}
	return Root{}, errors.New("has no root certificate with its key in it")
}

// blocks yields the PEM blocks of a type, wherever in data they begin.
func blocks(data []byte, kind string) func(func(*pem.Block) bool) {
	begin := []byte("-----BEGIN " + kind + "-----")
	return func(yield func(*pem.Block) bool) {
		for {
			at := bytes.Index(data, begin)
			if at < 0 {
				return
			}
			data = data[at:]
			// A block is small; the rest of the program need not be searched.
			if block, _ := pem.Decode(data[:min(len(data), 16<<10)]); block != nil && block.Type == kind && !yield(block) {
				return
			}
			data = data[len(begin):]
		}
	}
}

// Install makes the root that of an authority which keeps its keys in dir. Call
// it before the authority starts for the first time.
func (r Root) Install(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "root.crt"), r.Cert, 0o600),
		os.WriteFile(filepath.Join(dir, "root.key"), r.Key, 0o600))
}
