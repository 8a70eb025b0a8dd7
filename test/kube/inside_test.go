package kube

import (
	"context"
	"io"
	"net"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/internal/lab"
)

// inside returns the path of an enrolled pod's network namespace, in which this
// process calls as the pod's own would, only faster than through kubectl.
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
	return root + "/run/signet/netns/" + string(p.UID)
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
