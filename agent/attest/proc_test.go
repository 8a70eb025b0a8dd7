package attest

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// The command name is the process's to choose: it may hold whatever would be
// read as further fields.
func TestStartTime(t *testing.T) {
	rest := "S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2"
	for _, comm := range []string{"sh", "a b", ") S 1 (", "((", "))", ") R 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 111 (", "x\ny"} {
		got, err := startTime(fmt.Appendf(nil, "42 (%s) %s\n", comm, rest))
		if err != nil || got != 987654 {
			t.Errorf("comm %q: %d, %v; want 987654", comm, got, err)
		}
	}
	for _, bad := range []string{"", "42", "42 (sh)", "42 (sh) S 1 2", "42 (sh) " + strings.Replace(rest, "987654", "-1", 1)} {
		if got, err := startTime([]byte(bad)); err == nil {
			t.Errorf("%q: read as %d", bad, got)
		}
	}
}

func FuzzStat(f *testing.F) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own)
	f.Add([]byte("42 (a) b) S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2"))
	f.Fuzz(func(t *testing.T, b []byte) {
		want, err := startTime(b)
		if err != nil {
			return
		}
		// Nothing that a process puts into its name may move the start time.
		i := strings.IndexByte(string(b), '(')
		if i < 0 || i > strings.LastIndexByte(string(b), ')') {
			return // the kernel writes no such line
		}
		forged := string(b[:i+1]) + ") S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 7 (" + string(b[i+1:])
		if got, err := startTime([]byte(forged)); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", forged, got, err, want)
		}
	})
}

func TestPidfdPid(t *testing.T) {
	for in, want := range map[string]int{
		"pos:\t0\nflags:\t02\nPid:\t123\nNSpid:\t123\n": 123,
		"Pid:\t-1\n": -1,
		"Pid:\t0\n":  0,
	} {
		if got, err := pidfdPid([]byte(in)); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "NSpid:\t1\n", "Pid:\tx\n"} {
		if got, err := pidfdPid([]byte(in)); err == nil {
			t.Errorf("%q: read as %d", in, got)
		}
	}
}

func TestEffectiveIDs(t *testing.T) {
	good := "Name:\ta\\nUid:\t0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t\n"
	if uid, gid, err := effectiveIDs([]byte(good)); err != nil || uid != 2 || gid != 6 {
		t.Errorf("%d, %d, %v; want 2 and 6", uid, gid, err)
	}
	for _, bad := range []string{"", "Uid:\t1\t2\t3\t4\n", "Uid:\t1\nGid:\t5\t6\t7\t8\n", "Uid:\t1\t-2\t3\t4\nGid:\t5\t6\t7\t8\n", good + "Uid:\t0\t0\t0\t0\n"} {
		if uid, gid, err := effectiveIDs([]byte(bad)); err == nil {
			t.Errorf("%q: read as %d, %d", bad, uid, gid)
		}
	}
}

const (
	unified = "0::/system.slice/nginx.service\n"
	hybrid  = "9:name=systemd:/system.slice/nginx.service\n4:memory:/system.slice\n3:cpuset:/\n0::/system.slice/nginx.service\n"
)

func TestCgroup(t *testing.T) {
	for _, tc := range []struct {
		name, file, cgroup, unit string
		err                      string // empty: matches
	}{
		{name: "v2", file: unified, cgroup: "/system.slice/nginx.service"},
		{name: "v2 below", file: unified, cgroup: "/system.slice"},
		{name: "v2 not a prefix of a name", file: unified, cgroup: "/system.slice/nginx", err: "want"},
		{name: "v2 root", file: "0::/\n", cgroup: "/a", err: "in no cgroup"},
		{name: "colon in a name", file: "0::/a:b/c\n", cgroup: "/a:b"},
		{name: "v1", file: "2:cpu:/app\n1:memory:/app\n", cgroup: "/app"},
		{name: "v1 deeper in one", file: "2:cpu:/app\n1:memory:/app/x\n", cgroup: "/app"},
		{name: "v1 conflict", file: "2:cpu:/app\n1:memory:/other\n", cgroup: "/app", err: "conflict"},
		{name: "hybrid conflict", file: "4:memory:/other/x\n0::/app\n", cgroup: "/app", err: "conflict"},
		{name: "hybrid, one hierarchy unused", file: "4:memory:/app\n0::/\n", cgroup: "/app"},
		{name: "removed", file: "0::/app (deleted)\n", cgroup: "/app (deleted)", err: "removed"},
		{name: "outside of the namespace", file: "0::/../app\n", cgroup: "/app", err: "outside"},
		{name: "not absolute", file: "0::app\n", cgroup: "/app", err: "absolute"},
		{name: "not plain", file: "0::/a//b\n", cgroup: "/a", err: "plainly"},
		{name: "twice", file: "0::/a\n0::/b\n", cgroup: "/a", err: "twice"},
		{name: "no colon", file: "nonsense\n", cgroup: "/a", err: "no colon"},
		{name: "one colon", file: "0:/a\n", cgroup: "/a", err: "one colon"},
		{name: "empty", file: "", cgroup: "/a", err: "empty"},

		{name: "unit v2", file: unified, unit: "nginx.service"},
		{name: "unit hybrid", file: hybrid, unit: "nginx.service"},
		{name: "unit below", file: "0::/system.slice/nginx.service/worker\n", unit: "nginx.service"},
		{name: "unit in nested slices", file: "0::/a.slice/a-b.slice/x.service\n", unit: "x.service"},
		{name: "slice", file: unified, unit: "system.slice"},
		{name: "scope", file: "0::/user.slice/user-0.slice/session-3.scope\n", unit: "session-3.scope"},
		{name: "unit v1 without unified", file: "2:name=systemd:/system.slice/nginx.service\n1:memory:/\n", unit: "nginx.service"},
		{name: "another unit", file: unified, unit: "redis.service", err: "want"},
		// A user's own service manager may name its units as it likes.
		{name: "forged by a user's manager", file: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service\n", unit: "nginx.service", err: "want"},
		// So may whoever was handed a unit, or a container.
		{name: "forged below a unit", file: "0::/system.slice/ci.service/system.slice/nginx.service\n", unit: "nginx.service", err: "want"},
		{name: "forged in a container", file: "0::/docker/abc/nginx.service\n", unit: "nginx.service", err: "want"},
		{name: "unit conflict", file: "9:name=systemd:/system.slice/nginx.service\n0::/system.slice/redis.service\n", unit: "nginx.service", err: "conflict"},
		{name: "unit conflict with a controller", file: "4:memory:/system.slice/redis.service\n0::/system.slice/nginx.service\n", unit: "nginx.service", err: "conflict"},
		{name: "unit in a controller only", file: "4:memory:/system.slice/nginx.service\n0::/\n", unit: "nginx.service", err: "no unit"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := parseCgroups(tc.file)
			if err == nil && tc.cgroup != "" {
				err = c.within(tc.cgroup)
			}
			if err == nil && tc.unit != "" {
				err = c.inUnit(tc.unit)
			}
			switch {
			case tc.err == "" && err != nil:
				t.Error(err)
			case tc.err != "" && err == nil:
				t.Error("matches")
			case tc.err != "" && !strings.Contains(err.Error(), tc.err):
				t.Errorf("%q, want something with %q", err, tc.err)
			}
		})
	}
}

func FuzzCgroup(f *testing.F) {
	for _, s := range []string{unified, hybrid, "0::/a:b\n", "1:cpu,cpuacct:/x\n0::/\n"} {
		f.Add(s, "/system.slice/nginx.service", "nginx.service")
	}
	f.Fuzz(func(t *testing.T, file, cgroup, unit string) {
		c, err := parseCgroups(file)
		if err != nil {
			return
		}
		for _, m := range c {
			if !strings.HasPrefix(m.path, "/") || m.path == "/" || strings.Contains(m.path, "/../") {
				t.Errorf("path %q", m.path)
			}
		}
		// Whatever matches does so in every hierarchy: a further one that
		// says otherwise must make it fail.
		further := append(c[:len(c):len(c)], membership{"fuzz", "/elsewhere"})
		if c.within(cgroup) == nil && cgroup != "/elsewhere" && cgroup != "" && further.within(cgroup) == nil {
			t.Errorf("%q matches %v", cgroup, further)
		}
		if c.inUnit(unit) == nil && !strings.Contains(file, unit) {
			t.Errorf("unit %q matches %v", unit, c)
		}
	})
}
