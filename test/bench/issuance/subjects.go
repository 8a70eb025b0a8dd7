package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/url"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/svid"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

var appID = spiffeid.RequireFromSegments(domain, "ns", "bench", "sa", "app-0-0")

// apiNodes is how many nodes ask the node API at the same time, and atOnce how many
// calls there are under way, of it and of the authority; aCall is how many
// certificates a batch is for.
const (
	apiNodes = 4
	atOnce   = 16
	aCall    = 20
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
	request := ca.Request{ID: appID, CSR: csr, TTL: time.Hour, Node: nodeName(0), Workload: "bench/app-0-0"}
	issue := func() error {
		p, err := authority.Prepare(request)
		if err != nil {
			return err
		}
		_, err = authority.Issue(p)
		return err
	}
	issueMany := func() error {
		list := make([]*ca.Prepared, aCall)
		for i := range list {
			var err error
			if list[i], err = authority.Prepare(request); err != nil {
				return err
			}
		}
		for _, r := range authority.IssueMany(list) {
			if r.Err != nil {
				return r.Err
			}
		}
		return nil
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
	asker := func() (nodev1.NodeClient, *nodev1.IssueRequest) {
		i := int(next.Add(1)) % apiNodes
		w := "app-" + string(rune('0'+i)) + "-0"
		return nodes[i].client, &nodev1.IssueRequest{Workload: "bench/" + w, Uid: "uid-" + w, Csr: csr}
	}
	ask := func() error {
		client, request := asker()
		_, err := client.Issue(ctx, request)
		return err
	}
	askMany := func() error {
		client, request := asker()
		answers, err := svid.AskMany(ctx, client, slices.Repeat([]*nodev1.IssueRequest{request}, aCall))
		for _, a := range answers {
			err = errors.Join(err, a.Err)
		}
		return err
	}
	own := func() (time.Duration, error) { return cpuOf("self") }
	return []subject{
			{"bare", "`x509.CreateCertificate` in a loop: a certificate of the same form, signed with a key of the same kind, and nothing else. It verifies its signature.", turns(1, 1, 1, own, bare)},
			{"authority, 1 caller", "`Prepare` and `Issue`: the request is checked, the certificate built without a key and linted, the intent is synced to the disk, the certificate signed, its signature verified, and its bytes compared. One at a time, so each waits for the disk.", turns(1, 1, 1, own, issue)},
			{"authority, 16 callers", "the same with 16 callers, who share syncs.", turns(1, atOnce, 1, own, issue)},
			{fmt.Sprintf("authority, %d at once", aCall), fmt.Sprintf("`Prepare` for each and `IssueMany` for %d, by one caller: all intents are synced together before the first is signed.", aCall), turns(1, 1, aCall, own, issueMany)},
			{"node API, 16 callers", "the control plane in a process of its own, asked by 16 callers over 4 connections of 4 nodes, by gRPC and mutual TLS on loopback. The callers have another processor; their CPU is not counted.", turns(runtime.NumCPU(), atOnce, 1, api.cpu, ask)},
			{fmt.Sprintf("node API, %d a call", aCall), fmt.Sprintf("the same callers, each of whose calls is for %d certificates, as an agent asks when many are due at once.", aCall), turns(runtime.NumCPU(), atOnce, aCall, api.cpu, askMany)},
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

// turns measures f, which issues a number of certificates, by a number of callers, with
// this process on so many processors.
func turns(processors, callers, each int, cpu func() (time.Duration, error), f func() error) func(context.Context, time.Duration) (turn, error) {
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
					issued.Add(int64(each))
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
