package svid

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
)

// cache is a directory with one file for each identity, named by the hash of
// the SPIFFE ID, and one for the trust bundle. A key and its certificate are
// in the same file, so that they cannot come apart.
type cache struct {
	dir string
	log *slog.Logger

	mu     sync.Mutex
	bundle []byte // guarded by mu; what the bundle file holds
}

const (
	bundleFile   = "bundle.json"
	tempPrefix   = ".svid-"
	maxCacheFile = 1 << 20
)

var svidFile = regexp.MustCompile(`^[0-9a-f]{64}\.json$`)

type cachedSVID struct {
	ID        spiffeid.ID `json:"id"`
	Workloads []string    `json:"workloads"`
	Chain     [][]byte    `json:"chain"` // DER
	Key       []byte      `json:"key"`   // PKCS#8, DER
	RenewAt   time.Time   `json:"renewAt"`
}

type cachedBundle struct {
	TrustDomain spiffeid.TrustDomain `json:"trustDomain"`
	Roots       [][]byte             `json:"roots"` // DER
}

// openCache prepares the directory, and returns nil when keys cannot be kept
// there safely.
func openCache(dir string, log *slog.Logger) *cache {
	log = log.With("dir", dir)
	if err := privateDir(dir); err != nil {
		log.Error("certificates are not kept on disk; a restart will need the control plane", "error", err)
		return nil
	}
	c := &cache{dir: dir, log: log}
	c.removeLeftovers()
	return c
}

// removeLeftovers removes what interrupted writes left behind: they may hold
// keys.
func (c *cache) removeLeftovers() {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		c.log.Error("the certificate cache cannot be listed", "error", err)
		return
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		if err := os.Remove(filepath.Join(c.dir, e.Name())); err != nil {
			c.log.Error("the rest of an interrupted write could not be removed", "file", e.Name(), "error", err)
		}
	}
}

// privateDir makes dir with mode 0700, or takes the access of others away.
func privateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(dir)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory", dir)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	if int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to uid %d; it must belong to uid %d, which the agent runs as", dir, st.Uid, os.Geteuid())
	}
	return os.Chmod(dir, 0o700)
}

func fileOf(id spiffeid.ID) string {
	sum := sha256.Sum256([]byte(id.String()))
	return hex.EncodeToString(sum[:]) + ".json"
}

// load reads everything that is whole and valid at the instant now, and logs
// what it leaves out.
func (c *cache) load(now time.Time) (spiffeid.TrustDomain, []*x509.Certificate, []*SVID) {
	td, roots, err := c.loadBundle()
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			c.log.Warn("the cached trust bundle is not usable, nor are the certificates beside it", "error", err)
		}
		return spiffeid.TrustDomain{}, nil, nil
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		c.log.Warn("the certificate cache cannot be listed", "error", err)
		return td, roots, nil
	}
	var out []*SVID
	for _, e := range entries {
		if !svidFile.MatchString(e.Name()) {
			continue
		}
		s, err := c.loadSVID(e.Name(), td, roots, now)
		if err != nil {
			c.log.Warn("a cached certificate is ignored", "file", e.Name(), "error", err)
			continue
		}
		out = append(out, s)
	}
	c.log.Info("took certificates from the cache", "count", len(out))
	return td, roots, out
}

func (c *cache) loadBundle() (spiffeid.TrustDomain, []*x509.Certificate, error) {
	raw, err := c.read(bundleFile)
	if err != nil {
		return spiffeid.TrustDomain{}, nil, err
	}
	var b cachedBundle
	if err := json.Unmarshal(raw, &b); err != nil {
		return spiffeid.TrustDomain{}, nil, err
	}
	if b.TrustDomain.IsZero() || len(b.Roots) == 0 {
		return spiffeid.TrustDomain{}, nil, errors.New("trust domain or roots are missing")
	}
	var roots []*x509.Certificate
	for _, der := range b.Roots {
		r, err := x509.ParseCertificate(der)
		if err != nil {
			return spiffeid.TrustDomain{}, nil, err
		}
		roots = append(roots, r)
	}
	c.bundle = raw
	return b.TrustDomain, roots, nil
}

func (c *cache) loadSVID(name string, td spiffeid.TrustDomain, roots []*x509.Certificate, now time.Time) (*SVID, error) {
	raw, err := c.read(name)
	if err != nil {
		return nil, err
	}
	var e cachedSVID
	if err := json.Unmarshal(raw, &e); err != nil {
		return nil, err
	}
	switch {
	case e.ID.IsZero() || fileOf(e.ID) != name:
		return nil, fmt.Errorf("the file of another identity (%s)", e.ID)
	case e.ID.TrustDomain() != td:
		return nil, fmt.Errorf("%s is not of trust domain %s", e.ID, td)
	case len(e.Workloads) == 0:
		return nil, errors.New("no workload is named")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(e.Key)
	if err != nil {
		return nil, errors.New("the key cannot be read") // the cause may quote key bytes
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, errors.New("the key cannot sign")
	}
	leaf, err := check(e.ID, key.Public(), e.Chain, roots, now)
	if err != nil {
		return nil, err
	}
	if e.RenewAt.After(leaf.NotAfter) {
		e.RenewAt = now
	}
	return newSVID(e.ID, leaf, e.Chain, key, e.RenewAt).held(e.Workloads), nil
}

// read refuses links and files that others may read: a key that was exposed
// is not used again.
func (c *cache) read(name string) ([]byte, error) {
	f, err := os.OpenFile(filepath.Join(c.dir, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("not a regular file")
	case info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("mode %04o lets group or others in", info.Mode().Perm())
	case info.Size() > maxCacheFile:
		return nil, fmt.Errorf("%d bytes; at most %d are read", info.Size(), maxCacheFile)
	}
	return io.ReadAll(io.LimitReader(f, maxCacheFile))
}

// put keeps a certificate. It is on disk when put returns; a failure is
// logged, since the certificate in memory is as good.
func (c *cache) put(s *SVID) {
	der, err := s.PKCS8()
	if err == nil {
		err = c.writeJSON(fileOf(s.ID), cachedSVID{ID: s.ID, Workloads: s.Workloads, Chain: s.Chain, Key: der, RenewAt: s.RenewAt})
	}
	if err != nil {
		c.log.Error("a certificate could not be kept on disk", "id", s.ID, "error", err)
	}
}

// putBundle keeps the roots, without which cached certificates are not
// believed.
func (c *cache) putBundle(td spiffeid.TrustDomain, roots []*x509.Certificate) {
	b := cachedBundle{TrustDomain: td}
	for _, r := range roots {
		b.Roots = append(b.Roots, r.Raw)
	}
	raw, err := json.Marshal(b)
	if err != nil {
		c.log.Error("the trust bundle could not be kept on disk", "error", err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if string(raw) == string(c.bundle) {
		return
	}
	if err := c.write(bundleFile, raw); err != nil {
		c.log.Error("the trust bundle could not be kept on disk", "error", err)
		return
	}
	c.bundle = raw
}

// keepOnly removes the files of identities that are not held. No put may run
// for one of those.
func (c *cache) keepOnly(holders map[spiffeid.ID]*holder) {
	keep := make(map[string]bool, len(holders))
	for id := range holders {
		keep[fileOf(id)] = true
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		c.log.Error("the certificate cache cannot be listed", "error", err)
		return
	}
	for _, e := range entries {
		name := e.Name()
		if keep[name] || !svidFile.MatchString(name) {
			continue
		}
		if err := os.Remove(filepath.Join(c.dir, name)); err != nil {
			c.log.Error("a key that is no longer needed could not be removed", "file", name, "error", err)
		}
	}
}

func (c *cache) writeJSON(name string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.write(name, raw)
}

// write replaces a file whole: after a crash it holds the old content or the
// new.
func (c *cache) write(name string, raw []byte) error {
	f, err := os.CreateTemp(c.dir, tempPrefix+"*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(raw)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(c.dir, name)); err != nil {
		return err
	}
	d, err := os.Open(c.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
