package peers

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
)

// newKey makes a key for as long as the relay runs, and the certificate that TLS wants around it. Nothing but the key counts.
func newKey() (tls.Certificate, string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, "", err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, "", err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, "", err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, keyHash(leaf), nil
}

func keyHash(c *x509.Certificate) string { return secret.Hash(string(c.RawSubjectPublicKeyInfo)) }

// errKey says that the other end has not the key that it should have.
var errKey = errors.New("the key is not that of a relay which shares the database")

// config is TLS in which the other end has to show a key that is known; who signed it, for which name and until when, says nothing.
func config(cert tls.Certificate, known func(key string) bool) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does it
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || !known(keyHash(s.PeerCertificates[0])) {
				return errKey
			}
			return nil
		},
	}
}
