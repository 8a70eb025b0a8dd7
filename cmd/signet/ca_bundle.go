package main

import (
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/bundle"
)

// bundleForm is a form that others read a bundle in. It is a flag's value.
type bundleForm string

// The forms.
const (
	bundlePEM    bundleForm = "pem"
	bundleSPIFFE bundleForm = "spiffe"
)

var bundleForms = []string{string(bundlePEM), string(bundleSPIFFE)}

// Set parses a form.
func (f *bundleForm) Set(s string) error {
	if !slices.Contains(bundleForms, s) {
		return fmt.Errorf("must be one of %s", f.Type())
	}
	*f = bundleForm(s)
	return nil
}

// String returns the form's name.
func (f *bundleForm) String() string { return string(*f) }

// Type names the flag's kind of value in the help text.
func (f *bundleForm) Type() string { return strings.Join(bundleForms, "|") }

func (a *app) newCABundleCommand() *cobra.Command {
	form := bundlePEM
	var trustDomain string
	cmd := a.finds(&cobra.Command{
		Use:   "bundle",
		Short: "Print what the mesh's certificates are verified by, for others",
		Long: `Print the trust bundle of the mesh, for others who are to believe its identities:
public keys only.

  pem     the roots, as programs that speak TLS read them
  spiffe  the roots and the keys of tokens as a SPIFFE bundle, on one line: byte for
          byte what the bundle endpoint shows, and what spec.bundle of a Federation
          and other SPIFFE implementations take

A federated partner needs it once, over a way that nobody can tamper with, and
fetches what follows by itself. Whoever keeps a copy of their own has to get the
next one while a rotation has both roots published; see ` + "`signet ca status`" + `.

With --trust-domain it is that of a partner, the newest that was fetched, or what its
Federation began with.`,
		Example: `  signet ca bundle >mesh.pem
  signet ca bundle -o spiffe | ssh partner spire-server bundle set -format spiffe -id spiffe://mesh.example
  signet ca bundle -o spiffe | jq .spiffe_sequence
  signet ca bundle --trust-domain partner.example | openssl x509 -noout -fingerprint -sha256`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if trustDomain != "" {
				td, err := spiffeid.TrustDomainFromString(trustDomain)
				if err != nil {
					return usage(fmt.Errorf("--trust-domain %q: %w", trustDomain, err))
				}
				trustDomain = td.Name()
			}
			client, err := a.connect(cmd.Context(), cmd)
			if err != nil {
				return err
			}
			defer client.Close()
			b, err := client.TrustBundle(cmd.Context(), trustDomain)
			if err != nil {
				return err
			}
			if trustDomain != "" && b.TrustDomain != trustDomain {
				return fmt.Errorf("the control plane answered with the bundle of %q", b.TrustDomain)
			}
			out, err := bundleIn(form, b)
			if err != nil {
				return err
			}
			_, err = a.out.Write(out)
			return err
		},
	}, "namespace", "n")
	cmd.Flags().VarP(&form, "output", "o", "pem: the roots; spiffe: a SPIFFE bundle")
	complete(cmd, "output", bundleForms...)
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", "a partner's, that the mesh is federated with; empty: its own")
	return cmd
}

// bundleIn writes a bundle in a form.
func bundleIn(form bundleForm, b adminv1.TrustBundle) ([]byte, error) {
	td, err := spiffeid.TrustDomainFromString(b.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("the control plane answered with the bundle of %q: %w", b.TrustDomain, err)
	}
	parsed, err := bundle.Parse(td, b.Document)
	if err != nil {
		return nil, fmt.Errorf("the control plane's answer: %w", err)
	}
	if len(parsed.Ignored) > 0 { // it would be another one for whoever is given it
		return nil, fmt.Errorf("the control plane's answer cannot be read: %s", strings.Join(parsed.Ignored, "; "))
	}
	if form == bundleSPIFFE {
		return append(slices.Clone(b.Document), '\n'), nil
	}
	if len(parsed.Roots) == 0 {
		return nil, fmt.Errorf("the bundle of %s has no roots: none of its certificates is believed", td)
	}
	var out []byte
	for _, root := range parsed.Roots {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})...)
	}
	return out, nil
}
