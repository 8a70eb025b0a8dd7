package control

import (
	"context"
	"crypto/x509"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/fanout"
	"github.com/signet-mesh/signet/internal/federation"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Source says what the mesh is.
type Source interface {
	// Run follows the mesh until ctx ends. It calls accept with every new
	// view, and reject with what of the newest edit is not in force and why;
	// an accept says that nothing is rejected any more. Calls do not overlap.
	// It returns an error only when it cannot go on.
	Run(ctx context.Context, accept func(*mesh.View), reject func(lines ...string)) error
}

// Facts are what a running control plane knows about its nodes and roots. The
// functions are safe for concurrent use.
type Facts struct {
	// Reports is what the nodes of the mesh say, whichever replica they are
	// connected to; Own what those say that are connected to this one.
	Reports, Own func() []caserver.NodeReport
	// Others is which steps each other replica has taken.
	Others func() [][]caserver.Step
	// Federations is how this replica's following of other trust domains goes.
	Federations func() []federation.Status
	// Bundle returns the roots, and a channel that is closed when they are no
	// longer current.
	Bundle func() ([]*x509.Certificate, <-chan struct{})
}

// Upstream says how it stands with the authority above; its channel is closed when
// that changes.
type Upstream func() (ca.UpstreamStatus, <-chan struct{})

// Config says what a control plane works with.
type Config struct {
	// Version of the program, to be told to who asks.
	Version string
	Source  Source // required
	// StateDir keeps the authority and the join tokens.
	StateDir string
	// Listen is where nodes connect, AdminListen where the operator does:
	// host:port, or the absolute path of a unix socket.
	Listen, AdminListen string
	// HealthListen serves /healthz, /readyz and /metrics; empty: nowhere.
	HealthListen string
	// Tokens says who may join; nil: who has a token of the state directory.
	Tokens caserver.Joiner
	// Roots keeps the authority's roots; nil: files in its directory.
	Roots ca.RootStore
	// RootKeys keeps the keys of roots that are made; nil: beside the roots.
	RootKeys ca.RootKeys
	// Above keeps roots and intermediate of an authority above in Roots; nil: the
	// mesh has a root of its own.
	Above func(spiffeid.TrustDomain) (*ca.Enrolment, error)
	// Leaves signs workloads' certificates below the root of the authority above; nil:
	// the intermediate does.
	Leaves ca.LeafSigner
	// JWTKeys keeps the keys that sign JWT-SVIDs; nil: a file beside the root's.
	JWTKeys ca.JWTKeyStore
	// JWTKeyLife is how long each signs; zero: ca.DefaultJWTKeyLife.
	JWTKeyLife time.Duration
	// Federation says how the mesh shows itself to other trust domains.
	Federation FederationConfig
	// Attend runs beside the servers, until ctx ends; nil: nothing does.
	Attend func(ctx context.Context, facts Facts) error
	// Enrolling runs beside it, from before there is an authority, while there is one
	// above; nil: nothing does.
	Enrolling func(ctx context.Context, status Upstream) error
	// Agents lists the nodes' agents, which are asked for what an operator
	// wants to know of the whole mesh; nil: nobody is asked.
	Agents func() []fanout.Node
	// Replicas lists where nodes connect to the other replicas, host:port; nil:
	// this is the only one.
	Replicas func() []string
	// Steps is how far this one has taken namespaces into the mesh, for the other
	// replicas; nil: nothing goes in steps. What it returns is not edited later.
	Steps func() []caserver.Step
	Log   *slog.Logger
}

// The places below a state directory.

// AuthorityDir holds the root and the intermediate.
func AuthorityDir(state string) string { return filepath.Join(state, "ca") }

// TokenDir holds the join tokens.
func TokenDir(state string) string { return filepath.Join(state, "tokens") }

// RootFile is the root certificate, which nodes need before they join.
func RootFile(state string) string { return filepath.Join(AuthorityDir(state), "root.crt") }
