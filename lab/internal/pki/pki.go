// Package pki makes the keys, certificates and kubeconfigs of a lab.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

const validity = 10 * 365 * 24 * time.Hour

// Dir is a directory of keys and certificates with one authority.
type Dir struct {
	path string
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

// Identity is what a certificate says of its holder.
type Identity struct {
	User   string
	Groups []string
	DNS    []string
	IPs    []netip.Addr
}

// Open opens the directory and makes authority and service account key if they are missing.
func Open(path string) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	d := &Dir{path: path}
	if _, err := os.Stat(d.Path("sa.pub")); errors.Is(err, fs.ErrNotExist) {
		if err := d.create(); err != nil {
			return nil, fmt.Errorf("make the certificate authority: %w", err)
		}
	}
	pair, err := tls.LoadX509KeyPair(d.Path("ca.crt"), d.Path("ca.key"))
	if err != nil {
		return nil, fmt.Errorf("load the certificate authority: %w", err)
	}
	d.cert, d.key = pair.Leaf, pair.PrivateKey.(crypto.Signer)
	d.pem, err = os.ReadFile(d.Path("ca.crt"))
	return d, err
}

// Path is the path of a file in the directory.
func (d *Dir) Path(name string) string { return filepath.Join(d.path, name) }

func (d *Dir) create() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t, err := template(Identity{User: "doppel-lab"})
	if err != nil {
		return err
	}
	t.IsCA, t.BasicConstraintsValid = true, true
	t.KeyUsage |= x509.KeyUsageCertSign
	t.ExtKeyUsage = nil
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return err
	}
	if err := d.write("ca", der, key); err != nil {
		return err
	}
	return d.createServiceAccountKey()
}

func (d *Dir) createServiceAccountKey() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	private, err := keyPEM(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.Path("sa.key"), private, 0o600); err != nil {
		return err
	}
	return os.WriteFile(d.Path("sa.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o600)
}

// Issue makes sure that NAME.crt and NAME.key exist for the identity.
func (d *Dir) Issue(name string, id Identity) error {
	if _, err := os.Stat(d.Path(name + ".crt")); err == nil {
		return nil
	}
	der, key, err := d.sign(id)
	if err != nil {
		return fmt.Errorf("certificate of %s: %w", name, err)
	}
	return d.write(name, der, key)
}

func (d *Dir) sign(id Identity) ([]byte, crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	t, err := template(id)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, t, d.cert, key.Public(), d.key)
	return der, key, err
}

func template(id Identity) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: id.User, Organization: id.Groups},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(validity),
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:     id.DNS,
	}
	for _, ip := range id.IPs {
		t.IPAddresses = append(t.IPAddresses, net.IP(ip.AsSlice()))
	}
	return t, nil
}

func (d *Dir) write(name string, der []byte, key crypto.Signer) error {
	k, err := keyPEM(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.Path(name+".key"), k, 0o600); err != nil {
		return err
	}
	return os.WriteFile(d.Path(name+".crt"), certPEM(der), 0o644)
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
