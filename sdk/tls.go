package sdk

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/x509check"
)

// handshake is one handshake and what came of it.
type handshake struct {
	mesh     *Mesh
	accepted bool
	want     []spiffeid.ID // the server may be; nobody else
	port     uint16

	serial     string // of the own certificate
	peer       spiffeid.ID
	peerSerial string
	decided    decision // zero: the peer has proved nothing
	err        error    // why not
}

// certificate returns the own certificate. One that is not valid is not shown:
// the agent had no other for a long time.
func (h *handshake) certificate() (*tls.Certificate, error) {
	svid, err := h.mesh.source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	leaf := svid.Certificates[0]
	if now := time.Now(); now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return nil, fmt.Errorf("the certificate of %s is valid from %s to %s only", svid.ID, leaf.NotBefore, leaf.NotAfter)
	}
	h.serial = serial(leaf.SerialNumber)
	out := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: leaf}
	for _, c := range svid.Certificates {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out, nil
}

// verify judges the peer. It runs in every handshake.
func (h *handshake) verify(state tls.ConnectionState) error {
	id, err := x509check.Verify(state.PeerCertificates, h.mesh.source, time.Now())
	if err != nil {
		if !id.IsZero() {
			err = fmt.Errorf("%w; its certificate names %.256q", err, id.String())
		}
		h.err = err
		return err
	}
	if !h.accepted && !slices.Contains(h.want, id) {
		h.err = fmt.Errorf("it is %s", id)
		return h.err
	}
	h.peer, h.peerSerial = id, serial(state.PeerCertificates[0].SerialNumber)
	if h.decided = h.mesh.decide(h.accepted, id, h.peerSerial, h.port); h.decided.refuses() {
		return &RefusedError{h.decided.reason}
	}
	return nil
}

func (h *handshake) config(protocols []string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: protocols,
		// No sessions: whoever connects proves anew who it is.
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequireAnyClientCert,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return h.certificate() },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return h.certificate() },
		InsecureSkipVerify:     true, //nolint:gosec // names are SPIFFE IDs; VerifyConnection verifies
		VerifyConnection:       h.verify,
	}
}

// server runs the server's end of a handshake over a connection that it takes
// over.
func (m *Mesh) server(ctx context.Context, raw net.Conn, protocols []string) (*Conn, error) {
	e := m.newEvent(raw, true)
	h := &handshake{mesh: m, accepted: true}
	if t, ok := raw.LocalAddr().(*net.TCPAddr); ok {
		h.port = t.AddrPort().Port()
	}
	conn := tls.Server(raw, h.config(protocols))
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	err := conn.HandshakeContext(ctx)
	e.Serial, e.PeerSerial = h.serial, h.peerSerial
	if !h.peer.IsZero() {
		e.Peer = h.peer.String()
	}
	e.Revision = h.decided.revision
	var header tls.RecordHeaderError
	switch {
	case h.decided.refuses():
		m.refused(e, denied, h.decided.reason)
	case h.err != nil:
		m.refused(e, denied, "the caller proved no identity: "+h.err.Error())
	case errors.As(err, &header):
		m.refused(e, denied, "plaintext: "+m.id.String()+" takes only connections whose caller proves an identity")
	case err != nil:
		m.refused(e, failed, "the connection broke in the handshake: "+err.Error())
	default:
		return m.admit(conn, e, true, h.peer, h.port, h.decided)
	}
	return nil, errors.Join(err, raw.Close())
}

// connect runs the client's end.
func (m *Mesh) connect(ctx context.Context, raw net.Conn, want []spiffeid.ID, protocols []string) (*Conn, error) {
	e := m.newEvent(raw, false)
	h := &handshake{mesh: m, want: want}
	conn := tls.Client(raw, h.config(protocols))
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	err := conn.HandshakeContext(ctx)
	e.Serial, e.PeerSerial = h.serial, h.peerSerial
	if !h.peer.IsZero() {
		e.Peer = h.peer.String()
	}
	switch {
	case h.decided.refuses():
		m.refused(e, denied, h.decided.reason)
		err = &RefusedError{h.decided.reason}
	case h.err != nil:
		m.refused(e, failed, fmt.Sprintf("the peer did not prove that it is %s: %v", oneOf(want), h.err))
		err = fmt.Errorf("sdk: the peer did not prove that it is %s: %w", oneOf(want), h.err)
	case errors.As(err, &tls.RecordHeaderError{}):
		m.refused(e, failed, "what answered speaks no TLS: "+err.Error())
		err = fmt.Errorf("sdk: %s answered without TLS; where this program is captured, the mesh's tunnel leads straight to the application, so dial it in plain: %w", raw.RemoteAddr(), err)
	case err != nil:
		m.refused(e, failed, "the connection broke in the handshake: "+err.Error())
		err = fmt.Errorf("sdk: handshake with %s: %w", raw.RemoteAddr(), err)
	default:
		return m.admit(conn, e, false, h.peer, 0, h.decided)
	}
	_ = raw.Close()
	return nil, err
}

func oneOf(ids []spiffeid.ID) string {
	var out []string
	for _, id := range ids {
		out = append(out, id.String())
	}
	return strings.Join(out, " or ")
}

func portText(p uint16) string { return strconv.Itoa(int(p)) }

// serial is a serial number as the mesh writes it.
func serial(n *big.Int) string { return hex.EncodeToString(n.Bytes()) }

// clean makes a text fit for the audit: printable, 512 bytes at most.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) > 512 {
		s = strings.ToValidUTF8(s[:509], "") + "..."
	}
	return s
}
