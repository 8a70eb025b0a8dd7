package kube

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// A program that is on no pod's network and speaks mutual TLS by itself is let in
// to a pod that speaks none, where a policy has that TLS ended, and only as an
// identity that policies admit. And pods that speak none reach a program that asks
// for mutual TLS itself, where a policy has it spoken for them.
func TestDirectInCluster(t *testing.T) {
	b := open(t)
	in := b.namespace("enforce")
	b.startPods(
		(&pod{namespace: in, name: "server", account: "server", node: "node1", args: []string{"serve", "--tls-port=8443"}}).socket(),
		&pod{namespace: in, name: "client", account: "client", node: "node2", args: []string{"hold"}},
		&pod{namespace: in, name: "near", account: "near", node: "node1", args: []string{"hold"}},
		&pod{namespace: in, name: "other", account: "other", node: "node2", args: []string{"hold"}},
	)
	b.waitStatus(in, "enforce: 4 of 4 pods enrolled")
	b.apply(strings.Replace(allow(in, "server", "client"), "  from:", "  ports: [8080]\n  tls: terminate\n  from:", 1))
	node, address := b.cluster.Node("node2"), net.JoinHostPort(b.ip(in, "server"), "8080")
	call := func(account string) string {
		cert, _ := b.copied(node, id(in, account))
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		raw, err := node.DialContext(ctx, "tcp", address)
		if err != nil {
			return err.Error()
		}
		defer raw.Close()
		_ = raw.SetDeadline(time.Now().Add(20 * time.Second))
		c := tls.Client(raw, &tls.Config{Certificates: []tls.Certificate{*cert}, InsecureSkipVerify: true, //nolint:gosec // looked at below
			VerifyConnection: func(s tls.ConnectionState) error {
				if got := s.PeerCertificates[0].URIs; len(got) != 1 || got[0].String() != id(in, "server") {
					t.Errorf("the server shows itself as %v", got)
				}
				return nil
			}})
		_, _ = io.WriteString(c, "GET /healthz HTTP/1.0\r\n\r\n") // an error of it is the read's too
		answer, _ := io.ReadAll(c)
		return string(answer)
	}
	b.eventually(20*time.Second, func() string {
		if got := call("client"); !strings.HasPrefix(got, "HTTP/1.") || !strings.Contains(got, " 200 ") {
			return "the allowed caller got " + got
		}
		return ""
	})
	if got := call("other"); got != "" {
		t.Errorf("whom no policy names got %q", got)
	}
	b.served(in, "client", address, "server") // through the tunnel, as ever
	b.eventually(20*time.Second, func() string {
		seen := map[string]bool{}
		for _, r := range b.audit("--to", in+"/server") {
			if r.Transport == "mtls-direct" && r.Side == "destination" && r.Node == "node1" {
				seen[r.Verdict+" "+r.Source.ID] = true
			}
		}
		if !seen["allowed "+id(in, "client")] || !seen["denied "+id(in, "other")] {
			return "the audit lacks one of the calls"
		}
		return ""
	})
	b.originated(in)
}
