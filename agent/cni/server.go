// Package cni is the agent's end of the socket on which signet-cni asks
// whether a pod may start. It is the gate that a pod's first process waits
// behind, so nothing that goes wrong opens it: an agent that does not know
// yet, that is not told in time, or that fails, keeps the pod waiting, and
// kubelet asks again.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"regexp"
	"time"

	v1 "github.com/signet-mesh/signet/api/cni/v1"
	"github.com/signet-mesh/signet/internal/unixsocket"
)

// Verdict is whether a pod belongs into the mesh.
type Verdict int

// The verdicts. The zero one lets no pod start.
const (
	// Unknown: there is no state yet, or it has not reached this pod.
	Unknown Verdict = iota
	// Enrolled: the pod starts when it is captured.
	Enrolled
	// NotEnrolled: its namespace is not in the mesh.
	NotEnrolled
	// Excluded: it opted out, and may.
	Excluded
)

// Agent is what the server needs of the agent. All methods are called
// concurrently.
type Agent interface {
	// Enrolment says whether a pod belongs into the mesh, by the last known
	// state. It does not block.
	Enrolment(namespace, name, uid string) Verdict
	// Hold pins the pod's network namespace, which is at netns, puts the
	// rules in place, and returns when the proxy listens inside. It may be
	// called again for the same pod.
	Hold(ctx context.Context, uid, netns string) error
	// Check says what is missing for a pod that Hold was called for.
	Check(ctx context.Context, uid, netns string) error
	// Release says that the sandbox whose namespace is at netns is being
	// deleted. netns is empty when nobody knows. A newer sandbox of the same
	// pod may be held already and must be left alone.
	Release(ctx context.Context, uid, netns string) error
}

// Config is what a Server needs to know.
type Config struct {
	// Socket is the path to listen on; required.
	Socket string
	// OwnNamespace is the namespace of the release, whose pods never wait: a
	// node on which the mesh itself waits for the mesh would not boot. Empty
	// means that there is none.
	OwnNamespace string
	// Wait is how long a pod waits for the agent before kubelet is told to
	// try again; 10 seconds if zero.
	Wait time.Duration
	// Poll is how often the agent is asked again meanwhile; 50 ms if zero.
	Poll time.Duration
	Log  *slog.Logger
}

// Server answers signet-cni.
type Server struct {
	cfg   Config
	agent Agent
}

// New returns a server that asks agent. Run serves.
func New(cfg Config, agent Agent) *Server {
	if cfg.Wait == 0 {
		cfg.Wait = 10 * time.Second
	}
	if cfg.Poll == 0 {
		cfg.Poll = 50 * time.Millisecond
	}
	return &Server{cfg: cfg, agent: agent}
}

// Run listens on the socket, which only the owner may open, until ctx ends.
// Pods that wait then are told to come again.
func (s *Server) Run(ctx context.Context) error {
	l, err := unixsocket.Listen(s.cfg.Socket, 0o600)
	if err != nil {
		return fmt.Errorf("cni: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := &http.Server{
		Handler:           s.handler(ctx),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelWarn),
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("cni: serve %s: %w", s.cfg.Socket, err)
	case <-ctx.Done():
	}
	// Those who wait are answered first: their requests end with ctx.
	end, stop := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer stop()
	err = srv.Shutdown(end)
	if errors.Is(err, context.DeadlineExceeded) {
		err = srv.Close()
	}
	if serr := <-done; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// handler serves the three questions; ctx ends with the server.
func (s *Server) handler(ctx context.Context) http.Handler {
	mux := http.NewServeMux()
	for path, answer := range map[string]func(context.Context, v1.Pod) (v1.Result, error){
		v1.PathAdd: s.add, v1.PathCheck: s.check, v1.PathDel: s.del,
	} {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			rctx, cancel := context.WithCancel(r.Context())
			defer cancel()
			defer context.AfterFunc(ctx, cancel)()
			s.serve(rctx, w, r, answer)
		})
	}
	return mux
}

func (s *Server) serve(ctx context.Context, w http.ResponseWriter, r *http.Request, answer func(context.Context, v1.Pod) (v1.Result, error)) {
	begin := time.Now()
	var p v1.Pod
	status, a := http.StatusOK, v1.Answer{}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10))
	d.DisallowUnknownFields()
	err := d.Decode(&p)
	if err == nil {
		err = valid(p, r.URL.Path == v1.PathDel)
	}
	if err != nil {
		status, a.Error = http.StatusBadRequest, fmt.Sprintf("signet-cni and signet-agent do not understand each other: %v; both must be of one release", err)
	} else if a.Result, err = answer(ctx, p); err != nil {
		status, a = http.StatusServiceUnavailable, v1.Answer{Error: err.Error()}
	}
	level := slog.LevelDebug
	if status != http.StatusOK {
		level = slog.LevelWarn
	}
	s.cfg.Log.Log(ctx, level, "cni", "path", r.URL.Path, "pod", p.Namespace+"/"+p.Name, "uid", p.UID, "sandbox", p.ContainerID,
		"result", string(a.Result), "error", a.Error, "took", time.Since(begin))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(a); err != nil {
		s.cfg.Log.WarnContext(ctx, "cni: answer", "pod", p.Namespace+"/"+p.Name, "error", err)
	}
}

var (
	label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	name  = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	uid   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,62}$`)
	cid   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}$`)
)

// valid checks each field for what Kubernetes and CNI allow.
func valid(p v1.Pod, mayLackNetNS bool) error {
	switch {
	case !label.MatchString(p.Namespace):
		return fmt.Errorf("namespace %q is no name of a namespace", p.Namespace)
	case !name.MatchString(p.Name):
		return fmt.Errorf("name %q is no name of a pod", p.Name)
	case !uid.MatchString(p.UID):
		return fmt.Errorf("uid %q is no UID of a pod", p.UID)
	case !cid.MatchString(p.ContainerID):
		return fmt.Errorf("containerID %q is no ID of a container", p.ContainerID)
	case p.NetNS == "" && mayLackNetNS:
		return nil
	case !filepath.IsAbs(p.NetNS) || filepath.Clean(p.NetNS) != p.NetNS:
		return fmt.Errorf("netns %q is no absolute path in its plain form", p.NetNS)
	}
	return nil
}
