package kube

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"time"
)

// originated has captured pods that speak no TLS call the server's port 8443, where
// go-spiffe asks for mutual TLS: from another node and from its own, at its address
// and by a service. It answers each by the caller's own SPIFFE ID, whom no policy
// names does not reach it, and without `tls: originate` the same calls end in vain.
//
// What it defends: that the caller's node, which speaks for it, hears of a policy that
// protects a pod of another node, and of its end, for its address and for a service
// whose port is another; and that it shows the certificate of the very caller.
func (b *bench) originated(in string) {
	b.Helper()
	const policy = "asks-for-tls"
	began := time.Now()
	admit := func(tls string, callers ...string) {
		b.Helper()
		b.apply(policyOf(in, policy, "{target: {serviceAccount: server}, ports: [8443], "+tls+"from: [{serviceAccount: "+strings.Join(callers, "}, {serviceAccount: ")+"}]}"))
	}
	admit("tls: originate, ", "client", "near")
	b.apply(fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: secure, namespace: %s}\nspec: {selector: {app: server}, ports: [{port: 80, targetPort: 8443}]}\n", in))
	places := []string{net.JoinHostPort(b.ip(in, "server"), "8443"), net.JoinHostPort(b.clusterIP(in, "secure", false), "80")}
	answered := func() {
		b.Helper()
		for _, at := range places {
			for _, caller := range []string{"client", "near"} {
				b.served(in, caller, at, "server "+id(in, caller))
			}
			if a := b.dial(in, "other", at); a.OK || strings.HasPrefix(a.Error, "answer ") || strings.Contains(a.Error, "timeout") {
				b.Errorf("whom no policy names calls %s: %+v", at, a)
			}
		}
	}
	answered()
	b.condition("allowpolicy", in, policy, "Accepted", "True")
	b.condition("allowpolicy", in, policy, "Programmed", "True")
	if out, want := b.kubectl("signet", "policy", "explain", "--from", in+"/client", "--to", in+"/server", "--port", "8443"), "tls: originate of "+in+"/"+policy; !strings.Contains(out, want) {
		b.Errorf("kubectl signet policy explain does not say %q:\n%s", want, out)
	}

	// The server hears what the callers say, which is not TLS, and says so.
	admit("", "client", "near")
	for _, at := range places {
		for _, caller := range []string{"client", "near"} {
			b.eventually(20*time.Second, func() string {
				if a := b.dial(in, caller, at); a.OK || a.Error != "answer 400 Bad Request" {
					return fmt.Sprintf("without tls: originate %s calls %s: %+v", caller, at, a)
				}
				return ""
			})
		}
	}
	admit("tls: originate, ", "client", "near")
	answered()

	// Both ends of every call have both identities.
	b.eventually(20*time.Second, func() string {
		seen := map[string]bool{}
		for _, r := range b.audit("--since", began.UTC().Format(time.RFC3339), "--to", in+"/server") {
			if _, port, _ := net.SplitHostPort(r.Destination.Address); port != "8443" && r.Destination.Address != places[1] {
				continue
			}
			says := fmt.Sprintf("%s %s on %s: %s by %s", r.Source.ID, r.Verdict, r.Side, r.Transport, r.Node)
			if r.Verdict == "allowed" && (r.Source.ID == id(in, "other") || r.Destination.ID != id(in, "server")) {
				b.Fatalf("%s: %+v", says, r)
			}
			seen[says] = true
		}
		for _, want := range []string{
			id(in, "client") + " allowed on source: mtls by node2", id(in, "client") + " allowed on destination: mtls by node1",
			id(in, "near") + " allowed on source: mtls by node1", id(in, "near") + " allowed on destination: mtls by node1",
			id(in, "other") + " denied on source: mtls by node2", id(in, "other") + " denied on destination: mtls by node1",
		} {
			if !seen[want] {
				return fmt.Sprintf("the audit lacks %q; it has %q", want, slices.Sorted(maps.Keys(seen)))
			}
		}
		return ""
	})

	// One proxy speaks for two callers, each by itself.
	admit("tls: originate, ", "client", "near", "other")
	for _, at := range places {
		b.served(in, "other", at, "server "+id(in, "other"))
		b.served(in, "client", at, "server "+id(in, "client"))
	}
}
