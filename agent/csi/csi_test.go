package csi

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/internal/mesh"
)

// serial reads a volume as a program does; empty: there is no certificate.
func serial(t *testing.T, dir string) string {
	t.Helper()
	// Both of one version: by their own names, one file could be read before they
	// are replaced and the other after.
	at, err := filepath.EvalSymlinks(filepath.Join(dir, "..data"))
	var pair tls.Certificate
	if err == nil {
		pair, err = tls.LoadX509KeyPair(filepath.Join(at, "tls.crt"), filepath.Join(at, "tls.key"))
	}
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return ""
	}
	return fmt.Sprintf("%x", pair.Leaf.SerialNumber.Bytes())
}

func roots(t *testing.T, dir string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil || !x509.NewCertPool().AppendCertsFromPEM(text) {
		t.Fatalf("ca.crt: %v", err)
	}
	return strings.Count(string(text), "BEGIN CERTIFICATE")
}

// kubelet finds the driver, asks it what it can, and has it mount a volume: the
// files are there at once, belong together, follow renewals of the certificate and
// of the roots, and are gone afterwards, with all mounts. Each call may be repeated.
func TestVolume(t *testing.T) {
	n := newNode(t)
	n.start()
	ctx := t.Context()
	plugin := registration.NewRegistrationClient(n.dial(n.driver.registrar()))
	info, err := plugin.GetInfo(ctx, &registration.InfoRequest{})
	if err != nil || info.GetType() != "CSIPlugin" || info.GetName() != "csi.signet.dev" || info.GetEndpoint() != n.kubel+"/plugins/csi.signet.dev/csi.sock" {
		t.Fatalf("%v, %v", info, err)
	}
	conn := n.dial(info.GetEndpoint())
	if _, err := plugin.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Fatal(err)
	}
	kubelet := spec.NewNodeClient(conn)
	if r, err := kubelet.NodeGetInfo(ctx, &spec.NodeGetInfoRequest{}); err != nil || r.GetNodeId() != "node1" {
		t.Errorf("%v, %v", r, err)
	}
	if r, err := kubelet.NodeGetCapabilities(ctx, &spec.NodeGetCapabilitiesRequest{}); err != nil || len(r.GetCapabilities()) != 1 || r.GetCapabilities()[0].GetRpc().GetType() != spec.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP {
		t.Errorf("%v, %v", r, err)
	}
	if r, err := spec.NewIdentityClient(conn).Probe(ctx, &spec.ProbeRequest{}); err != nil || !r.GetReady().GetValue() {
		t.Errorf("%v, %v", r, err)
	}

	w := n.pod(uidA, "web-1", "web")
	first := n.issue(w.ID, time.Hour)
	req, at := n.request(w, nil), n.target(uidA, "svid")
	for range 2 {
		if err := n.publish(req); err != nil {
			t.Fatal(err)
		}
		if got := serial(t, at); got != first.Serial || roots(t, at) != 1 {
			t.Errorf("certificate %q, want %s", got, first.Serial)
		}
	}
	if at := n.mounts(); len(at) != 2 {
		t.Errorf("mounted %q, want the files and the pod's view", at)
	}
	// Who has a file of before open, or the directory, goes on.
	for range 3 {
		next := n.issue(w.ID, time.Hour)
		n.eventually("the next certificate", func() bool { return serial(t, at) == next.Serial })
	}
	n.mu.Lock()
	n.more = []*x509.Certificate{n.root}
	n.mu.Unlock()
	n.eventually("the next root", func() bool { return roots(t, at) == 2 })
	if all, empty := n.driver.Count(); all != 1 || empty != 0 {
		t.Errorf("counted %d, %d", all, empty)
	}
	for range 2 {
		if err := n.unpublish(req.GetVolumeId(), at); err != nil {
			t.Fatal(err)
		}
		n.nothing("unpublished")
		if _, err := os.Lstat(at); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the target: %v", err)
		}
	}
	if all, _ := n.driver.Count(); all != 0 {
		t.Errorf("counted %d", all)
	}
}

// Who may read the key: its owner, and the pod's group if it has one, and nobody
// else, whatever is asked for.
func TestKeyMode(t *testing.T) {
	for _, c := range []struct {
		attributes map[string]string
		fsGroup    string
		want       [3]uint32
	}{
		{nil, "", [3]uint32{0, 0, 0o400}},
		{nil, "2000", [3]uint32{0, 2000, 0o440}},
		{map[string]string{attrUID: "33"}, "", [3]uint32{33, 0, 0o400}},
		{map[string]string{attrUID: "33"}, "2000", [3]uint32{33, 2000, 0o440}},
		{map[string]string{attrUID: "33", attrMode: "0400"}, "2000", [3]uint32{33, 2000, 0o400}},
		{map[string]string{attrMode: "0440"}, "", [3]uint32{0, 0, 0o440}},
	} {
		n := newNode(t)
		n.start()
		w := n.pod(uidA, "web-1", "web")
		n.issue(w.ID, time.Hour)
		req := n.request(w, c.attributes)
		req.GetVolumeCapability().GetMount().VolumeMountGroup = c.fsGroup
		if err := n.publish(req); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(req.GetTargetPath(), "tls.key"))
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		if got := [3]uint32{st.Uid, st.Gid, uint32(info.Mode().Perm())}; got != c.want {
			t.Errorf("%v, fsGroup %q: owner, group and mode %o, want %o", c.attributes, c.fsGroup, got, c.want)
		}
		// The pod's programs may enter as whoever they are; the agent's side is its own.
		if info, err := os.Stat(req.GetTargetPath()); err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("the folder: %v, %v", info.Mode(), err)
		}
		if info, err := os.Stat(n.driver.store.of(req.GetVolumeId())); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("the agent's side: %v, %v", info.Mode(), err)
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(req.GetTargetPath(), &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
			t.Errorf("the key is not in memory: %x, %v", fs.Type, err)
		}
		n.stop()
	}
}

// Nobody but the agent writes to a volume, neither on the node nor where a mount
// of it has been propagated to: root of a container that were able to could have the
// agent write elsewhere, by links.
func TestReadOnly(t *testing.T) {
	n := newNode(t)
	pods := filepath.Join(n.kubel, "pods")
	copied := filepath.Join(filepath.Dir(n.kubel), "copied")
	if err := os.Mkdir(copied, 0o755); err != nil {
		t.Fatal(err)
	}
	// As kubelet and the agent see one directory through two mounts.
	for _, m := range []struct {
		from, to string
		flags    uintptr
	}{{pods, pods, unix.MS_BIND}, {"", pods, unix.MS_SHARED}, {pods, copied, unix.MS_BIND}} {
		if err := unix.Mount(m.from, m.to, "", m.flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	w := n.pod(uidA, "web-1", "web")
	n.issue(w.ID, time.Hour)
	for _, content := range []string{contentFiles, contentSocket} {
		req := n.request(w, map[string]string{attrContent: content})
		if err := n.publish(req); err != nil {
			t.Fatal(err)
		}
		for _, at := range []string{req.GetTargetPath(), strings.Replace(req.GetTargetPath(), pods, copied, 1)} {
			entries, err := os.ReadDir(at)
			if err != nil || content == contentFiles && len(entries) == 0 {
				t.Fatalf("%s: %v, %v", at, entries, err)
			}
			if err := os.WriteFile(filepath.Join(at, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("%s: writing to it: %v", at, err)
			}
			var fs unix.Statfs_t
			const want = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
			if err := unix.Statfs(at, &fs); err != nil || fs.Flags&want != want {
				t.Errorf("%s: flags %x, %v", at, fs.Flags, err)
			}
		}
		if err := n.unpublish(req.GetVolumeId(), req.GetTargetPath()); err != nil {
			t.Fatal(err)
		}
		if got := len(n.mounts()); got != 2 {
			t.Errorf("mounted %q", n.mounts())
		}
	}
}

// A volume with the socket of the Workload API: it is the real one, and another
// agent's after a restart.
func TestSocket(t *testing.T) {
	n := newNode(t)
	n.start()
	w := n.pod(uidA, "web-1", "web") // without a certificate
	req := n.request(w, map[string]string{attrContent: contentSocket})
	api := filepath.Join(n.run, "api")
	if err := os.Rename(api, api+"-away"); err != nil {
		t.Fatal(err)
	}
	if err := n.publish(req); err == nil {
		t.Error("published without a socket")
	}
	n.nothing("no socket")
	if err := os.Rename(api+"-away", api); err != nil {
		t.Fatal(err)
	}
	if err := n.publish(req); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		l, err := net.Listen("unix", filepath.Join(n.run, "api", "agent.sock"))
		if err != nil {
			t.Fatal(err)
		}
		dir, err := os.Open(req.GetTargetPath()) // whose path is too long for a socket's; a pod's is not
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/agent.sock", dir.Fd()))
		dir.Close()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		l.Close()
	}
	if err := n.unpublish(req.GetVolumeId(), req.GetTargetPath()); err != nil {
		t.Fatal(err)
	}
	n.nothing("unpublished")
	if _, err := os.Stat(filepath.Join(n.run, "api")); err != nil {
		t.Errorf("the socket's directory went too: %v", err)
	}
}

// Who the pod is, is what kubelet says and the control plane confirms. Requests in
// which anything disagrees, or that ask for what there is not, mount nothing.
func TestForged(t *testing.T) {
	n := newNode(t)
	n.start()
	w, other := n.pod(uidA, "web-1", "web"), n.pod(uidB, "bank-1", "bank")
	n.issue(w.ID, time.Hour)
	n.issue(other.ID, time.Hour)
	type request = spec.NodePublishVolumeRequest
	set := func(key, value string) func(*request) {
		return func(r *request) { r.VolumeContext[key] = value }
	}
	for name, c := range map[string]struct {
		forge func(*request)
		code  codes.Code
		says  string
	}{
		"another pod's UID in the attributes": {set(kubeletUID, uidB), codes.InvalidArgument, "target_path"},
		"another pod's path":                  {func(r *request) { r.TargetPath = n.target(uidB, "svid") }, codes.InvalidArgument, "target_path"},
		"another service account":             {set(kubeletAccount, "bank"), codes.FailedPrecondition, "service account web"},
		"another name":                        {set(kubeletName, "bank-1"), codes.FailedPrecondition, "shop/web-1"},
		"another namespace":                   {set(kubeletNamespace, "bank"), codes.FailedPrecondition, "shop/web-1"},
		"no UID":                              {set(kubeletUID, ""), codes.InvalidArgument, "podInfoOnMount"},
		"no service account":                  {set(kubeletAccount, ""), codes.InvalidArgument, "podInfoOnMount"},
		"not inline":                          {set(kubeletEphemeral, "false"), codes.InvalidArgument, "inline"},
		"an identity of its choice":           {set("signet.dev/spiffe-id", "spiffe://mesh.test/ns/shop/sa/bank"), codes.InvalidArgument, "signet.dev/spiffe-id"},
		"an unknown content":                  {set(attrContent, "keys"), codes.InvalidArgument, "neither files nor socket"},
		"a mode with the socket":              {func(r *request) { set(attrContent, contentSocket)(r); set(attrMode, "0400")(r) }, codes.InvalidArgument, attrMode},
		"a key for everybody":                 {set(attrMode, "0444"), codes.InvalidArgument, "neither 0400 nor 0440"},
		"a user that is none":                 {set(attrUID, "-1"), codes.InvalidArgument, attrUID},
		"a user that means nobody's change":   {set(attrUID, "4294967295"), codes.InvalidArgument, attrUID},
		"a file outside":                      {set(attrKey, "../x"), codes.InvalidArgument, `"../x"`},
		"two files of one name":               {set(attrKey, "tls.crt"), codes.InvalidArgument, "two files"},
		"a hidden file":                       {set(attrCert, "..data"), codes.InvalidArgument, `"..data"`},
		"a signal to nobody":                  {set(attrSignal, "HUP"), codes.InvalidArgument, "belong together"},
		"a signal that ends programs":         {func(r *request) { set(attrSignal, "KILL")(r); set(attrProgram, "/bin/x")(r) }, codes.InvalidArgument, "HUP, USR1, USR2"},
		"a program by its name":               {func(r *request) { set(attrSignal, "HUP")(r); set(attrProgram, "nginx")(r) }, codes.InvalidArgument, "absolute path"},
		"writable":                            {func(r *request) { r.Readonly = false }, codes.InvalidArgument, "readOnly: true"},
		"a block device": {func(r *request) {
			r.VolumeCapability = &spec.VolumeCapability{AccessType: &spec.VolumeCapability_Block{}}
		}, codes.InvalidArgument, "block"},
		"a secret":                {func(r *request) { r.Secrets = map[string]string{"a": "b"} }, codes.InvalidArgument, "nodePublishSecretRef"},
		"a volume id that climbs": {func(r *request) { r.VolumeId = "../../x" }, codes.InvalidArgument, "volume_id"},
		"no volume id":            {func(r *request) { r.VolumeId = "" }, codes.InvalidArgument, "volume_id"},
		"a group that is none":    {func(r *request) { r.GetVolumeCapability().GetMount().VolumeMountGroup = "x" }, codes.InvalidArgument, "fsGroup"},
	} {
		req := n.request(w, nil)
		c.forge(req)
		if err := n.publish(req); status.Code(err) != c.code || !strings.Contains(message(err), c.says) {
			t.Errorf("%s: %v; want %s that says %q", name, err, c.code, c.says)
		}
		n.nothing(name)
		if c.code == codes.FailedPrecondition {
			n.wantRefused(name, refusal.NotItsOwn, uidA)
		} else {
			n.wantRefused(name, "", "")
		}
	}
	// Paths that are no pod's volume.
	good := n.target(uidA, "svid")
	for _, path := range []string{
		"", "/", "/etc", good + "/..", good + "/", strings.Replace(good, "/volumes/", "//volumes/", 1), strings.Replace(good, "/volumes/", "/./volumes/", 1),
		strings.Replace(good, "kubernetes.io~csi", "kubernetes.io~empty-dir", 1), strings.Replace(good, uidA, "..", 1), strings.Replace(good, "/svid/", "/../", 1),
		strings.TrimSuffix(good, "/mount"), good + "x", "pods/" + uidA + "/volumes/kubernetes.io~csi/svid/mount",
	} {
		req := n.request(w, nil)
		req.TargetPath = path
		if err := n.publish(req); status.Code(err) != codes.InvalidArgument || !strings.Contains(message(err), "target_path") {
			t.Errorf("%q: %v", path, err)
		}
		if err := n.unpublish(req.GetVolumeId(), path); err == nil {
			t.Errorf("unpublished %q", path)
		}
		n.nothing(path)
	}
	// What is mounted for one pod is not taken by another, nor taken away by a
	// wrong path.
	req := n.request(w, nil)
	if err := n.publish(req); err != nil {
		t.Fatal(err)
	}
	stolen := n.request(other, nil)
	stolen.VolumeId = req.GetVolumeId()
	if err := n.publish(stolen); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a volume's id for another pod: %v", err)
	}
	if err := n.unpublish(req.GetVolumeId(), n.target(uidB, "svid")); err == nil {
		t.Error("unpublished by another pod's path")
	}
	if serial(t, req.GetTargetPath()) == "" {
		t.Error("the volume is gone")
	}
}

// A pod that has no identity, or none yet, gets an error that says why, and never
// an empty folder.
func TestNobody(t *testing.T) {
	n := newNode(t)
	n.start()
	w := &mesh.Workload{Namespace: "shop", Name: "web-1", ServiceAccount: "web", UID: uidA}
	n.mkdir(uidA, "svid")
	for _, content := range []string{contentFiles, contentSocket} {
		req := n.request(w, map[string]string{attrContent: content})
		if err := n.publish(req); status.Code(err) != codes.Unavailable || !strings.Contains(message(err), "does not know this pod yet") {
			t.Errorf("%s of an unknown pod: %v", content, err)
		}
		n.wantRefused("a pod that may yet be known", "", "")
		n.nothing("unknown")
		req.VolumeContext[kubeletNamespace] = "outside"
		if err := n.publish(req); status.Code(err) != codes.FailedPrecondition || !strings.Contains(message(err), "not in the mesh") {
			t.Errorf("%s of a pod outside of the mesh: %v", content, err)
		}
		n.wantRefused(content, refusal.Stranger, uidA)
		n.nothing("outside")
	}
	known := n.pod(uidA, "web-1", "web")
	req := n.request(known, nil)
	if err := n.publish(req); status.Code(err) != codes.Unavailable || !strings.Contains(message(err), "certificate is not there yet") {
		t.Errorf("without a certificate: %v", err)
	}
	n.nothing("no certificate")
	// It comes while kubelet waits.
	go func() { time.Sleep(50 * time.Millisecond); n.issue(known.ID, time.Hour) }()
	if err := n.publish(req); err != nil {
		t.Error(err)
	}
}

// Somebody has put a link where kubelet's directories should be: nothing is
// mounted, made or removed where it leads.
func TestLinks(t *testing.T) {
	for _, part := range []string{uidA, "volumes", "kubernetes.io~csi", "svid", "mount"} {
		n := newNode(t)
		n.start()
		w := n.pod(uidA, "web-1", "web")
		n.issue(w.ID, time.Hour)
		at := n.target(uidA, "svid")
		if err := os.Mkdir(at, 0o750); err != nil {
			t.Fatal(err)
		}
		from := at[:strings.Index(at, "/"+part)+1+len(part)]
		to := filepath.Join(filepath.Dir(n.kubel), "elsewhere")
		if err := errors.Join(os.Rename(from, to), os.Symlink(to, from)); err != nil {
			t.Fatal(err)
		}
		req := n.request(w, nil)
		if err := n.publish(req); err == nil {
			t.Errorf("%s is a link: published", part)
		}
		n.nothing(part + " is a link")
		// Nor when the link came after what was there had been looked at.
		if to, err := parseTarget(n.driver.pods(), at); err != nil || to.attach(filepath.Join(n.run, "api")) == nil {
			t.Errorf("%s is a link: attached (%v)", part, err)
		}
		n.nothing(part + " is a link")
		// Something of somebody else's is mounted where the link leads.
		victim := strings.Replace(at, from, to, 1)
		if err := unix.Mount("tmpfs", victim, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		if err := n.unpublish(req.GetVolumeId(), at); err == nil {
			t.Errorf("%s is a link: unpublished", part)
		}
		if got := n.mounts(); len(got) != 1 || got[0] != victim {
			t.Errorf("%s is a link: mounted %q, want %s", part, got, victim)
		}
		n.stop()
	}
}

// An agent that starts again renews the volumes that it finds, and takes away those
// whose pod is gone, or that were never finished.
func TestRestart(t *testing.T) {
	n := newNode(t)
	n.start()
	w, b := n.pod(uidA, "web-1", "web"), n.pod(uidB, "bank-1", "bank")
	n.issue(w.ID, time.Hour)
	n.issue(b.ID, time.Hour)
	reqA, reqB := n.request(w, nil), n.request(b, nil)
	for _, req := range []*spec.NodePublishVolumeRequest{reqA, reqB} {
		if err := n.publish(req); err != nil {
			t.Fatal(err)
		}
	}
	n.stop()
	if serial(t, reqA.GetTargetPath()) == "" {
		t.Error("without an agent the files are gone")
	}
	// Meanwhile a pod goes, with its mount, and a crash has left halves.
	tb, err := parseTarget(n.driver.pods(), reqB.GetTargetPath())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tb.detach(), os.RemoveAll(filepath.Join(n.kubel, "pods", uidB))); err != nil {
		t.Fatal(err)
	}
	half := &volume{ID: "csi-half", UID: uidA, Namespace: "shop", Pod: "web-1", Target: n.target(uidA, "half"), Content: contentFiles}
	if err := errors.Join(n.driver.store.put(half), n.driver.store.mount(half.ID), os.Mkdir(n.driver.store.of("csi-nothing"), 0o700)); err != nil {
		t.Fatal(err)
	}
	next := n.issue(w.ID, time.Hour)
	n.start()
	n.eventually("the next certificate", func() bool { return serial(t, reqA.GetTargetPath()) == next.Serial })
	if entries, err := os.ReadDir(n.driver.store.dir); err != nil || len(entries) != 1 || entries[0].Name() != reqA.GetVolumeId() {
		t.Errorf("kept %v, %v", entries, err)
	}
	if got := n.mounts(); len(got) != 2 {
		t.Errorf("mounted %q", got)
	}
	// kubelet asks again, after a restart of its own.
	if err := n.publish(reqA); err != nil {
		t.Error(err)
	}
	// What is left of a pod that is gone goes while the agent runs, too.
	ta, err := parseTarget(n.driver.pods(), reqA.GetTargetPath())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(ta.detach(), os.RemoveAll(filepath.Join(n.kubel, "pods", uidA))); err != nil {
		t.Fatal(err)
	}
	n.eventually("the volume of a pod that is gone to go", func() bool { all, _ := n.driver.Count(); return all == 0 })
	n.nothing("the pod is gone")
}

// The files outlive neither their certificate nor, for longer than that, the
// identity; when there is another, they are back.
func TestExpired(t *testing.T) {
	n := newNode(t)
	n.start()
	w := n.pod(uidA, "web-1", "web")
	n.issue(w.ID, 2*time.Second)
	req := n.request(w, nil)
	if err := n.publish(req); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	delete(n.pods, uidA) // it has left the mesh
	n.mu.Unlock()
	time.Sleep(100 * time.Millisecond)
	if serial(t, req.GetTargetPath()) == "" {
		t.Error("the files went before their certificate")
	}
	// An agent that starts only then removes them, too.
	n.stop()
	n.start()
	n.eventually("the files to go", func() bool { return serial(t, req.GetTargetPath()) == "" })
	if entries, err := os.ReadDir(req.GetTargetPath()); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if all, empty := n.driver.Count(); all != 1 || empty != 1 {
		t.Errorf("counted %d, %d", all, empty)
	}
	n.mu.Lock()
	n.pods[uidA] = w
	n.mu.Unlock()
	next := n.issue(w.ID, time.Hour)
	n.eventually("the files to be back", func() bool { return serial(t, req.GetTargetPath()) == next.Serial })
}

// A program is told of each change, and of the first certificate, which it has not
// read yet, not.
func TestSignal(t *testing.T) {
	n := newNode(t)
	n.start()
	w := n.pod(uidA, "web-1", "web")
	n.issue(w.ID, time.Hour)
	if err := n.publish(n.request(w, map[string]string{attrSignal: "HUP", attrProgram: "/usr/sbin/nginx"})); err != nil {
		t.Fatal(err)
	}
	told := func() string {
		n.mu.Lock()
		defer n.mu.Unlock()
		return strings.Join(n.told, ", ")
	}
	time.Sleep(2 * lookAround)
	if got := told(); got != "" {
		t.Errorf("told %s before anything had changed", got)
	}
	n.issue(w.ID, time.Hour)
	n.eventually("the signal", func() bool { return told() == uidA+" /usr/sbin/nginx SIGHUP" })
}

// The mesh is removed from the cluster: nothing stays on the node.
func TestRemove(t *testing.T) {
	n := newNode(t)
	n.start()
	w := n.pod(uidA, "web-1", "web")
	n.issue(w.ID, time.Hour)
	if err := n.publish(n.request(w, nil)); err != nil {
		t.Fatal(err)
	}
	n.stop()
	if err := Remove(n.config()); err != nil {
		t.Fatal(err)
	}
	if got := n.mounts(); len(got) > 0 {
		t.Errorf("mounted %q", got)
	}
	for _, path := range []string{n.config().Dir, n.driver.socket(), n.driver.registrar()} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}
