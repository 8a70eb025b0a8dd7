package cniconf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a node's two folders and what works on them.
type host struct {
	t         *testing.T
	bin, conf string
}

func newHost(t *testing.T) host {
	t.Helper()
	dir := t.TempDir()
	h := host{t, filepath.Join(dir, "bin"), filepath.Join(dir, "net.d")}
	if err := os.Mkdir(h.conf, 0o755); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h host) installer() *Installer {
	h.t.Helper()
	program := filepath.Join(h.t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"), 0o600); err != nil {
		h.t.Fatal(err)
	}
	i, err := New(Config{
		BinDir: h.bin, ConfDir: h.conf, Program: program, Grace: time.Second,
		Entry: Entry{Socket: "/run/signet/cni.sock", OwnNamespace: "signet-system"},
		Log:   slog.New(slog.NewTextHandler(h.t.Output(), nil)),
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return i
}

func (h host) write(name, text string) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.conf, name), []byte(text), 0o640); err != nil {
		h.t.Fatal(err)
	}
}

func (h host) files() (names []string) {
	h.t.Helper()
	entries, err := os.ReadDir(h.conf)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// used loads what a container runtime would: the lexically first file, as
// containerd and CRI-O do, through the CNI library.
func (h host) used() (file string, types []string, err error) {
	files, err := libcni.ConfFiles(h.conf, []string{".conf", ".conflist", ".json"})
	if err != nil || len(files) == 0 {
		return "", nil, errors.Join(err, ErrNoNetwork)
	}
	slices.Sort(files)
	if filepath.Ext(files[0]) != ".conflist" {
		raw, err := os.ReadFile(files[0])
		if err != nil {
			return "", nil, err
		}
		p, err := libcni.NetworkPluginConfFromBytes(raw)
		if err != nil {
			return filepath.Base(files[0]), nil, err
		}
		return filepath.Base(files[0]), []string{p.Network.Type}, nil
	}
	list, err := libcni.ConfListFromFile(files[0])
	if err != nil {
		return filepath.Base(files[0]), nil, err
	}
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
	}
	return filepath.Base(files[0]), types, nil
}

func (h host) uses(file string, types ...string) {
	h.t.Helper()
	f, got, err := h.used()
	if err != nil || f != file || !slices.Equal(got, types) {
		h.t.Errorf("the runtime uses %s: %v, %v; want %s: %v", f, got, err, file, types)
	}
}

const (
	list   = `{"cniVersion":"0.4.0","name":"kc","disableCheck":true,"plugins":[{"type":"ptp","mtu":1400},{"type":"portmap","capabilities":{"portMappings":true}}]}`
	single = `{"cniVersion":"0.3.1","name":"old","type":"bridge","bridge":"cni0"}`
)

// Defends: the runtime uses a chain that ends with signet-cni, the CNI's own
// file is as it was, and installing again changes nothing.
func TestInstall(t *testing.T) {
	h := newHost(t)
	i := h.installer()
	if _, err := i.Install(); !errors.Is(err, ErrNoNetwork) {
		t.Errorf("without a network: %v", err)
	}
	h.write("10-kc.conflist", list)
	h.write("20-other.conflist", list)
	h.write("00-readme.txt", "x")
	for n := range 3 {
		changed, err := i.Install()
		if err != nil || changed != (n == 0) {
			t.Errorf("round %d: %v, %v", n, changed, err)
		}
	}
	h.uses("10-kc-signet.conflist", "ptp", "portmap", Plugin)
	if raw, err := os.ReadFile(filepath.Join(h.conf, "10-kc.conflist")); err != nil || string(raw) != list {
		t.Errorf("the CNI's own file: %s, %v", raw, err)
	}
	got, err := libcni.ConfListFromFile(filepath.Join(h.conf, "10-kc-signet.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	was, err := libcni.ConfListFromBytes([]byte(list))
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != was.Name || got.CNIVersion != was.CNIVersion || got.DisableCheck != was.DisableCheck || !reflect.DeepEqual(got.Plugins[:2], was.Plugins) {
		t.Errorf("the copy differs in more than the entry: %s", got.Bytes)
	}
	if want := `{"ownNamespace":"signet-system","socket":"/run/signet/cni.sock","type":"signet-cni"}`; string(got.Plugins[2].Bytes) != want {
		t.Errorf("entry %s", got.Plugins[2].Bytes)
	}
	for path, mode := range map[string]os.FileMode{filepath.Join(h.conf, "10-kc-signet.conflist"): 0o640, filepath.Join(h.bin, Plugin): 0o755} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", path, st, err)
		}
	}
	for range 2 {
		if err := i.Remove(0); err != nil {
			t.Error(err)
		}
	}
	h.uses("10-kc.conflist", "ptp", "portmap")
	if got := h.files(); !slices.Equal(got, []string{"00-readme.txt", "10-kc.conflist", "20-other.conflist"}) {
		t.Errorf("left: %v", got)
	}
	if _, err := os.Stat(filepath.Join(h.bin, Plugin)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the program is left: %v", err)
	}
}

// A configuration of one plugin becomes a list; a newer release changes the
// entry; a list that has an entry already, wherever, gets one, at its end.
func TestKinds(t *testing.T) {
	for _, tc := range []struct{ name, file, text, to, types string }{
		{"conf", "10-a.conf", single, "10-a-signet.conflist", "bridge signet-cni"},
		{"json", "10-a.json", single, "10-a-signet.conflist", "bridge signet-cni"},
		{"entry of another release", "10-a.conflist", `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"signet-cni","socket":"/old"},{"type":"ptp"},{"type":"signet-cni"}]}`, "10-a-signet.conflist", "ptp signet-cni"},
		{"several versions", "10-a.conflist", `{"cniVersion":"0.3.1","cniVersions":["0.3.1","1.0.0"],"name":"a","plugins":[{"type":"ptp"}]}`, "10-a-signet.conflist", "ptp signet-cni"},
	} {
		h := newHost(t)
		h.write(tc.file, tc.text)
		i := h.installer()
		if _, err := i.Install(); err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		h.uses(tc.to, strings.Fields(tc.types)...)
		i.cfg.Entry.Socket = "/run/new.sock"
		if changed, err := i.Install(); err != nil || !changed {
			t.Errorf("%s: new entry: %v, %v", tc.name, changed, err)
		}
		if raw, err := os.ReadFile(filepath.Join(h.conf, tc.to)); err != nil || strings.Count(string(raw), "/run/new.sock") != 1 || strings.Contains(string(raw), "/old") {
			t.Errorf("%s: %s, %v", tc.name, raw, err)
		}
		if err := i.Remove(0); err != nil {
			t.Error(err)
		}
		if got := h.files(); !slices.Equal(got, []string{tc.file}) {
			t.Errorf("%s: left: %v", tc.name, got)
		}
	}
}

// Defends: what does not parse, or cannot be chained, is left alone, with an
// error that names the file and the cause; the next one is built on, for a
// runtime that passes over the broken one.
func TestBroken(t *testing.T) {
	for text, want := range map[string]string{
		``:                      "no JSON object",
		`{"cniVersion":"0.4.0"`: "no JSON object",
		`[]`:                    "no JSON object",
		`{"cniVersion":"0.4.0","name":"a","plugins":[]}`:                        "plugins is empty",
		`{"cniVersion":"0.4.0","name":"a","plugins":{}}`:                        "plugins is no list",
		`{"cniVersion":"0.4.0","name":"a"}`:                                     "plugins is no list",
		`{"cniVersion":"0.4.0","name":"a","plugins":[{"x":1}]}`:                 "plugins[0] has no type",
		`{"cniVersion":"0.4.0","name":"a","plugins":[{"type":"signet-cni"}]}`:   "plugins is empty",
		`{"cniVersion":"0.4.0","plugins":[{"type":"ptp"}]}`:                     "no name",
		`{"cniVersion":"0.2.0","name":"a","plugins":[{"type":"ptp"}]}`:          `cniVersion "0.2.0"`,
		`{"name":"a","plugins":[{"type":"ptp"}]}`:                               `cniVersion ""`,
		`{"cniVersion":"2.0.0","name":"a","plugins":[{"type":"ptp"}]}`:          `cniVersion "2.0.0"`,
		`{"cniVersion":"x","name":"a","plugins":[{"type":"ptp"}]}`:              `cniVersion "x"`,
		`{"cniVersion":"0.4.0","name":"a","plugins":[{"type":"ptp"}],"name":7}`: "invalid name",
	} {
		h := newHost(t)
		h.write("10-a.conflist", text)
		i := h.installer()
		if _, err := i.Install(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "10-a.conflist") {
			t.Errorf("%s: %v; want %q", text, err, want)
		}
		if got := h.files(); !slices.Equal(got, []string{"10-a.conflist"}) {
			t.Errorf("%s: files %v", text, got)
		}
		h.write("20-b.conflist", list)
		if changed, err := i.Install(); err == nil || !changed {
			t.Errorf("%s: with a second file: %v, %v", text, changed, err)
		}
		if got := h.files(); !slices.Contains(got, "20-b-signet.conflist") {
			t.Errorf("%s: files %v", text, got)
		}
	}
}

// watch runs an installer until the test ends.
func (h host) watch(i *Installer) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(h.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := i.Watch(ctx, nil); err != nil {
			h.t.Error(err)
		}
	})
	h.t.Cleanup(func() { cancel(); wg.Wait() })
}

// eventually waits for the runtime to use a chain.
func (h host) eventually(file string, types ...string) {
	h.t.Helper()
	var f string
	var got []string
	var err error
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if f, got, err = h.used(); err == nil && f == file && slices.Equal(got, types) {
			return
		}
	}
	h.t.Fatalf("the runtime uses %s: %v, %v; want %s: %v", f, got, err, file, types)
}

// Defends: the CNI writes its configuration anew 50 times, in every manner
// seen in the field, with two installers at work. At no moment does a runtime
// find a chain without signet-cni, and each new content is taken over.
func TestRewritten(t *testing.T) {
	h := newHost(t)
	h.write("10-kc.conflist", list)
	first := h.installer()
	if _, err := first.Install(); err != nil {
		t.Fatal(err)
	}
	h.watch(first)
	h.watch(h.installer())
	stop := make(chan struct{})
	var wg sync.WaitGroup
	looks := 0
	wg.Go(func() { // the runtime, which looks all the time
		for {
			select {
			case <-stop:
				return
			default:
			}
			looks++
			if f, types, err := h.used(); err != nil || types[len(types)-1] != Plugin {
				t.Errorf("a pod would start with %s: %v, %v", f, types, err)
				return
			}
		}
	})
	path := filepath.Join(h.conf, "10-kc.conflist")
	for n := range 50 {
		kind := fmt.Sprintf("plugin%d", n)
		text := strings.Replace(list, `"ptp"`, `"`+kind+`"`, 1)
		var err error
		switch n % 4 {
		case 0: // in one step
			h.write("tmp", text)
			err = os.Rename(filepath.Join(h.conf, "tmp"), path)
		case 1: // in place
			err = os.WriteFile(path, []byte(text), 0o640)
		case 2: // in place, slowly
			err = os.WriteFile(path, []byte(text[:20]), 0o640)
			time.Sleep(20 * time.Millisecond)
			err = errors.Join(err, os.WriteFile(path, []byte(text), 0o640))
		case 3: // removed first
			err = os.Remove(path)
			for range 3 { // each makes the installers look
				h.write("tmp", "")
				time.Sleep(60 * time.Millisecond)
			}
			err = errors.Join(err, os.Remove(filepath.Join(h.conf, "tmp")))
			h.write("10-kc.conflist", text)
		}
		if err != nil {
			t.Fatal(err)
		}
		h.eventually("10-kc-signet.conflist", kind, "portmap", Plugin)
	}
	close(stop)
	wg.Wait()
	t.Logf("%d looks", looks)
	if got := h.files(); !slices.Equal(got, []string{"10-kc-signet.conflist", "10-kc.conflist"}) {
		t.Errorf("left: %v", got)
	}
}

// Defends: another CNI that takes over, and one that goes away for good: its
// stale copy must not tell the runtime that the node has a network. What is
// removed behind the installer's back comes back. When the installer stops,
// everything stays.
func TestTakeover(t *testing.T) {
	h := newHost(t)
	i := h.installer()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := i.Watch(ctx, nil); err != nil {
			t.Error(err)
		}
	})
	defer wg.Wait()
	defer cancel()
	time.Sleep(20 * time.Millisecond)
	h.write("10-kc.conflist", list) // the CNI comes after the installer
	h.eventually("10-kc-signet.conflist", "ptp", "portmap", Plugin)
	h.write("05-new.conf", single)
	h.eventually("05-new-signet.conflist", "bridge", Plugin)
	if err := errors.Join(os.Remove(filepath.Join(h.conf, "05-new-signet.conflist")), os.Remove(filepath.Join(h.bin, Plugin))); err != nil {
		t.Fatal(err)
	}
	h.eventually("05-new-signet.conflist", "bridge", Plugin)
	// The installer may have looked between the two removals.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := os.Stat(filepath.Join(h.bin, Plugin))
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(h.conf, "05-new.conf")); err != nil {
		t.Fatal(err)
	}
	h.eventually("10-kc-signet.conflist", "ptp", "portmap", Plugin)
	cancel()
	wg.Wait()
	h.uses("10-kc-signet.conflist", "ptp", "portmap", Plugin)

	h.watch(h.installer()) // the next installer
	if err := os.Remove(filepath.Join(h.conf, "10-kc.conflist")); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if len(h.files()) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("left: %v", h.files())
		}
	}
}

// Defends: a crash before the rename leaves a file that no runtime reads, and
// that goes away later; not, though, what another installer is writing.
func TestCrash(t *testing.T) {
	h := newHost(t)
	h.write("10-kc.conflist", list)
	if err := os.Mkdir(h.bin, 0o755); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	for _, dir := range []string{h.conf, h.bin} {
		for _, name := range []string{aside + "1", aside + "2"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(list[:30]), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chtimes(filepath.Join(dir, aside+"1"), old, old); err != nil {
			t.Fatal(err)
		}
	}
	h.uses("10-kc.conflist", "ptp", "portmap")
	h.watch(h.installer())
	h.eventually("10-kc-signet.conflist", "ptp", "portmap", Plugin)
	for _, dir := range []string{h.conf, h.bin} {
		if _, err := os.Stat(filepath.Join(dir, aside+"1")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", dir, err)
		}
		if _, err := os.Stat(filepath.Join(dir, aside+"2")); err != nil {
			t.Error(err)
		}
	}
}

func FuzzChain(f *testing.F) {
	f.Add([]byte(list), true)
	f.Add([]byte(single), false)
	f.Fuzz(func(t *testing.T, raw []byte, isList bool) {
		out, err := chain(raw, isList, Entry{Socket: "/s"})
		if err != nil {
			return
		}
		l, err := libcni.ConfListFromBytes(out)
		if err != nil || l.Plugins[len(l.Plugins)-1].Network.Type != Plugin {
			t.Fatalf("%s: %v", out, err)
		}
		again, err := chain(out, true, Entry{Socket: "/s"})
		if err != nil || string(again) != string(out) {
			t.Errorf("again: %s, %v; want %s", again, err, out)
		}
	})
}
