package kube

import (
	"context"
	"fmt"
	"net"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/internal/lab"
)

// endpointChanges measures how long after an EndpointSlice has changed a caller
// gets to a new endpoint, and no longer gets to one that went.
func (b *bench) endpointChanges(in string) {
	b.Helper()
	address := net.JoinHostPort(b.clusterIP(in, "changing", false), "80")
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	watch, err := b.client.DiscoveryV1().EndpointSlices(in).Watch(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=changing"})
	if err != nil {
		b.Fatal(err)
	}
	defer watch.Stop()
	changed := func(want int) time.Time {
		for limit := time.After(20 * time.Second); ; {
			select {
			case e := <-watch.ResultChan():
				// A service of two families has a slice of each.
				if s, ok := e.Object.(*discoveryv1.EndpointSlice); ok && s.AddressType == discoveryv1.AddressTypeIPv4 && len(s.Endpoints) == want {
					return time.Now()
				}
			case <-limit:
				b.Fatalf("the service has not %d endpoints after 20 s", want)
			}
		}
	}
	var most, sum time.Duration
	const rounds = 10
	for range rounds {
		for _, want := range []string{"one", ""} {
			label, count := "changing=yes", 1
			if want == "" {
				label, count = "changing-", 0
			}
			b.kubectl("-n", in, "label", "pod", "one", label)
			at := changed(count)
			if err := lab.In(b.inside(in, "far"), func() error {
				for time.Since(at) < 10*time.Second {
					if _, answer, _ := ask(ctx, address); answer == want {
						return nil
					}
					time.Sleep(10 * time.Millisecond)
				}
				return fmt.Errorf("the service's endpoints are not yet %q to a caller 10 s later", want)
			}); err != nil {
				b.Fatal(err)
			}
			took := time.Since(at)
			sum, most = sum+took, max(most, took)
		}
	}
	b.Logf("%d changes of endpoints reached a caller's proxy after %s on average, %s at most", 2*rounds, (sum / (2 * rounds)).Round(time.Millisecond), most.Round(time.Millisecond))
	if most > time.Second {
		b.Errorf("a change of endpoints reached a caller's proxy after %s", most)
	}
}

// lastOfNode ends the only endpoint of a node of a service that keeps to the
// node: until it has ended, it serves, as without the mesh.
func (b *bench) lastOfNode(in, out string) {
	b.Helper()
	began := time.Now()
	for _, ns := range []string{in, out} {
		b.eventually(20*time.Second, func() string {
			if by := b.answersTo(ns, "near", net.JoinHostPort(b.clusterIP(ns, "ending", false), "80"), 5); by["ending-1"] != 5 {
				return fmt.Sprintf("%s: before it ends, %v answer", ns, by)
			}
			return ""
		})
		b.kubectl("-n", ns, "delete", "pod", "ending-1", "--wait=false")
	}
	b.eventually(5*time.Second, func() string {
		for _, ns := range []string{in, out} {
			slices, err := b.client.DiscoveryV1().EndpointSlices(ns).List(b.Context(), metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=ending"})
			if err != nil {
				return err.Error()
			}
			ends := false
			for _, s := range slices.Items {
				for _, e := range s.Endpoints {
					ends = ends || e.Conditions.Terminating != nil && *e.Conditions.Terminating
				}
			}
			if !ends {
				return "no endpoint of " + ns + " ends"
			}
		}
		return ""
	})
	time.Sleep(1500 * time.Millisecond) // what follows is by this state
	for _, ns := range []string{in, out} {
		if by := b.answersTo(ns, "near", net.JoinHostPort(b.clusterIP(ns, "ending", false), "80"), 20); by["ending-1"] != 20 {
			b.Errorf("in the mesh %v: while the node's last endpoint ends, %v answer", ns == in, by)
		}
	}
	b.recorded(began, in+"/near", "client", "ending-1")
}
