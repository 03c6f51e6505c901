// Package tunnel owns how a tunnel comes to be and what runs on it: keys, handshake, HTTP Upgrade, reconnection, and flows.
package tunnel

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Identity is one end's key (ECDSA P-256) with a self-signed certificate around it. Only the key's fingerprint counts: names
// and dates of the certificate are never checked.
type Identity struct {
	cert        tls.Certificate
	fingerprint string
}

// NewIdentity makes a key. The names go into the certificate, for those who look at it with other tools.
func NewIdentity(dnsNames ...string) (*Identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("generate serial number: %w", err)
	}
	name := "doppel"
	if len(dnsNames) > 0 {
		name = dnsNames[0]
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     dnsNames,
		NotBefore:    now.Add(-24 * time.Hour), // clocks differ
		NotAfter:     now.AddDate(20, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return identity(der, key)
}

func identity(der []byte, key *ecdsa.PrivateKey) (*Identity, error) {
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse certificate: %w", err)
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return nil, errors.New("certificate and key do not belong together")
	}
	return &Identity{
		cert:        tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf},
		fingerprint: Fingerprint(leaf),
	}, nil
}

// Fingerprint returns "sha256:" and the unpadded base64url form of the SHA-256 of the certificate's public key
// (SubjectPublicKeyInfo, DER): the same for every certificate of one key.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return "sha256:" + base64.RawURLEncoding.EncodeToString(sum[:])
}

// Fingerprint returns the identity's fingerprint; see the function of that name.
func (i *Identity) Fingerprint() string { return i.fingerprint }

// TLSCertificate returns the identity for use in a tls.Config.
func (i *Identity) TLSCertificate() tls.Certificate { return i.cert }

const (
	pemCert = "CERTIFICATE"
	pemKey  = "PRIVATE KEY"
)

// MarshalPEM returns certificate and private key (PKCS #8), for a file or Secret that only the owner may read.
func (i *Identity) MarshalPEM() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(i.cert.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	out := pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: i.cert.Certificate[0]})
	return append(out, pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: key})...), nil
}

// ParseIdentity reads what MarshalPEM wrote.
func ParseIdentity(data []byte) (*Identity, error) {
	var der []byte
	var key *ecdsa.PrivateKey
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case pemCert:
			der = block.Bytes
		case pemKey:
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("parse key: %w", err)
			}
			ec, ok := k.(*ecdsa.PrivateKey)
			if !ok || ec.Curve != elliptic.P256() {
				return nil, errors.New("the key is not ECDSA P-256")
			}
			key = ec
		}
	}
	if der == nil || key == nil {
		return nil, errors.New("want one CERTIFICATE and one PRIVATE KEY block")
	}
	return identity(der, key)
}
