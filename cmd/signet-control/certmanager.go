package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	cmclient "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned/typed/certmanager/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	restclient "k8s.io/client-go/rest"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/certmanager"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/internal/kube"
)

// leastIntermediate is the shortest life that an intermediate may be asked for.
const leastIntermediate = time.Minute

// certManager says how cert-manager is the authority above. Without a name it is not.
type certManager struct {
	issuer   certmanager.Issuer
	leaves   certmanager.Issuer // of workloads, if another
	duration time.Duration
	roots    string
	mode     string
}

// The modes.
const (
	modeIntermediate = "intermediate"
	modePerWorkload  = "per-workload"
)

func (c *certManager) flags(f *flag.FlagSet) {
	f.StringVar(&c.issuer.Name, "cert-manager-issuer", "", "cert-manager's issuer that certifies the intermediate; empty: the mesh has a root of its own")
	f.StringVar(&c.issuer.Kind, "cert-manager-issuer-kind", "", "Issuer (of the release's namespace), ClusterIssuer, or a kind of another group (default Issuer)")
	f.StringVar(&c.issuer.Group, "cert-manager-issuer-group", "", "group of that kind (default cert-manager.io)")
	f.StringVar(&c.leaves.Name, "cert-manager-workload-issuer", "", "with --cert-manager-mode=per-workload, the issuer of workloads' certificates; empty: the one that certifies the intermediate")
	f.StringVar(&c.leaves.Kind, "cert-manager-workload-issuer-kind", "", "its kind, as above")
	f.StringVar(&c.leaves.Group, "cert-manager-workload-issuer-group", "", "its group, as above")
	f.DurationVar(&c.duration, "cert-manager-duration", ca.DefaultIntermediateTTL, "lifetime of the intermediate that is asked for; it is renewed at half of it")
	f.StringVar(&c.roots, "cert-manager-roots", "", "file of the only roots that the issuer's chains may end at, PEM; empty: those that it says")
	f.StringVar(&c.mode, "cert-manager-mode", modeIntermediate, "intermediate: workloads are certified below the intermediate; per-workload: each by the issuer itself, for small clusters (see docs/cert-manager.md)")
}

// check refuses what makes no sense.
func (c *certManager) check(kubernetes bool) error {
	switch {
	case c.mode != modeIntermediate && c.mode != modePerWorkload:
		return fmt.Errorf("--cert-manager-mode: is %q; use %s or %s", c.mode, modeIntermediate, modePerWorkload)
	case c.leaves != certmanager.Issuer{} && c.mode != modePerWorkload:
		return fmt.Errorf("--cert-manager-workload-issuer: needs --cert-manager-mode=%s; without, no issuer certifies workloads", modePerWorkload)
	case c.leaves != certmanager.Issuer{} && c.leaves.Name == "":
		return errors.New("--cert-manager-workload-issuer: is missing; name the issuer that its kind and group are about")
	case c.issuer == certmanager.Issuer{} && c.roots == "" && c.mode == modeIntermediate:
		return nil
	case c.issuer.Name == "":
		return errors.New("--cert-manager-issuer: is missing; name the issuer that the other --cert-manager flags are about")
	case !kubernetes:
		return errors.New("--cert-manager-issuer: needs --kubernetes; cert-manager is a part of a cluster")
	case c.duration < leastIntermediate:
		return fmt.Errorf("--cert-manager-duration: is %s; use %s or more", c.duration, leastIntermediate)
	}
	if err := c.issuer.Check(); err != nil {
		return fmt.Errorf("--cert-manager-issuer-kind: %w", err)
	}
	if c.leaves.Name == "" {
		c.leaves = c.issuer
	}
	if err := c.leaves.Check(); err != nil {
		return fmt.Errorf("--cert-manager-workload-issuer-kind: %w", err)
	}
	return nil
}

// apply has cert-manager be the authority above.
func (c *certManager) apply(cfg *control.Config, client *kube.Client, namespace string, status *kube.AuthorityStatus) error {
	if c.issuer.Name == "" {
		return nil
	}
	roots, err := readRoots(c.roots)
	if err != nil {
		return fmt.Errorf("--cert-manager-roots: %w", err)
	}
	rest := client.Config
	if c.mode == modePerWorkload {
		rest = restclient.CopyConfig(rest)
		rest.QPS, rest.Burst = certmanager.QPS, certmanager.Burst
	}
	requests, err := cmclient.NewForConfig(rest)
	if err != nil {
		return err
	}
	upstream, err := certmanager.New(requests, namespace, c.issuer, cfg.Log)
	if err != nil {
		return err
	}
	cfg.Above = func(td spiffeid.TrustDomain) (*ca.Enrolment, error) {
		return ca.NewEnrolment(ca.EnrolmentConfig{TrustDomain: td, Store: cfg.Roots, Upstream: upstream, TTL: c.duration, Roots: roots, Log: cfg.Log})
	}
	if c.mode == modePerWorkload {
		if cfg.Leaves, err = certmanager.New(requests, namespace, c.leaves, cfg.Log); err != nil {
			return err
		}
	}
	cfg.Enrolling = func(ctx context.Context, follow control.Upstream) error {
		status.Status = follow
		return status.Run(ctx)
	}
	return nil
}

// readRoots reads a file of certificates; none when it has no name.
func readRoots(path string) (out []*x509.Certificate, err error) {
	if path == "" {
		return nil, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for len(strings.TrimSpace(string(text))) > 0 {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: only certificates in PEM belong here", path)
		}
		one, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, one)
	}
	if out == nil {
		return nil, fmt.Errorf("%s: holds no certificate", path)
	}
	return out, nil
}
