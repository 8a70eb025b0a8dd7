package control

import (
	"time"

	"github.com/signet-mesh/signet/internal/federation"
)

// FlagSet is what flags are declared in.
type FlagSet interface {
	StringVar(p *string, name, value, usage string)
	DurationVar(p *time.Duration, name string, value time.Duration, usage string)
}

// Flags declares the flags of the configuration, for the program that serves and
// for the one that starts it.
func (c *FederationConfig) Flags(f FlagSet) {
	f.StringVar(&c.SPIFFEListen, "bundle-listen", "", "serves the mesh's bundle to other trust domains with an SVID (https_spiffe), at "+federation.Path+": host:port")
	f.StringVar(&c.WebListen, "bundle-web-listen", "", "serves it with --web-certificate (https_web): host:port")
	f.StringVar(&c.Certificate, "web-certificate", "", "file of the certificate chain of --bundle-web-listen, PEM; read again when it changes")
	f.StringVar(&c.Key, "web-key", "", "file of its key, PEM")
	f.DurationVar(&c.RefreshHint, "bundle-refresh-hint", federation.DefaultRefreshHint, "how often other trust domains are told to fetch the bundle; a root's rotation waits for three of these")
	f.StringVar(&c.Issuer, "oidc-issuer", "", "iss of tokens, an https URL whose discovery document --bundle-web-listen serves; empty: tokens have none")
}

// Args returns the flags as another program is given them.
func (c *FederationConfig) Args() []string {
	out := []string{"--bundle-refresh-hint", c.RefreshHint.String()}
	for _, f := range [][2]string{
		{"--bundle-listen", c.SPIFFEListen}, {"--bundle-web-listen", c.WebListen}, {"--web-certificate", c.Certificate},
		{"--web-key", c.Key}, {"--oidc-issuer", c.Issuer},
	} {
		if f[1] != "" {
			out = append(out, f[0], f[1])
		}
	}
	return out
}
