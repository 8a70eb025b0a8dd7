package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/test/spire"
)

var spireTD = spiffeid.RequireTrustDomainFromString("spire.test")

// spire starts a server, with as many agents as there are clients, and with as
// many workloads for each as the nodes of the mesh have.
func (b *bench) spire(ctx context.Context) error {
	dir := filepath.Join(b.dir, "spire")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	b.stops = append(b.stops, func() { _ = log.Close() })
	server, err := spire.StartServer(ctx, b.programs, spire.Options{
		Dir: dir, TrustDomain: spireTD, Address: netip.MustParseAddrPort("127.0.0.1:18445"), Durable: true, Env: oneProcessor,
		// 500 signatures a second for each address otherwise.
		More: "  ratelimit {\n    attestation = false\n    signing = false\n  }\n",
	}, log)
	if err != nil {
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%w\n%s", err, said)
	}
	b.stops = append(b.stops, server.Stop)
	one := &subject{name: "SPIRE", pid: server.Pid(),
		about: "`spire-server` with SQLite and keys on disk, server API `BatchNewX509SVID` with one certificate a call; its audit log is off, as by default, so it keeps no record of what it issues"}
	all := &subject{name: fmt.Sprintf("SPIRE, %d a call", workloads), pid: server.Pid(),
		about: fmt.Sprintf("the same server and clients, %d certificates a call, as its agent asks when it needs many at once; latency is a call's", workloads)}
	for i := range b.clients {
		client, err := server.Attest(ctx)
		if err != nil {
			return err
		}
		b.stops = append(b.stops, func() { _ = client.Close() })
		var entries []spire.Entry
		for j := range workloads {
			entries = append(entries, spire.Entry{
				ID: spiffeid.RequireFromPathf(spireTD, "/ns/bench/sa/w%d-%d", i, j), Selectors: []string{fmt.Sprintf("unix:uid:%d", 10000+i*workloads+j)},
			})
		}
		if err := server.AddEntries(ctx, client.ID(), entries...); err != nil {
			return err
		}
		ids, err := client.Entries(ctx, len(entries))
		if err != nil {
			return err
		}
		one.clients = append(one.clients, func(ctx context.Context, n int) ([][]byte, error) {
			at := n % len(ids)
			return client.NewX509SVIDs(ctx, ids[at:at+1], b.csr(i, n))
		})
		all.clients = append(all.clients, func(ctx context.Context, n int) ([][]byte, error) {
			return client.NewX509SVIDs(ctx, ids, b.csr(i, n))
		})
	}
	b.subjects = append(b.subjects, one, all)
	return onProcessors(server.Pid(), 0, 1)
}
