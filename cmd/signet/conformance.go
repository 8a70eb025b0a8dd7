package main

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/conformance"
	"github.com/signet-mesh/signet/internal/output"
)

// conformanceFlags are the options as they were given.
type conformanceFlags struct {
	conformance.Options
	url, endpointID, roots string
	list, strict           bool
}

// conformanceDoc is what became of the checks.
type conformanceDoc struct {
	output.Meta
	conformance.Report
	Failures int `json:"failures"` // of what must be
	Warnings int `json:"warnings"` // of what should be
	Passed   int `json:"passed"`
	Skipped  int `json:"notApplicable"`
}

func newConformanceDoc(r *conformance.Report) *conformanceDoc {
	return &conformanceDoc{
		Meta: output.NewMeta("Conformance"), Report: *r,
		Failures: r.Count(conformance.Fail, conformance.Must), Warnings: r.Count(conformance.Fail, conformance.Should),
		Passed:  r.Count(conformance.Pass, conformance.Must) + r.Count(conformance.Pass, conformance.Should),
		Skipped: r.Count(conformance.NotApplicable, conformance.Must) + r.Count(conformance.NotApplicable, conformance.Should),
	}
}

func (d *conformanceDoc) Text(t *output.Text) {
	styles := map[conformance.Verdict]output.Style{conformance.Pass: output.Good, conformance.Fail: output.Bad, conformance.NotApplicable: output.Dim}
	head := []output.Column{{Name: "VERDICT"}, {Name: "CHECK"}, {Name: "LEVEL"}, {Name: "SPECIFICATION"}, {Name: "DEMAND", Wide: true}, {Name: "SEEN"}}
	var rows [][]output.Cell
	for _, r := range d.Results {
		style := styles[r.Verdict]
		if r.Verdict == conformance.Fail && r.Level == conformance.Should {
			style = output.Warn
		}
		rows = append(rows, []output.Cell{output.S(style, r.Verdict), output.C(r.ID), output.C(r.Level), output.C(r.Document + " " + r.Section), output.C(r.Demand), output.C(r.Reason)})
	}
	t.Table(head, rows)
	t.Line(plural(len(d.Results), "check", "checks"), ": ", d.Passed, " passed, ", plural(d.Failures, "MUST", "MUSTs"), " and ", plural(d.Warnings, "SHOULD", "SHOULDs"), " failed, ", d.Skipped, " not applicable")
}

// conformanceList is what the suite has.
type conformanceList struct {
	output.Meta
	Checks []conformance.Check `json:"checks"`
}

func (d *conformanceList) Text(t *output.Text) {
	var rows [][]output.Cell
	for _, c := range d.Checks {
		rows = append(rows, []output.Cell{output.C(c.ID), output.C(c.Level), output.C(c.Document + " " + c.Section), output.C(c.Demand)})
	}
	t.Table([]output.Column{{Name: "CHECK"}, {Name: "LEVEL"}, {Name: "SPECIFICATION"}, {Name: "DEMAND"}}, rows)
}

func (a *app) newConformanceCommand() *cobra.Command {
	var f conformanceFlags
	cmd := a.answers(&cobra.Command{
		Use:   "conformance",
		Short: "Check an implementation of SPIFFE against the specifications",
		Long: `Ask a Workload API, of this mesh or of any other implementation, what a workload
asks, and compare the answers with the SPIFFE specifications: one line for each
check. Nothing is changed there.

The command must be a workload itself: run it as the user, and in the container,
that has an identity. What it knows of that makes more checks possible: --id,
--trust-domain. Run it once more as somebody who has none, with
--stranger-endpoint in place of --endpoint, for what such a caller is answered.

Some checks have to wait: for a certificate to be replaced, and for a token to
expire. Give them time with --wait, more than certificates and tokens live.

Exit code 3 when something fails that a specification says MUST be (with
--strict, SHOULD be, too).`,
		Example: `  signet conformance
  signet conformance --endpoint unix:///tmp/spire-agent/public/api.sock --trust-domain example.org
  signet conformance --id spiffe://example.org/web --wait 1h -o json
  sudo -u nobody signet conformance --stranger-endpoint unix:///run/signet/api/agent.sock
  signet conformance --bundle-url https://example.org:8443/bundle --bundle-endpoint-id spiffe://example.org/spire/server
  signet conformance --list -o wide`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.list {
				return a.printer().Print(&conformanceList{Meta: output.NewMeta("ConformanceChecks"), Checks: conformance.Checks()})
			}
			o, err := f.options(a, cmd.Flags().Changed("endpoint"))
			if err != nil {
				return err
			}
			report, err := conformance.Run(cmd.Context(), *o)
			if err != nil {
				return err
			}
			doc := newConformanceDoc(report)
			if err := a.printer().Print(doc); err != nil {
				return err
			}
			return findings(doc.Failures > 0 || f.strict && doc.Warnings > 0)
		},
	})
	flags := cmd.Flags()
	flags.StringVar(&f.Endpoint, "endpoint", "", "Workload API, unix:///PATH or tcp://IP:PORT; default, without the next and without --bundle-url: $"+envEndpoint+", or the one of --run-dir")
	flags.StringVar(&f.Stranger, "stranger-endpoint", "", "Workload API at which this process has no identity")
	flags.StringVar(&f.TrustDomain, "trust-domain", "", "the server's trust domain; default: that of the first identity")
	flags.StringSliceVar(&f.IDs, "id", nil, "SPIFFE ID that this process has; say all of them")
	flags.StringVar(&f.Audience, "audience", "", "for whom tokens are asked")
	flags.BoolVar(&f.NoJWT, "no-jwt", false, "the JWT-SVID profile is switched off there")
	flags.DurationVar(&f.Wait, "wait", 0, "for how long to wait for a new certificate, and for a token to expire; 0: not")
	flags.DurationVar(&f.Timeout, "timeout", 10*time.Second, "for how long to wait for an answer")
	flags.StringVar(&f.url, "bundle-url", "", "URL of the trust domain's bundle endpoint")
	flags.StringVar(&f.endpointID, "bundle-endpoint-id", "", "SPIFFE ID of the bundle endpoint, with the profile https_spiffe; without it the profile is https_web")
	flags.StringVar(&f.roots, "bundle-roots", "", "file with the authorities that prove the bundle endpoint, PEM")
	flags.BoolVar(&f.list, "list", false, "list the checks and what each is about, and run none")
	flags.BoolVar(&f.strict, "strict", false, "what should be, must be")
	return cmd
}

// options reads what was given as text.
func (f *conformanceFlags) options(a *app, given bool) (*conformance.Options, error) {
	o := f.Options
	if !given && o.Stranger == "" && f.url == "" {
		o.Endpoint = a.env(envEndpoint, "unix://"+filepath.Join(a.runDir, "api", "agent.sock"))
	}
	if f.url == "" && (f.endpointID != "" || f.roots != "") {
		return nil, usage(errors.New("--bundle-endpoint-id and --bundle-roots belong to --bundle-url"))
	}
	if f.url != "" {
		o.Federation = &conformance.Federation{URL: f.url, SPIFFEID: f.endpointID}
	}
	if f.roots != "" {
		roots, err := readRoots(f.roots)
		if err != nil {
			return nil, usage(fmt.Errorf("--bundle-roots: %w", err))
		}
		o.Federation.Roots = roots
	}
	if err := o.Check(); err != nil {
		return nil, usage(err)
	}
	return &o, nil
}

// readRoots reads certificates in PEM, at least one.
func readRoots(path string) (out []*x509.Certificate, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM", path)
	}
	return out, nil
}
