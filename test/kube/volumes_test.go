package kube

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// restricted is what Pod Security asks of a container under that name.
const restricted = "securityContext: {runAsNonRoot: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}"

// nginxTLS is an nginx that speaks mutual TLS with what its volume holds, and is
// told of each change.
func nginxTLS(namespace string) string {
	return strings.ReplaceAll(`apiVersion: v1
kind: ConfigMap
metadata: {name: nginx, namespace: NS}
data:
  nginx.conf: |
    worker_processes 1;
    pid /tmp/nginx.pid;
    events { worker_connections 1024; }
    http {
      access_log off;
      client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
      server {
        listen 8443 ssl;
        ssl_certificate /run/tls/tls.crt;
        ssl_certificate_key /run/tls/tls.key;
        ssl_client_certificate /run/tls/ca.crt;
        ssl_verify_client on;
        ssl_verify_depth 3;
        location / { return 200 "$ssl_client_serial\n"; }
      }
    }
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: NS}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: NS, labels: {app: web}}
spec:
  serviceAccountName: web
  nodeName: node1
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 2000}
  containers:
    - name: nginx
      image: signet.example/shop-nginx:1
      imagePullPolicy: Never
      args: [-c, /config/nginx.conf]
      readinessProbe: {tcpSocket: {port: 8443}, periodSeconds: 1}
      `+restricted+`
      volumeMounts:
        - {name: config, mountPath: /config}
        - {name: svid, mountPath: /run/tls}
  volumes:
    - {name: config, configMap: {name: nginx}}
    - name: svid
      csi:
        driver: csi.signet.dev
        readOnly: true
        volumeAttributes: {signet.dev/signal: HUP, signet.dev/signal-program: /usr/sbin/nginx}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: NS}
spec: {selector: {app: web}, ports: [{port: 8443}]}
---
`, "NS", namespace)
}

// volume is the pod's part of a volume svid at /svid with attributes, in YAML's flow
// form, such as `signet.dev/uid: "33"`.
func (p *pod) volume(readOnly bool, attributes string) *pod {
	p.spec = append(p.spec, fmt.Sprintf("volumes: [{name: svid, csi: {driver: csi.signet.dev, readOnly: %v, volumeAttributes: {%s}}}]", readOnly, attributes))
	p.more = append(p.more, restricted, "volumeMounts: [{name: svid, mountPath: /svid}]")
	return p
}

// socket gives the pod the Workload API's socket by a volume.
func (p *pod) socket() *pod {
	p.env = append(p.env, "{name: SPIFFE_ENDPOINT_SOCKET, value: unix:///svid/agent.sock}")
	return p.volume(true, "signet.dev/content: socket")
}

// tlsCalls are the calls that a pod with testpod tls has made since an instant.
func (b *bench) tlsCalls(namespace, name string, since time.Time) (n int, serials map[string]bool, failed []string) {
	b.Helper()
	serials = map[string]bool{}
	dec := json.NewDecoder(strings.NewReader(b.kubectl("-n", namespace, "logs", name)))
	for dec.More() {
		var c struct {
			At                 time.Time
			Serial, Own, Error string
		}
		if err := dec.Decode(&c); err != nil {
			b.Fatal(err)
		}
		if c.At.Before(since) {
			continue
		}
		n++
		if c.Error != "" {
			failed = append(failed, c.At.Format(time.TimeOnly)+" "+c.Error)
			continue
		}
		serials[c.Serial] = true
		if c.Own != id(namespace, name) {
			b.Errorf("%s calls as %s", name, c.Own)
		}
	}
	return n, serials, failed
}

// waitEvent waits until an event of a pod says something.
func (b *bench) waitEvent(namespace, name, says string) {
	b.Helper()
	b.eventually(time.Minute, func() string {
		events, err := b.client.CoreV1().Events(namespace).List(b.Context(), metav1.ListOptions{FieldSelector: "type=Warning,involvedObject.name=" + name})
		if err != nil {
			return err.Error()
		}
		var all []string
		for _, e := range events.Items {
			if e.Reason == "FailedMount" && strings.Contains(e.Message, says) {
				b.Logf("%s: %s", name, e.Message)
				return ""
			}
			all = append(all, e.Reason+": "+e.Message)
		}
		return fmt.Sprintf("no event of %s says %q; there are %q", name, says, all)
	})
}

// volumesOn is everything of csi.signet.dev's volumes that is on a node.
func (b *bench) volumesOn(node string) string {
	b.Helper()
	return b.script(b.cluster.Node(node), `ls /run/signet/csi; grep -e signet-svid -e kubernetes.io~csi /proc/self/mountinfo || true; ls -d /var/lib/kubelet/pods/*/volumes/kubernetes.io~csi/* 2>/dev/null || true`)
}

// The certificate in a folder: nginx serves mutual TLS with it, under Pod Security
// `restricted`, over many renewals and a restart of the node's agent, and no call
// fails. Its caller has the Workload API's socket by a volume, too. When the pods are
// gone, nothing of a volume is left on a node, though the agent was away.
func TestVolumes(t *testing.T) {
	b := open(t)
	b.setTTL(24 * time.Second)
	in := b.namespace("enforce")
	b.kubectl("label", "namespace", in, "pod-security.kubernetes.io/enforce=restricted")
	before := map[string]string{}
	for _, n := range b.cluster.Nodes() {
		before[n.Name()] = b.volumesOn(n.Name())
	}
	b.apply(nginxTLS(in) + allow(in, "web", "caller"))
	caller := (&pod{namespace: in, name: "caller", account: "caller", node: "node2", args: []string{"tls", "web." + in + ":8443", "--id", id(in, "web")}}).socket()
	b.kubectl("-n", in, "wait", "pod", "web", "--for=condition=Ready", "--timeout=1m")
	b.startPods(caller)

	// What a program of the pod may do with it.
	if out, err := b.try("-n", in, "exec", "web", "--", "sh", "-c", "touch /run/tls/x"); err == nil || !strings.Contains(out, "Read-only") {
		t.Errorf("the pod writes to its volume: %v\n%s", err, out)
	}
	if out := b.kubectl("-n", in, "exec", "web", "--", "sh", "-c", "stat -L -c '%a %u %g' /run/tls/tls.key; stat -f -c %T /run/tls"); out != "440 0 2000\ntmpfs\n" {
		t.Errorf("the key: %s", out)
	}

	began := time.Now()
	b.eventually(20*time.Second, func() string { // policies and proxies follow
		if n, serials, failed := b.tlsCalls(in, "caller", time.Now().Add(-time.Second)); n == 0 || len(failed) > 0 {
			return fmt.Sprintf("%d calls, %v, failed: %q", n, serials, failed)
		}
		return ""
	})
	t.Logf("the first call in a row was served after %s", time.Since(began).Round(time.Second))
	judge := func(what string, since time.Time, want int) {
		t.Helper()
		b.eventually(2*time.Minute, func() string {
			if _, serials, _ := b.tlsCalls(in, "caller", since); len(serials) < want {
				return fmt.Sprintf("%s: nginx showed %d certificates, want %d", what, len(serials), want)
			}
			return ""
		})
		n, serials, failed := b.tlsCalls(in, "caller", since)
		t.Logf("%s: %d calls in %s, %d failed; nginx showed %d certificates", what, n, time.Since(since).Round(time.Second), len(failed), len(serials))
		if len(failed) > 0 {
			t.Errorf("%s: failed: %q", what, failed)
		}
	}
	judge("renewals", time.Now(), 4)

	since := time.Now()
	b.kubectl("-n", system, "delete", "pod", b.partOn("agent", "node1"))
	b.ready()
	judge("the agent started again", since, 3)

	// The agent goes in the same moment as the pod.
	agent := b.partOn("agent", "node1")
	b.kubectl("-n", in, "delete", "pod", "web", "caller", "--wait=false")
	b.kubectl("-n", system, "delete", "pod", agent)
	b.ready()
	b.kubectl("-n", in, "wait", "pod", "web", "caller", "--for=delete", "--timeout=1m")
	for node, was := range before {
		if is := b.volumesOn(node); is != was {
			t.Errorf("%s has\n%s\nand had before\n%s", node, is, was)
		}
	}
}

// Whatever a pod's author writes, a volume holds the identity that the pod has, or is
// not mounted, and an event says why.
func TestVolumesForged(t *testing.T) {
	b := open(t)
	in, out := b.namespace("observe"), b.namespace("")
	b.startPods((&pod{namespace: in, name: "bank", account: "bank", node: "node1", args: []string{"hold"}}).volume(true, ""))
	bank, err := b.client.CoreV1().Pods(in).Get(t.Context(), "bank", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// kubelet's own words, forged.
	forged := fmt.Sprintf("csi.storage.k8s.io/pod.uid: %s, csi.storage.k8s.io/pod.name: bank, csi.storage.k8s.io/serviceAccount.name: bank, csi.storage.k8s.io/pod.namespace: %s", bank.UID, in)
	b.startPods((&pod{namespace: in, name: "thief", account: "thief", node: "node1", args: []string{"hold"}}).volume(true, forged))
	for name, want := range map[string]string{"bank": id(in, "bank"), "thief": id(in, "thief")} {
		block, _ := pem.Decode([]byte(b.kubectl("-n", in, "exec", name, "--", "cat", "/svid/tls.crt")))
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil || len(cert.URIs) != 1 || cert.URIs[0].String() != want {
			t.Errorf("%s has a certificate of %v (%v)", name, cert.URIs, err)
		}
		// The key has no owner among those that the pod runs as.
		if out, err := b.try("-n", in, "exec", name, "--", "cat", "/svid/tls.key"); err == nil || !strings.Contains(out, "Permission denied") {
			t.Errorf("%s: anybody reads the key: %v", name, err)
		}
	}
	hold := func(namespace, name string) *pod {
		return &pod{namespace: namespace, name: name, account: "thief", node: "node1", args: []string{"hold"}}
	}
	for name, c := range map[string]struct {
		pod  *pod
		says string
	}{
		"chooses":  {hold(in, "chooses").volume(true, "signet.dev/spiffe-id: "+id(in, "bank")), `"signet.dev/spiffe-id" is not known`},
		"writes":   {hold(in, "writes").volume(false, ""), "write readOnly: true"},
		"stranger": {hold(out, "stranger").volume(true, ""), "namespace " + out + " is not in the mesh"},
		"listener": {hold(out, "listener").volume(true, "signet.dev/content: socket"), "namespace " + out + " is not in the mesh"},
	} {
		b.apply(c.pod.yaml())
		b.waitEvent(c.pod.namespace, name, c.says)
		if p, err := b.client.CoreV1().Pods(c.pod.namespace).Get(t.Context(), name, metav1.GetOptions{}); err != nil || len(p.Status.ContainerStatuses) != 1 || p.Status.ContainerStatuses[0].State.Waiting == nil {
			t.Errorf("%s runs: %+v, %v", name, p.Status, err)
		}
	}
	// They start once their namespace is in the mesh.
	b.mode(out, "observe")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	for _, name := range []string{"stranger", "listener"} {
		if text, err := b.command(ctx, "kubectl", "-n", out, "wait", "pod", name, "--for=condition=Ready", "--timeout=3m").CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
}
