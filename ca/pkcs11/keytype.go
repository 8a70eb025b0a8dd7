package pkcs11

import "fmt"

// KeyType is the kind of the keys that are made. The zero value is P-256.
type KeyType int

// The kinds.
const (
	P256 KeyType = iota
	RSA3072
	RSA4096
)

var keyTypes = []string{P256: "ec-p256", RSA3072: "rsa-3072", RSA4096: "rsa-4096"}

// String is how a flag has it.
func (k KeyType) String() string { return keyTypes[k] }

// bits is the size of an RSA key; 0: it is none.
func (k KeyType) bits() int { return []int{RSA3072: 3072, RSA4096: 4096}[k] }

// ParseKeyType reads what String writes.
func ParseKeyType(s string) (KeyType, error) {
	for k, name := range keyTypes {
		if s == name {
			return KeyType(k), nil
		}
	}
	return 0, fmt.Errorf("%q is no kind of key that a root can have in a token; use one of %v", s, keyTypes)
}
