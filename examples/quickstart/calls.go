package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
)

// flow is a kind of connection: who called whom, and how it went.
type flow struct {
	from, to string // namespace/service account
	verdict  audit.Verdict
}

// call runs a caller's program in a pod and counts what it saw. verdict is
// what a call that gets an answer is. It returns what the program wrote.
func (q *quickstart) call(ctx context.Context, from, to, url string, verdict audit.Verdict) (out string, answered bool, err error) {
	args := []string{q.curl, "-sS", "--max-time", "5", url}
	if q.curl == "" {
		args = []string{q.python, "-c", fmt.Sprintf("import urllib.request as r; print(r.urlopen(%q, timeout=5).read().decode())", url)}
	}
	cmd := q.lab.Pod(from).Command(ctx, args[0], args[1:]...)
	cmd.Env = environment()
	raw, err := cmd.CombinedOutput()
	out = strings.TrimSpace(string(raw))
	var exit *exec.ExitError
	switch {
	case err == nil:
		q.seen[flow{"shop/" + from, to, verdict}]++
		return out, true, nil
	case ctx.Err() != nil || !errors.As(err, &exit):
		return out, false, fmt.Errorf("%s calls %s: %w", from, to, err)
	case q.curl != "" && exit.ExitCode() == 28 || strings.Contains(out, "timed out"):
		return out, false, fmt.Errorf("%s calls %s: no answer and no refusal: %s", from, to, out)
	}
	q.seen[flow{"shop/" + from, to, audit.Denied}]++
	return lastLine(out), false, nil
}

// shown is call with the command line and the outcome on the screen.
func (q *quickstart) shown(ctx context.Context, from, to, url string, verdict audit.Verdict) error {
	line := "curl -sS " + url
	if q.curl == "" {
		line = "python3 -c 'urllib.request.urlopen(\"" + url + "\")...'"
	}
	q.command(from, line)
	out, answered, err := q.call(ctx, from, to, url, verdict)
	if err != nil {
		return err
	}
	q.output(out)
	if want := verdict != audit.Denied; answered != want {
		return fmt.Errorf("%s calls %s: answered: %v, want %v: %s", from, to, answered, want, out)
	}
	return nil
}

// holder is a program that opens a connection and waits for a byte.
const holder = `import socket, sys
c = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print("connected", flush=True)
print("the connection was closed" if not c.recv(1) else "a byte came")`

// hold opens a connection from a pod that stays open.
func (q *quickstart) hold(ctx context.Context, from, to, host, port string) error {
	p, err := start(q.lab.Pod(from), "a waiting caller in "+from, q.python, "-c", holder, host, port)
	if err != nil {
		return err
	}
	q.held = append(q.held, p)
	q.seen[flow{"shop/" + from, to, audit.Allowed}]++
	return q.until(ctx, 5*time.Second, p.name, func() error {
		if p.ended() {
			return &finalError{fmt.Errorf("it ended: %s", lastLine(p.out.String()))}
		}
		if !strings.Contains(p.out.String(), "connected") {
			return errors.New("not connected yet")
		}
		return nil
	})
}

// signet runs the real program, shows it, and checks its exit code.
func (q *quickstart) signet(ctx context.Context, want int, args ...string) error {
	q.command("node", "signet "+strings.Join(args, " "))
	color := "--color=never"
	if q.color {
		color = "--color=always"
	}
	out, code, err := q.quiet(ctx, append(args, color)...)
	if err != nil {
		return err
	}
	q.output(out)
	if code != want {
		return fmt.Errorf("signet %s: exit code %d, want %d", strings.Join(args, " "), code, want)
	}
	return nil
}

// quiet runs signet and returns what it wrote and its exit code.
func (q *quickstart) quiet(ctx context.Context, args ...string) (out string, code int, err error) {
	cmd := exec.CommandContext(ctx, filepath.Join(q.bin, "signet"), args...)
	cmd.Env = environment()
	var errOut strings.Builder
	cmd.Stderr = &errOut
	raw, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", 0, err
	}
	return string(raw) + errOut.String(), cmd.ProcessState.ExitCode(), nil
}

// records reads the audit.
func (q *quickstart) records(ctx context.Context) ([]audit.Record, error) {
	var doc struct {
		Records []audit.Record `json:"records"`
	}
	return doc.Records, q.read(ctx, &doc, "audit", "--limit", "0")
}

// certificate is one that the agent holds.
type certificate struct {
	Holder string `json:"holder"`
	Serial string `json:"serial"`
}

// serials reads the certificates of the workloads, by holder.
func (q *quickstart) serials(ctx context.Context) (map[string]string, error) {
	var doc struct {
		Certificates []certificate `json:"certificates"`
	}
	if err := q.read(ctx, &doc, "certs"); err != nil {
		return nil, err
	}
	serials := map[string]string{}
	for _, c := range doc.Certificates {
		if strings.Contains(c.Holder, "/") {
			serials[c.Holder] = c.Serial
		}
	}
	if len(serials) != len(addresses) {
		return nil, fmt.Errorf("the agent holds certificates of %d workloads, want %d", len(serials), len(addresses))
	}
	return serials, nil
}

func (q *quickstart) read(ctx context.Context, doc any, args ...string) error {
	out, code, err := q.quiet(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if code != 0 {
		return fmt.Errorf("signet %s: exit code %d: %s", strings.Join(args, " "), code, out)
	}
	if err := json.Unmarshal([]byte(out), doc); err != nil {
		return fmt.Errorf("signet %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// reconcile compares the audit with what the callers saw: each connection
// must be there once for each side, and nothing else.
func (q *quickstart) reconcile(ctx context.Context) error {
	return q.until(ctx, 5*time.Second, "the audit to hold every connection", func() error {
		records, err := q.records(ctx)
		if err != nil {
			return &finalError{err}
		}
		bySide := map[audit.Side]map[flow]int{audit.Source: {}, audit.Destination: {}}
		for _, r := range records {
			bySide[r.Side][flow{account(r.Source), account(r.Destination), r.Verdict}]++
		}
		q.audited = 0
		for side, got := range bySide {
			for f := range union(got, q.seen) {
				if got[f] != q.seen[f] {
					return fmt.Errorf("%s side: the audit has %d of %s -> %s %s, the callers saw %d", side, got[f], f.from, f.to, f.verdict, q.seen[f])
				}
				q.audited += got[f]
			}
		}
		return nil
	})
}

// wasCut reports whether the newest call that got no answer was admitted
// before an edit was in force and ended when it was, rather than refused. The
// caller cannot tell one from the other; the audit can.
func (q *quickstart) wasCut(ctx context.Context, from, to string) (cut bool, err error) {
	allowed, denied := flow{from, to, audit.Allowed}, flow{from, to, audit.Denied}
	err = q.until(ctx, 5*time.Second, "the audit to hold the newest call", func() error {
		records, err := q.records(ctx)
		if err != nil {
			return &finalError{err}
		}
		got := map[flow]int{}
		for _, r := range records {
			if r.Side == audit.Destination {
				got[flow{account(r.Source), account(r.Destination), r.Verdict}]++
			}
		}
		if got[allowed]+got[denied] < q.seen[allowed]+q.seen[denied] {
			return errors.New("it is not there yet")
		}
		cut = got[denied] < q.seen[denied]
		return nil
	})
	if cut {
		q.seen[denied]--
		q.seen[allowed]++
	}
	return cut, err
}

func union(a, b map[flow]int) map[flow]bool {
	all := map[flow]bool{}
	for f := range a {
		all[f] = true
	}
	for f := range b {
		all[f] = true
	}
	return all
}

// account is the namespace and service account of one end. In these documents
// each workload has the name of its service account.
func account(p audit.Party) string {
	if parts := strings.Split(p.ID, "/"); len(parts) == 7 {
		return parts[4] + "/" + parts[6]
	}
	return p.Workload
}

// result is the last line.
func (q *quickstart) result() string {
	count := func(verdicts ...audit.Verdict) (n int) {
		for f, c := range q.seen {
			if slices.Contains(verdicts, f.verdict) {
				n += c
			}
		}
		return n
	}
	return fmt.Sprintf("quickstart: allowed=%d denied=%d audited=%d rotated=%d",
		count(audit.Allowed, audit.Observed), count(audit.Denied), q.audited, q.rotated)
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}
