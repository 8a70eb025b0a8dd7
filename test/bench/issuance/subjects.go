package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net/url"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

var appID = spiffeid.RequireFromSegments(domain, "ns", "bench", "sa", "app-0-0")

// apiNodes is how many nodes ask the node API at the same time, and atOnce how many
// calls there are under way, of it and of the authority.
const (
	apiNodes = 4
	atOnce   = 16
)

// subjects prepares what is measured: the bare loop first, which the others are
// compared with.
func subjects(ctx context.Context, dir string) ([]subject, func(), error) {
	log := slog.New(slog.NewTextHandler(io.Discard, nil)) //nolint:sloglint // lines are made as in a program that logs, and go nowhere
	authority, err := ca.Open(ca.Options{Dir: filepath.Join(dir, "ca"), TrustDomain: domain, Log: log})
	if err != nil {
		return nil, nil, err
	}
	key, csr, err := newRequest()
	if err != nil {
		return nil, nil, err
	}
	bare, err := newBare(key.Public())
	if err != nil {
		return nil, nil, err
	}
	issue := func() error {
		p, err := authority.Prepare(ca.Request{ID: appID, CSR: csr, TTL: time.Hour, Node: nodeName(0), Workload: "bench/app-0-0"})
		if err != nil {
			return err
		}
		_, err = authority.Issue(p)
		return err
	}
	api, err := startControl(ctx, filepath.Join(dir, "api"), 1, apiNodes, 1)
	if err != nil {
		return nil, nil, err
	}
	done := func() {
		_ = api.stop()
		_ = authority.Close()
	}
	var nodes []*node
	for i := range apiNodes {
		n, err := joinNode(ctx, api, i)
		if err != nil {
			done()
			return nil, nil, err
		}
		nodes = append(nodes, n)
	}
	next := atomic.Int64{}
	ask := func() error {
		i := int(next.Add(1)) % apiNodes
		w := "app-" + string(rune('0'+i)) + "-0"
		_, err := nodes[i].client.Issue(ctx, &nodev1.IssueRequest{Workload: "bench/" + w, Uid: "uid-" + w, Csr: csr})
		return err
	}
	own := func() (time.Duration, error) { return cpuOf("self") }
	return []subject{
			{"bare", "`x509.CreateCertificate` in a loop: a certificate of the same form, signed with a key of the same kind, and nothing else.", turns(1, 1, own, bare)},
			{"authority, 1 caller", "`Prepare` and `Issue`: the request is checked and a trial of the certificate linted, the intent is synced to the disk, the certificate signed, parsed, linted and verified. One at a time, so each waits for the disk.", turns(1, 1, own, issue)},
			{"authority, 16 callers", "the same with 16 callers, who share syncs.", turns(1, atOnce, own, issue)},
			{"node API, 16 callers", "the control plane in a process of its own, asked by 16 callers over 4 connections of 4 nodes, by gRPC and mutual TLS on loopback. The callers have another processor; their CPU is not counted.", turns(runtime.NumCPU(), atOnce, api.cpu, ask)},
		}, func() {
			for _, n := range nodes {
				_ = n.conn.Close()
			}
			done()
		}, nil
}

func newRequest() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

// newBare returns what signs one certificate of the form that package ca gives them.
func newBare(leaf crypto.PublicKey) (func() error, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	self := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "signet intermediate"}, NotBefore: time.Now(), NotAfter: time.Now().Add(7 * 24 * time.Hour),
		URIs: []*url.URL{domain.ID().URL()}, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, self, self, key.Public(), key)
	if err != nil {
		return nil, err
	}
	issuer, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return func() error {
		var serial [16]byte
		if _, err := rand.Read(serial[:]); err != nil {
			return err
		}
		now := time.Now()
		_, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: new(big.Int).SetBytes(serial[:]), NotBefore: now, NotAfter: now.Add(time.Hour), URIs: []*url.URL{appID.URL()},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
		}, issuer, leaf, key)
		return err
	}, nil
}

// turns measures f by a number of callers, with this process on so many processors.
func turns(processors, callers int, cpu func() (time.Duration, error), f func() error) func(context.Context, time.Duration) (turn, error) {
	return func(ctx context.Context, d time.Duration) (turn, error) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(processors))
		before, err := cpu()
		if err != nil {
			return turn{}, err
		}
		began := time.Now()
		var issued atomic.Int64
		var failed atomic.Pointer[error]
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				for time.Since(began) < d && ctx.Err() == nil && failed.Load() == nil {
					if err := f(); err != nil {
						failed.Store(&err)
						return
					}
					issued.Add(1)
				}
			})
		}
		wg.Wait()
		out := turn{issued: int(issued.Load()), wall: time.Since(began)}
		if err := failed.Load(); err != nil {
			return out, *err
		}
		after, err := cpu()
		out.cpu = after - before
		return out, err
	}
}
