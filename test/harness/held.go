package harness

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// Held is what somebody who reads a node's disk has: the certificate, with its key
// and serial number, that an agent holds for an identity. stateDir is the agent's.
func Held(stateDir, id string) (cert *tls.Certificate, serial string, err error) {
	sum := sha256.Sum256([]byte(id))
	text, err := os.ReadFile(filepath.Join(stateDir, "svids", hex.EncodeToString(sum[:])+".json"))
	if err != nil {
		return nil, "", err
	}
	var file struct {
		Chain [][]byte `json:"chain"`
		Key   []byte   `json:"key"`
	}
	if err := json.Unmarshal(text, &file); err != nil {
		return nil, "", err
	}
	key, err := x509.ParsePKCS8PrivateKey(file.Key)
	if err != nil {
		return nil, "", err
	}
	if len(file.Chain) == 0 {
		return nil, "", fmt.Errorf("the agent's file for %s holds no certificate", id)
	}
	leaf, err := x509.ParseCertificate(file.Chain[0])
	if err != nil {
		return nil, "", err
	}
	return &tls.Certificate{Certificate: file.Chain, PrivateKey: key}, hex.EncodeToString(leaf.SerialNumber.Bytes()), nil
}
