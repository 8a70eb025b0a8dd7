package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
)

// tlsOffset is added to a server's port for the proxy in front of it.
const tlsOffset = 10000

// staticEnvoy runs two proxies as one would configure them by hand: the
// client's originates mTLS, one connection for each of the client's, the
// server's ends it; both check the other's SPIFFE ID. TLS has the parameters
// that the mesh uses.
func (b *bench) staticEnvoy(ctx context.Context, s *subject) error {
	s.about = "two Envoys with static files and one thread each, mTLS for each connection, `tcp_proxy`, TLS 1.3 with X25519MLKEM768, a P-256 chain of two and no resumption, as in the mesh; the client dials its proxy, nothing is captured, no access log"
	s.target = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	dir := filepath.Join(b.dir, "envoy")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	const clientID, serverID = "spiffe://static.test/client", "spiffe://static.test/server"
	if err := writeChains(dir, map[string]string{"client": clientID, "server": serverID}); err != nil {
		return err
	}
	for _, p := range []struct {
		pod    *lab.Pod
		name   string
		config object
	}{
		{s.server, "server", staticConfig(dir, "server", clientID, s.server.Addr)},
		{s.client, "client", staticConfig(dir, "client", serverID, s.server.Addr)},
	} {
		data, err := json.MarshalIndent(p.config, "", " ")
		if err != nil {
			return err
		}
		path := filepath.Join(dir, p.name+".json")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return err
		}
		var log bytes.Buffer
		cmd := p.pod.Command(context.WithoutCancel(ctx), b.envoy, "-c", path, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := cmd.Start(); err != nil {
			return err
		}
		s.pids = append(s.pids, cmd.Process.Pid)
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		s.stop = append(s.stop, func() { _ = cmd.Process.Kill(); <-done })
		port := portEcho
		if p.name == "server" {
			port += tlsOffset
		}
		if err := listening(ctx, p.pod, port, done); err != nil {
			_ = cmd.Process.Kill()
			<-done
			return fmt.Errorf("%s: %w\n%s", p.name, err, log.String())
		}
	}
	return nil
}

// listening waits until something does, in a pod.
func listening(ctx context.Context, p *lab.Pod, port int, done <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		c, err := p.Dial(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return c.Close()
		}
		select {
		case <-done:
			return errors.New("ended at once")
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

type (
	object = map[string]any
	list   = []any
)

const typePrefix = "type.googleapis.com/envoy.extensions."

// staticConfig is the whole configuration of one side's proxy.
func staticConfig(dir, side, peer string, server netip.Addr) object {
	common := object{
		"tls_params": object{
			"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3",
			"ecdh_curves": list{"X25519MLKEM768", "X25519"},
		},
		"tls_certificates": list{object{
			"certificate_chain": object{"filename": filepath.Join(dir, side+".crt")},
			"private_key":       object{"filename": filepath.Join(dir, side+".key")},
		}},
		"validation_context": object{
			"trusted_ca": object{"filename": filepath.Join(dir, "root.crt")},
			"match_typed_subject_alt_names": list{
				object{"san_type": "URI", "matcher": object{"exact": peer}},
			},
		},
	}
	upstreamTLS := object{"name": "tls", "typed_config": object{
		"@type":              typePrefix + "transport_sockets.tls.v3.UpstreamTlsContext",
		"common_tls_context": common, "max_session_keys": 0,
	}}
	downstreamTLS := object{"name": "tls", "typed_config": object{
		"@type":              typePrefix + "transport_sockets.tls.v3.DownstreamTlsContext",
		"common_tls_context": common, "require_client_certificate": true,
		"disable_stateless_session_resumption": true, "disable_stateful_session_resumption": true,
	}}
	var listeners, clusters list
	for _, port := range []int{portEcho, portSink, portSource} {
		name := strconv.Itoa(port)
		chain := object{"filters": list{object{"name": "tcp", "typed_config": object{
			"@type":       typePrefix + "filters.network.tcp_proxy.v3.TcpProxy",
			"stat_prefix": name, "cluster": name,
		}}}}
		listen, dial := address("127.0.0.1", port), address(server.String(), port+tlsOffset)
		cluster := object{"name": name, "type": "STATIC", "connect_timeout": "5s"}
		if side == "server" {
			listen, dial = address("0.0.0.0", port+tlsOffset), address("127.0.0.1", port)
			chain["transport_socket"] = downstreamTLS
		} else {
			cluster["transport_socket"] = upstreamTLS
		}
		cluster["load_assignment"] = object{"cluster_name": name, "endpoints": list{object{
			"lb_endpoints": list{object{"endpoint": object{"address": dial}}},
		}}}
		listeners = append(listeners, object{"name": name, "address": listen, "filter_chains": list{chain}})
		clusters = append(clusters, cluster)
	}
	return object{"static_resources": object{"listeners": listeners, "clusters": clusters}}
}

func address(host string, port int) object {
	return object{"socket_address": object{"address": host, "port_value": port}}
}

// writeChains makes a root, an intermediate and one leaf for each name, and
// writes root.crt and each name's .crt and .key.
func writeChains(dir string, leaves map[string]string) error {
	serial := int64(0)
	type pair struct {
		cert *x509.Certificate
		key  *ecdsa.PrivateKey
	}
	issue := func(by *pair, id string, isCA bool) (*pair, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		uri, err := url.Parse(id)
		if err != nil {
			return nil, err
		}
		serial++
		t := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: fmt.Sprint("static ", serial)},
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
			URIs: []*url.URL{uri}, BasicConstraintsValid: true, IsCA: isCA,
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if isCA {
			t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageCertSign, nil
		}
		if by == nil {
			by = &pair{t, key}
		}
		der, err := x509.CreateCertificate(rand.Reader, t, by.cert, key.Public(), by.key)
		if err != nil {
			return nil, err
		}
		cert, err := x509.ParseCertificate(der)
		return &pair{cert, key}, err
	}
	encode := func(kind string, der ...[]byte) []byte {
		var out []byte
		for _, d := range der {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: d})...)
		}
		return out
	}
	root, err := issue(nil, "spiffe://static.test", true)
	if err != nil {
		return err
	}
	middle, err := issue(root, "spiffe://static.test", true)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "root.crt"), encode("CERTIFICATE", root.cert.Raw), 0o600); err != nil {
		return err
	}
	for name, id := range leaves {
		leaf, err := issue(middle, id, false)
		if err != nil {
			return err
		}
		key, err := x509.MarshalPKCS8PrivateKey(leaf.key)
		if err != nil {
			return err
		}
		err = errors.Join(
			os.WriteFile(filepath.Join(dir, name+".crt"), encode("CERTIFICATE", leaf.cert.Raw, middle.cert.Raw), 0o600),
			os.WriteFile(filepath.Join(dir, name+".key"), encode("PRIVATE KEY", key), 0o600))
		if err != nil {
			return err
		}
	}
	return nil
}
