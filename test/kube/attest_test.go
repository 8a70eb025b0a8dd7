package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
)

// given asks, in a pod, for the identities that it is given.
func (b *bench) given(namespace, name, socket string) (ids []string, code string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	out, err := b.command(ctx, "kubectl", "-n", namespace, "exec", name, "--", "/usr/bin/testpod", "identity", socket).CombinedOutput()
	var said struct {
		IDs  []string `json:"ids"`
		Code string   `json:"code"`
	}
	if jerr := json.Unmarshal(out, &said); jerr != nil {
		b.Fatalf("testpod identity in %s/%s: %v: %v\n%s", namespace, name, err, jerr, out)
	}
	return said.IDs, said.Code
}

// Defends: with a real runtime and real pods, each process gets the identity of
// the pod that it is in and no other, at whatever path the socket is mounted; one
// of a pod outside of the mesh gets none, and the audit of its node says who it
// was.
func TestAttestation(t *testing.T) {
	b := open(t)
	began := time.Now()
	in, out := b.namespace("enforce"), b.namespace("")
	socket := []string{"volumes: [{name: api, hostPath: {path: /run/signet/api, type: Directory}}]"}
	at := func(dir string) []string {
		return []string{fmt.Sprintf("volumeMounts: [{name: api, mountPath: %s}]", dir)}
	}
	b.startPods(
		&pod{namespace: in, name: "web", account: "web", node: "node1", args: []string{"hold"}, spec: socket, more: at("/run/signet/api")},
		&pod{namespace: in, name: "db", account: "db", node: "node1", args: []string{"hold"}, spec: socket, more: at("/elsewhere")},
		&pod{namespace: out, name: "stranger", account: "web", node: "node1", args: []string{"hold"}, spec: socket, more: at("/run/signet/api")},
	)
	b.waitStatus(in, "enforce: 2 of 2 pods enrolled")
	for name, path := range map[string]string{"web": "/run/signet/api/agent.sock", "db": "/elsewhere/agent.sock"} {
		b.eventually(20*time.Second, func() string {
			if ids, code := b.given(in, name, path); !slices.Equal(ids, []string{id(in, name)}) {
				return fmt.Sprintf("%s is given %q, %s; want %s", name, ids, code, id(in, name))
			}
			return ""
		})
	}
	if ids, code := b.given(out, "stranger", "/run/signet/api/agent.sock"); len(ids) != 0 || code != "PermissionDenied" {
		t.Errorf("a pod outside of the mesh is given %q, %s", ids, code)
	}
	uid := b.kubectl("-n", out, "get", "pod", "stranger", "-o", "jsonpath={.metadata.uid}")
	b.eventually(20*time.Second, func() string {
		ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
		defer cancel()
		raw, err := b.command(ctx, "kubectl", "signet", "audit", "-o", "json", "--verdict", "refused", "--node", "node1", "--since", began.UTC().Format(time.RFC3339)).Output()
		var doc struct {
			Records []audit.Record `json:"records"`
		}
		if jerr := json.Unmarshal(raw, &doc); jerr != nil {
			return fmt.Sprintf("%v: %v", err, jerr)
		}
		for _, r := range doc.Records {
			if f := r.Refusal; f != nil && f.PodUID == uid && f.Kind == "stranger" && f.Call == "FetchX509SVID" && f.Executable == "/usr/bin/testpod" {
				return ""
			}
		}
		return fmt.Sprintf("the refusal of pod %s is not among %+v", uid, doc.Records)
	})
	if _, err := b.try("signet", "ca", "refused", "--since", "1h"); err != nil {
		t.Errorf("kubectl signet ca refused: %v", err)
	}
}
