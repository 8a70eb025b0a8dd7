package federation

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"
)

// lookAtFiles is how often it is looked whether the files were replaced.
const lookAtFiles = time.Second

// CertificateFiles is an operator's certificate and key, read again when the
// files change. While what they hold makes no sense, the former is used. It is
// safe for concurrent use.
type CertificateFiles struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate // guarded by mu
	looked  time.Time        // guarded by mu
	state   string           // guarded by mu; of the files when they were last read
}

// OpenCertificate reads a certificate chain and its key, both PEM.
func OpenCertificate(cert, key string, log *slog.Logger) (*CertificateFiles, error) {
	c := &CertificateFiles{cert: cert, key: key, log: log}
	state := c.stat()
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("certificate %s with key %s: %w", cert, key, err)
	}
	c.current, c.state, c.looked = &pair, state, time.Now()
	return c, nil
}

// GetCertificate has the form that tls.Config wants.
func (c *CertificateFiles) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.looked) >= lookAtFiles {
		c.looked = now
		if state := c.stat(); state != c.state {
			c.state = state
			pair, err := tls.LoadX509KeyPair(c.cert, c.key)
			if err != nil { // it is tried again when the files change again
				c.log.Error("the new certificate cannot be used; the former stays", "certificate", c.cert, "key", c.key, "error", err)
			} else {
				c.current = &pair
				c.log.Info("the certificate was replaced", "certificate", c.cert)
			}
		}
	}
	return c.current, nil
}

// stat describes the files without reading them.
func (c *CertificateFiles) stat() string {
	var out strings.Builder
	for _, path := range []string{c.cert, c.key} {
		info, err := os.Stat(path)
		if err != nil {
			out.WriteString(err.Error())
			continue
		}
		fmt.Fprint(&out, info.Size(), info.ModTime().UnixNano(), " ")
	}
	return out.String()
}
