// Package conformance is a suite that shows whether an implementation of the
// SPIFFE Workload API, and of a bundle endpoint, does what the specifications say.
// It asks as a workload does, over the protocol as it is on the wire, and reads
// certificates, tokens and key sets by itself. It knows no implementation.
//
// In a test of one's own:
//
//	report, err := conformance.Run(ctx, conformance.Options{Endpoint: "unix:///run/agent.sock"})
//
// The process that calls Run must be a workload with an identity.
package conformance

import (
	"context"
	"errors"
	"fmt"
)

// Level is how strongly the specification wants something.
type Level string

// The levels.
const (
	Must   Level = "MUST"
	Should Level = "SHOULD"
)

// Verdict is what became of a check.
type Verdict string

// The verdicts. The zero value is none of them.
const (
	Pass          Verdict = "pass"
	Fail          Verdict = "fail"
	NotApplicable Verdict = "not-applicable"
)

// Check is one demand of a specification.
type Check struct {
	// ID stays the same over versions of the suite.
	ID string `json:"id"`
	// Document and Section are where the specification says it.
	Document string `json:"document"`
	Section  string `json:"section"`
	Level    Level  `json:"level"`
	// Demand is what is wanted, in words of the suite.
	Demand string `json:"demand"`
}

// Result is what became of a check.
type Result struct {
	Check
	Verdict Verdict `json:"verdict"`
	// Reason is what was seen, or why nothing could be.
	Reason string `json:"reason"`
}

// Report has a result for every check, in their order.
type Report struct {
	Results []Result `json:"results"`
}

// Count returns how many results have a verdict, of one level.
func (r *Report) Count(v Verdict, l Level) (n int) {
	for i := range r.Results {
		if r.Results[i].Verdict == v && r.Results[i].Level == l {
			n++
		}
	}
	return n
}

// Checks lists every check, in the order in which they run.
func Checks() []Check {
	var out []Check
	for _, c := range all() {
		out = append(out, c.Check)
	}
	return out
}

// check is a Check that can be run. The text is what was seen; a nil error is a
// pass, one of skip says that there is nothing to judge, any other is a failure.
type check struct {
	Check
	run func(context.Context, *session) (string, error)
}

// all is the suite: what the later checks rest on comes first, what has to wait
// last.
func all() (out []check) {
	for _, group := range [][]check{endpointChecks, streamChecks, x509Checks, authorityChecks, x509BundleChecks,
		jwtChecks, jwtBundleChecks, validateChecks, strangerChecks, bundleEndpointChecks, bundleDocumentChecks, waitChecks} {
		out = append(out, group...)
	}
	return out
}

// skipped says why a check has nothing to judge.
type skipped struct{ why string }

func (s *skipped) Error() string { return s.why }

func skip(format string, args ...any) error { return &skipped{fmt.Sprintf(format, args...)} }

// Run runs every check. The error says that an option makes no sense, that the
// endpoint cannot be reached at all, or that ctx has ended; what the endpoint does
// wrong is in the report.
func Run(ctx context.Context, o Options) (*Report, error) {
	s, err := o.open(ctx)
	if err != nil {
		return nil, err
	}
	defer s.close()
	report := &Report{}
	for _, c := range all() {
		if o.Progress != nil {
			o.Progress(c.Check)
		}
		seen, err := c.run(ctx, s)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		result := Result{Check: c.Check, Verdict: Pass, Reason: seen}
		var s *skipped
		switch {
		case errors.As(err, &s):
			result.Verdict, result.Reason = NotApplicable, s.why
		case err != nil:
			result.Verdict, result.Reason = Fail, err.Error()
		}
		report.Results = append(report.Results, result)
	}
	return report, nil
}
