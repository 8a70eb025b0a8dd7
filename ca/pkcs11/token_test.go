//go:build cgo

package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/ca"
)

const (
	softHSM = "/usr/lib/softhsm/libsofthsm2.so"
	goodPIN = "4711-right"
)

// anyFile returns the first of files that exists.
func anyFile(t *testing.T, patterns ...string) string {
	t.Helper()
	for _, p := range patterns {
		if found, _ := filepath.Glob(p); len(found) > 0 {
			return found[0]
		}
	}
	t.Fatalf("none of %v is installed: run `make deps-debian`", patterns)
	return ""
}

// softToken makes a token named mesh in a SoftHSM of the test's own.
func softToken(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	store := filepath.Join(dir, "tokens")
	if err := os.Mkdir(store, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, conf, "directories.tokendir = "+store+"\nobjectstore.backend = file\nlog.level = ERROR\n")
	t.Setenv("SOFTHSM2_CONF", conf)
	anyFile(t, softHSM)
	for _, label := range []string{"other", "mesh"} {
		command(t, "softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "so-"+goodPIN, "--pin", goodPIN)
	}
	write(t, filepath.Join(dir, "pin"), goodPIN+"\n")
	return dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// tokenOf is the token that softToken has made in a directory.
func tokenOf(t *testing.T, dir, module string, edit func(*Config)) *token {
	t.Helper()
	u, err := ParseTokenURI(URI{Token: "mesh", ModulePath: module, PINSource: filepath.Join(dir, "pin")}.String())
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{URI: u, RefusedFile: filepath.Join(dir, "refused-pin"), Log: slog.New(slog.NewTextHandler(testWriter{t}, nil))}
	if edit != nil {
		edit(&cfg)
	}
	if err := u.CheckFiles(); err != nil {
		t.Fatal(err)
	}
	return open(cfg)
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

func wantError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("error %v, want one that says %q", err, want)
	}
}

// objects is what another program finds in the token.
func objects(t *testing.T) string {
	t.Helper()
	return command(t, "pkcs11-tool", "--module", softHSM, "--token-label", "mesh", "--login", "--pin", goodPIN, "--list-objects")
}

// verifies reports whether the key signs a digest.
func verifies(t *testing.T, k ca.RootKeys, name string, pub crypto.PublicKey, hash crypto.Hash) {
	t.Helper()
	h := hash.New()
	h.Write([]byte("something"))
	digest := h.Sum(nil)
	sig, err := k.Sign(name, digest, hash)
	if err != nil {
		t.Fatal(err)
	}
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(pub, digest, sig) {
			t.Error("the signature does not verify")
		}
	case *rsa.PublicKey:
		if err := rsa.VerifyPKCS1v15(pub, hash, digest, sig); err != nil {
			t.Error(err)
		}
	default:
		t.Errorf("a key of the kind %T", pub)
	}
}

// A key of each kind is made, signs, cannot be read out, and is gone once it is
// destroyed, as another program sees it too.
func TestKeysInToken(t *testing.T) {
	for kind, bits := range map[KeyType]int{P256: 256, RSA3072: 3072, RSA4096: 4096} {
		t.Run(kind.String(), func(t *testing.T) {
			dir := softToken(t)
			k := tokenOf(t, dir, softHSM, func(c *Config) { c.KeyType = kind })
			var names []string
			for range 2 {
				name, err := k.Name()
				if err != nil {
					t.Fatal(err)
				}
				pub, err := k.Make(name)
				if err != nil {
					t.Fatal(err)
				}
				switch pub := pub.(type) {
				case *ecdsa.PublicKey:
					if pub.Curve.Params().BitSize != bits {
						t.Errorf("a curve of %d bits", pub.Curve.Params().BitSize)
					}
				case *rsa.PublicKey:
					if pub.N.BitLen() != bits || pub.E != 65537 {
						t.Errorf("a modulus of %d bits, exponent %d", pub.N.BitLen(), pub.E)
					}
				}
				for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
					verifies(t, k, name, pub, hash)
				}
				names = append(names, name)
			}
			seen := objects(t)
			if strings.Count(seen, "Private Key Object") != 2 || strings.Count(seen, "sensitive, always sensitive, never extractable") != 2 {
				t.Errorf("the token holds:\n%s", seen)
			}
			if kind != P256 && strings.Count(seen, "Usage:      sign\n") != 2 {
				t.Errorf("the keys are for more than signatures:\n%s", seen)
			}
			if err := k.Destroy(names[0]); err != nil {
				t.Fatal(err)
			}
			if err := k.Destroy(names[0]); err != nil {
				t.Errorf("destroyed twice: %v", err)
			}
			digest := sha256.Sum256(nil)
			_, err := k.Sign(names[0], digest[:], crypto.SHA256)
			wantError(t, err, "holds 0 private keys")
			if _, err := k.Sign(names[1], digest[:], crypto.SHA256); err != nil {
				t.Error(err)
			}
			if seen := objects(t); strings.Count(seen, "Private Key Object") != 1 || strings.Count(seen, "Public Key Object") != 1 {
				t.Errorf("the token holds:\n%s", seen)
			}
			_, err = k.Sign(names[1], digest[:20], crypto.SHA256)
			wantError(t, err, "no digest")
			_, err = k.Sign(names[1], digest[:], &rsa.PSSOptions{Hash: crypto.SHA256})
			wantError(t, err, "PSS")
			// A name that may fit somebody else's key destroys nothing.
			wantError(t, k.Destroy("pkcs11:object=signet-root"), "not destroyed")
		})
	}
}

// A key that another program has made can be the root's.
func TestOperatorsKey(t *testing.T) {
	dir := softToken(t)
	command(t, "pkcs11-tool", "--module", softHSM, "--token-label", "mesh", "--login", "--pin", goodPIN, "--keypairgen", "--key-type", "EC:secp384r1", "--label", "company root", "--id", "0a0b")
	k := tokenOf(t, dir, softHSM, nil)
	digest := sha256.Sum256(nil)
	for _, name := range []string{"pkcs11:object=company%20root", "pkcs11:id=%0A%0B;type=private"} {
		if _, err := k.Sign(name, digest[:], crypto.SHA256); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := k.Sign("pkcs11:object=company", digest[:], crypto.SHA256)
	wantError(t, err, "holds 0 private keys")
	command(t, "pkcs11-tool", "--module", softHSM, "--token-label", "mesh", "--login", "--pin", goodPIN, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "company root")
	_, err = k.Sign("pkcs11:object=company%20root", digest[:], crypto.SHA256)
	wantError(t, err, "holds 2 private keys")
}

// What is not there, or not the operator's alone, is refused before the token is
// asked for anything.
func TestTokenRefused(t *testing.T) {
	dir := softToken(t)
	digest := sha256.Sum256(nil)
	sign := func(edit func(*Config)) error {
		_, err := tokenOf(t, dir, softHSM, edit).Sign("pkcs11:object=a", digest[:], crypto.SHA256)
		return err
	}
	wantError(t, sign(func(c *Config) { c.URI.Token = "absent" }), `"other"`)
	wantError(t, sign(func(c *Config) { c.URI.Token, c.URI.Manufacturer = "", "SoftHSM project" }), "2 tokens match")
	wantError(t, sign(func(c *Config) { c.URI.ModulePath = "/bin/true" }), "cannot be loaded")
	pin := filepath.Join(dir, "pin")
	for text, want := range map[string]string{
		"": "is empty", "\n": "is empty", "one\ntwo\n": "more than one line", strings.Repeat("1", maxPIN+1): "more than 256 bytes",
	} {
		write(t, pin, text)
		_, err := Open(Config{URI: URI{Token: "mesh", ModulePath: softHSM, PINSource: pin}})
		wantError(t, err, want)
	}
	write(t, pin, goodPIN)
	module := filepath.Join(dir, "module.so")
	write(t, module, "no library")
	for _, tt := range []struct {
		path string
		mode os.FileMode
		want string
	}{{pin, 0o640, "chmod 600"}, {module, 0o622, "chmod go-w"}} {
		if err := os.Chmod(tt.path, tt.mode); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Config{URI: URI{Token: "mesh", ModulePath: module, PINSource: pin}})
		wantError(t, err, tt.want)
		if err := os.Chmod(tt.path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(module, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	_, err := Open(Config{URI: URI{Token: "mesh", ModulePath: module, PINSource: pin}})
	wantError(t, err, "belongs to user 12345")
}

// A wrong PIN reaches the token once, whoever starts the program again, until the
// file has another one: a token locks itself. Every call of the library is recorded
// on its way.
func TestWrongPIN(t *testing.T) {
	dir := softToken(t)
	calls := filepath.Join(dir, "calls")
	t.Setenv("PKCS11SPY", softHSM)
	t.Setenv("PKCS11SPY_OUTPUT", calls)
	spy := anyFile(t, "/usr/lib/*/pkcs11/pkcs11-spy.so", "/usr/lib/*/pkcs11-spy.so")
	logins := func() int {
		text, err := os.ReadFile(calls)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(text, []byte("C_Login\n"))
	}
	pin := filepath.Join(dir, "pin")
	digest := sha256.Sum256(nil)
	sign := func() error { // a new one each time, as after a restart
		_, err := tokenOf(t, dir, spy, nil).Sign("pkcs11:object=a", digest[:], crypto.SHA256)
		return err
	}
	wantError(t, sign(), "holds 0 private keys")
	if n := logins(); n != 1 {
		t.Fatalf("a right PIN reached the token %d times", n)
	}
	write(t, pin, "0000-wrong\n")
	for i := range 5 {
		err := sign()
		if !errors.Is(err, ca.ErrNoRetry) {
			t.Fatalf("with a wrong PIN: %v", err)
		}
		if want := map[bool]string{true: "CKR_PIN_INCORRECT", false: "was refused at"}[i == 0]; !strings.Contains(err.Error(), want) {
			t.Errorf("try %d: %v, want %q", i, err, want)
		}
		// The file is written again, as at every start of a service that is given its PIN.
		write(t, pin, "0000-wrong\n")
	}
	if n := logins(); n != 2 {
		t.Errorf("a wrong PIN reached the token %d times", n-1)
	}
	kept, err := os.ReadFile(filepath.Join(dir, "refused-pin"))
	if err != nil || bytes.Contains(kept, []byte("0000-wrong")) {
		t.Errorf("what is remembered is %q, %v", kept, err)
	}
	write(t, pin, "1111-wrong\n") // another one may be right
	wantError(t, sign(), "CKR_PIN_INCORRECT")
	write(t, pin, goodPIN+"\n")
	wantError(t, sign(), "holds 0 private keys")
	if _, err := os.Stat(filepath.Join(dir, "refused-pin")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a refusal is still remembered: %v", err)
	}
}

// remote is a token in another process, as one behind a network is.
type remote struct {
	t       *testing.T
	dir     string
	process *os.Process
}

func (r *remote) start() {
	r.t.Helper()
	socket := filepath.Join(r.dir, "p11.sock")
	os.Remove(socket)
	server := anyFile(r.t, "/usr/libexec/p11-kit/p11-kit-server", "/usr/lib/*/p11-kit/p11-kit-server", "/usr/lib/p11-kit/p11-kit-server")
	cmd := exec.Command(server, "--foreground", "--name", socket, "--provider", softHSM, "pkcs11:token=mesh")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	r.process = cmd.Process
	r.t.Setenv("P11_KIT_SERVER_ADDRESS", "unix:path="+socket)
	for range 200 {
		if _, err := os.Stat(socket); err == nil {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	r.t.Fatal("p11-kit-server does not listen")
}

// signal reaches the server and its child that serves the connection.
func (r *remote) signal(s syscall.Signal) {
	r.t.Helper()
	if err := syscall.Kill(-r.process.Pid, s); err != nil {
		r.t.Fatal(err)
	}
}

// A token that hangs, and one that is lost, in the middle of a mesh's life:
// certificates are issued all the while, what needs the root fails in time and says
// why, and all of it works again when the token is back.
func TestTokenHangsAndIsLost(t *testing.T) {
	r := &remote{t: t, dir: softToken(t)}
	r.start()
	t.Cleanup(func() { r.signal(syscall.SIGKILL) })
	keys := tokenOf(t, r.dir, anyFile(t, "/usr/lib/*/pkcs11/p11-kit-client.so"), func(c *Config) { c.signTime, c.makeTime = time.Second, time.Second })
	now := time.Now()
	options := ca.Options{
		Dir: filepath.Join(r.dir, "ca"), TrustDomain: spiffeid.RequireTrustDomainFromString("mesh.example"), IntermediateTTL: 8 * time.Hour,
		RootKeys: keys, Now: func() time.Time { return now }, Log: keys.log,
	}
	a, err := ca.Open(options)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { a.Close() }()
	issue := func(within time.Duration) {
		t.Helper()
		began := time.Now()
		for range 20 {
			if _, err := a.ServerCertificate(ca.ControlID(options.TrustDomain), time.Hour); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took > within {
			t.Errorf("20 certificates took %s", took)
		}
	}
	issue(10 * time.Second)

	now = now.Add(5 * time.Hour) // the intermediate is due
	r.signal(syscall.SIGSTOP)
	issue(10 * time.Second)
	began := time.Now()
	wantError(t, a.PrepareRoot(), "does not answer")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("that took %s", took)
	}
	issue(10 * time.Second)
	r.signal(syscall.SIGCONT)
	eventually(t, func() error { return a.PrepareRoot() })

	r.signal(syscall.SIGKILL)
	now = now.Add(time.Hour)
	issue(10 * time.Second)
	if err := a.SwitchRoot(); err == nil {
		t.Fatal("the next root signs without a token")
	}
	// Nor does a restart need it.
	a.Close()
	if a, err = ca.Open(options); err != nil {
		t.Fatal(err)
	}
	issue(10 * time.Second)
	r.start()
	eventually(t, func() error { return a.SwitchRoot() })
	issue(10 * time.Second)
	if seen := objects(t); strings.Count(seen, "Private Key Object") != 1 {
		t.Errorf("the token holds:\n%s", seen)
	}
}

func eventually(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for range 100 {
		if err = f(); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal(err)
}

// The PIN of a token does not get into what is written and logged.
func TestPINStaysSecret(t *testing.T) {
	dir := softToken(t)
	var log bytes.Buffer
	k := tokenOf(t, dir, softHSM, func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	name, err := k.Name()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.Make(name); err != nil {
		t.Fatal(err)
	}
	wrong := "secret-" + rand.Text()
	write(t, filepath.Join(dir, "pin"), wrong)
	_, err = k.Make(name)
	if err == nil || strings.Contains(err.Error()+log.String()+k.String(), goodPIN) || strings.Contains(err.Error()+log.String(), wrong) {
		t.Errorf("%v\n%s", err, &log)
	}
}

// The build without cgo, which is the default, has a test of its own.
func TestWithoutCgo(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "test", "-v", "-run", "TestAbsent$", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestAbsent")) {
		t.Errorf("%v\n%s", err, out)
	}
}
