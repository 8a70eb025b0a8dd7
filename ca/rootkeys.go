package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// RootKeys makes and keeps the private keys of roots where they cannot be read,
// such as a PKCS#11 token. Every call ends in bounded time, with an error if what
// is behind it does not answer. It is safe for concurrent use.
type RootKeys interface {
	// Name returns a name, one word, for a key that is to be made. No other key
	// has it.
	Name() (string, error)
	// Make makes a key. After an error it may be there nevertheless, or come to
	// be there later.
	Make(name string) (crypto.PublicKey, error)
	// Sign signs a digest, as crypto.Signer does.
	Sign(name string, digest []byte, opts crypto.SignerOpts) ([]byte, error)
	// Destroy destroys a key; that there is none is no error.
	Destroy(name string) error
	// String names the place, for errors.
	String() string
}

// ErrNoRetry is wrapped in errors that another try does not mend, and may make
// worse: a token locks itself after a few wrong PINs. Open then fails.
var ErrNoRetry = errors.New("it is not tried again")

const (
	// keyNameExt is the file in the place of a root's .key whose key RootKeys keeps.
	keyNameExt = ".key-uri"
	// madeKeysFile lists the keys that were made in a token and not yet destroyed.
	madeKeysFile = "token-keys"
)

// heldKey is a key that RootKeys keeps. It implements crypto.Signer.
type heldKey struct {
	keys RootKeys
	name string
	pub  crypto.PublicKey
}

func (k *heldKey) Public() crypto.PublicKey { return k.pub }

func (k *heldKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.keys.Sign(k.name, digest, opts)
}

var errNotTheKey = errors.New("its signature does not verify with the certificate; name the key that belongs to it")

// prove has the key sign something that nobody has chosen.
func (k *heldKey) prove() error {
	var nonce [32]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return err
	}
	digest := sha256.Sum256(append([]byte("signet: is this the root's key? "), nonce[:]...))
	sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	good := false
	switch pub := k.pub.(type) {
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(pub, digest[:], sig)
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], sig) == nil
	}
	if !good {
		return errNotTheKey
	}
	return nil
}

// rootPair reads a root with its key, which is in files or, by its name there,
// where keys keeps it. It returns nil when there is neither.
func rootPair(place, name string, files map[string][]byte, keys RootKeys) (*pair, error) {
	text, held := files[name+keyNameExt]
	if !held {
		return parsePair(place, name, files)
	}
	crtPath, namePath := filepath.Join(place, name+".crt"), filepath.Join(place, name+keyNameExt)
	switch {
	case files[name+".key"] != nil:
		return nil, fmt.Errorf("%s and %s both exist; remove the one that is not the key of %s", filepath.Join(place, name+".key"), namePath, crtPath)
	case files[name+".crt"] == nil:
		return nil, fmt.Errorf("%s exists but %s does not; put the certificate beside it, or remove it", namePath, crtPath)
	case keys == nil:
		return nil, fmt.Errorf("%s: the key of %s is in a token; name the token with --root-key", namePath, crtPath)
	}
	certs, err := parseCerts(crtPath, files[name+".crt"])
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("%s: holds %d certificates; exactly one is needed", crtPath, len(certs))
	}
	switch pub := certs[0].PublicKey.(type) {
	case *ecdsa.PublicKey:
	case *rsa.PublicKey:
		if pub.N.BitLen() < minRSABits {
			return nil, fmt.Errorf("%s: RSA key of %d bits; at least %d are needed", crtPath, pub.N.BitLen(), minRSABits)
		}
	default:
		return nil, fmt.Errorf("%s: key kind %T; use ECDSA or RSA, which every peer can verify", crtPath, pub)
	}
	return &pair{cert: certs[0], key: &heldKey{keys, strings.TrimSuffix(string(text), "\n"), certs[0].PublicKey}}, nil
}

// keyFile returns the file that stands for a root's key: its name beyond that of
// the root, and what is in it.
func keyFile(key crypto.Signer) (ext string, data []byte, err error) {
	if held, ok := key.(*heldKey); ok {
		return keyNameExt, []byte(held.name + "\n"), nil
	}
	data, err = encodeKey(key)
	return ".key", data, err
}

// makeRoot makes a root with a key of its own.
func (a *Authority) makeRoot() (*pair, error) {
	if a.rootKeys == nil {
		return newRoot(a.td, a.now(), a.rootTTL)
	}
	name, err := a.rootKeys.Name()
	if err != nil {
		return nil, err
	}
	// Before the key is there, so that a crash leaves none that nobody knows.
	made, err := a.madeKeys()
	if err == nil {
		err = a.saveMadeKeys(append(made, name))
	}
	if err != nil {
		return nil, fmt.Errorf("note the key that is to be made: %w", err)
	}
	pub, err := a.rootKeys.Make(name)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return selfSigned(a.td, a.now(), a.rootTTL, &heldKey{a.rootKeys, name, pub})
}

// madeKeys returns the names of the keys that were made here and may be there.
func (a *Authority) madeKeys() ([]string, error) {
	text, err := os.ReadFile(filepath.Join(a.dir, madeKeysFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(text)), err
}

func (a *Authority) saveMadeKeys(names []string) error {
	var text bytes.Buffer
	for _, name := range names {
		fmt.Fprintln(&text, name)
	}
	return wholefile.Write(filepath.Join(a.dir, madeKeysFile), text.Bytes())
}

// destroyUnused destroys the keys that were made here and that no stored root has
// any more. Keys that an operator has made are the operator's to destroy. The
// caller holds rootsMu, and has seen that what it stored is stored whole. What
// fails is tried again after the next step, and at the next start.
func (a *Authority) destroyUnused(files map[string][]byte) {
	if a.rootKeys == nil {
		return
	}
	made, err := a.madeKeys()
	if err != nil {
		a.log.Error("keys that are used no more stay in the token", "err", err)
		return
	}
	used := map[string]bool{}
	for _, root := range []string{rootName, nextRootName} {
		used[strings.TrimSuffix(string(files[root+keyNameExt]), "\n")] = true
	}
	left := slices.DeleteFunc(slices.Clone(made), func(name string) bool {
		if used[name] {
			return false
		}
		if err := a.rootKeys.Destroy(name); err != nil {
			a.log.Error("a root's key that is used no more could not be destroyed; it is tried again", "key", name, "err", err)
			return false
		}
		a.log.Info("a root's key was destroyed", "key", name)
		return true
	})
	if len(left) == len(made) {
		return
	}
	if err := a.saveMadeKeys(left); err != nil {
		a.log.Error("the list of keys in the token could not be stored", "err", err)
	}
}

// proveRoots has the keys that are not here sign something. A place that is away
// does not keep the authority from opening: the intermediate signs.
func (a *Authority) proveRoots(set rootSet) error {
	for name, p := range map[string]*pair{rootName: set.signs, nextRootName: set.next} {
		if p == nil {
			continue
		}
		held, ok := p.key.(*heldKey)
		if !ok {
			if a.rootKeys != nil && name == rootName {
				a.log.Warn("the key of the root that signs is in a file; the next root's will be in the token: replace the root with `signet ca rotate`", "token", a.rootKeys.String())
			}
			continue
		}
		err := held.prove()
		switch {
		case errors.Is(err, ErrNoRetry) || errors.Is(err, errNotTheKey):
			return fmt.Errorf("the key of %s: %s: %w", name+".crt", held.name, err)
		case err != nil:
			a.log.Error("a root's key cannot be used; the present intermediate signs for as long as it is valid", "root", name, "key", held.name, "err", err)
		}
	}
	return nil
}
