package control

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/pkcs11"
)

// ExitNoRetry is the exit status of a control plane whose next start would do
// harm, such as one with a PIN that the token has refused.
const ExitNoRetry = 78

// RootKeyConfig says where the keys of roots are made.
type RootKeyConfig struct {
	// URI names a PKCS#11 token; empty: keys are in files.
	URI string
	// Type is the kind of the keys that are made in the token.
	Type string
}

// Flags declares the flags of the configuration.
func (c *RootKeyConfig) Flags(f FlagSet) {
	f.StringVar(&c.URI, "root-key", "", "PKCS#11 token that keeps the root's key: pkcs11:token=NAME?module-path=/LIBRARY.so&pin-source=/FILE (default: a file)")
	f.StringVar(&c.Type, "root-key-type", pkcs11.P256.String(), "of keys made in the token: ec-p256, rsa-3072 or rsa-4096")
}

// Args returns the flags as another program is given them.
func (c *RootKeyConfig) Args() []string {
	if c.URI == "" {
		return nil
	}
	return []string{"--root-key", c.URI, "--root-key-type", c.Type}
}

// Check refuses what makes no sense, without a look at the token.
func (c *RootKeyConfig) Check() error {
	kind, err := pkcs11.ParseKeyType(c.Type)
	if err != nil {
		return fmt.Errorf("--root-key-type: %w", err)
	}
	if c.URI == "" {
		if kind != pkcs11.P256 {
			return errors.New("--root-key-type: is of keys in a token; name one with --root-key, or place a root.crt and root.key of that kind")
		}
		return nil
	}
	u, err := pkcs11.ParseTokenURI(c.URI)
	if err == nil {
		err = u.CheckFiles()
	}
	if err != nil {
		return fmt.Errorf("--root-key: %w", err)
	}
	return nil
}

// Open returns the keys in the token; nil where there is none.
func (c *RootKeyConfig) Open(stateDir string, log *slog.Logger) (ca.RootKeys, error) {
	if c.URI == "" {
		return nil, nil
	}
	cfg := pkcs11.Config{RefusedFile: filepath.Join(AuthorityDir(stateDir), "refused-pin"), Log: log}
	var err error
	if cfg.KeyType, err = pkcs11.ParseKeyType(c.Type); err != nil {
		return nil, fmt.Errorf("--root-key-type: %w", err)
	}
	if cfg.URI, err = pkcs11.ParseTokenURI(c.URI); err == nil {
		var keys ca.RootKeys
		if keys, err = pkcs11.Open(cfg); err == nil {
			return keys, nil
		}
	}
	return nil, fmt.Errorf("--root-key: %w", err)
}
