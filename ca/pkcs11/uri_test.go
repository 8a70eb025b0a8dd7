package pkcs11

import (
	"strings"
	"testing"
)

func TestParseURI(t *testing.T) {
	for _, tt := range []struct{ in, want, err string }{
		{in: "pkcs11:token=mesh;serial=00a1?module-path=/usr/lib/x.so&pin-source=/etc/pin", want: "pkcs11:token=mesh;serial=00a1?module-path=/usr/lib/x.so&pin-source=/etc/pin"},
		{in: "pkcs11:serial=1;token=a%20b?pin-source=file:/etc/pin&module-path=/x%20y.so", want: "pkcs11:token=a%20b;serial=1?module-path=/x%20y.so&pin-source=/etc/pin"},
		{in: "pkcs11:token=a?pin-source=file:///etc/pin&module-path=/x.so", want: "pkcs11:token=a?module-path=/x.so&pin-source=/etc/pin"},
		{in: "pkcs11:id=%00a%ff;object=root;type=private", want: "pkcs11:id=%00%61%FF;object=root;type=private"},
		{in: "pkcs11:token=%C3%A9", want: "pkcs11:token=%C3%A9"},
		{in: "pkcs11:", want: "pkcs11:"},
		{in: "", err: "does not begin"},
		{in: "PKCS11:token=a", err: "does not begin"},
		{in: "file:/root.key", err: "does not begin"},
		{in: "pkcs11:token", err: "not name=value"},
		{in: "pkcs11:token=a;", err: "not name=value"},
		{in: "pkcs11:;token=a", err: "not name=value"},
		{in: "pkcs11:=a", err: "not name=value"},
		{in: "pkcs11:token=", err: "token is empty"},
		{in: "pkcs11:token=a;token=b", err: "twice"},
		{in: "pkcs11:token=a;TOKEN=b", err: "not known"},
		{in: "pkcs11:slot-id=1", err: "not known"},
		{in: "pkcs11:token=a b", err: "%20"},
		{in: "pkcs11:token=é", err: "written %C3"},
		{in: "pkcs11:token=%2", err: "ends within"},
		{in: "pkcs11:token=%zz", err: "no %XX"},
		{in: "pkcs11:token=%00", err: "control character"},
		{in: "pkcs11:token=%ff", err: "not UTF-8"},
		{in: "pkcs11:token=a=b", err: "written %3D"},
		{in: "pkcs11:token=" + strings.Repeat("a", 33), err: "at most 32"},
		{in: "pkcs11:serial=" + strings.Repeat("1", 17), err: "at most 16"},
		{in: "pkcs11:type=public", err: "only a private key"},
		{in: "pkcs11:token=a?pin-value=1234", err: "put the PIN into a file"},
		{in: "pkcs11:token=a?pin-source=|ask", err: "names a command"},
		{in: "pkcs11:token=a?pin-source=pin", err: "absolute path"},
		{in: "pkcs11:token=a?pin-source=file://host/pin", err: "absolute path"},
		{in: "pkcs11:token=a?module-path=x.so", err: "absolute path"},
		{in: "pkcs11:token=a?module-path=/lib/../x.so", err: "absolute path"},
		{in: "pkcs11:token=a?module-name=softhsm2", err: "module-path="},
		{in: "pkcs11:token=a?x-mine=1", err: "not known"},
		{in: "pkcs11:token=a?module-path=/x.so&module-path=/y.so", err: "twice"},
		{in: "pkcs11:token=" + strings.Repeat("a", maxURI), err: "at most"},
	} {
		u, err := ParseURI(tt.in)
		switch {
		case tt.err != "":
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: error %v, want one that says %q", tt.in, err, tt.err)
			}
		case err != nil:
			t.Errorf("%q: %v", tt.in, err)
		case u.String() != tt.want:
			t.Errorf("%q is %q, want %q", tt.in, u, tt.want)
		}
	}
}

// What is not said is asked for, and a key cannot be named where it is made.
func TestParseTokenURI(t *testing.T) {
	const whole = "pkcs11:token=mesh?module-path=/x.so&pin-source=/pin"
	if _, err := ParseTokenURI(whole); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"pkcs11:model=x?module-path=/x.so&pin-source=/pin":         "names no token",
		"pkcs11:token=mesh?pin-source=/pin":                        "module-path is missing",
		"pkcs11:token=mesh?module-path=/x.so":                      "pin-source is missing",
		strings.Replace(whole, "mesh", "mesh;object=root", 1):      "name the token only",
		strings.Replace(whole, "mesh", "mesh;id=%01", 1):           "name the token only",
		strings.Replace(whole, "mesh", "mesh;type=private", 1):     "name the token only",
		"pkcs11:token=mesh&module-path=/x.so?pin-source=/pin":      "written %26",
		"pkcs11:token=mesh?module-path=/x.so;pin-source=/etc/pin":  "written %3B",
		"pkcs11:token=mesh?module-path=/x.so&&pin-source=/etc/pin": "not name=value",
	} {
		if _, err := ParseTokenURI(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one that says %q", in, err, want)
		}
	}
	for in, want := range map[string]string{
		"pkcs11:type=private":                 "names no key",
		"pkcs11:token=mesh;object=root":       "more than a key",
		"pkcs11:object=root?module-path=/x.s": "more than a key",
		"root":                                "does not begin",
	} {
		if _, err := parseKeyName(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one that says %q", in, err, want)
		}
	}
}

// Whatever is read is written in one form, which reads as the same.
func FuzzParseURI(f *testing.F) {
	for _, seed := range []string{
		"pkcs11:", "pkcs11:token=a;serial=1?module-path=/x.so&pin-source=file:/p", "pkcs11:id=%00%ff;object=a%20b;type=private",
		"pkcs11:token=%C3%A9?pin-source=/a?b|c", "pkcs11:token=a;token=b", "pkcs11:token=%", "pkcs11:?", "pkcs11:token=a?pin-source=file:////x",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil {
			t.Fatalf("%q is written %q, which does not read: %v", s, u, err)
		}
		if again.String() != u.String() || again.Token != u.Token || again.Object != u.Object || string(again.ID) != string(u.ID) || again.PINSource != u.PINSource || again.ModulePath != u.ModulePath {
			t.Fatalf("%q is %#v, and written and read again %#v", s, u, again)
		}
	})
}
