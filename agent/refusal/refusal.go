// Package refusal holds who was refused an identity, or what goes with one, on
// this node. Callers can be anybody, so what they cause is bounded.
package refusal

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/internal/tally"
)

// Kind is why somebody was refused, in one word.
type Kind string

// The kinds.
const (
	Stranger     Kind = "stranger"      // no workload's rules match
	Gone         Kind = "gone"          // the process has ended, or has become another
	Moved        Kind = "moved"         // it was moved to another cgroup meanwhile
	Unidentified Kind = "unidentified"  // the kernel does not say who calls
	Header       Kind = "header"        // not a Workload API client
	NotItsOwn    Kind = "not-its-own"   // it asked for the identity of another
	Limit        Kind = "limit"         // it has too much open, or asks too often
	Quarantined  Kind = "quarantined"   // the identity is cut off
	NoSVID       Kind = "no-svid"       // there is nothing valid to give out
	Control      Kind = "control-plane" // the control plane refuses the workload
	Other        Kind = "other"
)

// KindOf returns the kind of an error of package attest.
func KindOf(err error) Kind {
	switch {
	case errors.Is(err, attest.ErrStranger):
		return Stranger
	case errors.Is(err, attest.ErrGone):
		return Gone
	case errors.Is(err, attest.ErrMoved):
		return Moved
	}
	return Other
}

// Refusal is one.
type Refusal struct {
	Kind Kind
	// Call is what was asked for, such as "FetchX509SVID".
	Call string
	// ID is the identity that was asked for by name; empty: none was.
	ID string
	// Reason says more, for the operator only: it may tell the rules.
	Reason string

	// Caller is the process that asked; zero when nobody did: the agent asks the
	// control plane by itself.
	Caller Caller
	// Workload is whom the agent asked for, "namespace/name".
	Workload string
}

// Caller is a process as it was seen. Nothing of it but PID and UID is proven.
type Caller struct {
	PID        int
	UID        *uint32
	Executable string // as its own mount namespace names it
	PodUID     string // of the pod whose cgroup it is in; empty: none
}

// Of describes a process. A nil process is nobody.
func Of(p *attest.Process) Caller {
	if p == nil {
		return Caller{}
	}
	uid := p.UID
	c := Caller{PID: p.PID, UID: &uid}
	c.Executable, c.PodUID = p.Looks()
	return c
}

const maxText = 1024 // bytes of one text

// Entry is what there is to write: the latest refusal, and how many there were.
type Entry = tally.Entry[Refusal]

// Book counts refusals, and has them written. A nil Book keeps none. It is safe
// for concurrent use.
type Book struct {
	tally *tally.Tally[Refusal]

	mu     sync.Mutex
	counts map[Kind]uint64 // guarded by mu
}

// NewBook returns a Book. Somebody has to call Run.
func NewBook() *Book {
	return &Book{tally: tally.New[Refusal](), counts: map[Kind]uint64{}}
}

// Run has entries written until ctx ends, and then what is left; see package
// tally for how many.
func (b *Book) Run(ctx context.Context, write func(context.Context, []Entry) error) {
	b.tally.Run(ctx, write)
}

// Add notes a refusal. It does not block.
func (b *Book) Add(r Refusal) {
	if b == nil {
		return
	}
	for _, text := range []*string{&r.ID, &r.Reason, &r.Caller.Executable} {
		*text = tally.Text(*text, maxText)
	}
	b.mu.Lock()
	b.counts[r.Kind]++
	b.mu.Unlock()
	b.tally.Add(r.group(), strings.Join([]string{string(r.Kind), r.Call, r.ID, r.Caller.Executable}, "\n"), r)
}

// group is who answers for a refusal: a pod, a user of the node outside of pods,
// or a workload.
func (r *Refusal) group() string {
	switch {
	case r.Workload != "":
		return "workload " + r.Workload
	case r.Caller.PodUID != "":
		return "pod " + r.Caller.PodUID
	case r.Caller.UID != nil:
		return fmt.Sprintf("uid %d", *r.Caller.UID)
	}
	return "nobody"
}

// Counts returns how many refusals there were of each kind.
func (b *Book) Counts() map[Kind]uint64 {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.counts)
}
