package kube

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// as returns a kubeconfig of a service account that has the given bindings.
func (b *bench) as(namespace, account string, bindings string) string {
	b.Helper()
	b.apply(fmt.Sprintf("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: %s, namespace: %s}\n---\n", account, namespace) + bindings)
	token := strings.TrimSpace(b.kubectl("-n", namespace, "create", "token", account, "--duration=1h"))
	text := b.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json")
	var config map[string]any
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		b.Fatal(err)
	}
	users, ok := config["users"].([]any)
	if !ok || len(users) != 1 {
		b.Fatalf("the kubeconfig has the users %v", config["users"])
	}
	users[0].(map[string]any)["user"] = map[string]any{"token": token}
	out, err := json.Marshal(config)
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), account)
	if err := os.WriteFile(path, out, 0o600); err != nil {
		b.Fatal(err)
	}
	return path
}

// bound binds an account to the roles of an operator.
func bound(namespace, account string) string {
	return fmt.Sprintf(`apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: %[1]s-%[2]s, namespace: %[3]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: signet-operator}
subjects: [{kind: ServiceAccount, namespace: %[1]s, name: %[2]s}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: %[1]s-%[2]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: signet-operator}
subjects: [{kind: ServiceAccount, namespace: %[1]s, name: %[2]s}]
---
`, namespace, account, system)
}

// What an operator asks with kubectl signet is answered with the roles that the
// release brings for it and nothing else; without them it is refused, and says
// what is missing.
func TestOperator(t *testing.T) {
	b := open(t)
	shop := b.namespace("enforce")
	b.apply(service(shop, "server", "server"))
	b.startPods(
		&pod{namespace: shop, name: "server", account: "server", args: []string{"serve"}},
		&pod{namespace: shop, name: "client", account: "client", args: []string{"hold"}},
	)
	b.refused(shop, "client", "server."+shop+":8080")
	b.mode(shop, "observe")
	b.served(shop, "client", "server."+shop+":8080", "server")
	b.mode(shop, "enforce")
	b.waitStatus(shop, "enforce: 2 of 2 pods enrolled")
	b.refused(shop, "client", "server."+shop+":8080")

	operator, nobody := b.as(shop, "operator", bound(shop, "operator")), b.as(shop, "nobody", "")
	t.Cleanup(func() { b.unbind(shop, "operator") })
	ask := func(kubeconfig string, args ...string) (string, error) {
		cmd := b.command(t.Context(), "kubectl", append([]string{"signet"}, args...)...)
		cmd.Env = append(cmd.Env, "KUBECONFIG="+kubeconfig)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, c := range []struct {
		args []string
		want string // in the answer
		code int
	}{
		{[]string{"check"}, "0 errors", 0},
		{[]string{"status"}, "2 of 2 pods enrolled", 0},
		{[]string{"certs"}, id(shop, "client"), 0},
		{[]string{"audit", "--since", "5m", "--verdict", "denied", "--to", shop + "/server"}, "default deny", 0},
		{[]string{"audit", "verify"}, "node2", 0},
		{[]string{"policy", "explain", "--from", shop + "/client", "--to", shop + "/server", "--port", "8080"}, "default deny", 3},
		{[]string{"policy", "generate", "--namespace", shop, "--since", "10m"}, "kind: AllowPolicy", 0},
	} {
		b.eventually(20*time.Second, func() string { // records are on their way
			out, err := ask(operator, c.args...)
			if code := exitCode(err); code != c.code || !strings.Contains(out, c.want) {
				return fmt.Sprintf("kubectl signet %q: exit code %d, want %d and %q:\n%s", c.args, code, c.code, c.want, out)
			}
			return ""
		})
		out, err := ask(nobody, c.args...)
		if code := exitCode(err); code == 0 || !strings.Contains(out, "forbidden") && !strings.Contains(out, "you may not") {
			t.Errorf("kubectl signet %q without a role: exit code %d:\n%s", c.args, code, out)
		}
	}
	// What is generated is what makes the calls pass.
	policy, err := ask(operator, "policy", "generate", "--namespace", shop, "--since", "10m")
	if err != nil {
		t.Fatalf("%v\n%s", err, policy)
	}
	b.apply(policy)
	b.served(shop, "client", "server."+shop+":8080", "server")
}

// Before Signet is installed, check says whether it could be, and by whom.
func TestCheckBeforeInstall(t *testing.T) {
	b := open(t)
	ns := b.namespace("")
	out, err := b.try("signet", "check", "-n", "not-installed")
	if err != nil || !strings.Contains(out, "SIG0502") {
		t.Errorf("%v\n%s", err, out)
	}
	nobody := b.as(ns, "nobody", "")
	cmd := b.command(t.Context(), "kubectl", "signet", "check", "-n", "not-installed")
	cmd.Env = append(cmd.Env, "KUBECONFIG="+nobody)
	said, err := cmd.CombinedOutput()
	if exitCode(err) == 0 {
		t.Errorf("an account without rights is told that it can install:\n%s", said)
	}
	t.Logf("an account without rights is told:\n%s", said)
}

func (b *bench) unbind(namespace, account string) {
	cmd := b.command(b.Context(), "kubectl", "delete", "-f", "-", "--ignore-not-found")
	cmd.Stdin = strings.NewReader(bound(namespace, account))
	_ = cmd.Run() // a binding without its account grants nothing
}
