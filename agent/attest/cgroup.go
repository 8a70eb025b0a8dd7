package attest

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// membership is a process's place in one cgroup hierarchy.
type membership struct {
	hierarchy string // controllers, "name=systemd", or "" for version 2
	path      string // absolute and clean
}

func (m membership) String() string {
	name := m.hierarchy
	if name == "" {
		name = "unified"
	}
	return name + ":" + m.path
}

// cgroups is a process's place in every hierarchy that gives it one; being in
// a hierarchy's root is no place.
type cgroups []membership

// parseCgroups reads /proc/<pid>/cgroup, whose lines are
// "<id>:<controllers>:<path>". The kernel writes the names of cgroups as they
// are, so a path may hold colons; a line feed in a name is escaped. Lines of
// another form, paths outside of the reader's root and cgroups that have been
// removed are errors: they cannot be compared with a rule.
func parseCgroups(file string) (cgroups, error) {
	var out cgroups
	seen := map[string]bool{}
	for line := range strings.Lines(file) {
		line = strings.TrimSuffix(line, "\n")
		_, rest, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("cgroup: line %q has no colon", line)
		}
		hierarchy, p, ok := strings.Cut(rest, ":")
		switch {
		case !ok:
			return nil, fmt.Errorf("cgroup: line %q has one colon; want two", line)
		case seen[hierarchy]:
			return nil, fmt.Errorf("cgroup: hierarchy %q is there twice", hierarchy)
		case !strings.HasPrefix(p, "/"):
			return nil, fmt.Errorf("cgroup: path %q is not absolute", p)
		case slices.Contains(strings.Split(p, "/"), ".."):
			return nil, fmt.Errorf("cgroup: path %q is outside of the agent's cgroup namespace; run the agent in the host's", p)
		case strings.HasSuffix(p, " (deleted)"):
			return nil, fmt.Errorf("cgroup: %q has been removed", p)
		case path.Clean(p) != p:
			return nil, fmt.Errorf("cgroup: path %q is not written plainly", p)
		}
		seen[hierarchy] = true
		if p != "/" {
			out = append(out, membership{hierarchy, p})
		}
	}
	if len(seen) == 0 {
		return nil, fmt.Errorf("cgroup: empty")
	}
	return out, nil
}

// within says whether the process is in the cgroup want or below it: every
// hierarchy that gives it a place must agree, and at least one must. With one
// hierarchy (version 2) that is plain; with several (version 1, hybrid) a
// process that only some of them place there is refused.
func (c cgroups) within(want string) error {
	var yes, no []string
	for _, m := range c {
		if m.path == want || strings.HasPrefix(m.path, want+"/") {
			yes = append(yes, m.String())
		} else {
			no = append(no, m.String())
		}
	}
	switch {
	case len(yes) > 0 && len(no) > 0:
		return fmt.Errorf("cgroup: hierarchies conflict about %s: in %s, but also in %s", want, strings.Join(yes, ", "), strings.Join(no, ", "))
	case len(yes) == 0 && len(no) == 0:
		return fmt.Errorf("cgroup: want %s, the process is in no cgroup", want)
	case len(yes) == 0:
		return fmt.Errorf("cgroup: want %s, the process is in %s", want, strings.Join(no, ", "))
	}
	return nil
}

// inUnit says whether the process belongs to a unit of the system's service
// manager. The manager's own hierarchies (name=systemd, version 2) must name
// it, both if both give a place; a hierarchy of a controller may name a
// parent or nothing, but no other unit.
func (c cgroups) inUnit(want string) error {
	var yes, no []string
	for _, m := range c {
		units := unitsOf(m.path)
		own := m.hierarchy == "" || m.hierarchy == "name=systemd"
		switch {
		case slices.Contains(units, want):
			if own {
				yes = append(yes, m.String())
			}
		case own || (len(units) > 0 && !isSlice(units[len(units)-1])):
			no = append(no, m.String())
		}
	}
	switch {
	case len(yes) > 0 && len(no) > 0:
		return fmt.Errorf("systemdUnit: hierarchies conflict about %s: in %s, but also in %s", want, strings.Join(yes, ", "), strings.Join(no, ", "))
	case len(yes) == 0 && len(no) == 0:
		return fmt.Errorf("systemdUnit: want %s, the process is in no unit", want)
	case len(yes) == 0:
		return fmt.Errorf("systemdUnit: want %s, the process is in %s", want, strings.Join(no, ", "))
	}
	return nil
}

// unitsOf returns the units of the system's service manager that a cgroup
// path lies in: the slices from the root, then the first service or scope.
// What is below that belongs to whom the unit was handed, such as a user's
// own service manager, and proves nothing: in user@1000.service/app.slice/
// nginx.service the unit is user@1000.service.
func unitsOf(p string) []string {
	var out []string
	for seg := range strings.SplitSeq(strings.TrimPrefix(p, "/"), "/") {
		seg = strings.TrimPrefix(seg, "_") // how systemd escapes names the kernel has taken
		if isSlice(seg) {
			out = append(out, seg)
			continue
		}
		if name, ok := strings.CutSuffix(seg, ".service"); ok && name != "" {
			out = append(out, seg)
		} else if name, ok := strings.CutSuffix(seg, ".scope"); ok && name != "" {
			out = append(out, seg)
		}
		return out
	}
	return out
}

func isSlice(unit string) bool {
	return strings.HasSuffix(unit, ".slice") && unit != ".slice"
}
