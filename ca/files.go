package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// Names in the authority's directory. A pair is <name>.crt and <name>.key.
const (
	rootName         = "root"
	nextRootName     = "next-root"
	intermediateName = "intermediate"
	furtherRootsFile = "further-roots.crt"
	distrustedFile   = "distrusted-roots"
	logFile          = "issuance.log"
	lockFile         = "lock"
)

// minRSABits is the smallest RSA modulus that is accepted anywhere.
const minRSABits = 2048

// secureDir makes dir (0700) when it is missing, and refuses one that others
// than its owner may write to or read.
func secureDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s: not a directory", dir)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%s: mode %04o lets group or others in; run: chmod 700 %s", dir, perm, dir)
	}
	return nil
}

// lockDir takes the lock that keeps a second authority out of dir. The lock
// ends with the process, however it ends.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: another authority uses this directory; stop it first (%w)", path, err)
	}
	return f, nil
}

// writePair replaces a certificate and its key, or the name of that, as one: both
// are written to a staging directory whose rename commits them, and finishPair
// moves them into place, now or after a crash. The files are by what their names
// have beyond that of the pair.
func writePair(dir, name string, files map[string][]byte) error {
	tmp, err := os.MkdirTemp(dir, wholefile.TempPattern) // mode 0700
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for ext, data := range files {
		if err := wholefile.Write(filepath.Join(tmp, name+ext), data); err != nil {
			return err
		}
	}
	if err := os.Rename(tmp, stagingDir(dir, name)); err != nil {
		return err
	}
	if err := wholefile.SyncDir(dir); err != nil {
		return err
	}
	return finishPair(dir, name)
}

// finishPair completes a writePair that was committed; it does nothing when
// there is none.
func finishPair(dir, name string) error {
	staging := stagingDir(dir, name)
	if _, err := os.Stat(staging); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	// The key of before goes first, where the new one is of the other kind.
	for ext, other := range map[string]string{".key": keyNameExt, keyNameExt: ".key"} {
		if _, err := os.Stat(filepath.Join(staging, name+ext)); err != nil {
			continue
		}
		if err := os.Remove(filepath.Join(dir, name+other)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, ext := range []string{".key", keyNameExt, ".crt"} {
		err := os.Rename(filepath.Join(staging, name+ext), filepath.Join(dir, name+ext))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // already moved
			return err
		}
	}
	if err := wholefile.SyncDir(dir); err != nil {
		return err
	}
	return os.RemoveAll(staging)
}

// removeLeftovers removes temporary files of writes that a crash cut short;
// they may hold keys that were never used.
func removeLeftovers(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, wholefile.TempPattern))
	if err != nil {
		return err
	}
	for _, path := range paths {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	return nil
}

func stagingDir(dir, name string) string { return filepath.Join(dir, ".new-"+name) }

// pair is a CA certificate with its key.
type pair struct {
	cert *x509.Certificate
	key  crypto.Signer // nil: of a root that is an authority's above
	// above stands between an intermediate and its root.
	above []*x509.Certificate
}

// readPair loads <name>.crt and <name>.key. It returns nil when neither
// exists, and an error when only one does.
func readPair(dir, name string) (*pair, error) {
	files := map[string][]byte{}
	for _, ext := range []string{".crt", ".key"} {
		data, err := readFile(filepath.Join(dir, name+ext))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		files[name+ext] = data
	}
	return parsePair(dir, name, files)
}

// readFile reads a file of the authority. A private key that others than its
// owner can read is refused.
func readFile(path string) ([]byte, error) {
	if filepath.Ext(path) == ".key" {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if perm := info.Mode().Perm(); perm&0o077 != 0 {
			return nil, fmt.Errorf("%s: mode %04o lets group or others at the private key; run: chmod 600 %s, and replace the key if it may have been read", path, perm, path)
		}
	}
	return os.ReadFile(path)
}

// parsePair reads <name>.crt and <name>.key of a place. It returns nil when there
// is neither, and an error when there is only one.
func parsePair(place, name string, files map[string][]byte) (*pair, error) {
	crtPath, keyPath := filepath.Join(place, name+".crt"), filepath.Join(place, name+".key")
	crt, hasCrt := files[name+".crt"]
	text, hasKey := files[name+".key"]
	switch {
	case !hasCrt && !hasKey:
		return nil, nil
	case !hasCrt:
		return nil, fmt.Errorf("%s exists but %s does not; put the certificate beside its key, or remove the key", keyPath, crtPath)
	case !hasKey:
		return nil, fmt.Errorf("%s exists but %s does not; put the key beside its certificate, or remove the certificate", crtPath, keyPath)
	}
	certs, err := parseCerts(crtPath, crt)
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("%s: holds %d certificates; exactly one is needed", crtPath, len(certs))
	}
	key, err := parseKey(keyPath, text)
	if err != nil {
		return nil, err
	}
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(certs[0].PublicKey) {
		return nil, fmt.Errorf("%s is not the key of %s; restore the pair that belongs together", keyPath, crtPath)
	}
	return &pair{cert: certs[0], key: key}, nil
}

// parseKey reads one private key: PKCS#8, PKCS#1 or SEC 1, in PEM.
func parseKey(path string, data []byte) (crypto.Signer, error) {
	var block *pem.Block
	for {
		block, data = pem.Decode(data)
		if block == nil {
			return nil, fmt.Errorf("%s: no private key in PEM found", path)
		}
		if block.Type != "EC PARAMETERS" { // openssl writes these before a key
			break
		}
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("%s: PEM block %q; want an unencrypted private key in PKCS#8", path, block.Type)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		return k, nil
	case *rsa.PrivateKey:
		if k.N.BitLen() < minRSABits {
			return nil, fmt.Errorf("%s: RSA key of %d bits; at least %d are needed", path, k.N.BitLen(), minRSABits)
		}
		return k, nil
	}
	return nil, fmt.Errorf("%s: key kind %T; use ECDSA or RSA, which every peer can verify", path, key)
}

// parseCerts reads the certificates of PEM text.
func parseCerts(path string, data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: PEM block %q; only certificates belong here", path, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s: no certificate in PEM found", path)
	}
	return certs, nil
}

func encodeCerts(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
