package pkcs11

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// scheme begins every URI of RFC 7512.
const scheme = "pkcs11:"

// maxURI is far beyond what tokens' names, a key's and two paths take.
const maxURI = 8192

// The lengths that PKCS#11 gives to a token's names, in bytes.
var maxName = map[string]int{"token": 32, "manufacturer": 32, "model": 16, "serial": 16}

// URI names a token, or a key in one, in the form of RFC 7512. Of the RFC's
// attributes it has those that are needed here; others are refused, so that none
// is left out of account.
type URI struct {
	// Token, Manufacturer, Model and Serial say which token; what is empty does
	// not matter.
	Token, Manufacturer, Model, Serial string
	// Object and ID say which key of it.
	Object string
	ID     []byte
	// Type is "private" or empty.
	Type string
	// ModulePath and PINSource are absolute paths: of the library that speaks to
	// the token, and of the file with the PIN.
	ModulePath, PINSource string
}

// ParseURI reads a URI strictly: attributes that it does not know, come twice or
// are empty are errors, and so is a character that should be written as %XX.
func ParseURI(s string) (URI, error) {
	var u URI
	if len(s) > maxURI {
		return u, fmt.Errorf("has %d bytes; at most %d are read", len(s), maxURI)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return u, fmt.Errorf("does not begin with %q; write pkcs11:token=NAME?module-path=/path/to/library.so&pin-source=/path/to/file", scheme)
	}
	path, query, hasQuery := strings.Cut(rest, "?")
	text := map[string]*string{
		"token": &u.Token, "manufacturer": &u.Manufacturer, "model": &u.Model, "serial": &u.Serial, "object": &u.Object, "type": &u.Type,
	}
	err := eachAttribute(path, ";", "", func(name, value string) error {
		if name == "id" {
			u.ID = []byte(value)
			return nil
		}
		field, ok := text[name]
		if !ok {
			return errors.New("is not known here; name the token by token, serial, model and manufacturer")
		}
		if err := checkText(value); err != nil {
			return err
		}
		if limit := maxName[name]; limit > 0 && len(value) > limit {
			return fmt.Errorf("has %d bytes; a token's has at most %d", len(value), limit)
		}
		*field = value
		return nil
	})
	if err != nil {
		return URI{}, err
	}
	if u.Type != "" && u.Type != "private" {
		return URI{}, fmt.Errorf("type=%s: only a private key can sign; write type=private or leave it out", u.Type)
	}
	if !hasQuery {
		return u, nil
	}
	err = eachAttribute(query, "&", "/?|", func(name, value string) error {
		if err := checkText(value); err != nil {
			return err
		}
		switch name {
		case "module-path":
			u.ModulePath = value
		case "pin-source":
			if strings.HasPrefix(value, "|") {
				return errors.New("names a command; write the path of a file")
			}
			value = strings.TrimPrefix(value, "file:")
			if rest, ok := strings.CutPrefix(value, "//"); ok {
				value = rest
			}
			u.PINSource = value
		case "pin-value":
			return errors.New("is seen by everybody who lists processes; put the PIN into a file and write pin-source=/path/to/file")
		case "module-name":
			return errors.New("is not known here; write module-path=/path/to/library.so")
		default:
			return errors.New("is not known here; write module-path and pin-source")
		}
		return nil
	})
	if err != nil {
		return URI{}, err
	}
	for name, value := range map[string]string{"module-path": u.ModulePath, "pin-source": u.PINSource} {
		if value != "" && (!filepath.IsAbs(value) || filepath.Clean(value) != value) {
			return URI{}, fmt.Errorf("%s=%s: write an absolute path without . or ..", name, value)
		}
	}
	return u, nil
}

// ParseTokenURI reads a URI that names a token, the library for it and the file
// with the PIN, and no key.
func ParseTokenURI(s string) (URI, error) {
	u, err := ParseURI(s)
	switch {
	case err != nil:
		return URI{}, err
	case u.Object != "" || u.ID != nil || u.Type != "":
		return URI{}, errors.New("names a key (object, id or type); name the token only: each root gets a key of its own there")
	case u.Token == "" && u.Serial == "":
		return URI{}, errors.New("names no token; write token=NAME or serial=NUMBER")
	case u.ModulePath == "":
		return URI{}, errors.New("module-path is missing; write ?module-path=/path/to/library.so, such as /usr/lib/softhsm/libsofthsm2.so")
	case u.PINSource == "":
		return URI{}, errors.New("pin-source is missing; write &pin-source=/path/to/file, where only its owner can read the file with the PIN")
	}
	return u, nil
}

// parseKeyName reads the name of a key in a token that is named elsewhere.
func parseKeyName(s string) (URI, error) {
	u, err := ParseURI(s)
	switch {
	case err != nil:
		return URI{}, fmt.Errorf("the key's name %q: %w", s, err)
	case u.Object == "" && u.ID == nil:
		return URI{}, fmt.Errorf("the key's name %q names no key; write pkcs11:id=%%XX...;object=NAME", s)
	case u.Token+u.Manufacturer+u.Model+u.Serial+u.ModulePath+u.PINSource != "":
		return URI{}, fmt.Errorf("the key's name %q names more than a key (id, object, type); --root-key says which token", s)
	}
	return u, nil
}

// String writes the URI with every attribute that has a value, in one order.
func (u URI) String() string {
	var path, query []string
	add := func(list *[]string, name, value, also string) {
		if value != "" {
			*list = append(*list, name+"="+escape(value, also))
		}
	}
	add(&path, "token", u.Token, "")
	add(&path, "manufacturer", u.Manufacturer, "")
	add(&path, "model", u.Model, "")
	add(&path, "serial", u.Serial, "")
	if u.ID != nil { // in hexadecimal throughout, as other programs write it
		path = append(path, "id="+percents(u.ID))
	}
	add(&path, "object", u.Object, "")
	add(&path, "type", u.Type, "")
	add(&query, "module-path", u.ModulePath, "/")
	add(&query, "pin-source", u.PINSource, "/")
	out := scheme + strings.Join(path, ";")
	if len(query) > 0 {
		out += "?" + strings.Join(query, "&")
	}
	return out
}

// eachAttribute reads name=value pairs. also are characters that values may have
// beside those of every part.
func eachAttribute(s, separator, also string, f func(name, value string) error) error {
	if s == "" {
		return nil
	}
	var seen []string
	for attribute := range strings.SplitSeq(s, separator) {
		name, raw, ok := strings.Cut(attribute, "=")
		if !ok || name == "" {
			return fmt.Errorf("%q is not name=value", attribute)
		}
		if slices.Contains(seen, name) {
			return fmt.Errorf("%s is there twice", name)
		}
		seen = append(seen, name)
		value, err := unescape(raw, also)
		if err == nil && value == "" {
			err = errors.New("is empty")
		}
		if err == nil {
			err = f(name, value)
		}
		if err != nil {
			return fmt.Errorf("%s %w", name, err)
		}
	}
	return nil
}

func checkText(s string) error {
	if !utf8.ValidString(s) {
		return errors.New("is not UTF-8")
	}
	if strings.ContainsFunc(s, func(r rune) bool { return unicode.IsControl(r) || r == utf8.RuneError }) {
		return errors.New("has a control character")
	}
	return nil
}

// plain reports whether a byte stands for itself: RFC 7512's pk11-pchar without
// "=" and "&", which it allows in paths only, so that a URI reads the same to
// whoever splits it carelessly.
func plain(c byte, also string) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~:[]@!$'()*+,"+also, c) >= 0
}

func unescape(s, also string) (string, error) {
	var out []byte
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '%':
			if len(s) < i+3 {
				return "", errors.New("ends within a %XX")
			}
			b, err := hex.DecodeString(s[i+1 : i+3])
			if err != nil {
				return "", fmt.Errorf("has %q, which is no %%XX", s[i:i+3])
			}
			out = append(out, b...)
			i += 2
		case plain(c, also):
			out = append(out, c)
		default:
			return "", fmt.Errorf("has %q, which is written %%%02X", string(rune(c)), c)
		}
	}
	return string(out), nil
}

func escape(s, also string) string {
	var out strings.Builder
	for i := range len(s) {
		if c := s[i]; plain(c, also) {
			out.WriteByte(c)
		} else {
			fmt.Fprintf(&out, "%%%02X", c)
		}
	}
	return out.String()
}

func percents(b []byte) string {
	var out strings.Builder
	for _, c := range b {
		fmt.Fprintf(&out, "%%%02X", c)
	}
	return out.String()
}
