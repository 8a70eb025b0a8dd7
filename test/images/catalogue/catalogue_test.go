package catalogue

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// open reads an archive as a container runtime does.
func open(t *testing.T, i Image) v1.Image {
	t.Helper()
	tag, err := name.NewTag(i.Reference)
	if err != nil {
		t.Fatal(err)
	}
	image, err := tarball.ImageFromPath(i.Archive, &tag)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// unpackImage writes an image's files below a folder.
func unpackImage(t *testing.T, image v1.Image, root string) {
	t.Helper()
	in := mutate.Extract(image)
	defer in.Close()
	links := map[string]string{}
	r := tar.NewReader(in)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode&^0o1777 != 0 || h.Mode&0o1000 != 0 && strings.TrimSuffix(h.Name, "/") != "tmp" {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		at := filepath.Join(root, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(at, 0o755)
		case tar.TypeSymlink:
			links[at] = h.Linkname // made last, so that nothing is written through one
			continue
		case tar.TypeReg:
			var b []byte
			if b, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(at, b, os.FileMode(h.Mode).Perm())
			}
		default:
			t.Fatalf("%s is of type %q", h.Name, h.Typeflag)
		}
		if err == nil {
			err = errors.Join(os.Chmod(at, os.FileMode(h.Mode).Perm()|stickiness(h.Mode)), os.Lchown(at, h.Uid, h.Gid))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for at, target := range links {
		if err := os.Symlink(target, at); err != nil {
			t.Fatal(err)
		}
	}
}

func stickiness(mode int64) os.FileMode {
	if mode&0o1000 != 0 {
		return os.ModeSticky
	}
	return 0
}

// Defends the tests of the cluster from an image that is not built anew when
// its recipe changed, and from minutes lost on one that did not.
func TestBuildIsRepeatable(t *testing.T) {
	dir := t.TempDir()
	first, err := Build(t.Context(), Options{Dir: dir}, Probe, ShopAPI)
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != 2 || first[0].Reference != ProbeReference || first[1].Reference != ShopAPIReference {
		t.Fatalf("built %+v", first)
	}
	was, err := os.Stat(first[0].Archive)
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(first[0].Archive)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Build(t.Context(), Options{Dir: dir}, Probe); err != nil {
		t.Fatal(err)
	}
	if is, err := os.Stat(first[0].Archive); err != nil || !is.ModTime().Equal(was.ModTime()) {
		t.Errorf("it was built again (%v)", err)
	}
	if err := os.WriteFile(first[0].Archive+".key", []byte("another recipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Build(t.Context(), Options{Dir: dir}, Probe); err != nil {
		t.Fatal(err)
	}
	is, err := os.Stat(first[0].Archive)
	if err != nil || is.ModTime().Equal(was.ModTime()) {
		t.Errorf("it was not built again (%v)", err)
	}
	if after, err := os.ReadFile(first[0].Archive); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the same recipe made another archive (%v)", err)
	}
	if _, err := Build(t.Context(), Options{Dir: dir}, "nothing"); err == nil || !strings.Contains(err.Error(), `no image "nothing"`) {
		t.Errorf("an unknown name: %v", err)
	}
}

// Defends pods from an image whose program lacks a library, may not run as its
// user, or has no shell for kubectl exec. Programs run in a root of their own.
func TestImagesRun(t *testing.T) {
	images, err := Build(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	calls := map[string][][]string{
		Nginx:    {{"nginx", "-V"}, {"curl", "--version"}, {"nginx", "-t", "-e", "/tmp/error", "-c", "/etc/nginx/nginx.conf"}},
		Redis:    {{"redis-server", "--version"}, {"redis-cli", "--version"}},
		Postgres: {{"psql", "--version"}, {"pg_isready", "--version"}, {"/usr/lib/postgresql/15/bin/postgres", "--version"}},
		Probe:    {},
		ShopAPI:  nil, // no shell: it is one static program
	}
	for _, i := range images {
		t.Run(i.Name, func(t *testing.T) {
			image := open(t, i)
			config, err := image.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			user, _, _ := strings.Cut(config.Config.User, ":")
			if user == "0" || user == "" || strings.Trim(user, "0123456789") != "" {
				t.Errorf("it runs as %q, which kubelet does not know for an ordinary user", config.Config.User)
			}
			root := t.TempDir()
			if err := os.Chmod(filepath.Dir(root), 0o755); err != nil {
				t.Fatal(err)
			}
			unpackImage(t, image, root)
			if _, err := os.Stat(filepath.Join(root, config.Config.Entrypoint[0])); err != nil {
				t.Error(err)
			}
			r := &runner{root: root, config: config}
			for _, argv := range calls[i.Name] {
				if out, err := r.command(t.Context(), argv...).CombinedOutput(); err != nil {
					t.Errorf("%q: %v\n%s", argv, err, out)
				}
			}
			if calls[i.Name] == nil {
				return
			}
			out, err := r.command(t.Context(), "sh", "-c", "sleep 0 && cat /etc/passwd | wc -l && ls / && id -u").CombinedOutput()
			if err != nil || !strings.HasSuffix(strings.TrimSpace(string(out)), "\n"+user) {
				t.Errorf("a shell: %v\n%s", err, out)
			}
		})
	}
}

type runner struct {
	root   string
	config *v1.ConfigFile
}

// command runs a program of the image, as its user, below its root.
func (r *runner) command(ctx context.Context, argv ...string) *exec.Cmd {
	var id uint32
	for _, digit := range strings.Split(r.config.Config.User, ":")[0] {
		id = id*10 + uint32(digit-'0')
	}
	// env of the image looks the program up in the image's PATH.
	cmd := exec.CommandContext(ctx, "/bin/busybox", append([]string{"env"}, argv...)...)
	cmd.Err = nil // it is looked for below the root
	cmd.Dir = "/"
	cmd.Env = r.config.Config.Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: r.root, Credential: &syscall.Credential{Uid: id, Gid: id}, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Defends orders from a database that is not made when it first answers, loses
// what it was given, or is made again at each start.
func TestPostgresStarts(t *testing.T) {
	images, err := Build(t.Context(), Options{}, Postgres)
	if err != nil {
		t.Fatal(err)
	}
	image := open(t, images[0])
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.Chmod(filepath.Dir(root), 0o755); err != nil {
		t.Fatal(err)
	}
	unpackImage(t, image, root)
	for dir, mode := range map[string]os.FileMode{"dev": 0o755, "init": 0o755} {
		if err := os.MkdirAll(filepath.Join(root, dir), mode); err != nil {
			t.Fatal(err)
		}
	}
	for file, content := range map[string]string{"dev/null": "", "init/a.sql": "CREATE TABLE t (n int); INSERT INTO t VALUES (7);"} {
		if err := os.WriteFile(filepath.Join(root, file), []byte(content), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "dev/null"), 0o666); err != nil {
		t.Fatal(err)
	}
	r := &runner{root: root, config: config}
	query := func(sql string) (string, error) {
		cmd := r.command(t.Context(), "psql", "-qAt", "-h", "/tmp", "-p", "54329", "-U", "shop", "-d", "shop", "-c", sql)
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	for round, want := range []string{"7", "7\n8"} {
		// No address but the socket below its own root.
		server := r.command(t.Context(), append(slices.Clone(config.Config.Entrypoint), "-p", "54329", "-c", "listen_addresses=")...)
		server.Env = append(slices.Clone(server.Env), "POSTGRES_USER=shop", "POSTGRES_DB=shop", "POSTGRES_PASSWORD=x")
		var log bytes.Buffer
		server.Stdout, server.Stderr = &log, &log
		server.Cancel = func() error { return server.Process.Signal(syscall.SIGINT) }
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		got, err := "", errors.New("not asked")
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			if got, err = query("SELECT n FROM t ORDER BY n"); err == nil {
				break
			}
		}
		if err != nil || got != want {
			t.Errorf("round %d: %q, %v; the server says:\n%s", round, got, err, log.String())
		}
		if round == 0 {
			if out, err := query("INSERT INTO t VALUES (8)"); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
		_ = server.Process.Signal(syscall.SIGINT)
		_ = server.Wait()
	}
}

// Defends the list of packages from whatever else apt-get may say.
func TestReadURIs(t *testing.T) {
	debs, err := readURIs([]byte("'http://d/p/redis_1.deb' redis-tools_5%3a7.0-1_amd64.deb 12 MD5Sum:ab\n'http://d/c' curl_7_amd64.deb 3 \n"))
	if err != nil || len(debs) != 2 || debs[0].File != "curl_7_amd64.deb" || debs[1].request() != "redis-tools:amd64=5:7.0-1" {
		t.Errorf("%+v, %v", debs, err)
	}
	for _, bad := range []string{"E: nothing\n", "'u' ../x_1_amd64.deb 3\n", "'u' x.deb 3\n", "'u' x_1_amd64.rpm 3\n"} {
		if _, err := readURIs([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
