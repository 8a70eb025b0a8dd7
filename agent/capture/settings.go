package capture

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/signet-mesh/signet/internal/mesh"
)

// The settings under net.ipv4 that Apply changes, in the order of writing:
// ports are reserved before the range of local ports is widened over them.
// The wide range and the reuse of waiting ports are there because the proxy
// dials the workload from one address, which exhausts the usual range.
const (
	reservedPorts = "ip_local_reserved_ports"
	portRange     = "ip_local_port_range"
	reuseWaiting  = "tcp_tw_reuse"
	// migrateRequests lets the connections that wait for one listener of a port
	// be taken by another when the first closes, so that none is lost while one
	// proxy takes over from the other. Kernels before 5.14 lack it, and there a
	// connection that waits at that moment is reset.
	migrateRequests = "tcp_migrate_req"
)

var settingNames = []string{reservedPorts, portRange, reuseWaiting, migrateRequests}

// settings are values by name, with single spaces; of migrateRequests only
// where the kernel has it.
type settings map[string]string

// wanted is what Apply sets where the original settings were as given.
func wanted(saved settings) settings {
	return settings{
		reservedPorts: reserve(saved[reservedPorts], mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel),
		portRange:     "1024 65535",
		reuseWaiting:  "1",

		migrateRequests: "1",
	}
}

// Originals are a namespace's settings from before it was captured. They are
// kept with the rules, and lost when somebody deletes those; who remembers them
// can still have them restored. The zero Originals remembers nothing.
type Originals struct{ values settings }

// before returns what the settings were, by what they are now: those that are
// as Apply sets them are as remembered, and others have been set since.
func (o Originals) before(now settings) settings {
	set := wanted(o.values)
	out := settings{}
	for name, value := range now {
		if was, known := o.values[name]; known && value == set[name] {
			value = was
		}
		out[name] = value
	}
	return out
}

// Originals returns the settings from before the first Apply, the zero value
// where nothing is in place.
func (n *NS) Originals() (Originals, error) {
	n.apply.Lock()
	defer n.apply.Unlock()
	s, err := n.saved()
	return Originals{s}, err
}

// reserve adds ports to a kernel list such as "80,8000-8080" and returns it
// in the kernel's form: sorted, neighbours joined. Text that it cannot read
// is dropped.
func reserve(list string, ports ...int) string {
	type span struct{ from, to int }
	var spans []span
	for s := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(s, "-")
		if !isRange {
			to = from
		}
		a, err1 := strconv.Atoi(from)
		b, err2 := strconv.Atoi(to)
		if err1 == nil && err2 == nil {
			spans = append(spans, span{a, b})
		}
	}
	for _, p := range ports {
		spans = append(spans, span{p, p})
	}
	slices.SortFunc(spans, func(x, y span) int { return x.from - y.from })
	var joined []span
	for _, s := range spans {
		if k := len(joined) - 1; k >= 0 && s.from <= joined[k].to+1 {
			joined[k].to = max(joined[k].to, s.to)
			continue
		}
		joined = append(joined, s)
	}
	var out []string
	for _, s := range joined {
		if s.from == s.to {
			out = append(out, strconv.Itoa(s.from))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", s.from, s.to))
		}
	}
	return strings.Join(out, ",")
}

// /proc/sys/net shows the namespace of the thread that opens it.
func settingPath(name string) string { return "/proc/sys/net/ipv4/" + name }

func (n *NS) readSettings() (settings, error) {
	out := settings{}
	err := n.do(func() error {
		for _, name := range settingNames {
			s, err := readSetting(settingPath(name))
			if name == migrateRequests && errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("capture: %s: read setting: %w", n.path, err)
			}
			out[name] = s
		}
		return nil
	})
	return out, err
}

// readSetting reads with one call, because the kernel cuts a list of ports at
// the end of the first buffer.
func readSetting(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	buf := make([]byte, 1<<16)
	n, err := f.Read(buf)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if n == len(buf) {
		return "", fmt.Errorf("%s: longer than %d bytes", path, n)
	}
	return strings.Join(strings.Fields(string(buf[:n])), " "), nil
}

func (n *NS) writeSettings(s settings) error {
	return n.do(func() error {
		var errs []error
		for _, name := range settingNames {
			value, has := s[name]
			if _, err := os.Stat(settingPath(name)); !has || name == migrateRequests && errors.Is(err, os.ErrNotExist) {
				continue
			}
			// The newline also makes an empty list a write.
			if err := os.WriteFile(settingPath(name), []byte(value+"\n"), 0); err != nil {
				errs = append(errs, fmt.Errorf("capture: %s: set net.ipv4.%s (is /proc/sys writable?): %w", n.path, name, err))
			}
		}
		return errors.Join(errs...)
	})
}
