package spire

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Agent is a running spire-agent, which tells workloads apart by the kernel's
// facts ("unix:uid:0" and the like).
type Agent struct {
	*process
	id     spiffeid.ID
	socket string
}

// StartAgent joins an agent to the server and waits until it is ready. The caller
// stops it.
func (s *Server) StartAgent(ctx context.Context, log io.Writer) (*Agent, error) {
	dir := filepath.Join(s.options.Dir, "agent")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	bundle, err := s.Command(ctx, nil, "bundle show")
	if err != nil {
		return nil, err
	}
	roots, config := filepath.Join(dir, "bootstrap.pem"), filepath.Join(dir, "agent.conf")
	if err := os.WriteFile(roots, bundle, 0o600); err != nil {
		return nil, err
	}
	token, id, err := s.JoinToken(ctx)
	if err != nil {
		return nil, err
	}
	a := &Agent{id: id, socket: filepath.Join(dir, "api.sock")}
	text := fmt.Sprintf("agent {\n  data_dir = %q\n  log_level = \"INFO\"\n  server_address = %q\n  server_port = \"%d\"\n  socket_path = %q\n  trust_bundle_path = %q\n  trust_domain = %q\n  join_token = %q\n}\n"+
		"plugins {\n  NodeAttestor \"join_token\" {\n    plugin_data {}\n  }\n  KeyManager \"memory\" {\n    plugin_data {}\n  }\n  WorkloadAttestor \"unix\" {\n    plugin_data {\n      discover_workload_path = true\n    }\n  }\n}\n",
		dir, s.options.Address.Addr(), s.options.Address.Port(), a.socket, roots, s.options.TrustDomain.Name(), token)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	if a.process, err = start(s.programs.Agent, []string{"run", "-config", config}, nil, log); err != nil {
		return nil, err
	}
	if err := a.ready(ctx, func(ctx context.Context) error {
		_, err := run(ctx, s.programs.Agent, nil, "healthcheck", "-socketPath", a.socket)
		return err
	}); err != nil {
		a.Stop()
		return nil, err
	}
	return a, nil
}

// ID is the agent's own identity.
func (a *Agent) ID() spiffeid.ID { return a.id }

// Socket is the address of the Workload API.
func (a *Agent) Socket() string { return "unix://" + a.socket }
