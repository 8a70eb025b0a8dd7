//go:build cgo

package pkcs11

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"

	p11 "github.com/miekg/pkcs11"
)

// oidP256 is the curve's name, in DER.
var oidP256, _ = asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})

// Name implements ca.RootKeys: a key has a label and an ID of its own.
func (t *token) Name() (string, error) {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return "", err
	}
	return URI{ID: id, Object: "signet-root-" + hex.EncodeToString(id[:8]), Type: "private"}.String(), nil
}

// Make implements ca.RootKeys. The key cannot leave the token, or the token is
// refused.
func (t *token) Make(name string) (crypto.PublicKey, error) {
	u, err := parseKeyName(name)
	if err != nil {
		return nil, err
	}
	return call(t, t.makeTime, true, func(s *session) (crypto.PublicKey, error) { return s.make(u, t.KeyType) })
}

func (s *session) make(u URI, kind KeyType) (crypto.PublicKey, error) {
	mechanism, size := uint(p11.CKM_EC_KEY_PAIR_GEN), []*p11.Attribute{p11.NewAttribute(p11.CKA_EC_PARAMS, oidP256)}
	var only []*p11.Attribute // an RSA key can do more than sign, if it may
	if bits := kind.bits(); bits > 0 {
		mechanism, size = p11.CKM_RSA_PKCS_KEY_PAIR_GEN, []*p11.Attribute{
			p11.NewAttribute(p11.CKA_MODULUS_BITS, bits), p11.NewAttribute(p11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
		}
		only = []*p11.Attribute{p11.NewAttribute(p11.CKA_DECRYPT, false), p11.NewAttribute(p11.CKA_UNWRAP, false)}
	}
	both := []*p11.Attribute{
		p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_ID, u.ID), p11.NewAttribute(p11.CKA_LABEL, u.Object),
	}
	public := append(append(slices.Clone(both), p11.NewAttribute(p11.CKA_VERIFY, true)), size...)
	private := append(slices.Concat(both, only),
		p11.NewAttribute(p11.CKA_PRIVATE, true), p11.NewAttribute(p11.CKA_SIGN, true),
		p11.NewAttribute(p11.CKA_SENSITIVE, true), p11.NewAttribute(p11.CKA_EXTRACTABLE, false))
	pub, priv, err := s.GenerateKeyPair(s.handle, []*p11.Mechanism{p11.NewMechanism(mechanism, nil)}, public, private)
	if err == p11.Error(p11.CKR_MECHANISM_INVALID) {
		return nil, fmt.Errorf("the token makes no keys of the kind %s (%w); use another --root-key-type", kind, err)
	}
	if err != nil {
		return nil, fmt.Errorf("make a key of the kind %s: %w", kind, err)
	}
	made, err := s.GetAttributeValue(s.handle, priv, []*p11.Attribute{p11.NewAttribute(p11.CKA_SENSITIVE, nil), p11.NewAttribute(p11.CKA_EXTRACTABLE, nil)})
	if err != nil {
		return nil, fmt.Errorf("look at the key: %w", err)
	}
	if !isTrue(made[0]) || isTrue(made[1]) {
		return nil, errors.New("the token made a key that can be read out of it, although it was told not to")
	}
	if kind == P256 {
		return s.pointOf(pub)
	}
	return s.modulusOf(pub)
}

func isTrue(a *p11.Attribute) bool { return len(a.Value) > 0 && a.Value[0] != 0 }

// pointOf reads a public key of P-256.
func (s *session) pointOf(pub p11.ObjectHandle) (crypto.PublicKey, error) {
	a, err := s.GetAttributeValue(s.handle, pub, []*p11.Attribute{p11.NewAttribute(p11.CKA_EC_POINT, nil)})
	if err != nil {
		return nil, fmt.Errorf("read the public key: %w", err)
	}
	point := a[0].Value
	var octets []byte // as the standard has it; some tokens leave the wrapping out
	if rest, err := asn1.Unmarshal(point, &octets); err == nil && len(rest) == 0 {
		point = octets
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, fmt.Errorf("read the public key: %w", err)
	}
	return key, nil
}

func (s *session) modulusOf(pub p11.ObjectHandle) (crypto.PublicKey, error) {
	a, err := s.GetAttributeValue(s.handle, pub, []*p11.Attribute{p11.NewAttribute(p11.CKA_MODULUS, nil), p11.NewAttribute(p11.CKA_PUBLIC_EXPONENT, nil)})
	if err != nil {
		return nil, fmt.Errorf("read the public key: %w", err)
	}
	e := new(big.Int).SetBytes(a[1].Value)
	if !e.IsInt64() || e.Int64() > 1<<31-1 {
		return nil, fmt.Errorf("read the public key: its exponent is %s", e)
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(a[0].Value), E: int(e.Int64())}, nil
}

// Sign implements ca.RootKeys. RSA signatures are of PKCS #1 v1.5, as x509 makes
// them.
func (t *token) Sign(name string, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	u, err := parseKeyName(name)
	if err != nil {
		return nil, err
	}
	if _, pss := opts.(*rsa.PSSOptions); pss {
		return nil, errors.New("PSS signatures are not made here")
	}
	if hash := opts.HashFunc(); hash == 0 || hash.Size() != len(digest) {
		return nil, fmt.Errorf("%d bytes are no digest of %s", len(digest), hash)
	}
	return call(t, t.signTime, false, func(s *session) ([]byte, error) { return s.sign(u, digest, opts.HashFunc()) })
}

// prefixes stand before digests in PKCS #1 v1.5: their kind, in DER.
var prefixes = map[crypto.Hash][]byte{
	crypto.SHA256: {0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20},
	crypto.SHA384: {0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30},
	crypto.SHA512: {0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00, 0x04, 0x40},
}

func (s *session) sign(u URI, digest []byte, hash crypto.Hash) ([]byte, error) {
	keys, err := s.objects(u, p11.CKO_PRIVATE_KEY)
	if err != nil {
		return nil, err
	}
	if len(keys) != 1 {
		return nil, fmt.Errorf("the token holds %d private keys %s; exactly one is needed", len(keys), u)
	}
	kind, err := s.GetAttributeValue(s.handle, keys[0], []*p11.Attribute{p11.NewAttribute(p11.CKA_KEY_TYPE, nil)})
	if err != nil {
		return nil, fmt.Errorf("look at the key: %w", err)
	}
	mechanism, in := uint(p11.CKM_ECDSA), digest
	isRSA := slices.Equal(kind[0].Value, p11.NewAttribute(p11.CKA_KEY_TYPE, uint(p11.CKK_RSA)).Value)
	if isRSA {
		prefix, ok := prefixes[hash]
		if !ok {
			return nil, fmt.Errorf("digests of %s are not signed here", hash)
		}
		mechanism, in = p11.CKM_RSA_PKCS, slices.Concat(prefix, digest)
	}
	if err := s.SignInit(s.handle, []*p11.Mechanism{p11.NewMechanism(mechanism, nil)}, keys[0]); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	sig, err := s.Ctx.Sign(s.handle, in)
	if err != nil || isRSA {
		if err != nil {
			err = fmt.Errorf("sign: %w", err)
		}
		return sig, err
	}
	if len(sig) == 0 || len(sig)%2 != 0 {
		return nil, fmt.Errorf("sign: a signature of %d bytes is none of ECDSA", len(sig))
	}
	half := len(sig) / 2
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(sig[:half]), new(big.Int).SetBytes(sig[half:])})
}

// objects finds the objects of a class that a name fits.
func (s *session) objects(u URI, class uint) (found []p11.ObjectHandle, err error) {
	template := []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, class), p11.NewAttribute(p11.CKA_TOKEN, true)}
	if u.ID != nil {
		template = append(template, p11.NewAttribute(p11.CKA_ID, u.ID))
	}
	if u.Object != "" {
		template = append(template, p11.NewAttribute(p11.CKA_LABEL, u.Object))
	}
	if err := s.FindObjectsInit(s.handle, template); err != nil {
		return nil, fmt.Errorf("look for the key %s: %w", u, err)
	}
	found, _, err = s.FindObjects(s.handle, 8)
	if end := s.FindObjectsFinal(s.handle); err == nil {
		err = end
	}
	if err != nil {
		return nil, fmt.Errorf("look for the key %s: %w", u, err)
	}
	return found, nil
}

// Destroy implements ca.RootKeys. It sees to it that the key is gone. It takes the
// whole names only that Name returns.
func (t *token) Destroy(name string) error {
	u, err := parseKeyName(name)
	if err != nil {
		return err
	}
	if u.ID == nil || u.Object == "" {
		return fmt.Errorf("the key's name %q may fit others; it is not destroyed", name)
	}
	_, err = call(t, t.signTime, true, func(s *session) (struct{}, error) {
		for _, class := range []uint{p11.CKO_PRIVATE_KEY, p11.CKO_PUBLIC_KEY} {
			found, err := s.objects(u, class)
			if err != nil {
				return struct{}{}, err
			}
			for _, object := range found {
				if err := s.DestroyObject(s.handle, object); err != nil {
					return struct{}{}, fmt.Errorf("destroy the key %s: %w", u, err)
				}
			}
			if left, err := s.objects(u, class); err != nil || len(left) > 0 {
				return struct{}{}, errors.Join(fmt.Errorf("the key %s is still in the token after it was destroyed", u), err)
			}
		}
		return struct{}{}, nil
	})
	return err
}
