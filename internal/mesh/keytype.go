package mesh

import "strings"

// KeyType is the kind of key that workload certificates are made for.
type KeyType uint8

// The kinds of keys. The zero value is the default.
const (
	KeyECP256 KeyType = iota
	KeyECP384
	KeyRSA2048
	KeyRSA4096
)

var keyTypes = []string{KeyECP256: "ec-p256", KeyECP384: "ec-p384", KeyRSA2048: "rsa-2048", KeyRSA4096: "rsa-4096"}

// KeyTypes lists the names, for messages.
func KeyTypes() string { return strings.Join(keyTypes, ", ") }

// ParseKeyType reads a name; the empty one is the default.
func ParseKeyType(s string) (KeyType, bool) {
	if s == "" {
		return KeyECP256, true
	}
	for k, name := range keyTypes {
		if s == name {
			return KeyType(k), true
		}
	}
	return KeyECP256, false
}

// String returns the name.
func (k KeyType) String() string { return keyTypes[k] }
