package clients

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// server is a program that listens twice: for the workloads of all languages,
// and for one that is not there.
type server struct {
	*program
	language     *language
	open, closed string // addresses
}

// pair is a dialer and a server.
type pair struct{ dialer, server *language }

// shown is what the two showed each other.
type shown struct{ byDialer, byServer *x509.Certificate }

// TestMutualTLS: programs of all languages speak TLS with each other, each as
// dialer and as server, and each looks at whom it speaks with. When certificates
// have been replaced, new connections are made with the new ones.
func TestMutualTLS(t *testing.T) {
	f := start(t, 10*time.Second)
	var ids []string
	for _, l := range f.languages {
		ids = append(ids, l.id())
	}
	servers, dialers := map[*language]*server{}, map[*language]*program{}
	for _, l := range f.languages {
		servers[l] = &server{program: f.run(t, l, 0, "serve", "127.0.0.1:0", strings.Join(ids, ","), "127.0.0.1:0", nobodyID), language: l}
		dialers[l] = f.run(t, l, 0, "dial")
	}
	for _, s := range servers {
		s.open, s.closed = s.next(t).Listening, s.next(t).Listening
		if s.closed == "" {
			t.Fatalf("%s does not listen: %s", s.what, s.next(t).Error)
		}
	}

	first, spare := map[pair]shown{}, patience(2)
	for _, d := range f.languages {
		for _, s := range f.languages {
			t.Run(d.name+" dials "+s.name, func(t *testing.T) {
				both, err := meet(t, &spare, dialers[d], d, servers[s])
				if err != nil {
					t.Fatal(err)
				}
				first[pair{d, s}] = both
				refused(t, "a server that is another", dialers[d], servers[s], servers[s].open, nobodyID)
				refused(t, "by a server that wants another", dialers[d], servers[s], servers[s].closed, s.id())
			})
		}
	}
	if t.Failed() {
		return
	}

	// The certificates that were shown are replaced, on both sides of every pair.
	old := map[string]bool{}
	for _, both := range first {
		old[both.byDialer.SerialNumber.String()], old[both.byServer.SerialNumber.String()] = true, true
	}
	isNew := func(both shown) error {
		if old[both.byDialer.SerialNumber.String()] || old[both.byServer.SerialNumber.String()] {
			return errors.New("a certificate from before the rotation")
		}
		return nil
	}
	for _, l := range f.languages {
		f.mesh.Eventually(15*time.Second, l.name+" to use a new certificate", func() error {
			both, err := meet(t, &spare, dialers[l], l, servers[l])
			if err != nil {
				t.Fatal(err)
			}
			return isNew(both)
		})
	}
	for pair := range first {
		t.Run(pair.dialer.name+" dials "+pair.server.name+" after a rotation", func(t *testing.T) {
			both, err := meet(t, &spare, dialers[pair.dialer], pair.dialer, servers[pair.server])
			if err != nil {
				t.Fatal(err)
			}
			if err := isNew(both); err != nil {
				t.Error(err)
			}
		})
	}
}

// patience is how many handshakes of a test may be made again. spiffe-rustls 0.11
// refuses all for the moment between the arrival of a new certificate and its
// conversion: its changelog has that under Security, "while conversion is pending". Who
// dials again is served.
type patience int

// again reports whether a handshake that failed may be made once more, and waits.
func (p *patience) again(t *testing.T, err error, parties ...*language) bool {
	t.Helper()
	if err == nil || *p == 0 || !slices.ContainsFunc(parties, func(l *language) bool { return l.name == "rust" }) {
		return false
	}
	*p--
	t.Logf("once more: %v", err)
	time.Sleep(200 * time.Millisecond)
	return true
}

// meet connects a dialer with a server; each must find the other.
func meet(t *testing.T, spare *patience, dialer *program, d *language, s *server) (both shown, err error) {
	t.Helper()
	for both, err = meetOnce(t, dialer, d, s); spare.again(t, err, d, s.language); {
		both, err = meetOnce(t, dialer, d, s)
	}
	return both, err
}

func meetOnce(t *testing.T, dialer *program, d *language, s *server) (shown, error) {
	t.Helper()
	got, saw := dialer.ask(t, s.open, s.language.id()), s.next(t)
	if got.Error != "" || got.Got != "hello" || saw.Error != "" || saw.Server != s.open {
		return shown{}, fmt.Errorf("%s dials %s: %q, %s; the server: %s", d.name, s.language.name, got.Got, got.Error, saw.Error)
	}
	both := shown{byDialer: saw.leaf(t), byServer: got.leaf(t)}
	for leaf, want := range map[*x509.Certificate]string{both.byDialer: d.id(), both.byServer: s.language.id()} {
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != want {
			return shown{}, fmt.Errorf("%s dials %s: %v showed itself, want %s", d.name, s.language.name, leaf.URIs, want)
		}
	}
	return both, nil
}

// refused: the dialer gets no answer, and the server knows of no client.
func refused(t *testing.T, what string, dialer *program, s *server, address, expect string) {
	t.Helper()
	got, saw := dialer.ask(t, address, expect), s.next(t)
	if got.Error == "" || got.Got != "" || saw.Error == "" || saw.Server != address {
		t.Errorf("%s: the dialer %q %q, the server %q", what, got.Got, got.Error, saw.Error)
	}
}
