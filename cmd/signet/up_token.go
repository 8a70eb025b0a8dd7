package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// How often it is looked whether the agent must join again, and the time that
// it is given to use a token for it.
const (
	lookForExpiry = time.Second
	useToken      = 30 * time.Second
)

// writeToken makes a token with which the agent joins.
func (m *machine) writeToken() error {
	token, err := m.tokens.Create(m.node, 10*time.Minute)
	if err != nil {
		return err
	}
	return wholefile.Write(m.tokenFile(), []byte(token))
}

// keepToken gives the agent a token whenever the certificate of the node has
// expired, until ctx ends: nothing is left to renew that with, after a machine
// was suspended for long, and the token of the agent's start is spent.
func (m *machine) keepToken(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(lookForExpiry)
	defer tick.Stop()
	var given time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		expired, ok := expiryOf(filepath.Join(m.agentState(), "node.pem"))
		if !ok || time.Now().Before(expired) || !given.IsZero() && time.Since(given) < useToken {
			continue
		}
		if err := m.writeToken(); err != nil {
			log.Error("the node's certificate has expired, and the agent cannot be given a token to join again", "error", err)
			continue
		}
		given = time.Now()
		log.Warn("the node's certificate has expired, as after a suspend or with a clock set ahead; the agent has a new token to join again", "expired", expired)
	}
}

// expiryOf returns until when the first certificate of a file is valid.
func expiryOf(path string) (time.Time, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return time.Time{}, false
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return time.Time{}, false
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return time.Time{}, false
	}
	return cert.NotAfter, true
}
