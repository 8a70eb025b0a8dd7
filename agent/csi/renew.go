package csi

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/svid"
)

// lookAround is how often volumes are looked at although nothing is known to have
// changed: timers stand still while a machine is suspended, certificates do not.
const lookAround = time.Second

// follow keeps the files up to date until ctx ends.
func (d *Driver) follow(ctx context.Context) {
	tick := time.NewTicker(lookAround)
	defer tick.Stop()
	for {
		changed := d.svids.Changed()
		d.refresh(ctx)
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

// refresh looks at every volume once.
func (d *Driver) refresh(ctx context.Context) {
	var tell []*volume
	d.mu.Lock()
	for _, p := range d.mounted {
		if gone, err := d.podGone(p.volume); err == nil && gone {
			d.cfg.Log.Info("the pod of a volume is gone; the volume goes too", "volume", p.ID, "pod", p.Namespace+"/"+p.Pod, "uid", p.UID)
			t, err := parseTarget(d.pods(), p.Target)
			if err == nil {
				err = d.clean(p.ID, t)
			}
			d.trouble(ctx, p, err)
			continue
		}
		if p.Content != contentFiles {
			continue
		}
		changed, err := d.write(p)
		if err != nil && !p.expires.IsZero() && !time.Now().Round(0).Before(p.expires) {
			err = errors.Join(fmt.Errorf("the certificate has expired without another, and its files are removed: %w", err), d.empty(p))
		}
		d.trouble(ctx, p, err)
		if changed && p.Signal != "" {
			tell = append(tell, p.volume)
		}
	}
	d.mu.Unlock()
	for _, v := range tell {
		n, err := d.agent.SignalPod(ctx, v.UID, v.Program, signals[v.Signal])
		switch {
		case err != nil && ctx.Err() == nil:
			d.cfg.Log.Error("telling a program of its new certificate", "volume", v.ID, "pod", v.Namespace+"/"+v.Pod, "program", v.Program, "error", err)
		case n == 0:
			d.cfg.Log.Warn("no process to tell of its new certificate: none runs the program, or none handles the signal", "volume", v.ID, "pod", v.Namespace+"/"+v.Pod, "program", v.Program, "signal", v.Signal)
		default:
			d.cfg.Log.Info("told a program of its new certificate", "pod", v.Namespace+"/"+v.Pod, "program", v.Program, "signal", v.Signal, "processes", n)
		}
	}
}

// podGone reports whether kubelet has removed the pod's directory, which it does
// when the pod is gone and all of its volumes are.
func (d *Driver) podGone(v *volume) (bool, error) {
	_, err := os.Lstat(filepath.Join(d.pods(), v.UID))
	if errors.Is(err, os.ErrNotExist) {
		// Not because kubelet's directory itself is not there.
		_, err = os.Stat(d.pods())
		return err == nil, err
	}
	return false, err
}

// trouble logs what is wrong with a volume, once. The caller holds mu.
func (d *Driver) trouble(ctx context.Context, p *publishes, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != p.said {
		level := slog.LevelError
		if errors.Is(err, errNobody) {
			level = slog.LevelInfo // as with every pod that ends
		}
		d.cfg.Log.Log(ctx, level, "a volume is not up to date", "volume", p.ID, "pod", p.Namespace+"/"+p.Pod, "expires", p.expires, "error", text)
	}
	p.said = text
}

// write puts the pod's certificate as it is now into the files, and reports
// whether they have changed. The caller holds mu.
func (d *Driver) write(p *publishes) (changed bool, err error) {
	s, err := d.certificate(p.volume)
	if err != nil {
		return false, err
	}
	roots := d.svids.Bundle()
	if s == p.written && same(roots, p.bundle) {
		return false, nil
	}
	x, err := x509SVID(s)
	if err != nil {
		return false, err
	}
	changed, err = p.files(d.store.filesOf(p.ID)).Write(x, x509bundle.FromX509Authorities(s.ID.TrustDomain(), roots))
	if err != nil {
		return changed, err
	}
	p.written, p.bundle, p.expires = s, roots, s.NotAfter
	return changed, nil
}

// empty removes the files. The caller holds mu.
func (d *Driver) empty(p *publishes) error {
	if err := p.files(d.store.filesOf(p.ID)).Remove(); err != nil {
		return err
	}
	p.written, p.bundle, p.expires = nil, nil, time.Time{}
	return nil
}

// expiry is when the certificate in a volume's files ends; zero: there is none.
func (d *Driver) expiry(v *volume) time.Time {
	if v.Content != contentFiles {
		return time.Time{}
	}
	text, err := os.ReadFile(filepath.Join(d.store.filesOf(v.ID), v.Certificate))
	if err != nil {
		return time.Time{}
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return time.Time{}
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return time.Time{}
	}
	return leaf.NotAfter
}

func x509SVID(s *svid.SVID) (*x509svid.SVID, error) {
	out := &x509svid.SVID{ID: s.ID, PrivateKey: s.Key}
	for _, der := range s.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out.Certificates = append(out.Certificates, c)
	}
	return out, nil
}

// signals are those that a volume may ask for: by custom they have a program read
// its files again.
var signals = map[string]unix.Signal{"HUP": unix.SIGHUP, "USR1": unix.SIGUSR1, "USR2": unix.SIGUSR2}
