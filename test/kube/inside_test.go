package kube

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/internal/lab"
)

// inside returns the path of a pod's network namespace, in the mesh or not, in
// which this process calls as the pod's own would, only faster than through
// kubectl.
func (b *bench) inside(namespace, name string) string {
	b.Helper()
	p, err := b.client.CoreV1().Pods(namespace).Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	root, err := b.cluster.Node(p.Spec.NodeName).Root()
	if err != nil {
		b.Fatal(err)
	}
	pinned := root + "/run/signet/netns/" + string(p.UID)
	if _, err := os.Stat(pinned); err == nil {
		return pinned
	}
	all, err := filepath.Glob(root + "/run/netns/*")
	if err != nil {
		b.Fatal(err)
	}
	for _, path := range all {
		found := false
		// One that goes in between is not the pod's.
		_ = lab.In(path, func() error {
			addrs, err := net.InterfaceAddrs()
			for _, a := range addrs {
				found = found || strings.HasPrefix(a.String(), p.Status.PodIP+"/")
			}
			return err
		})
		if found {
			return path
		}
	}
	b.Fatalf("none of %d network namespaces of %s has the address %q of %s/%s", len(all), p.Spec.NodeName, p.Status.PodIP, namespace, name)
	return ""
}

// ask calls a literal address once from the namespace that the calling goroutine
// is in, and returns its own address and the name of the pod that answered; the
// empty name if the connection was closed without an answer.
func ask(ctx context.Context, address string) (local, answer string, err error) {
	d := net.Dialer{Timeout: 2 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return "", "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	_, _ = io.WriteString(conn, "GET /id HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	got, _ := io.ReadAll(conn)
	_, body, _ := strings.Cut(string(got), "\r\n\r\n")
	return conn.LocalAddr().String(), strings.TrimSpace(body), nil
}

// answersTo has a pod call an address many times, and counts who answers; "" are
// calls that nobody answered.
func (b *bench) answersTo(namespace, name, address string, times int) map[string]int {
	b.Helper()
	by := map[string]int{}
	if err := lab.In(b.inside(namespace, name), func() error {
		for range times {
			_, answer, _ := ask(b.Context(), address)
			by[answer]++
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	return by
}

// recorded waits until the calls that a pod made since an instant are recorded
// by both ends with both identities, one server at least by each of them, and
// fails if any record of them names another identity.
func (b *bench) recorded(since time.Time, caller, account string, servers ...string) {
	b.Helper()
	namespace, _, _ := strings.Cut(caller, "/")
	b.eventually(20*time.Second, func() string {
		seen := map[string]bool{}
		for _, r := range b.audit("--since", since.UTC().Format(time.RFC3339)) {
			to, mine := strings.CutPrefix(r.Destination.Workload, namespace+"/")
			if !mine || r.Source.Workload != caller && (r.Side == "source" || r.Source.ID != id(namespace, account)) {
				continue
			}
			if r.Source.ID != id(namespace, account) || r.Verdict == "allowed" && (r.Transport != "mtls" || r.Destination.ID != id(namespace, "server")) {
				b.Fatalf("a call of %s is recorded as %+v", caller, r)
			}
			if r.Verdict == "allowed" {
				seen[r.Side+" "+to] = true
			}
		}
		for _, s := range servers {
			for _, side := range []string{"source", "destination"} {
				if !seen[side+" "+s] {
					return fmt.Sprintf("no call of %s to %s is recorded at the %s; there is %v", caller, s, side, seen)
				}
			}
		}
		return ""
	})
}
