package relay

import (
	"errors"
	"flag"
	"time"
)

// Flags registers what a relay is started with; docs/relay.md has them all.
func (cfg *Config) Flags(f *flag.FlagSet) {
	f.StringVar(&cfg.URL, "url", "", "where it is reached: https://DOMAIN[:PORT]; previews are one label below DOMAIN")
	f.StringVar(&cfg.DataDir, "data", "/var/lib/doppel-relay", "directory of the database and the built-in CA")
	f.StringVar(&cfg.Database, "database", "", "postgres:// `URL` of a database that several relays share, better given as $DOPPEL_RELAY_DATABASE (default: a file in the data directory)")
	f.StringVar(&cfg.PeerAddr, "peer", "", "`HOST:PORT` of the port for the other relays, as they reach it (none)")
	f.StringVar(&cfg.Addr, "listen", "", "address of the port with TLS (:443)")
	f.StringVar(&cfg.HealthAddr, "health", "", "address of the plain port for health and metrics (:8080)")
	f.StringVar(&cfg.CertFile, "cert", "", "certificate for DOMAIN and *.DOMAIN, PEM (default: of a built-in CA, ca.pem in the data directory)")
	f.StringVar(&cfg.KeyFile, "key", "", "key of the certificate, PEM")
	f.StringVar(&cfg.ACME.DNS, "acme-dns", "", "get the certificate by ACME: `HOST[:PORT]` of the DNS server that takes updates (RFC 2136) of the domain's zone")
	f.StringVar(&cfg.ACME.TSIG, "acme-tsig", "", "`FILE` with the key that signs these updates, as tsig-keygen writes it")
	f.StringVar(&cfg.ACME.Program, "acme-exec", "", "get the certificate by ACME: `PROGRAM` that is run with present or cleanup, name and value of a TXT record")
	f.StringVar(&cfg.ACME.Record, "acme-record", "", "`NAME` of the record, if _acme-challenge.DOMAIN is an alias (CNAME) of it")
	f.StringVar(&cfg.ACME.Resolver, "acme-resolver", "", "`HOST[:PORT]` of the resolver that says whether the record is there (the system's)")
	f.StringVar(&cfg.ACME.CA, "acme-ca", "", "`URL` of the authority's directory (Let's Encrypt)")
	f.StringVar(&cfg.ACME.CARoots, "acme-ca-roots", "", "`FILE` with certificates by which the authority's own is verified (the system's)")
	f.StringVar(&cfg.ACME.Email, "acme-email", "", "`ADDRESS` that the authority is told")
	f.StringVar(&cfg.OIDC.Issuer, "oidc-issuer", "", "identity provider (OpenID Connect) that says who people are, instead of passwords; its client's secret is $DOPPEL_RELAY_OIDC_SECRET")
	f.StringVar(&cfg.OIDC.ClientID, "oidc-client", "", "the relay's client ID there; its redirect URI is URL/oidc/callback")
	f.StringVar(&cfg.OIDC.Name, "oidc-name", "", "what people call the provider")
	f.StringVar(&cfg.OIDC.Team, "oidc-team", "", "team that everybody becomes a member of whom the provider lets in (none)")
	f.Func("keep-visits", "how long visits are listed, a `TIME` above zero (720h)", func(s string) (err error) {
		if cfg.KeepVisits, err = time.ParseDuration(s); err == nil && cfg.KeepVisits <= 0 {
			err = errors.New("want a time above zero") // Config's zero value is the default
		}
		return err
	})
}
