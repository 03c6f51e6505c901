package relay

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// certificates say what the relay shows of itself.
type certificates interface {
	Get(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Expires() (time.Time, error) // an error: there is none
}

// reload is how often files are looked at for a new certificate.
const reload = time.Minute

// Lives of what the built-in CA makes. A certificate is made anew when a third of its life is left.
const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 90 * 24 * time.Hour
)

// clocksDiffer is how far the clock of whoever looks at a certificate may be behind ours, which may have been set meanwhile.
const clocksDiffer = 24 * time.Hour

func newCertificates(cfg Config, domain string) (certificates, error) {
	if cfg.CertFile != "" {
		f := &certFiles{cert: cfg.CertFile, key: cfg.KeyFile}
		_, err := f.Get(nil)
		return f, err
	}
	return newBuiltinCA(cfg.DataDir, domain)
}

// certFiles is a certificate in files that somebody renews.
type certFiles struct {
	cert, key string

	mu sync.Mutex
	// guarded by mu
	now    *tls.Certificate
	looked time.Time
}

// Get is the certificate, as it is in the files.
func (f *certFiles) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now != nil && time.Since(f.looked) < reload {
		return f.now, nil
	}
	c, err := tls.LoadX509KeyPair(f.cert, f.key)
	f.looked = time.Now()
	if err == nil {
		f.now = &c
	}
	if f.now == nil {
		return nil, err
	}
	return f.now, nil // a half-written file leaves the last one in place
}

// Expires is when the certificate ends.
func (f *certFiles) Expires() (time.Time, error) { return expires(f) }

// expires is when the certificate that is shown now ends.
func expires(c certificates) (time.Time, error) {
	now, err := c.Get(nil)
	if err != nil {
		return time.Time{}, err
	}
	return now.Leaf.NotAfter, nil
}

// builtinCA is an authority of the relay's own, for demos and tests: whoever is to trust it needs its ca.pem.
type builtinCA struct {
	domain string
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey

	mu sync.Mutex
	// guarded by mu
	now *tls.Certificate
}

// caFile is what people who are to trust the built-in CA need.
const caFile = "ca.pem"

// PrintCA writes the certificate of the built-in CA of a relay's directory.
func PrintCA(dataDir string, w io.Writer) error {
	b, err := os.ReadFile(filepath.Join(dataDir, caFile))
	if err != nil {
		return fmt.Errorf("built-in CA: %w", err)
	}
	_, err = w.Write(b)
	return err
}

// ownCA is the PEM of the authority that whoever is to trust a certificate needs, if it is the built-in one.
func ownCA(c certificates) string {
	if ca, ok := c.(*builtinCA); ok {
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}))
	}
	return ""
}

func newBuiltinCA(dir, domain string) (*builtinCA, error) {
	ca := &builtinCA{domain: domain}
	certFile, keyFile := filepath.Join(dir, caFile), filepath.Join(dir, "ca-key.pem")
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		if err = makeCA(domain, certFile, keyFile); err == nil {
			pair, err = tls.LoadX509KeyPair(certFile, keyFile)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("built-in CA: %w", err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("built-in CA: %s is no ECDSA key", keyFile)
	}
	ca.cert, ca.key = pair.Leaf, key
	return ca, nil
}

func makeCA(domain, certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: "doppel relay " + domain}, NotBefore: time.Now().Add(-clocksDiffer), NotAfter: time.Now().Add(caLife),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLenZero: true,
		PermittedDNSDomains: []string{domain}, PermittedDNSDomainsCritical: true, // nobody who trusts it trusts it for more
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := writePEM(keyFile, 0o600, "PRIVATE KEY", pkcs8); err != nil {
		return err
	}
	return writePEM(certFile, 0o644, "CERTIFICATE", der)
}

func writePEM(file string, mode os.FileMode, kind string, der []byte) error {
	var b bytes.Buffer
	if err := pem.Encode(&b, &pem.Block{Type: kind, Bytes: der}); err != nil {
		return err
	}
	return os.WriteFile(file, b.Bytes(), mode)
}

// Get is the certificate, which is made anew when it is old.
func (ca *builtinCA) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.now != nil && time.Until(ca.now.Leaf.NotAfter) > leafLife/3 {
		return ca.now, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: ca.domain}, DNSNames: []string{ca.domain, "*." + ca.domain},
		NotBefore: time.Now().Add(-clocksDiffer), NotAfter: time.Now().Add(leafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	ca.now = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return ca.now, nil
}

// Expires is when the certificate ends.
func (ca *builtinCA) Expires() (time.Time, error) { return expires(ca) }
