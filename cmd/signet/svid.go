package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/internal/output"
	"github.com/signet-mesh/signet/internal/svidfiles"
)

// envEndpoint is how the SPIFFE Workload Endpoint specification names the socket.
const envEndpoint = "SPIFFE_ENDPOINT_SOCKET"

func (a *app) newSVIDCommand() *cobra.Command {
	svid := group("svid", "Use the identity of this process", `Use the identity that the SPIFFE Workload API gives to this process, which is the
one of the user, the program and the container that the command runs as.`,
		`  signet svid files /run/nginx/tls -- nginx -s reload`)
	svid.AddCommand(a.newSVIDFilesCommand())
	return svid
}

// svidFlags are the options as they were given.
type svidFlags struct {
	files   svidfiles.Files
	id      string
	socket  string
	mode    string
	signal  string
	pidFile string
	once    bool
	timeout time.Duration
}

func (a *app) newSVIDFilesCommand() *cobra.Command {
	var f svidFlags
	cmd := &cobra.Command{
		Use:   "files DIR [-- COMMAND [ARG...]]",
		Short: "Keep certificate, key and trust bundle in files, for programs that only read files",
		Long: `Keep this process's certificate, its key and the trust bundle in files, renew them
in time, and tell whoever reads them: by a signal, or by a command that is run after
each change. The three change as one. It runs until it is stopped; the files stay.

When the identity is withdrawn, or a renewal does not come, the files stay until the
certificate expires, and are removed then.

The Workload API gives an identity to the process that asks, so this has to run as
the user, and in the container, of the program it is for; rules by path or digest
have to name this program.`,
		Example: `  signet svid files /run/nginx/tls -- nginx -s reload
  signet svid files /run/app --signal HUP --pid-file /run/app.pid
  signet svid files /run/job --once    # for a job that starts afterwards`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			at := cmd.ArgsLenAtDash()
			if at < 0 {
				at = len(given)
			}
			if at != 1 {
				return usage(fmt.Errorf("name one directory, and the command after --; got %q", given))
			}
			f.files.Dir = given[0]
			return a.keepFiles(cmd.Context(), &f, given[at:])
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.id, "id", "", "SPIFFE ID to use, when the process has several; default: the first that the API gives")
	flags.StringVar(&f.files.Certificate, "cert-file", svidfiles.DefaultCertificate, "name of the file with the certificate chain")
	flags.StringVar(&f.files.Key, "key-file", svidfiles.DefaultKey, "name of the file with the key")
	flags.StringVar(&f.files.Bundle, "bundle-file", svidfiles.DefaultBundle, "name of the file with the roots")
	flags.StringVar(&f.mode, "key-mode", "0600", "mode of the key's file")
	flags.StringVar(&f.signal, "signal", "", "signal to send after each change, such as HUP; to the process of --pid-file")
	flags.StringVar(&f.pidFile, "pid-file", "", "file with the process to send the signal to; read each time")
	flags.BoolVar(&f.once, "once", false, "write the files once and end")
	flags.DurationVar(&f.timeout, "timeout", 30*time.Second, "for how long to wait for the first certificate; 0 is for ever")
	flags.StringVar(&f.socket, "endpoint", "", "Workload API, unix:///PATH ($"+envEndpoint+", or the one of --run-dir)")
	return cmd
}

// check reads what was given as text.
func (f *svidFlags) check(command []string) (sig syscall.Signal, id spiffeid.ID, err error) {
	bad := func(format string, args ...any) (syscall.Signal, spiffeid.ID, error) {
		return 0, spiffeid.ID{}, usage(fmt.Errorf(format, args...))
	}
	mode, err := strconv.ParseUint(f.mode, 8, 32)
	if err != nil {
		return bad("--key-mode %q: write octal digits, such as 0600", f.mode)
	}
	f.files.KeyMode = fs.FileMode(mode)
	if err := f.files.Check(); err != nil {
		return bad("%w", err)
	}
	if (f.signal == "") != (f.pidFile == "") {
		return bad("--signal and --pid-file belong together")
	}
	if f.signal != "" {
		if sig = unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(f.signal), "SIG")); sig == 0 {
			return bad("--signal %q: is no signal; write HUP or USR1, for example", f.signal)
		}
		if len(command) > 0 {
			return bad("give --signal or a command, not both")
		}
	}
	if f.id != "" {
		if id, err = spiffeid.FromString(f.id); err != nil {
			return bad("--id %q: %w", f.id, err)
		}
	}
	if f.timeout < 0 {
		return bad("--timeout %s: must not be negative", f.timeout)
	}
	return sig, id, nil
}

// lookAround is how often it is looked, by the wall clock, whether the files have
// expired: timers stand still while a machine is suspended.
const lookAround = time.Second

// updates hands the newest of what a watcher hears to one reader.
type updates struct {
	news chan *workloadapi.X509Context // holds one
	errs chan error                    // holds one
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (u *updates) OnX509ContextUpdate(c *workloadapi.X509Context) { newest(u.news, c) }

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (u *updates) OnX509ContextWatchError(err error) { newest(u.errs, err) }

func newest[T any](c chan T, v T) {
	for {
		select {
		case c <- v:
			return
		default:
		}
		select {
		case <-c:
		default:
		}
	}
}

// keepFiles follows the Workload API until ctx ends.
func (a *app) keepFiles(ctx context.Context, f *svidFlags, command []string) error {
	sig, id, err := f.check(command)
	if err != nil {
		return err
	}
	socket := f.socket
	if socket == "" {
		socket = a.env(envEndpoint, "unix://"+filepath.Join(a.runDir, "api", "agent.sock"))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	u := &updates{make(chan *workloadapi.X509Context, 1), make(chan error, 1)}
	watched := make(chan struct{})
	var ended error // set before watched is closed
	go func() {
		defer close(watched)
		ended = workloadapi.WatchX509Context(ctx, u, workloadapi.WithAddr(socket))
	}()
	defer func() { cancel(); <-watched }()

	var patience <-chan time.Time
	if f.timeout > 0 {
		patience = time.After(f.timeout)
	}
	var expires time.Time // zero: there are no files
	look := time.NewTicker(lookAround)
	defer look.Stop()
	said, why := "", "nothing was heard"
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-watched:
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("the Workload API on %s: %w", socket, ended)
		case err := <-u.errs:
			if why = describeAPI(err); why != said {
				said = why
				a.say("the Workload API on %s: %s", socket, why)
			}
		case <-patience:
			return fmt.Errorf("no certificate within %s: %s", f.timeout, why)
		case <-look.C:
			if expires.IsZero() || time.Now().Round(0).Before(expires) {
				continue
			}
			expires = time.Time{}
			a.say("the certificate has expired without another; its files are removed")
			if err := f.files.Remove(); err != nil {
				return err
			}
		case news := <-u.news:
			svid, err := choose(news.SVIDs, id)
			if err != nil {
				if why = err.Error(); f.once {
					return err
				}
				a.say("%s", why)
				continue
			}
			bundle, err := news.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
			if err != nil {
				return err
			}
			changed, err := f.files.Write(svid, bundle)
			if err != nil {
				return err
			}
			patience, expires, said = nil, svid.Certificates[0].NotAfter, ""
			if changed {
				a.say("%s: valid until %s", svid.ID, instant(svid.Certificates[0].NotAfter))
				err = f.tell(ctx, sig, command)
			}
			switch {
			case err != nil && (f.once || ctx.Err() != nil):
				return err
			case err != nil:
				a.say("%v; the files are right, and it is tried again after the next change", err)
			case f.once:
				return nil
			}
		}
	}
}

// say writes a line on the side.
func (a *app) say(format string, args ...any) {
	_, _ = fmt.Fprintf(a.err, "%s\n", output.Clean(fmt.Sprintf(format, args...)))
}

// describeAPI says what an error of the Workload API means.
func describeAPI(err error) string {
	s := status.Convert(err)
	if s.Code() == codes.PermissionDenied {
		return "this process has no identity: " + s.Message()
	}
	return s.Message()
}

// choose returns the SVID of an identity, or the first.
func choose(svids []*x509svid.SVID, id spiffeid.ID) (*x509svid.SVID, error) {
	if id.IsZero() && len(svids) > 0 {
		return svids[0], nil
	}
	var have []string
	for _, s := range svids {
		if s.ID == id {
			return s, nil
		}
		have = append(have, s.ID.String())
	}
	slices.Sort(have)
	return nil, fmt.Errorf("this process is not %s; it is %s", id, strings.Join(have, ", "))
}

// hookTime is what a command may take.
const hookTime = time.Minute

// tell sends the signal, or runs the command.
func (f *svidFlags) tell(ctx context.Context, sig syscall.Signal, command []string) error {
	switch {
	case sig != 0:
		text, err := os.ReadFile(f.pidFile)
		if err != nil {
			return fmt.Errorf("--pid-file: %w", err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil || pid <= 1 {
			return fmt.Errorf("--pid-file: %s holds %.40q, which is no process", f.pidFile, text)
		}
		if err := syscall.Kill(pid, sig); err != nil {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	case len(command) > 0:
		ctx, cancel := context.WithTimeout(ctx, hookTime)
		defer cancel()
		out, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput()
		if err != nil {
			return errors.Join(fmt.Errorf("%s: %w: %.300s", command[0], err, out), ctx.Err())
		}
	}
	return nil
}
