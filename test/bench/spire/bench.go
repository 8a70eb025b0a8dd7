package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/spire"
)

const (
	// workloads is how many each client asks certificates for.
	workloads = 20
	// requests is how many certificate requests there are, each with its own key.
	requests = 64
	// warmUp is what of a turn is not counted.
	warmUp = time.Second
	// tick is the unit of CPU times in /proc.
	tick = 10 * time.Millisecond
)

// issuer asks one server for certificates, as one node or agent does. n counts
// its calls; it returns the leaves.
type issuer func(ctx context.Context, n int) (leaves [][]byte, err error)

// subject is one way to get certificates.
type subject struct {
	name    string
	about   string // for the report
	pid     int    // of the server
	clients []issuer
}

// turn is what a subject did in one turn.
type turn struct {
	certificates int
	calls        []time.Duration // how long each took, sorted
	elapsed      time.Duration
	cpu          time.Duration // of the server
}

func (t *turn) rate() float64 { return float64(t.certificates) / t.elapsed.Seconds() }

// perCertificate is the server's processor time for one certificate, in µs.
func (t *turn) perCertificate() float64 {
	return t.cpu.Seconds() * 1e6 / float64(t.certificates)
}

// busy is how much of the time the server had its processor.
func (t *turn) busy() float64 { return t.cpu.Seconds() / t.elapsed.Seconds() }

func (t *turn) quantile(q float64) float64 {
	return t.calls[min(int(q*float64(len(t.calls))), len(t.calls)-1)].Seconds() * 1e3
}

// bench is one run.
type bench struct {
	options
	dir      string
	programs spire.Programs
	csrs     [][]byte
	subjects []*subject
	turns    []map[string]*turn // by round, by subject
	started  time.Time
	stops    []func() // last first
}

// stop ends everything that was started.
func (b *bench) stop() {
	for _, f := range slices.Backward(b.stops) {
		f()
	}
}

func (b *bench) setUp(ctx context.Context) error {
	for range requests {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			return err
		}
		b.csrs = append(b.csrs, csr)
	}
	for _, f := range []func(context.Context) error{b.signet, b.spire} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	if n := runtime.NumCPU(); n > 1 {
		return onProcessors(os.Getpid(), 1, n) // the servers have the first
	}
	return nil
}

// csr is a certificate request for a client's call.
func (b *bench) csr(client, n int) []byte { return b.csrs[(client+n)%len(b.csrs)] }

// onProcessors keeps all threads of a process on processors from one up to
// before another.
func onProcessors(pid, from, to int) error {
	var set unix.CPUSet
	for i := from; i < to; i++ {
		set.Set(i)
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return err
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(filepath.Base(task))
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("keep thread %d of process %d on its processors: %w", tid, pid, err)
		}
	}
	return nil
}

// oneProcessor is the environment of a server; with it goes onProcessors.
var oneProcessor = []string{"GOMAXPROCS=1"}

func (b *bench) measure(ctx context.Context) error {
	for round := range b.rounds {
		turns := map[string]*turn{}
		for i := range b.subjects {
			s := b.subjects[(round+i)%len(b.subjects)] // each begins once
			fmt.Fprintf(os.Stderr, "bench-spire: round %d of %d: %s\n", round+1, b.rounds, s.name)
			t, err := s.load(ctx, b.turn)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			turns[s.name] = t
		}
		b.turns = append(b.turns, turns)
	}
	return nil
}

// load has every client ask again and again for a turn, and checks one answer of
// each.
func (s *subject) load(ctx context.Context, length time.Duration) (*turn, error) {
	ctx, cancel := context.WithTimeout(ctx, warmUp+length+time.Minute)
	defer cancel()
	begin := time.Now().Add(warmUp)
	end := begin.Add(length)
	type result struct {
		certificates int
		calls        []time.Duration
		last         []byte
		err          error
	}
	results := make([]result, len(s.clients))
	var all sync.WaitGroup
	for i, ask := range s.clients {
		all.Go(func() {
			r := &results[i]
			for n := 0; ; n++ {
				asked := time.Now()
				leaves, err := ask(ctx, n)
				if err != nil {
					r.err = err
					return
				}
				now := time.Now()
				if now.After(end) {
					return
				}
				if asked.After(begin) {
					r.certificates += len(leaves)
					r.calls = append(r.calls, now.Sub(asked))
					r.last = leaves[len(leaves)-1]
				}
			}
		})
	}
	time.Sleep(time.Until(begin))
	before, err := processCPU(s.pid)
	if err == nil {
		time.Sleep(time.Until(end))
	}
	after, err2 := processCPU(s.pid)
	if err != nil {
		cancel()
	}
	all.Wait()
	out := &turn{elapsed: length, cpu: after - before}
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	for _, r := range results {
		if r.err != nil {
			return nil, r.err
		}
		if r.last == nil {
			return nil, fmt.Errorf("a client got nothing within %s", length)
		}
		cert, err := x509.ParseCertificate(r.last)
		if err != nil {
			return nil, err
		}
		if key, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() || len(cert.URIs) != 1 || cert.SignatureAlgorithm != x509.ECDSAWithSHA256 {
			return nil, fmt.Errorf("the certificate is no X509-SVID of P-256 below P-256: %v, %s", cert.URIs, cert.SignatureAlgorithm)
		}
		out.certificates += r.certificates
		out.calls = append(out.calls, r.calls...)
	}
	slices.Sort(out.calls)
	return out, nil
}

// processCPU is the time that a process has worked so far.
func processCPU(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("the server: %w", err)
	}
	// The name, in parentheses, may hold anything.
	f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q is not understood", pid, data)
	}
	user, err := strconv.ParseInt(f[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * tick, err
}
