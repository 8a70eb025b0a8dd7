package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// RootStore keeps the roots of a trust domain, by file name: root.crt and
// root.key, next-root.crt and next-root.key while a rotation is under way, and
// further-roots.crt and distrusted-roots. For a key that RootKeys keeps there is
// root.key-uri with its name. A root of an authority above has no key here, but an
// intermediate that was certified for a key made here: below-root.crt and
// below-root.key, or below-next-root.crt and .key; while another is asked for, its
// key is asked.key. Replicas of a control plane share one.
type RootStore interface {
	// Load returns what was last saved and a version of it; both are zero when
	// nothing was.
	Load(ctx context.Context) (files map[string][]byte, version string, err error)
	// Save replaces what Load returned with that version. It is durable when
	// Save returns. When something else is stored meanwhile, Save returns
	// ErrRootsChanged and changes nothing.
	Save(ctx context.Context, files map[string][]byte, version string) error
	// String names the place, for errors.
	String() string
}

// ErrRootsChanged is returned by RootStore.Save when another replica was first.
var ErrRootsChanged = errors.New("ca: the roots were changed meanwhile")

const (
	rootStoreTime = 10 * time.Second // for one access
	rootPoll      = time.Second      // how often it is looked whether another replica has changed the roots
)

// rootSet is the roots of a trust domain. It is replaced whole.
type rootSet struct {
	signs, next *pair // next is nil but in a rotation
	further     []*x509.Certificate
	distrusted  []Fingerprint // also of roots that are withdrawn
	// below and nextBelow are intermediates of roots whose key is not here.
	below, nextBelow *pair
	asked            crypto.Signer // of the intermediate that is asked for; nil: none is
}

func (s rootSet) bundle() []*x509.Certificate {
	out := []*x509.Certificate{s.signs.cert}
	if s.next != nil {
		out = append(out, s.next.cert)
	}
	return append(out, s.further...)
}

// files is what a RootStore keeps.
func (s rootSet) files() (map[string][]byte, error) {
	out := map[string][]byte{}
	if err := s.addBelow(out); err != nil {
		return nil, err
	}
	for name, p := range map[string]*pair{rootName: s.signs, nextRootName: s.next} {
		if p == nil || p.key == nil {
			continue
		}
		ext, key, err := keyFile(p.key)
		if err != nil {
			return nil, err
		}
		out[name+".crt"], out[name+ext] = encodeCerts(p.cert), key
	}
	if len(s.further) > 0 {
		out[furtherRootsFile] = encodeCerts(s.further...)
	}
	var text bytes.Buffer
	for _, f := range s.distrusted {
		fmt.Fprintln(&text, f)
	}
	if text.Len() > 0 {
		out[distrustedFile] = text.Bytes()
	}
	return out, nil
}

// parseRoots reads and checks what a RootStore kept. A crash between two of a
// directory's files may have left traces: what signs already is neither the next
// root nor a further one.
func parseRoots(td spiffeid.TrustDomain, store RootStore, keys RootKeys, files map[string][]byte, now time.Time) (s rootSet, err error) {
	place := store.String()
	if s.signs, s.below, err = parseRoot(td, place, rootName, files, keys); err != nil {
		return s, err
	}
	if s.signs == nil {
		return s, fmt.Errorf("%s holds no %s.crt and no %s.key; restore them from a copy", place, rootName, rootName)
	}
	if err := checkRoot(td, s.signs.cert, checkedAt(s.signs, now)); err != nil {
		return s, fmt.Errorf("%s: %w", filepath.Join(place, rootName+".crt"), err)
	}
	isRoot := func(c *x509.Certificate) bool { return bytes.Equal(c.Raw, s.signs.cert.Raw) }
	if files[nextRootName+".crt"] != nil { // of a removal that was cut short, the key may be left
		if s.next, s.nextBelow, err = parseRoot(td, place, nextRootName, files, keys); err != nil {
			return s, err
		}
		if isRoot(s.next.cert) {
			s.next, s.nextBelow = nil, nil
		} else if err := checkRoot(td, s.next.cert, checkedAt(s.next, now)); err != nil {
			return s, fmt.Errorf("%s: %w", filepath.Join(place, nextRootName+".crt"), err)
		}
	}
	if text := files[furtherRootsFile]; text != nil {
		path := filepath.Join(place, furtherRootsFile)
		if s.further, err = parseCerts(path, text); err != nil {
			return s, err
		}
		for _, c := range s.further {
			if err := checkFurtherRoot(td, c); err != nil {
				return s, fmt.Errorf("%s: %q: %w", path, c.Subject, err)
			}
		}
		s.further = slices.DeleteFunc(s.further, isRoot)
	}
	if text := files[askedFile]; text != nil {
		if s.asked, err = parseKey(filepath.Join(place, askedFile), text); err != nil {
			return s, err
		}
	}
	for line := range strings.Lines(string(files[distrustedFile])) {
		b, err := hex.DecodeString(strings.TrimSpace(line))
		if err != nil || len(b) != sha256.Size {
			return s, fmt.Errorf("%s: %q is no SHA-256 of a root", filepath.Join(place, distrustedFile), line)
		}
		s.distrusted = append(s.distrusted, Fingerprint(b))
	}
	return s, nil
}

// dirRoots is a RootStore in the authority's directory, which no other authority
// uses.
type dirRoots string

func (d dirRoots) String() string { return string(d) }

func (d dirRoots) Load(context.Context) (map[string][]byte, string, error) {
	files := map[string][]byte{}
	for _, name := range []string{rootName + ".crt", rootName + ".key", rootName + keyNameExt, nextRootName + ".crt", nextRootName + ".key", nextRootName + keyNameExt, furtherRootsFile, distrustedFile} {
		data, err := readFile(filepath.Join(string(d), name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, "", err
		}
		files[name] = data
	}
	return files, "", nil
}

// Save writes in an order in which a crash at any point leaves a state that the
// rotation can go on from: what is trusted comes first, and goes last.
func (d dirRoots) Save(ctx context.Context, files map[string][]byte, _ string) error {
	was, _, err := d.Load(ctx)
	if err != nil {
		return err
	}
	dir := string(d)
	if text := files[distrustedFile]; text != nil && !bytes.Equal(text, was[distrustedFile]) {
		if err := wholefile.Write(filepath.Join(dir, distrustedFile), text); err != nil {
			return err
		}
	}
	further := filepath.Join(dir, furtherRootsFile)
	if text := files[furtherRootsFile]; text != nil && !bytes.Equal(text, was[furtherRootsFile]) {
		if err := wholefile.Write(further, text); err != nil {
			return err
		}
	}
	for _, name := range []string{rootName, nextRootName} {
		crt := files[name+".crt"]
		switch {
		case crt == nil: // only the next root's
			for _, ext := range []string{".crt", ".key", keyNameExt} {
				if err := os.Remove(filepath.Join(dir, name+ext)); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
			}
		case !bytes.Equal(crt, was[name+".crt"]):
			pair := map[string][]byte{}
			for _, ext := range []string{".crt", ".key", keyNameExt} {
				if data := files[name+ext]; data != nil {
					pair[ext] = data
				}
			}
			if err := writePair(dir, name, pair); err != nil {
				return err
			}
		}
	}
	if files[furtherRootsFile] == nil {
		if err := os.Remove(further); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return wholefile.SyncDir(dir)
}
