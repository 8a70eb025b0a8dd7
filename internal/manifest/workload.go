package manifest

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"strings"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// noUID is (uid_t)-1, which the kernel uses for "no user".
const noUID = 1<<32 - 1

// netnsDir is where ip-netns keeps the namespaces that have a name.
const netnsDir = "/run/netns/"

var (
	sha256Hex   = regexp.MustCompile(`^[0-9a-f]{64}$`)
	systemdUnit = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,247}\.(service|scope|slice)$`)
)

func (b *builder) workloadEntries() {
	for _, d := range b.byKind[v1alpha1.KindWorkloadEntry] {
		spec := d.spec.(*v1alpha1.WorkloadEntrySpec)
		w := mesh.Workload{
			Namespace:      d.meta.Namespace,
			Name:           d.meta.Name,
			ServiceAccount: spec.ServiceAccount,
			Node:           spec.Node,
		}
		if d.require("spec.serviceAccount", spec.ServiceAccount, authz.CheckName) {
			id, err := spiffeid.FromSegments(b.domain, "ns", w.Namespace, "sa", w.ServiceAccount)
			if err == nil { // otherwise the namespace is at fault and reported
				w.ID = id
			}
		}
		switch {
		case spec.Node != "":
			d.require("spec.node", spec.Node, authz.CheckName)
		case b.node == "":
			d.fault(CodeRequired, "spec.node", "is missing, and this machine has no node name")
		default:
			w.Node = b.node
		}
		if spec.Attest != nil {
			w.Attest = attest(d, spec.Attest)
		}
		switch {
		case spec.Hint == "":
		case spec.Attest == nil:
			d.fault(CodeUseless, "spec.hint", "is for processes, and the workload has no attest; remove it")
		default:
			if d.require("spec.hint", spec.Hint, checkHint) {
				w.Hint = spec.Hint
			}
		}
		if spec.Capture != nil {
			w.Capture = b.capture(d, &w, spec.Capture)
		}
		if spec.Attest == nil && spec.Capture == nil {
			d.fault(CodeUseless, "spec", "has neither attest nor capture, so nothing could ever use the identity; add one")
		}
		b.workloads[w.Key()] = spec.Capture != nil
		b.state.Workloads = append(b.state.Workloads, w)
	}
}

func attest(d *document, a *v1alpha1.Attest) *mesh.Attest {
	if *a == (v1alpha1.Attest{}) {
		d.fault(CodeRequired, "spec.attest", "is empty, which every process would match; set uid, path, sha256, systemdUnit or cgroup")
	}
	out := &mesh.Attest{Path: a.Path, SHA256: a.SHA256, SystemdUnit: a.SystemdUnit, Cgroup: a.Cgroup}
	if a.UID != nil {
		if *a.UID < 0 || *a.UID >= noUID {
			d.fault(CodeValue, "spec.attest.uid", "%d is no user id; use 0 to %d", *a.UID, noUID-1)
		}
		uid := uint32(*a.UID)
		out.UID = &uid
	}
	if a.Path != "" {
		if err := checkPath(a.Path); err != nil {
			d.fault(CodeValue, "spec.attest.path", "%v", err)
		}
	}
	if a.SHA256 != "" && !sha256Hex.MatchString(a.SHA256) {
		d.fault(CodeValue, "spec.attest.sha256", "%q is no digest; write 64 lower-case hex digits, as sha256sum prints them", a.SHA256)
	}
	if a.SystemdUnit != "" && !systemdUnit.MatchString(a.SystemdUnit) {
		d.fault(CodeValue, "spec.attest.systemdUnit", "%q is no unit; write the full name, such as nginx.service", a.SystemdUnit)
	}
	if a.Cgroup != "" {
		if err := checkPath(a.Cgroup); err != nil {
			d.fault(CodeValue, "spec.attest.cgroup", "%v", err)
		}
	}
	return out
}

// checkPath accepts one spelling of an absolute path below the root.
func checkPath(p string) error {
	switch {
	case !strings.HasPrefix(p, "/"):
		return fmt.Errorf("%q must be an absolute path", p)
	case p == "/":
		return errors.New(`"/" is everything; name something below it`)
	case path.Clean(p) != p:
		return fmt.Errorf("%q must be written plainly, as %q", p, path.Clean(p))
	}
	return nil
}

func (b *builder) capture(d *document, w *mesh.Workload, c *v1alpha1.Capture) *mesh.Capture {
	const field = "spec.capture"
	out := &mesh.Capture{NetNS: c.NetworkNamespace}
	switch {
	case c.NetworkNamespace == "":
		d.fault(CodeRequired, field+".networkNamespace", "is missing")
	case c.NetworkNamespace == "." || c.NetworkNamespace == "..":
		d.fault(CodeValue, field+".networkNamespace", "%q is no name", c.NetworkNamespace)
	case !strings.Contains(c.NetworkNamespace, "/"):
		out.NetNS = netnsDir + c.NetworkNamespace
	default:
		if err := checkPath(c.NetworkNamespace); err != nil {
			d.fault(CodeValue, field+".networkNamespace", "%v, or the bare name of a namespace in %s", err, netnsDir)
		}
	}
	if c.NetworkNamespace != "" {
		key := [2]string{w.Node, out.NetNS}
		if strings.HasPrefix(out.NetNS, "/var/run/") { // a link to /run: two names of one namespace
			key[1] = strings.TrimPrefix(out.NetNS, "/var")
		}
		if other, taken := b.netns[key]; taken {
			d.fault(CodeDuplicate, field+".networkNamespace", "%s is already captured for workload %s; a namespace has one identity", out.NetNS, other)
		} else {
			b.netns[key] = w.Key()
		}
	}
	if len(c.Addresses) == 0 {
		d.fault(CodeRequired, field+".addresses", "is empty; list the namespace's own addresses")
	}
	for i, s := range c.Addresses {
		if addr, ok := b.claim(d, fmt.Sprintf("%s.addresses[%d]", field, i), s, "workload "+w.Key()); ok {
			out.Addrs = append(out.Addrs, addr)
		}
	}
	return out
}

// claim parses an address that belongs to one document alone.
func (b *builder) claim(d *document, field, s, owner string) (netip.Addr, bool) {
	addr, err := parseAddr(s)
	if err != nil {
		d.fault(CodeValue, field, "%v", err)
		return netip.Addr{}, false
	}
	if other, taken := b.addresses[addr]; taken {
		d.fault(CodeDuplicate, field, "%s already belongs to %s", addr, other)
		return netip.Addr{}, false
	}
	b.addresses[addr] = owner
	return addr, true
}

// parseAddr reads an address by which others can reach something.
func parseAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return addr, fmt.Errorf("%q is no IP address (a plain one, without port or prefix length)", s)
	case addr.Zone() != "" || addr.IsLinkLocalUnicast():
		return addr, fmt.Errorf("%q is link-local; use an address that is the same everywhere", s)
	case addr.Is4In6():
		return addr, fmt.Errorf("%q is an IPv4 address in IPv6 form; write %s", s, addr.Unmap())
	case addr.IsUnspecified() || addr.IsMulticast() || addr.IsLoopback() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return addr, fmt.Errorf("%q is no address of a single machine that others can reach", s)
	}
	return addr, nil
}

// checkHint accepts what shows in a log and a table as it is.
func checkHint(hint string) error {
	if len(hint) > 64 {
		return fmt.Errorf("has %d bytes; use at most 64", len(hint))
	}
	for _, r := range hint {
		if !unicode.IsGraphic(r) {
			return fmt.Errorf("%q holds a character that cannot be seen", hint)
		}
	}
	return nil
}
