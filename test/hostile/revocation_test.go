package hostile

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/test/harness"
)

// TestCallersCannotTellCertificates holds what docs/decisions.md says of why a
// caller's proxy refuses no revoked server, and the agent ends the connection after
// it: of the real proxy's means, none compares the number of a server's certificate
// but a list signed by the authority below which it is, and such a list has everything
// refused below authorities that have none. A proxy for which this fails can do more.
func TestCallersCannotTellCertificates(t *testing.T) {
	for _, what := range []string{"SERIAL", "FINGERPRINT_256"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		config := `{static_resources: {clusters: [{name: c, type: STATIC}], listeners: [{name: l, address: {socket_address: {address: 127.0.0.1, port_value: 0}},
			filter_chains: [{filters: [{name: tcp, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: x, cluster: c,
			access_log: [{name: f, typed_config: {"@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /dev/null,
			log_format: {text_format_source: {inline_string: "%UPSTREAM_PEER_` + what + `%"}}}}]}}]}]}]}}`
		out, err := exec.CommandContext(ctx, harness.Envoy(t), "--mode", "validate", "--config-yaml", strings.ReplaceAll(config, "\t", " ")).CombinedOutput() //nolint:gosec // the proxy under test
		if err == nil || !strings.Contains(string(out), "Not supported field in StreamInfo: UPSTREAM_PEER_"+what) {
			t.Errorf("the proxy knows the %s of a server's certificate: %v, %s", what, err, out)
		}
	}

	p := newPKI(time.Now())
	second := p.authority("signet second intermediate", "second", p.root) // has no list
	leaf := func(by *authority, serial byte) (*x509.Certificate, *tls.Certificate) {
		der := p.leaf(by, idWeb, func(c *cert) { c.serial = []byte{serial} })
		return must(x509.ParseCertificate(der)), &tls.Certificate{Certificate: [][]byte{der, by.der}, PrivateKey: p.keys.p256}
	}
	revoked, revokedPair := leaf(p.intermediate, 1)
	_, good := leaf(p.intermediate, 2)
	_, other := leaf(second, 3)
	by := must(x509.ParseCertificate(p.intermediate.der))
	list := must(x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: revoked.SerialNumber, RevocationTime: time.Now().Add(-time.Minute)}},
	}, by, p.intermediate.key))
	n := startNode(t, p, list)
	e := &endpoint{}
	e.start(t, n.lab.Pod("remote"))
	var tunnels []tunnel
	for _, c := range []struct {
		what string
		cert *tls.Certificate
		ok   bool
	}{
		{"another of the authority", good, true},
		{"the revoked one", revokedPair, false},
		{"one of an authority without a list", other, false},
		{"another of the authority, once more", good, true},
	} {
		e.become(c.cert)
		got := call(e)
		if (got.err == nil) != c.ok {
			t.Errorf("%s: %v", c.what, got.err)
		}
		tunnels = append(tunnels, got)
	}
	for i, why := range []string{"", "certificate_revoked", "unable_to_get_certificate_CRL", ""} {
		for _, r := range n.records(t, tunnels)[tunnels[i].from] {
			t.Logf("%d: %s, %s", i, r.Verdict, r.Reason)
			if why != "" && r.Side == audit.Source && !strings.Contains(r.Reason, why) {
				t.Errorf("the audit says %q, want %s", r.Reason, why)
			}
		}
	}
}
