package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

// fixed are sysctls of the whole kernel that kubelet sets when they are not so.
// It finds them as it wants them, and the real machine keeps its own.
var fixed = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// makeRoot turns the disk into the root of the mount namespace, with what a
// running system has in it.
func makeRoot(disk string, m spec.Machine, bootID string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount(disk, disk, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the disk: %w", err)
	}
	for _, dir := range []string{"usr", "proc", "sys", "dev", "run", "tmp", "root", "etc", "opt", "mnt", "var/lib", "var/log", "var/tmp"} {
		if err := os.MkdirAll(filepath.Join(disk, dir), 0o755); err != nil {
			return err
		}
	}
	if err := system(disk, m.Binds); err != nil {
		return err
	}
	const safe = unix.MS_NOSUID | unix.MS_NODEV
	for _, t := range []struct {
		what, where, fstype string
		flags               uintptr
		data                string
	}{
		{"/dev", "dev", "", unix.MS_BIND | unix.MS_REC, ""},
		{"tmpfs", "dev/shm", "tmpfs", safe, "mode=1777"},
		{"proc", "proc", "proc", safe | unix.MS_NOEXEC, ""},
		{"sysfs", "sys", "sysfs", safe | unix.MS_NOEXEC, ""},
		{"tmpfs", "run", "tmpfs", safe, "mode=0755"},
		{"tmpfs", "tmp", "tmpfs", safe, "mode=1777"},
	} {
		if err := unix.Mount(t.what, filepath.Join(disk, t.where), t.fstype, t.flags, t.data); err != nil {
			return fmt.Errorf("mount /%s: %w", t.where, err)
		}
	}
	if err := mountCgroups(disk, all); err != nil {
		return err
	}
	if err := hideKernel(disk, bootID); err != nil {
		return err
	}
	if err := os.Chdir(disk); err != nil {
		return err
	}
	// The old root comes to lie on top of the new one, and is taken off.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	// Mounts that pods make reach the node and other pods, if asked to.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	return leaf(all)
}

// system mounts the programs and libraries of the real machine.
func system(disk string, binds map[string]string) error {
	todo := map[string]string{"/usr": "/usr"}
	for _, name := range []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		info, err := os.Lstat("/" + name)
		switch {
		case errors.Is(err, os.ErrNotExist):
			continue
		case err != nil:
			return err
		case info.Mode()&os.ModeSymlink == 0:
			todo["/"+name] = "/" + name
			continue
		}
		to, err := os.Readlink("/" + name)
		if err != nil {
			return err
		}
		if err := os.Symlink(to, filepath.Join(disk, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	for to, from := range binds {
		todo[to] = from
	}
	for to, from := range todo {
		to = filepath.Join(disk, to)
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", from, err)
		}
		if err := unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("mount %s read-only: %w", from, err)
		}
	}
	if err := os.Symlink("../run", filepath.Join(disk, "var/run")); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// hideKernel gives the machine a boot ID of its own and the fixed sysctls.
func hideKernel(disk, bootID string) error {
	files := map[string]string{"kernel/random/boot_id": bootID}
	for name, value := range fixed {
		files[name] = value
	}
	hidden := filepath.Join(disk, "run/sysctl")
	for name, value := range files {
		from := filepath.Join(hidden, name)
		if err := os.MkdirAll(filepath.Dir(from), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(from, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		to := filepath.Join(disk, "proc/sys", name)
		if _, err := os.Stat(to); errors.Is(err, os.ErrNotExist) {
			continue // a kernel built without it
		}
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", to, err)
		}
	}
	return nil
}
