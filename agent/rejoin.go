package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/ca/caserver"
)

// rejoinEvery is how often a node that is cut off looks for the newest roots.
const rejoinEvery = 5 * time.Second

// cutOff reports whether an error of a call to the control plane says that one of
// the two does not trust the other.
func cutOff(err error) bool {
	switch s := status.Convert(err); s.Code() {
	case codes.Unauthenticated:
		return true
	case codes.Unavailable: // of the handshake; the words are caserver.ClientTLS's, and crypto/tls's for what the other end said
		return strings.Contains(s.Message(), "control plane's certificate:") || strings.Contains(s.Message(), "remote error: tls:")
	}
	return false
}

// revokedNode reports whether the control plane refuses this node's certificate
// because it is revoked.
func revokedNode(err error) bool {
	s := status.Convert(err)
	return s.Code() == codes.Unauthenticated && strings.Contains(s.Message(), caserver.NodeRevoked)
}

// rejoin is for a node of a cluster whose certificate was revoked, which joins
// again, and for one that was away while the root was replaced and was not waited
// for. It takes up the roots that the control plane has published
// to the cluster, which a node trusts when it joins for the first time, and joins
// again if its certificate is below none of them. Only watch calls it.
func (a *agent) rejoin(ctx context.Context, cause error) {
	if a.cfg.Pods == nil || a.cfg.Pods.Roots == nil || !cutOff(cause) || time.Since(a.rejoined) < rejoinEvery {
		return
	}
	a.rejoined = time.Now()
	if revokedNode(cause) {
		a.log.Warn("this node's certificate is revoked; it joins again, with the next token that it gets", "cause", cause)
		a.node.forget()
		if a.node.join(ctx) {
			a.node.reconnect() // the control plane knows this node by the certificate that a connection began with
		}
		return
	}
	text, err := a.cfg.Pods.Roots(ctx)
	if err != nil {
		a.log.Error("this node and the control plane do not trust each other, and the published roots cannot be read", "error", err)
		return
	}
	news, err := a.node.trust(text)
	if err != nil {
		a.log.Error("the published roots are not taken", "error", err)
		return
	}
	if news {
		a.log.Warn("the root was replaced while this node was away: the published roots are taken", "cause", cause)
	}
	if a.node.stale() {
		a.log.Warn("this node's certificate is below none of the roots; it joins again")
		a.node.join(ctx)
	}
}

// trust replaces the roots by those of PEM text, and reports whether they are
// others.
func (n *nodeIdentity) trust(text []byte) (news bool, err error) {
	bundle, err := x509bundle.Parse(n.bundle.TrustDomain(), text)
	if err != nil {
		return false, err
	}
	roots := bundle.X509Authorities()
	if len(roots) == 0 {
		return false, errors.New("there are none")
	}
	if sameCerts(roots, n.bundle.X509Authorities()) {
		return false, nil
	}
	var ders [][]byte
	for _, c := range roots {
		ders = append(ders, c.Raw)
	}
	return true, n.setBundle(ders)
}

// stale forgets a certificate that ends at none of the roots, and reports whether
// there is none then.
func (n *nodeIdentity) stale() bool {
	cert, err := n.certificate()
	if err != nil {
		return true
	}
	if _, ok := rootOf(cert.Certificate, n.bundle.X509Authorities()); ok {
		return false
	}
	n.forget()
	return true
}

// forget removes a certificate that is of no use any more.
func (n *nodeIdentity) forget() {
	n.mu.Lock()
	n.cert = nil
	n.mu.Unlock()
	if err := os.Remove(n.file()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log.Error("a certificate of no use could not be removed", "error", err)
	}
}
