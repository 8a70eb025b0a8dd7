package cluster

import (
	"bytes"
	"embed"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"text/template"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

//go:embed files
var files embed.FS

var templates = template.Must(template.ParseFS(files, "files/*"))

const (
	apiAddr     = "10.77.0.1:6443"
	serviceCIDR = "10.96.0.0/16,fd96::/112"
	podCIDR     = "10.244.0.0/16,fd44::/48"
	dnsAddr     = "10.96.0.10"

	bin = "/opt/kubernetes/bin/"
	etc = "/etc/kubernetes/"

	// nodeServicesFile holds all services of a node, whether they run or not.
	nodeServicesFile = "node-services.json"
)

// nodeServices are the names of a node's services.
var nodeServices = []string{"containerd", "kubelet", "kube-proxy"}

// configure writes what every machine needs before its first boot.
func (c *Cluster) configure() error {
	ca, err := newAuthority()
	if err != nil {
		return fmt.Errorf("cluster: make keys: %w", err)
	}
	for i := range c.state.Machines {
		m := c.machine(i)
		if err := os.MkdirAll(m.disk(), 0o755); err != nil {
			return fmt.Errorf("cluster: %w", err)
		}
		machine := spec.Machine{Name: m.Name, Cgroup: c.state.cgroup() + "/" + m.Name,
			Binds: map[string]string{"/opt/kubernetes/bin": c.state.Tools.Bin}}
		if i == 0 {
			machine.Forward = apiAddr
		}
		if err := m.write(spec.MachineFile, machine); err != nil {
			return fmt.Errorf("cluster: %s: %w", m.Name, err)
		}
		files, err := c.systemFiles(m)
		if err != nil {
			return err
		}
		more, err := c.controlFiles(ca)
		if i > 0 {
			more, err = c.nodeFiles(ca, m)
		}
		if err != nil {
			return fmt.Errorf("cluster: configure %s: %w", m.Name, err)
		}
		maps.Copy(files, more)
		for _, name := range sortedKeys(files) {
			if err := writeFile(filepath.Join(m.disk(), name), files[name]); err != nil {
				return fmt.Errorf("cluster: configure %s: %w", m.Name, err)
			}
		}
	}
	return c.adminConfigs(ca)
}

// systemFiles are what any program expects in /etc.
func (c *Cluster) systemFiles(m *machine) (map[string][]byte, error) {
	hosts := []byte("127.0.0.1 localhost\n::1 localhost\n")
	for _, other := range c.state.Machines {
		hosts = fmt.Appendf(hosts, "%s %s\n%s %s\n", other.Addr4, other.Name, other.Addr6, other.Name)
	}
	files := map[string][]byte{
		"etc/hosts":       hosts,
		"etc/hostname":    []byte(m.Name + "\n"),
		"etc/resolv.conf": []byte("# There is no name server outside of the cluster.\n"),
		"etc/machine-id":  fmt.Appendf(nil, "%032x\n", m.mac()),
		"etc/os-release":  []byte("PRETTY_NAME=\"test cluster\"\nID=signet-test\n"),
	}
	for _, name := range []string{"etc/passwd", "etc/group", "etc/nsswitch.conf", "etc/protocols", "etc/services", "etc/ld.so.cache", "etc/localtime"} {
		b, err := os.ReadFile("/" + name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("cluster: %w", err)
		}
		files[name] = b
	}
	// Many programs in /usr are links to links in here.
	alternatives := filepath.Join(m.disk(), "etc/alternatives")
	if err := os.MkdirAll(alternatives, 0o755); err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	entries, err := os.ReadDir("/etc/alternatives")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	for _, e := range entries {
		to, err := os.Readlink("/etc/alternatives/" + e.Name())
		if err != nil {
			continue // such as a README
		}
		if err := os.Symlink(to, filepath.Join(alternatives, e.Name())); err != nil {
			return nil, fmt.Errorf("cluster: %w", err)
		}
	}
	return files, nil
}

// controlFiles are the control plane's keys and kubeconfigs.
func (c *Cluster) controlFiles(ca *authority) (map[string][]byte, error) {
	control := c.control()
	_, signer, err := newKey()
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{
		"ca.crt": ca.pem,
		"sa.key": signer,
	}
	if files["ca.key"], err = encodeKey(ca.key); err != nil {
		return nil, err
	}
	for name, s := range map[string]subject{
		"apiserver": {user: "kube-apiserver",
			names: []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost", control.Name},
			addrs: []netip.Addr{control.Addr4, control.Addr6, netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd96::1"), netip.MustParseAddr("127.0.0.1")}},
		"kubelet-client": {user: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}},
	} {
		p, err := ca.issue(s)
		if err != nil {
			return nil, err
		}
		files[name+".crt"], files[name+".key"] = p.cert, p.key
	}
	for name, user := range map[string]string{
		"controller-manager": "system:kube-controller-manager",
		"scheduler":          "system:kube-scheduler",
	} {
		if files[name+".conf"], err = kubeconfig(ca, "https://"+apiAddr, subject{user: user}); err != nil {
			return nil, err
		}
	}
	return below(etc, files), nil
}

// nodeFiles are a node's keys and configuration.
func (c *Cluster) nodeFiles(ca *authority, m *machine) (map[string][]byte, error) {
	server := "https://" + apiAddr
	node := subject{user: "system:node:" + m.Name, groups: []string{"system:nodes"}}
	proxy, err := kubeconfig(ca, server, subject{user: "system:kube-proxy"})
	if err != nil {
		return nil, err
	}
	client, err := kubeconfig(ca, server, node)
	if err != nil {
		return nil, err
	}
	node.names, node.addrs = []string{m.Name}, []netip.Addr{m.Addr4, m.Addr6}
	serving, err := ca.issue(node)
	if err != nil {
		return nil, err
	}
	config := map[string][]byte{}
	for _, name := range []string{"containerd.toml", "kubelet.yaml", "cni.conflist"} {
		if config[name], err = render(name, m.machineState); err != nil {
			return nil, err
		}
	}
	files := below(etc, map[string][]byte{
		"ca.crt":          ca.pem,
		"kubelet.crt":     serving.cert,
		"kubelet.key":     serving.key,
		"kubelet.conf":    client,
		"kube-proxy.conf": proxy,
		"kubelet.yaml":    config["kubelet.yaml"],
	})
	files["etc/containerd/config.toml"] = config["containerd.toml"]
	files["etc/cni/net.d/10-pods.conflist"] = config["cni.conflist"]

	plugins := filepath.Join(m.disk(), "opt/cni/bin")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/usr/lib/cni")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if err := os.Symlink("/usr/lib/cni/"+e.Name(), filepath.Join(plugins, e.Name())); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	return files, m.write(nodeServicesFile, map[string]any{"Services": c.nodePrograms(m)})
}

// adminConfigs writes the kubeconfigs of Cluster.Kubeconfig and Cluster.Kubectl.
func (c *Cluster) adminConfigs(ca *authority) error {
	for name, server := range map[string]string{"kubeconfig": c.Server(), "kubeconfig-control": "https://" + apiAddr} {
		b, err := kubeconfig(ca, server, subject{user: "admin", groups: []string{"system:masters"}})
		if err != nil {
			return fmt.Errorf("cluster: %s: %w", name, err)
		}
		if err := writeFile(filepath.Join(c.dir, name), b); err != nil {
			return fmt.Errorf("cluster: %w", err)
		}
	}
	return nil
}

func kubeconfig(ca *authority, server string, s subject) ([]byte, error) {
	p, err := ca.issue(s)
	if err != nil {
		return nil, err
	}
	base64 := base64.StdEncoding.EncodeToString
	return render("kubeconfig.yaml", map[string]string{
		"Server": server, "CA": base64(ca.pem), "Cert": base64(p.cert), "Key": base64(p.key),
	})
}

func render(name string, data any) ([]byte, error) {
	var b bytes.Buffer
	err := templates.ExecuteTemplate(&b, name, data)
	return b.Bytes(), err
}

func below(dir string, files map[string][]byte) map[string][]byte {
	all := map[string][]byte{}
	for name, b := range files {
		all[filepath.Join(dir, name)[1:]] = b
	}
	return all
}

func writeFile(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	mode := os.FileMode(0o644)
	if bytes.Contains(b, []byte("PRIVATE KEY-----")) || bytes.Contains(b, []byte("client-key-data")) {
		mode = 0o600
	}
	return os.WriteFile(path, b, mode)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
