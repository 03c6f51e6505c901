// Package relay owns the relay as a program: its configuration, ports and certificates, and which host leads where.
package relay

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relay/acme"
	"github.com/doppel-dev/doppel/internal/relay/links"
	"github.com/doppel-dev/doppel/internal/relay/peers"
	"github.com/doppel-dev/doppel/internal/relay/preview"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relay/web"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/roots"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// Config is what a relay is started with. Zero values mean the defaults written at each field.
type Config struct {
	URL        string // required: https://DOMAIN[:PORT], where people and clusters reach it; previews are one label below DOMAIN
	DataDir    string // required: where the database is, and the built-in CA
	Database   string // postgres:// URL of a database that several relays may share; empty: a file in DataDir
	PeerAddr   string // HOST:PORT of the port for the other relays, as they reach it; empty: there are no others
	Addr       string // TLS (":443")
	HealthAddr string // health and metrics (":8080")
	CertFile   string // certificate for DOMAIN and *.DOMAIN, and its key, as PEM; empty: of a built-in CA, DataDir/ca.pem
	KeyFile    string
	ACME       acme.Config   // instead of files: how the relay gets a certificate itself
	OIDC       web.OIDC      // who people are; zero: accounts have passwords
	Passwords  uint32        // memory that hashing a password takes, in KiB (65,536)
	KeepVisits time.Duration // how long visits are listed (30 days)
	Log        *slog.Logger  // required
	Out        io.Writer     // gets the link that makes the first account; nil: nobody does
}

// database is the file that has everything.
const database = "relay.db"

func (c *Config) complete() (*url.URL, error) {
	var errs []error
	base, err := url.Parse(c.URL)
	if err != nil || base.Scheme != "https" || base.Hostname() == "" || strings.Trim(base.Path, "/") != "" || base.RawQuery != "" || net.ParseIP(base.Hostname()) != nil {
		errs = append(errs, fmt.Errorf("URL %q: want https://DOMAIN or https://DOMAIN:PORT", c.URL))
	}
	if c.DataDir == "" || c.Log == nil {
		errs = append(errs, errors.New("data directory and log are required"))
	}
	if (c.OIDC.Issuer == "") != (c.OIDC.ClientID == "") {
		errs = append(errs, errors.New("the identity provider's issuer and client ID go together"))
	}
	if c.Database != "" && !store.IsPostgres(c.Database) {
		errs = append(errs, errors.New("the database is no postgres:// URL"))
	}
	if c.PeerAddr != "" && c.Database == "" {
		errs = append(errs, errors.New("several relays need a database that they share"))
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		errs = append(errs, errors.New("certificate and key go together"))
	}
	if c.CertFile != "" && c.ACME.Enabled() {
		errs = append(errs, errors.New("a certificate from files, or one that the relay gets itself"))
	}
	if c.ACME != (acme.Config{}) && !c.ACME.Enabled() {
		errs = append(errs, errors.New("to get a certificate itself, the relay needs a DNS server that takes updates (-acme-dns), or a program that makes them (-acme-exec)"))
	}
	if c.Database == "" {
		c.Database = filepath.Join(c.DataDir, database)
	}
	if c.Addr == "" {
		c.Addr = ":443"
	}
	if c.HealthAddr == "" {
		c.HealthAddr = ":8080"
	}
	if c.KeepVisits < 0 {
		errs = append(errs, errors.New("visits are listed for a time above zero"))
	}
	if c.KeepVisits == 0 {
		c.KeepVisits = 30 * 24 * time.Hour
	}
	if c.Out == nil {
		c.Out = io.Discard
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	base.Path, base.Host = "", normal(base.Host)
	return base, nil
}

// Relay is one relay.
type Relay struct {
	cfg      Config
	base     *url.URL
	store    *store.Store
	links    *links.Links
	laptops  *links.Laptops
	previews *preview.Handler
	site     *web.Site
	peers    *peers.Peers // nil: there are none
	certs    certificates
	acme     *acme.Certificates // nil: certs come from elsewhere
	metrics  *metrics
	ctx      context.Context // links hang on it; it ends when requests have been answered

	answering, answered atomic.Int64 // requests of the port for everybody
}

// New opens the database and prepares every part; nothing is served yet.
func New(ctx context.Context, cfg Config) (*Relay, error) {
	base, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	roots.Ensure() // of the authority that gives certificates, and of the identity provider
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	r := &Relay{cfg: cfg, base: base, links: links.New(cfg.Log), laptops: links.NewLaptops(cfg.Log)}
	if r.store, err = store.Open(ctx, cfg.Database); err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	if cfg.ACME.Enabled() {
		r.acme, err = acme.New(cfg.ACME, base.Hostname(), r.store, cfg.Log)
		r.certs = r.acme
	} else {
		r.certs, err = newCertificates(cfg, base.Hostname())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("relay: %w", err), r.store.Close())
	}
	if cfg.PeerAddr != "" {
		if r.peers, err = peers.New(peers.Config{Store: r.store, Links: r.links, Laptops: r.laptops, Address: cfg.PeerAddr, Log: cfg.Log}); err != nil {
			return nil, errors.Join(fmt.Errorf("relay: %w", err), r.store.Close())
		}
	}
	r.previews = preview.New(preview.Config{Base: base, Store: r.store, Dial: r.links.Dial, Away: r.links.Away, Explain: explain, Log: cfg.Log})
	r.metrics = newMetrics(r.links, r.previews, r.certs)
	r.site = web.New(web.Config{Base: base, CA: ownCA(r.certs), Store: r.store, Links: r.links, Laptops: r.laptops, Passwords: secret.NewPasswords(cfg.Passwords), OIDC: cfg.OIDC, Log: cfg.Log})
	return r, nil
}

// Backup writes a copy of a relay's database into a new file.
func Backup(ctx context.Context, dataDir, source, file string) error {
	return store.Backup(ctx, cmp.Or(source, filepath.Join(dataDir, database)), file)
}

// Reset prints a link with which an account of the relay's gets another password, once, within a day. The relay may be running.
func Reset(ctx context.Context, cfg Config, email string) error {
	base, err := cfg.complete()
	if err != nil {
		return err
	}
	if cfg.OIDC.Issuer != "" {
		return errors.New("accounts have no passwords here: people log in at " + cfg.OIDC.Issuer)
	}
	if _, err := os.Stat(cfg.Database); err != nil && !store.IsPostgres(cfg.Database) { // it would be made
		return fmt.Errorf("there is no database: %w", err)
	}
	s, err := store.Open(ctx, cfg.Database)
	if err != nil {
		return err
	}
	link, err := web.AddReset(ctx, s, base, email)
	if errors.Is(err, store.ErrNotFound) {
		err = errors.New("no account has the e-mail address " + email)
	}
	if err = errors.Join(err, s.Close()); err == nil {
		fmt.Fprintf(cfg.Out, "Whoever opens this link within a day gives the account of %s another password:\n%s\n", store.Email(email), link)
	}
	return err
}

// Import copies what another database knows, a file or a PostgreSQL, into the relay's own, which has to be empty.
func Import(ctx context.Context, dataDir, source, from string) error {
	to := cmp.Or(source, filepath.Join(dataDir, database))
	s, err := store.Open(ctx, to)
	if err != nil {
		return err
	}
	if err := errors.Join(s.Import(ctx, from), s.Close()); err != nil {
		return fmt.Errorf("import %s into %s: %w", store.Name(from), store.Name(to), err)
	}
	return nil
}

// Run serves until ctx ends.
func (r *Relay) Run(ctx context.Context) error {
	l, err := net.Listen("tcp", r.cfg.Addr)
	if err != nil {
		return errors.Join(err, r.store.Close())
	}
	health, err := net.Listen("tcp", r.cfg.HealthAddr)
	if err != nil {
		return errors.Join(err, l.Close(), r.store.Close())
	}
	var others net.Listener
	if r.peers != nil {
		_, port, _ := net.SplitHostPort(r.cfg.PeerAddr) // New has looked
		if others, err = net.Listen("tcp", ":"+port); err != nil {
			return errors.Join(err, l.Close(), health.Close(), r.store.Close())
		}
	}
	return r.Serve(ctx, l, health, others)
}

// Serve is Run on listeners that are there, which it closes; others is for other relays, if there may be some.
func (r *Relay) Serve(ctx context.Context, l, health, others net.Listener) error {
	setup, err := r.site.SetupURL(ctx)
	if err != nil {
		err = errors.Join(err, l.Close(), health.Close(), r.store.Close())
		if others != nil {
			err = errors.Join(err, others.Close())
		}
		return err
	}
	if setup != "" {
		fmt.Fprintf(r.cfg.Out, "Make the first account within a day:\n%s\n", setup)
	}
	g := lifecycle.New(ctx, r.cfg.Log)
	lctx, endLinks := context.WithCancel(context.WithoutCancel(ctx))
	defer endLinks()
	r.ctx = lctx
	if r.acme != nil {
		if err := r.acme.Manage(g.Context()); err != nil { // it serves with what it has
			r.cfg.Log.Error("certificates not taken", "err", err)
		}
	}
	r.cfg.Log.Info("serving", "url", r.base.String(), "addr", l.Addr().String())
	srv := r.server()
	srv.RegisterOnShutdown(r.site.Close) // it waits for what is open
	r.serve(g, "previews and dashboard", srv, tls.NewListener(l, r.tlsConfig()), endLinks)
	r.serve(g, "health", &http.Server{Handler: r.health(), ReadHeaderTimeout: headTimeout}, health, func() {})
	g.Go("visitors", r.previews.Watch)
	vctx, endVisits := context.WithCancel(context.WithoutCancel(ctx))
	defer endVisits()
	visits := lifecycle.New(vctx, r.cfg.Log) // also those that end with the relay are listed
	visits.Go("visits", r.previews.List)
	g.Go("revoked links", r.watchLinks)
	g.Go("sweeper", r.sweep)
	if r.peers != nil {
		g.Go("other relays", func(ctx context.Context) error { return r.peers.Run(ctx, others) })
	}
	err = g.Wait()
	dctx, cancel := context.WithTimeout(vctx, leaveTimeout)
	defer cancel()
	r.previews.Drain(dctx)
	endVisits()
	err = errors.Join(err, visits.Wait())
	if r.acme != nil {
		r.acme.Close() // it writes into the store
	}
	return errors.Join(err, r.store.Close())
}

// Limits of the port for everybody.
const (
	headTimeout = 10 * time.Second      // a request's head
	idleTimeout = 2 * time.Minute       // a connection between requests
	maxHead     = 64 << 10              // bytes of a request's head
	endTimeout  = 2 * time.Second       // requests that are being answered when the relay ends
	endQuiet    = 50 * time.Millisecond // without any, after which it does

	leaveTimeout = time.Second // then, those that were cut
)

func (r *Relay) server() *http.Server {
	return &http.Server{
		Handler: r, ReadHeaderTimeout: headTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHead,
		ErrorLog: slog.NewLogLogger(r.cfg.Log.Handler(), slog.LevelDebug),
	}
}

func (r *Relay) tlsConfig() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: r.certs.Get, NextProtos: []string{"h2", "http/1.1"}}
}

// serve serves until the group ends; ended is called when what was being answered is.
func (r *Relay) serve(g *lifecycle.Group, name string, srv *http.Server, l net.Listener, ended func()) {
	g.Go(name, func(ctx context.Context) error {
		done := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(done)
			r.end(context.WithoutCancel(ctx), srv)
			ended()
		})
		err := srv.Serve(l)
		if stop() {
			return err
		}
		<-done
		return nil
	})
}

// end lets a server answer what it is answering. Shutdown alone waits a second more for browsers that only keep a connection of HTTP/2, and while a relay ends
// nobody sees what it shows.
func (r *Relay) end(ctx context.Context, srv *http.Server) {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Shutdown(ctx) // at its time-out it gives up
	}()
	tick := time.NewTicker(endQuiet)
	defer tick.Stop()
	for answered := r.answered.Load(); ; {
		select {
		case <-done:
			_ = srv.Close() // what is left is cut
			return
		case <-tick.C:
			now := r.answered.Load()
			if r.answering.Load() == 0 && now == answered { // and what was answered last is written
				_ = srv.Close()
			}
			answered = now
		}
	}
}

// ServeHTTP leads a request to where its host says: the domain itself, or a preview one label below it. Any other host is not here
// (RFC 9110, section 15.5.20).
func (r *Relay) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	host := normal(req.Host)
	req = req.WithContext(req.Context())
	req.Host = host // everybody compares with that
	label, below, _ := strings.Cut(host, ".")
	switch {
	case host == r.base.Host && req.URL.Path == relayapi.LinkPath:
		r.join(w, req, store.Link, func(t store.Token, c net.Conn) { r.links.Serve(r.ctx, t.Subject, t.Hash, c) })
	case host == r.base.Host && req.URL.Path == relayapi.LaptopPath:
		r.join(w, req, store.Laptop, func(t store.Token, c net.Conn) { r.laptops.Serve(r.ctx, t.Person, t.Hash, c) })
	case host == r.base.Host:
		r.answer("site", r.site, w, req)
	case below == r.base.Host && label != "":
		r.answer("preview", r.previews, w, req)
	default:
		http.Error(w, "This host is not here.", http.StatusMisdirectedRequest)
	}
}

// normal is a host in the form in which hosts are compared: without the default port (RFC 9110, section 4.2.3).
func normal(host string) string { return strings.TrimSuffix(strings.ToLower(host), ":443") }

func (r *Relay) answer(to string, h http.Handler, w http.ResponseWriter, req *http.Request) {
	r.metrics.requests.WithLabelValues(to).Inc()
	r.answering.Add(1)
	defer r.answering.Add(-1)
	defer r.answered.Add(1)
	h.ServeHTTP(w, req)
}

// join takes the connection of a traffic-manager that shows its cluster's token, or of a laptop that shows its login's.
func (r *Relay) join(w http.ResponseWriter, req *http.Request, kind store.Kind, serve func(store.Token, net.Conn)) {
	token, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	t, err := r.store.Token(req.Context(), kind, token)
	switch {
	case !ok || errors.Is(err, store.ErrNotFound):
		http.Error(w, map[store.Kind]string{store.Link: "this token is not, or no longer, a cluster's", store.Laptop: "not logged in, or no longer"}[kind], http.StatusUnauthorized)
		return
	case err != nil:
		r.cfg.Log.Error("token not looked up", "err", err)
		http.Error(w, "the relay has a problem of its own", http.StatusInternalServerError)
		return
	}
	tunnel.UpgradeHandler(func(c net.Conn) { serve(t, c) }).ServeHTTP(w, req)
}

// watchLinks cuts the links of clusters and laptops whose token is revoked.
func (r *Relay) watchLinks(ctx context.Context) error {
	tick := time.NewTicker(linkCheck)
	defer tick.Stop()
	for {
		changed := r.store.Changed()
		hangs := false // the database: nobody waits for it again
		counts := func(kind store.Kind) func(context.Context, string) bool {
			return func(ctx context.Context, hash string) bool {
				if hangs {
					return true
				}
				ctx, cancel := context.WithTimeout(ctx, store.Patience)
				defer cancel()
				_, err := r.store.TokenByHash(ctx, kind, hash)
				hangs = ctx.Err() != nil
				return !errors.Is(err, store.ErrNotFound)
			}
		}
		r.links.Cut(ctx, counts(store.Link))
		r.laptops.Cut(ctx, counts(store.Laptop))
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

// How often it is looked whether another relay has revoked a cluster's token, and for what has expired.
const (
	linkCheck  = 500 * time.Millisecond
	sweepEvery = 10 * time.Minute
)

func (r *Relay) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		if err := r.store.Sweep(ctx, time.Now().Add(-r.cfg.KeepVisits)); err != nil && ctx.Err() == nil {
			r.cfg.Log.Error("database not swept", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// explain says what it means for a visitor that a cluster does not take a connection.
func explain(err error) (status int, text string) {
	var re *mux.RejectError
	switch {
	case errors.Is(err, links.ErrAway):
		return http.StatusServiceUnavailable, "Its cluster is not connected to the relay."
	case errors.Is(err, links.ErrLaptopAway):
		return http.StatusServiceUnavailable, "The laptop that it shows is not connected."
	case !errors.As(err, &re):
		return 0, ""
	}
	switch re.Code {
	case wire.CodeNotFound:
		return http.StatusServiceUnavailable, "Nobody intercepts the service at the moment."
	case wire.CodeGone:
		return http.StatusServiceUnavailable, "The laptop that it shows is not connected."
	case wire.CodeTimeout:
		return http.StatusGatewayTimeout, "The cluster's ingress did not answer in time."
	case wire.CodeDenied, wire.CodeUnreachable:
		return http.StatusBadGateway, "The ingress of this preview is not within its owner's reach."
	default:
		return http.StatusBadGateway, "The cluster's ingress could not be reached."
	}
}
