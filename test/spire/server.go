package spire

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Options describe a server.
type Options struct {
	// Dir keeps configuration, state and sockets. Its path must be short.
	Dir         string
	TrustDomain spiffeid.TrustDomain
	// Address is where agents call.
	Address netip.AddrPort
	// BundleEndpoint serves the bundle by https_spiffe; zero: not.
	BundleEndpoint netip.AddrPort
	// Federates are the trust domains whose bundles are fetched.
	Federates []Federation
	// SVIDTTL is how long a workload's certificate lives; zero: SPIRE's default.
	SVIDTTL time.Duration
	// Durable keeps the authority's keys on disk, as in production, and not in
	// memory only.
	Durable bool
	// More are lines of the configuration's server section.
	More string
	// Env are further variables, such as GOMAXPROCS=1.
	Env []string
}

// Federation is a trust domain that is followed by https_spiffe.
type Federation struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	Endpoint    spiffeid.ID
}

// Server is a running spire-server, with its state in SQLite.
type Server struct {
	*process
	programs Programs
	options  Options
	socket   string
}

// StartServer runs a server and waits until it is ready. The caller stops it.
func StartServer(ctx context.Context, programs Programs, o Options, log io.Writer) (*Server, error) {
	s := &Server{programs: programs, options: o, socket: filepath.Join(o.Dir, "server.sock")}
	config := filepath.Join(o.Dir, "server.conf")
	if err := os.WriteFile(config, []byte(s.config()), 0o600); err != nil {
		return nil, err
	}
	var err error
	if s.process, err = start(programs.Server, []string{"run", "-config", config}, o.Env, log); err != nil {
		return nil, err
	}
	if err := s.ready(ctx, func(ctx context.Context) error {
		_, err := s.Command(ctx, nil, "healthcheck")
		return err
	}); err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

// config is the server's configuration file, in HCL.
func (s *Server) config() string {
	o := &s.options
	var b strings.Builder
	fmt.Fprintf(&b, "server {\n  bind_address = %q\n  bind_port = \"%d\"\n  socket_path = %q\n  trust_domain = %q\n  data_dir = %q\n  log_level = \"INFO\"\n  ca_key_type = \"ec-p256\"\n",
		o.Address.Addr(), o.Address.Port(), s.socket, o.TrustDomain.Name(), o.Dir)
	if o.SVIDTTL > 0 {
		fmt.Fprintf(&b, "  default_x509_svid_ttl = %q\n", o.SVIDTTL)
	}
	b.WriteString(o.More)
	if o.BundleEndpoint.IsValid() || len(o.Federates) > 0 {
		b.WriteString("  federation {\n")
		if o.BundleEndpoint.IsValid() {
			fmt.Fprintf(&b, "    bundle_endpoint {\n      address = %q\n      port = %d\n      refresh_hint = \"1s\"\n      profile \"https_spiffe\" {}\n    }\n", o.BundleEndpoint.Addr(), o.BundleEndpoint.Port())
		}
		for _, f := range o.Federates {
			fmt.Fprintf(&b, "    federates_with %q {\n      bundle_endpoint_url = %q\n      bundle_endpoint_profile \"https_spiffe\" {\n        endpoint_spiffe_id = %q\n      }\n    }\n", f.TrustDomain.Name(), f.URL, f.Endpoint)
		}
		b.WriteString("  }\n")
	}
	keys := "  KeyManager \"memory\" {\n    plugin_data {}\n  }\n"
	if o.Durable {
		keys = fmt.Sprintf("  KeyManager \"disk\" {\n    plugin_data {\n      keys_path = %q\n    }\n  }\n", filepath.Join(o.Dir, "keys.json"))
	}
	fmt.Fprintf(&b, "}\nplugins {\n  DataStore \"sql\" {\n    plugin_data {\n      database_type = \"sqlite3\"\n      connection_string = %q\n    }\n  }\n  NodeAttestor \"join_token\" {\n    plugin_data {}\n  }\n%s}\n",
		filepath.Join(o.Dir, "datastore.sqlite3"), keys)
	return b.String()
}

// Command runs a command of spire-server against this server: its words, and
// then its flags. It returns what the command prints.
func (s *Server) Command(ctx context.Context, stdin []byte, words string, flags ...string) ([]byte, error) {
	args := append(strings.Fields(words), "-socketPath", s.socket)
	return run(ctx, s.programs.Server, stdin, append(args, flags...)...)
}

// BundleEndpointURL is where others fetch the bundle. The endpoint is
// BundleEndpointID.
func (s *Server) BundleEndpointURL() string { return "https://" + s.options.BundleEndpoint.String() }

// BundleEndpointID is who the bundle endpoint is.
func (s *Server) BundleEndpointID() spiffeid.ID {
	return spiffeid.RequireFromPath(s.options.TrustDomain, "/spire/server")
}

// Bundle is the trust domain's bundle, as a SPIFFE document.
func (s *Server) Bundle(ctx context.Context) ([]byte, error) {
	return s.Command(ctx, nil, "bundle show", "-format", "spiffe")
}

// SetBundle gives the server the bundle of a trust domain that it is to follow,
// and has it ask that trust domain's endpoint at once.
func (s *Server) SetBundle(ctx context.Context, td spiffeid.TrustDomain, document []byte) error {
	if _, err := s.Command(ctx, document, "bundle set", "-format", "spiffe", "-id", td.IDString()); err != nil {
		return err
	}
	_, err := s.Command(ctx, nil, "federation refresh", "-id", td.IDString())
	return err
}

// Entry is a workload that the server knows.
type Entry struct {
	ID            spiffeid.ID
	Selectors     []string // such as "unix:uid:0"; all of them must be met
	FederatesWith []spiffeid.TrustDomain
}

// AddEntries registers workloads below an agent.
func (s *Server) AddEntries(ctx context.Context, agent spiffeid.ID, entries ...Entry) error {
	type object = map[string]any
	var list []object
	for _, e := range entries {
		var selectors []object
		for _, text := range e.Selectors {
			kind, value, _ := strings.Cut(text, ":")
			selectors = append(selectors, object{"type": kind, "value": value})
		}
		federates := []string{}
		for _, td := range e.FederatesWith {
			federates = append(federates, td.Name())
		}
		list = append(list, object{"parent_id": agent.String(), "spiffe_id": e.ID.String(), "selectors": selectors, "federates_with": federates})
	}
	data, err := json.Marshal(object{"entries": list})
	if err != nil {
		return err
	}
	_, err = s.Command(ctx, data, "entry create", "-data", "-")
	return err
}

// Federate gives every workload that is registered the bundle of a trust domain
// that SetBundle has made known.
func (s *Server) Federate(ctx context.Context, td spiffeid.TrustDomain) error {
	out, err := s.Command(ctx, nil, "entry show", "-output", "json")
	if err != nil {
		return err
	}
	var list struct {
		Entries []struct {
			ID       string     `json:"id"`
			SPIFFEID identity   `json:"spiffe_id"`
			ParentID identity   `json:"parent_id"`
			Matches  []selector `json:"selectors"`
		} `json:"entries"`
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return fmt.Errorf("entry show: %w in %s", err, out)
	}
	for _, e := range list.Entries {
		flags := []string{"-entryID", e.ID, "-spiffeID", e.SPIFFEID.String(), "-parentID", e.ParentID.String(), "-federatesWith", td.IDString()}
		for _, m := range e.Matches {
			flags = append(flags, "-selector", m.Type+":"+m.Value)
		}
		if _, err := s.Command(ctx, nil, "entry update", flags...); err != nil {
			return err
		}
	}
	return nil
}

// identity and selector are how the server's commands print these.
type identity struct {
	TrustDomain string `json:"trust_domain"`
	Path        string `json:"path"`
}

func (i identity) String() string { return "spiffe://" + i.TrustDomain + i.Path }

type selector struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

// Authority names one of the authority's keys.
type Authority struct {
	ID        string `json:"authority_id"`
	ExpiresAt string `json:"expires_at"`
}

// LocalAuthority runs one of the commands that replace the authority's keys: of
// kind x509 or jwt, an action such as prepare, of the authority with an ID.
func (s *Server) LocalAuthority(ctx context.Context, kind, action, id string) (map[string]Authority, error) {
	flags := []string{"-output", "json"}
	if id != "" {
		flags = append(flags, "-authorityID", id)
	}
	out, err := s.Command(ctx, nil, "localauthority "+kind+" "+action, flags...)
	if err != nil {
		return nil, err
	}
	var authorities map[string]Authority
	if err := json.Unmarshal(out, &authorities); err != nil {
		return nil, fmt.Errorf("localauthority %s %s: %w in %s", kind, action, err, out)
	}
	return authorities, nil
}

// JoinToken makes a token that one agent may join with, and names that agent.
func (s *Server) JoinToken(ctx context.Context) (token string, agent spiffeid.ID, err error) {
	out, err := s.Command(ctx, nil, "token generate", "-output", "json", "-ttl", strconv.Itoa(int(startTime/time.Second)))
	if err != nil {
		return "", spiffeid.ID{}, err
	}
	var made struct {
		Value string `json:"value"`
	}
	if err := json.Unmarshal(out, &made); err != nil {
		return "", spiffeid.ID{}, fmt.Errorf("token generate: %w in %s", err, out)
	}
	if made.Value == "" {
		return "", spiffeid.ID{}, fmt.Errorf("token generate: no token in %s", out)
	}
	agent, err = spiffeid.FromPath(s.options.TrustDomain, "/spire/agent/join_token/"+made.Value)
	return made.Value, agent, err
}
