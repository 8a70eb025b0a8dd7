package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/adminclient"
)

var (
	subjectRunDir    = subject{"SIG0120", "run directory", "the sockets of the agent and the control plane are in it"}
	subjectStateDir  = subject{"SIG0121", "state directory", "the authority's keys and the audit store are in it"}
	subjectSpace     = subject{"SIG0122", "disk space", "audit records are kept on disk"}
	subjectClock     = subject{"SIG0123", "clock", "certificates live for an hour or less, so a wrong clock refuses everybody"}
	subjectAuthority = subject{"SIG0201", "authority", "every certificate of the mesh hangs on the authority's own"}
)

// maxSocketPath is what a unix socket's address can hold, without the zero.
const maxSocketPath = 107

// meshRuns reports whether a mesh answers in the run directory.
func (a *app) meshRuns(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client := a.client()
	defer client.Close()
	_, agentErr := client.AgentStatus(ctx)
	_, controlErr := client.ControlStatus(ctx)
	return agentErr == nil || controlErr == nil
}

func checkRunDir(dir string, running bool) check {
	s := subjectRunDir
	abs, err := filepath.Abs(dir)
	if err != nil {
		return s.error("name it by an absolute path with --run-dir", "%v", err)
	}
	// No socket's name is longer than the control plane's.
	if n := len(filepath.Join(abs, adminclient.ControlSocket)); n > maxSocketPath {
		return s.error("choose a shorter path with --run-dir", "%s is too long: a socket's path would have %d bytes, at most %d are possible", abs, n, maxSocketPath)
	}
	if running {
		return s.ok("%s is in use by a running mesh", abs)
	}
	if err := writable(abs); err != nil {
		return s.error("choose another with --run-dir, or run as root", "%v", err)
	}
	for _, name := range []string{adminclient.AgentSocket, adminclient.ControlSocket} {
		info, err := os.Lstat(filepath.Join(abs, name))
		if err == nil && info.Mode().Type() != fs.ModeSocket {
			return s.error("move it away", "%s is there and is no socket", filepath.Join(abs, name))
		}
	}
	return s.ok("%s is free", abs)
}

// writable asks the kernel about a directory, or about the nearest one above
// it that exists and that it would be made in.
func writable(dir string) error {
	for at := dir; ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at) {
			continue
		}
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return fmt.Errorf("%s is no directory", at)
		}
		if err := unix.Access(at, unix.W_OK|unix.X_OK); err != nil {
			return fmt.Errorf("cannot write to %s: %w", at, err)
		}
		return nil
	}
}

func checkStateDir(dir string) check {
	s := subjectStateDir
	abs, err := filepath.Abs(dir)
	if err != nil {
		return s.error("name it by an absolute path with --state-dir", "%v", err)
	}
	if err := writable(abs); err != nil {
		return s.error("choose another with --state-dir, or run as root", "%v", err)
	}
	info, err := os.Stat(abs)
	if err != nil {
		return s.ok("%s can be made", abs)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return s.error("chmod 700 "+abs, "%s has mode %04o: others can replace what is in it", abs, info.Mode().Perm())
	}
	open, err := openKeys(abs)
	if err != nil {
		return s.error("run as root", "cannot look through it: %v", err)
	}
	if len(open) > 0 {
		return s.error("chmod 600 "+strings.Join(open, " ")+", and rotate these keys: they may be known", "private keys that others can read: %s", strings.Join(open, ", "))
	}
	return s.ok("%s can be written to", abs)
}

// openKeys lists private keys in a directory that others than the owner can
// get at.
func openKeys(dir string) (open []string, err error) {
	closed := map[string]bool{} // directories that keep others out
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		above := closed[filepath.Dir(path)]
		if d.IsDir() {
			closed[path] = above || info.Mode().Perm()&0o077 == 0
			return nil
		}
		if filepath.Ext(path) == ".key" && info.Mode().Perm()&0o077 != 0 && !above {
			open = append(open, path)
		}
		return nil
	})
	return open, err
}

// wantSpace holds several million audit records.
const wantSpace = 1 << 30

func checkSpace(dir string) check {
	at := dir
	var st unix.Statfs_t
	for {
		err := unix.Statfs(at, &st)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
			return subjectSpace.warning("see `df "+dir+"`", "cannot be read: %v", err)
		}
		at = filepath.Dir(at)
	}
	free := st.Bavail * uint64(st.Bsize)
	if free < wantSpace {
		return subjectSpace.warning("make room, or choose another place with --state-dir", "%d MiB are free for %s", free>>20, dir)
	}
	return subjectSpace.ok("%d GiB are free for %s", free>>30, dir)
}

// checkClock compares the clock with the age of this program, and asks the
// kernel whether anything keeps it right.
func (a *app) checkClock() check {
	now := a.now()
	built := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if at, err := time.Parse(time.RFC3339, s.Value); s.Key == "vcs.time" && err == nil {
				built = at
			}
		}
	}
	if now.Before(built) {
		return subjectClock.error("set the clock, for example with `timedatectl set-ntp true`", "says %s, which is before this program was made", instant(now))
	}
	state, err := unix.Adjtimex(&unix.Timex{})
	if err != nil || state == unix.TIME_ERROR {
		return subjectClock.warning("run a time service such as systemd-timesyncd or chrony; a machine that has its time from its host can ignore this", "%s; the kernel does not know it to be synchronised", instant(now))
	}
	return subjectClock.ok("%s, synchronised", instant(now))
}

// rootExpiresSoon is how early the end of a root is told: every node has to
// learn its successor before. Intermediates live for days; the control plane
// replaces them, also when one expired while it was stopped.
const rootExpiresSoon = 30 * 24 * time.Hour

// checkAuthority reads the authority's certificates in the state directory.
func (a *app) checkAuthority(dir string, running bool) check {
	s := subjectAuthority
	certs, err := certificatesIn(dir)
	if err != nil {
		return s.error("restore the file from a backup, or correct its mode", "%v", err)
	}
	if len(certs) == 0 {
		return s.ok("none in %s yet; one is made at the first start", dir)
	}
	now := a.now()
	var firstEnd time.Time
	for _, c := range certs {
		root := bytes.Equal(c.cert.RawIssuer, c.cert.RawSubject)
		switch left := c.cert.NotAfter.Sub(now); {
		case now.Before(c.cert.NotBefore):
			return s.error("set the clock", "%s is not valid before %s", c.path, instant(c.cert.NotBefore))
		case left <= 0 && root:
			return s.error("stop the mesh, move the authority's files away and start it: a new root is made, which every peer has to be told", "the root %s expired at %s", c.path, instant(c.cert.NotAfter))
		case left <= 0 && running:
			return s.error("look in the log of the control plane for why it did not replace it", "the intermediate %s expired at %s", c.path, instant(c.cert.NotAfter))
		case left < rootExpiresSoon && root:
			return s.warning("plan its rotation", "the root %s expires %s", c.path, until(now, c.cert.NotAfter))
		}
		if root && (firstEnd.IsZero() || c.cert.NotAfter.Before(firstEnd)) {
			firstEnd = c.cert.NotAfter
		}
	}
	return s.ok("%s, the root expires at %s", plural(len(certs), "certificate", "certificates"), instant(firstEnd))
}

type certificateFile struct {
	path string
	cert *x509.Certificate
}

// certificatesIn reads the authority certificates of every PEM file below a
// directory; leaves are short-lived and renewed, so they are left out.
func certificatesIn(dir string) (certs []certificateFile, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		if !d.Type().IsRegular() || !slices.Contains([]string{".crt", ".pem"}, filepath.Ext(path)) {
			return nil
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		found := false
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if block.Type != "CERTIFICATE" {
				continue
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			found = true
			if cert.IsCA {
				certs = append(certs, certificateFile{path, cert})
			}
		}
		if !found && filepath.Ext(path) == ".crt" {
			return fmt.Errorf("%s: holds no certificate", path)
		}
		return nil
	})
	return certs, err
}
