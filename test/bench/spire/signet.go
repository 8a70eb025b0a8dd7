package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-mesh/signet/agent/svid"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/test/harness"
)

const (
	signetAddress = "127.0.0.1:18443"
	shmAddress    = "127.0.0.1:18444"
)

var signetTD = spiffeid.RequireTrustDomainFromString("mesh.test")

// signet starts control planes: one as it is run, and one whose issuance log is
// in memory, which shows what the disk costs.
func (b *bench) signet(ctx context.Context) error {
	if err := b.controlPlane(ctx, "signet", filepath.Join(b.dir, "signet"), signetAddress,
		"`signet-control`, node API `Issue`, one certificate a call; each is in the issuance log, synced to the disk, before it is signed, and in the log"); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/dev/shm", "bench-spire-")
	if err != nil {
		return err
	}
	b.stops = append(b.stops, func() { _ = os.RemoveAll(dir) })
	return b.controlPlane(ctx, "signet, log in memory", dir, shmAddress, "the same with its state directory on a tmpfs, where syncing costs nothing")
}

func (b *bench) controlPlane(ctx context.Context, name, dir, address, about string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	documents, state := filepath.Join(dir, "mesh.yaml"), filepath.Join(dir, "state")
	if err := os.WriteFile(documents, []byte(b.documents()), 0o600); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	cmd := exec.Command(harness.Bin("signet-control"), "--config", documents, "--node", "n0", "--state-dir", state,
		"--run-dir", filepath.Join(dir, "run"), "--listen", address)
	cmd.Env = append(os.Environ(), oneProcessor...)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = cmd.Wait() }()
	b.stops = append(b.stops, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		force := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
		<-done
		force.Stop()
		_ = log.Close()
	})
	one := &subject{name: name, about: about, pid: cmd.Process.Pid}
	many := &subject{name: fmt.Sprintf("%s, %d a call", name, workloads), pid: cmd.Process.Pid,
		about: fmt.Sprintf("the same control plane and clients as `%s`, node API `IssueMany`, %d certificates a call, as an agent asks when many are due at once; latency is a call's", name, workloads)}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for i := range b.clients {
		client, err := b.node(ctx, state, address, i)
		for ; err != nil; client, err = b.node(ctx, state, address, i) { // it is starting
			if ctx.Err() != nil {
				said, _ := os.ReadFile(log.Name())
				return fmt.Errorf("%s: %w\n%s", name, err, said)
			}
			time.Sleep(100 * time.Millisecond)
		}
		one.clients = append(one.clients, b.askOne(client, i))
		many.clients = append(many.clients, b.askMany(client, i))
	}
	b.subjects = append(b.subjects, one, many)
	return onProcessors(cmd.Process.Pid, 0, 1)
}

// documents are a mesh with as many nodes as there are clients.
func (b *bench) documents() string {
	var text strings.Builder
	text.WriteString(harness.Config("1h") + harness.Namespace("bench", "enforce"))
	for i := range b.clients {
		for j := range workloads {
			fmt.Fprintf(&text, `apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: w%[1]d-%[2]d, namespace: bench}
spec: {serviceAccount: w%[1]d-%[2]d, node: n%[1]d, attest: {uid: %[3]d}}
---
`, i, j, 10000+i*workloads+j)
		}
	}
	return text.String()
}

// node joins a node and connects as it.
func (b *bench) node(ctx context.Context, state, address string, i int) (nodev1.NodeClient, error) {
	tokens, err := caserver.OpenTokens(control.TokenDir(state))
	if err != nil {
		return nil, err
	}
	token, err := tokens.Create(fmt.Sprintf("n%d", i), time.Minute)
	if err != nil {
		return nil, err
	}
	roots, err := x509bundle.Load(signetTD, control.RootFile(state))
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	dial := func(certificate func() (*tls.Certificate, error)) (*grpc.ClientConn, error) {
		config, err := caserver.ClientTLS(caserver.ClientConfig{TrustDomain: signetTD, Bundle: roots, Certificate: certificate})
		if err != nil {
			return nil, err
		}
		return grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	}
	stranger, err := dial(nil)
	if err != nil {
		return nil, err
	}
	defer stranger.Close()
	joined, err := nodev1.NewNodeClient(stranger).Join(ctx, &nodev1.JoinRequest{Token: token, Csr: csr})
	if err != nil {
		return nil, err
	}
	conn, err := dial(func() (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: joined.GetChain(), PrivateKey: key}, nil
	})
	if err != nil {
		return nil, err
	}
	b.stops = append(b.stops, func() { _ = conn.Close() })
	return nodev1.NewNodeClient(conn), nil
}

// askOne asks as node i for one certificate in a call.
func (b *bench) askOne(client nodev1.NodeClient, i int) issuer {
	return func(ctx context.Context, n int) ([][]byte, error) {
		resp, err := client.Issue(ctx, &nodev1.IssueRequest{Workload: fmt.Sprintf("bench/w%d-%d", i, n%workloads), Csr: b.csr(i, n)})
		if err != nil {
			return nil, err
		}
		if len(resp.GetChain()) == 0 {
			return nil, errors.New("an empty chain")
		}
		return resp.GetChain()[:1], nil
	}
}

// askMany asks as node i for a certificate of each of its workloads in a call.
func (b *bench) askMany(client nodev1.NodeClient, i int) issuer {
	return func(ctx context.Context, n int) ([][]byte, error) {
		requests := make([]*nodev1.IssueRequest, workloads)
		for j := range requests {
			requests[j] = &nodev1.IssueRequest{Workload: fmt.Sprintf("bench/w%d-%d", i, j), Csr: b.csr(i, n+j)}
		}
		answers, err := svid.AskMany(ctx, client, requests)
		if err != nil {
			return nil, err
		}
		var leaves [][]byte
		for _, a := range answers {
			if a.Err != nil {
				return nil, a.Err
			}
			if len(a.Chain) == 0 {
				return nil, errors.New("an empty chain")
			}
			leaves = append(leaves, a.Chain[0])
		}
		if len(leaves) != workloads {
			return nil, fmt.Errorf("%d certificates for %d requests", len(leaves), workloads)
		}
		return leaves, nil
	}
}
