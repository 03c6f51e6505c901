// Package acme owns the certificate that a relay gets and renews itself: from an authority by ACME (RFC 8555), to which DNS proves whose the domain is.
package acme

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/doppel-dev/doppel/internal/relay/store"
)

// Config is how a relay gets its certificate. The zero value: it does not.
type Config struct {
	DNS      string // HOST[:PORT] of a DNS server that takes updates (RFC 2136)
	TSIG     string // file with the key that signs them, as tsig-keygen writes it; empty: they are not signed
	Program  string // instead of DNS: a program that sets and removes records
	Record   string // name of the record, if _acme-challenge.DOMAIN is an alias (CNAME) of it
	Resolver string // HOST[:PORT] of the resolver that is asked for zones, and whether a record is there; empty: the system's, and the zone's own servers
	CA       string // URL of the authority's directory; empty: Let's Encrypt
	CARoots  string // file with certificates by which the authority's own is verified, PEM; empty: the system's
	Email    string // address that the authority is told; empty: none
}

// Enabled says whether a relay is to get a certificate.
func (c Config) Enabled() bool { return c.DNS != "" || c.Program != "" }

// Certificates are those for a domain and all names one label below it.
type Certificates struct {
	log     *slog.Logger
	names   []string
	cache   *certmagic.Cache
	magic   *certmagic.Config
	storage *storage

	mu sync.Mutex
	// guarded by mu
	problem string // of the last attempt to get one; empty: it was none, or none was made
}

// renewEvery is how often it is looked whether it is time for a new one, or whether another relay has got one.
const renewEvery = time.Minute

// endTimeout bounds how long Close waits for what is under way.
const endTimeout = 2 * time.Second

// New looks whether the configuration can work at all; nobody is asked yet.
func New(cfg Config, domain string, s *store.Store, log *slog.Logger) (*Certificates, error) {
	return newCertificates(cfg, domain, s, log, renewEvery)
}

func newCertificates(cfg Config, domain string, s *store.Store, log *slog.Logger, every time.Duration) (*Certificates, error) {
	c := &Certificates{log: log, names: []string{domain, "*." + domain}, storage: &storage{store: s}}
	switch {
	case cfg.DNS != "" && cfg.Program != "":
		return nil, errors.New("certificate: a DNS server or a program, not both")
	case cfg.DNS == "" && cfg.TSIG != "":
		return nil, errors.New("certificate: a TSIG key is for a DNS server")
	}
	var provider certmagic.DNSProvider
	var err error
	if cfg.DNS != "" {
		provider, err = newUpdater(withPort(cfg.DNS), cfg.TSIG)
	} else {
		provider, err = newProgram(cfg.Program)
	}
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	solver := &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{DNSProvider: provider, OverrideDomain: strings.TrimSuffix(cfg.Record, ".")}}
	if cfg.Resolver != "" {
		solver.Resolvers = []string{withPort(cfg.Resolver)}
	}
	issuer := certmagic.ACMEIssuer{
		CA: cfg.CA, Email: cfg.Email, Agreed: true, DisableHTTPChallenge: true, DisableTLSALPNChallenge: true, DNS01Solver: solver, Logger: zap.NewNop(),
	}
	if issuer.CA == "" {
		issuer.CA = certmagic.LetsEncryptProductionCA
	}
	if cfg.CARoots != "" {
		pem, err := os.ReadFile(cfg.CARoots)
		if err != nil {
			return nil, fmt.Errorf("certificate: the authority's roots: %w", err)
		}
		issuer.TrustedRoots = x509.NewCertPool()
		if !issuer.TrustedRoots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("certificate: the authority's roots: there is no certificate in %s", cfg.CARoots)
		}
	}
	// What is worth a word comes by events: the library's own log is another one's.
	c.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert:   func(certmagic.Certificate) (*certmagic.Config, error) { return c.magic, nil },
		RenewCheckInterval: every, Logger: zap.NewNop(),
	})
	c.magic = certmagic.New(c.cache, certmagic.Config{
		Storage: c.storage, Logger: zap.NewNop(), OnEvent: c.event,
		DefaultServerName: domain,                                      // of a client that names none
		OCSP:              certmagic.OCSPConfig{DisableStapling: true}, // authorities have given it up; it is one more server to wait for
	})
	c.magic.Issuers = []certmagic.Issuer{certmagic.NewACMEIssuer(c.magic, issuer)}
	return c, nil
}

// withPort is an address of a DNS server with its port.
func withPort(addr string) string {
	if _, _, err := net.SplitHostPort(addr); err == nil {
		return addr
	}
	return net.JoinHostPort(strings.Trim(addr, "[]"), "53")
}

// Manage takes the certificates that are there, and sees in the background that there are some and that they are renewed, until ctx ends: it is tried
// again and again if authority or DNS do not answer.
func (c *Certificates) Manage(ctx context.Context) error {
	for _, name := range c.names { // at once: ManageAsync takes its time for that, too
		if _, err := c.magic.CacheManagedCertificate(ctx, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.log.Error("a certificate is not read", "name", name, "err", err)
		}
	}
	if err := c.magic.ManageAsync(ctx, c.names); err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	return nil
}

// Close ends what Manage has begun, when its context has ended.
func (c *Certificates) Close() {
	c.cache.Stop()
	c.storage.wait(endTimeout)
}

// Get is the certificate for a name.
func (c *Certificates) Get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.magic.GetCertificate(hello)
}

// Expires is when the first of the certificates ends, and an error if one is not there.
func (c *Certificates) Expires() (time.Time, error) {
	var first time.Time
	for _, name := range c.names {
		all := c.cache.AllMatchingCertificates(name)
		if len(all) == 0 {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.problem != "" {
				return time.Time{}, fmt.Errorf("there is no certificate for %s yet: %s", name, c.problem)
			}
			return time.Time{}, fmt.Errorf("there is no certificate for %s yet", name)
		}
		if end := all[0].Leaf.NotAfter; first.IsZero() || end.Before(first) {
			first = end
		}
	}
	return first, nil
}

// event tells what becomes of attempts.
func (c *Certificates) event(_ context.Context, event string, data map[string]any) error {
	name, _ := data["identifier"].(string)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch event {
	case "cert_obtaining":
		c.log.Info("a certificate is asked for", "name", name)
	case "cert_obtained":
		c.problem = ""
		c.log.Info("there is a new certificate", "name", name)
	case "cert_failed":
		err, _ := data["error"].(error)
		c.problem = fmt.Sprint(err)
		c.log.Error("there is no new certificate; it is tried again", "name", name, "err", err)
	}
	return nil
}
