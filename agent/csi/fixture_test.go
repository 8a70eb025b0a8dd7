package csi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/internal/mesh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	uidA = "0b8e7d0e-3f6c-4b0e-9a53-5a1f0a4c2f11"
	uidB = "7c1f2d3e-0000-4b0e-9a53-5a1f0a4c2f22"
)

// node is a machine with kubelet's directories, an agent and an authority. The
// mounts are real, and kubelet is a client of the real sockets.
type node struct {
	t      *testing.T
	kubel  string // kubelet's directory
	run    string // the agent's
	root   *x509.Certificate
	key    *ecdsa.PrivateKey
	driver *Driver
	stop   func()

	mu      sync.Mutex
	pods    map[string]*mesh.Workload  // guarded by mu; by UID
	certs   map[spiffeid.ID]*svid.SVID // guarded by mu
	changed chan struct{}              // guarded by mu
	serial  int64                      // guarded by mu
	told    []string                   // guarded by mu; signals
	more    []*x509.Certificate        // guarded by mu; of the bundle
	refused []refusal.Refusal          // guarded by mu; since taken
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "csi") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, kubel: filepath.Join(dir, "kubelet"), run: filepath.Join(dir, "run"),
		pods: map[string]*mesh.Workload{}, certs: map[spiffeid.ID]*svid.SVID{}, changed: make(chan struct{})}
	t.Cleanup(func() {
		for _, at := range mountsBelow(t, dir) {
			_ = unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		os.RemoveAll(dir)
	})
	for _, d := range []string{"kubelet/pods", "kubelet/plugins", "kubelet/plugins_registry", "run/api"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if n.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	n.root = n.sign(&x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, n.key)
	return n
}

func (n *node) sign(tmpl *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	n.t.Helper()
	parent := n.root
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), n.key)
	if err != nil {
		n.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// mountsBelow lists what is mounted below a directory, the newest first.
func mountsBelow(t *testing.T, dir string) (at []string) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], dir+"/") {
			at = append([]string{f[4]}, at...)
		}
	}
	return at
}

// mounts is what the node has mounted.
func (n *node) mounts() []string { return mountsBelow(n.t, filepath.Dir(n.kubel)) }

// pod makes kubelet's directory of a pod, and has the control plane know it.
func (n *node) pod(uid, name, account string) *mesh.Workload {
	n.t.Helper()
	n.mkdir(uid, "svid")
	w := &mesh.Workload{Namespace: "shop", Name: name, ServiceAccount: account, UID: uid, Node: "node1",
		ID: spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/" + account)}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods[uid] = w
	return w
}

func (n *node) mkdir(uid, volume string) {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Dir(n.target(uid, volume)), 0o750); err != nil {
		n.t.Fatal(err)
	}
}

// issue gives an identity another certificate.
func (n *node) issue(id spiffeid.ID, life time.Duration) *svid.SVID {
	n.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		n.t.Fatal(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.serial++
	leaf := n.sign(&x509.Certificate{SerialNumber: big.NewInt(n.serial + 1), URIs: []*url.URL{id.URL()}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}, key)
	s := &svid.SVID{ID: id, Chain: [][]byte{leaf.Raw}, Key: key, Serial: hex.EncodeToString(leaf.SerialNumber.Bytes()), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}
	n.certs[id] = s
	close(n.changed)
	n.changed = make(chan struct{})
	return s
}

// Get, Bundle and Changed implement SVIDs.
func (n *node) Get(id spiffeid.ID) (*svid.SVID, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.certs[id]
	return s, s != nil && time.Now().Before(s.NotAfter)
}

func (n *node) Bundle() []*x509.Certificate {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]*x509.Certificate{n.root}, n.more...)
}

func (n *node) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

// Pod and SignalPod implement Agent.
func (n *node) Pod(namespace, uid string) (*mesh.Workload, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if w := n.pods[uid]; w != nil {
		return w, nil
	}
	if namespace == "outside" {
		return nil, errors.New("namespace outside is not in the mesh")
	}
	return nil, ErrUnknown
}

func (n *node) SignalPod(_ context.Context, uid, program string, signal unix.Signal) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.told = append(n.told, uid+" "+program+" "+unix.SignalName(signal))
	return 1, nil
}

func (n *node) refuse(r refusal.Refusal) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refused = append(n.refused, r)
}

// wantRefused wants one refusal to have been told since the last time, or none
// for an empty kind.
func (n *node) wantRefused(what string, kind refusal.Kind, uid string) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	got := n.refused
	n.refused = nil
	if kind == "" && len(got) == 0 {
		return
	}
	if len(got) != 1 || got[0].Kind != kind || got[0].Caller.PodUID != uid || got[0].Call != "NodePublishVolume" || got[0].Reason == "" {
		n.t.Errorf("%s: told %+v, want %q of %s", what, got, kind, uid)
	}
}

func (n *node) config() Config {
	return Config{Version: "test", Node: "node1", Kubelet: n.kubel, Dir: filepath.Join(n.run, "csi"), API: filepath.Join(n.run, "api"),
		Wait: 200 * time.Millisecond, Refused: n.refuse, Log: slog.New(slog.NewTextHandler(n.t.Output(), nil))}
}

// start runs a driver until the test ends or stop is called.
func (n *node) start() {
	n.t.Helper()
	n.driver = New(n.config(), n, n)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.driver.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(n.stop)
	n.eventually("the driver serves", func() bool { _, err := os.Stat(n.driver.registrar()); return err == nil })
}

func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	n.t.Fatalf("not within 10 s: %s", what)
}

// dial connects to a socket as kubelet does.
func (n *node) dial(socket string) *grpc.ClientConn {
	n.t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

func (n *node) target(uid, volume string) string {
	return filepath.Join(n.kubel, "pods", uid, "volumes", "kubernetes.io~csi", volume, "mount")
}

// request is what kubelet asks for a pod's volume named svid.
func (n *node) request(w *mesh.Workload, attributes map[string]string) *spec.NodePublishVolumeRequest {
	at := map[string]string{
		kubeletUID: w.UID, kubeletName: w.Name, kubeletNamespace: w.Namespace, kubeletAccount: w.ServiceAccount, kubeletEphemeral: "true",
	}
	maps.Copy(at, attributes)
	return &spec.NodePublishVolumeRequest{
		VolumeId: "csi-" + w.UID, TargetPath: n.target(w.UID, "svid"), Readonly: true, VolumeContext: at,
		VolumeCapability: &spec.VolumeCapability{AccessType: &spec.VolumeCapability_Mount{Mount: &spec.VolumeCapability_MountVolume{}}},
	}
}

func (n *node) publish(req *spec.NodePublishVolumeRequest) error {
	_, err := spec.NewNodeClient(n.dial(n.driver.socket())).NodePublishVolume(n.t.Context(), req)
	return err
}

func (n *node) unpublish(id, target string) error {
	_, err := spec.NewNodeClient(n.dial(n.driver.socket())).NodeUnpublishVolume(n.t.Context(), &spec.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
	return err
}

// nothing fails when anything of a volume is mounted or kept.
func (n *node) nothing(after string) {
	n.t.Helper()
	if at := n.mounts(); len(at) > 0 {
		n.t.Errorf("%s: mounted %q", after, at)
	}
	if left, err := os.ReadDir(n.driver.store.dir); err != nil && !errors.Is(err, fs.ErrNotExist) || len(left) > 0 {
		n.t.Errorf("%s: kept %v (%v)", after, left, err)
	}
}

func message(err error) string { return status.Convert(err).Message() }
