package main

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// keep leaves the mesh running until ctx ends, and says what to try. It fails
// when the mesh ends by itself.
func (q *quickstart) keep(ctx context.Context, result string) error {
	q.step("The mesh stays until Ctrl-C. Try it from another terminal")
	q.say("%s", result)
	user := ""
	if !q.realRoot() {
		user = "-U --preserve-credentials "
	}
	q.say("A shell inside its namespaces:")
	fmt.Fprintf(q.w, "\n%s\n\n", q.paint(cyan, fmt.Sprintf(
		"nsenter -t $(cat /proc/%s/task/*/children) %s-m -p -n env -u SIGNET_RUN_DIR PATH=%s:$PATH bash", os.Getenv(outerVar), user, q.bin)))
	q.say("And in that shell:")
	for _, try := range [][2]string{
		{"signet status", "is it well?"},
		{"nsenter --net=/run/netns/batch curl -sS " + ordersURL, "batch may, since the edit"},
		{"nsenter --net=/run/netns/web curl -sS " + ordersURL, "web may not any more"},
		{"signet audit --since 1m -o wide", "both, with the reason"},
		{"sed -i 's/serviceAccount: batch$/serviceAccount: web/' " + meshDir + "/40-policies.yaml", "the edit undone"},
		{"signet policy explain --from shop/web --to shop/orders --port 8080", "so web may again"},
		{"signet certs -o wide", "renewed every few seconds"},
		{"kill -9 $(pgrep -x signet-control)", "traffic goes on; it is back within a second"},
	} {
		fmt.Fprintf(q.w, "     %s\n     %s\n", q.paint(dim, "# "+try[1]), q.paint(cyan, try[0]))
	}
	if q.curl == "" {
		q.say("(curl is not installed here: apt-get install curl)")
	}
	select {
	case <-ctx.Done():
		q.say("Stopping.")
		return nil
	case <-q.mesh.done:
		return fmt.Errorf("the mesh ended by itself: %w", q.mesh.err)
	}
}

// realRoot reports whether the namespaces were made without a user namespace
// of one user.
func (q *quickstart) realRoot() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	fields := strings.Fields(string(b))
	return err == nil && len(fields) == 3 && fields[2] != "1"
}
