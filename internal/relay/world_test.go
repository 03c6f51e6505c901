package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relay/store/storetest"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(envChild); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	code := m.Run()
	storetest.Stop()
	// Of an authority that a test runs, and of the library's limits for all of the process: they have no end.
	endless := []goleak.Option{
		goleak.IgnoreTopFunction("github.com/letsencrypt/pebble/v2/va.VAImpl.processTasks"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.(*RingBufferRateLimiter).loop"),
	}
	if err := goleak.Find(endless...); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// onBoth runs a test on each kind of database.
func onBoth(t *testing.T, fn func(t *testing.T, on func(*Config))) {
	t.Helper()
	storetest.Both(t, func(t *testing.T, source func(*testing.T) string) {
		fn(t, func(c *Config) {
			if db := source(t); store.IsPostgres(db) {
				c.Database = db
			}
		})
	})
}

const domain = "relay.test"

// world is a relay on this machine, with everybody's names leading to it.
type world struct {
	t     testing.TB
	relay *Relay
	addr  string
	roots *x509.CertPool
	setup string
	stop  func() // ends the relay
}

func newWorld(t testing.TB, change ...func(*Config)) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, roots: x509.NewCertPool()}
	w.setup = w.start(dir, change...)
	pem, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil || !w.roots.AppendCertsFromPEM(pem) {
		t.Fatal("no CA", err)
	}
	return w
}

// start makes a relay the world's, and returns the link that it prints, if it does.
func (w *world) start(dir string, change ...func(*Config)) (setup string) {
	t := w.t
	t.Helper()
	out := make(said, 8)
	cfg := testConfig(dir, out)
	for _, fn := range change {
		fn(&cfg)
	}
	var others net.Listener
	if cfg.PeerAddr != "" { // wherever there is room
		others = listen(t)
		cfg.PeerAddr = others.Addr().String()
	}
	r, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, health := listen(t), listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Serve(ctx, l, health, others) }()
	w.relay, w.addr = r, l.Addr().String()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("relay: %v", err)
		}
	})
	t.Cleanup(w.stop)
	if empty, err := r.store.Empty(t.Context()); err != nil || !empty {
		return ""
	}
	return regexp.MustCompile(`https://\S+`).FindString(<-out)
}

func testConfig(dir string, out io.Writer) Config {
	return Config{URL: "https://" + domain, DataDir: dir, Passwords: passwordMemory, Log: slog.New(slog.DiscardHandler), Out: out}
}

// said gets what a relay prints.
type said chan string

func (s said) Write(p []byte) (int, error) {
	s <- string(p)
	return len(p), nil
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// until waits for something that other goroutines do.
func (w *world) until(what string, ok func() bool) time.Duration {
	w.t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > 10*time.Second {
			w.t.Fatalf("%s: not within 10 s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(start)
}

// dial leads the relay's names to it, and others where they lead.
func (w *world) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if strings.HasSuffix(addr, domain+":443") {
		addr = w.addr
	}
	return new(net.Dialer).DialContext(ctx, network, addr)
}

// browser is a person's browser.
type browser struct {
	w *world
	http.Client
}

func (w *world) browser() *browser {
	jar, err := cookiejar.New(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	tr := &http.Transport{DialContext: w.dial, TLSClientConfig: &tls.Config{RootCAs: w.roots}, DisableCompression: true}
	w.t.Cleanup(tr.CloseIdleConnections)
	b := &browser{w, http.Client{Jar: jar, Transport: tr, Timeout: 10 * time.Second}}
	b.CheckRedirect = func(r *http.Request, _ []*http.Request) error {
		if r.URL.Host == "127.0.0.1:7777" { // a laptop's own listener
			return http.ErrUseLastResponse
		}
		return nil
	}
	return b
}

type answer struct {
	status int
	body   string
	url    string // where redirects have led
	header http.Header
}

func (a answer) String() string { return fmt.Sprintf("%d at %s:\n%s", a.status, a.url, a.body) }

func (b *browser) do(req *http.Request) answer {
	b.w.t.Helper()
	resp, err := b.Do(req)
	if err != nil {
		b.w.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		b.w.t.Fatal(err)
	}
	if _, to, ok := strings.Cut(resp.Header.Get("Refresh"), "url="); ok { // a page that goes on by itself
		next, err := resp.Request.URL.Parse(to)
		if err != nil {
			b.w.t.Fatal(err)
		}
		if b.CheckRedirect == nil || b.CheckRedirect(&http.Request{URL: next}, nil) == nil {
			return b.visit(next.String())
		}
	}
	return answer{resp.StatusCode, string(body), resp.Request.URL.String(), resp.Header}
}

// visit opens a page as a browser does when its user types an address.
func (b *browser) visit(u string) answer {
	b.w.t.Helper()
	req, err := http.NewRequestWithContext(b.w.t.Context(), http.MethodGet, u, nil)
	if err != nil {
		b.w.t.Fatal(err)
	}
	req.Header = http.Header{"Accept": {"text/html"}, "Sec-Fetch-Site": {"none"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"document"}}
	return b.do(req)
}

// submit sends a form of one of the relay's own pages.
func (b *browser) submit(path string, form url.Values) answer {
	b.w.t.Helper()
	u := path
	if strings.HasPrefix(path, "/") {
		u = "https://" + domain + path
	}
	req, err := http.NewRequestWithContext(b.w.t.Context(), http.MethodPost, u, strings.NewReader(form.Encode()))
	if err != nil {
		b.w.t.Fatal(err)
	}
	req.Header = http.Header{
		"Accept": {"text/html"}, "Content-Type": {"application/x-www-form-urlencoded"}, "Origin": {"https://" + domain},
		"Sec-Fetch-Site": {"same-origin"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"document"},
	}
	return b.do(req)
}

const password = "correct horse battery"

// passwordMemory is little, in KiB: with the race detector an honest hash takes seconds.
const passwordMemory = 64

func hash(password string) string {
	h, err := secret.NewPasswords(passwordMemory).Hash(context.Background(), password)
	if err != nil {
		panic(err)
	}
	return h
}

// first makes the first account, an admin's.
func (w *world) first(email string) *browser {
	w.t.Helper()
	b := w.browser()
	u, err := url.Parse(w.setup)
	if err != nil {
		w.t.Fatal(err)
	}
	if a := b.visit(w.setup); a.status != http.StatusOK || !strings.Contains(a.body, "first account") {
		w.t.Fatalf("setup: %v", a)
	}
	a := b.submit("/setup", url.Values{"token": u.Query()["token"], "email": {email}, "name": {"A"}, "team": {"crew"}, "password": {password}})
	if a.status != http.StatusOK || !strings.Contains(a.body, email) {
		w.t.Fatalf("setup: %v", a)
	}
	return b
}

// laptop is a logged-in doppel.
type laptop struct {
	w     *world
	token string
}

// login does what doppel login does, with a person's browser.
func (b *browser) login() *laptop {
	w := b.w
	w.t.Helper()
	verifier := secret.ID()
	q := url.Values{"port": {"7777"}, "challenge": {secret.Challenge(verifier)}, "state": {"st"}, "host": {"lap"}}
	if a := b.visit("https://" + domain + relayapi.PathAuthorize + "?" + q.Encode()); a.status != http.StatusOK || !strings.Contains(a.body, "lap") {
		w.t.Fatalf("authorize: %v", a)
	}
	a := b.submit(relayapi.PathAuthorize, q)
	back, err := url.Parse(a.header.Get("Location"))
	if err != nil || a.status != http.StatusSeeOther || back.Host != "127.0.0.1:7777" || back.Query().Get("state") != "st" {
		w.t.Fatalf("authorize: %v, %v", a, back)
	}
	var res relayapi.LoginResult
	l := &laptop{w: w}
	if status := l.call(relayapi.PathLogin, relayapi.LoginRequest{Code: back.Query().Get("code"), Verifier: verifier}, &res); status != http.StatusOK {
		w.t.Fatalf("login: %d", status)
	}
	l.token = res.Token
	return l
}

// call is one call of the API.
func (l *laptop) call(path string, in, out any) int {
	l.w.t.Helper()
	a := l.ask(path, in)
	if a.status == http.StatusOK && out != nil {
		if err := json.Unmarshal([]byte(a.body), out); err != nil {
			l.w.t.Fatal(err)
		}
	}
	return a.status
}

// ask is call for those who want to know what is said, too.
func (l *laptop) ask(path string, in any) answer {
	w := l.w
	w.t.Helper()
	body, err := json.Marshal(in)
	if err != nil {
		w.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, "https://"+domain+path, bytes.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	if l.token != "" {
		req.Header.Set("Authorization", "Bearer "+l.token)
	}
	b := w.browser()
	defer b.CloseIdleConnections() // as doppel does
	return b.do(req)
}

func (l *laptop) must(path string, in, out any) {
	l.w.t.Helper()
	if status := l.call(path, in, out); status != http.StatusOK {
		l.w.t.Fatalf("%s: %d", path, status)
	}
}

// cluster is a fake cluster: a traffic-manager of which nothing is real but its link, and an ingress behind it.
type cluster struct {
	id    string
	token string
	shows []relayapi.LivePreview // what it says of its previews
	mux   *mux.Session
	app   *httptest.Server
	// ingress connects to another ingress than app, as a traffic-manager does; nil: there is none.
	ingress func(http2 bool) (c net.Conn, proto string, err error)
}

// dial connects to the cluster's ingress.
func (c *cluster) dial(http2 bool) (conn net.Conn, proto string, err error) {
	if c.ingress != nil {
		return c.ingress(http2)
	}
	conn, err = net.Dial("tcp", c.app.Listener.Addr().String())
	return conn, "", err
}

// cluster makes a cluster known and joins it. app answers at its ingress.
func (l *laptop) cluster(name string, app http.HandlerFunc) *cluster {
	w := l.w
	w.t.Helper()
	var added relayapi.AddClusterResult
	l.must(relayapi.PathAddCluster, relayapi.AddClusterRequest{Name: name}, &added)
	c := &cluster{id: added.ID, token: added.Token, app: httptest.NewServer(app)}
	w.t.Cleanup(c.app.Close)
	w.join(c)
	return c
}

func (w *world) join(c *cluster) {
	w.t.Helper()
	conn, err := w.upgrade(c.token)
	if err != nil {
		w.t.Fatal(err)
	}
	if c.mux, err = mux.New(conn, mux.Config{Initiator: true}); err != nil {
		w.t.Fatal(err)
	}
	welcomed := make(chan string, 1)
	go func() {
		_ = tunnel.Serve(context.Background(), c.mux, tunnel.Handlers{
			Preview: func(r *mux.Request, h wire.PreviewHeader) {
				conn, proto, err := c.dial(h.HTTP2)
				if err != nil {
					code := wire.CodeOf(err)
					if errors.Is(err, errNotKnown) {
						code = wire.CodeProtocol
					}
					_ = r.Reject(code, err.Error())
					return
				}
				_ = tunnel.ServeConn(r, conn, []byte(proto))
			},
			Watch: func(ctx context.Context, method string, body []byte, send func(any) error) error {
				var welcome relayapi.Welcome
				if err := json.Unmarshal(body, &welcome); err != nil {
					return err
				}
				if err := send(relayapi.ClusterState{Product: "test", Sessions: 1, Previews: c.shows}); err != nil {
					return err
				}
				welcomed <- welcome.Cluster
				<-ctx.Done()
				return nil
			},
		})
	}()
	w.t.Cleanup(func() { c.mux.Close() })
	if id := <-welcomed; id != c.id {
		w.t.Fatalf("welcomed as %q, want %q", id, c.id)
	}
}

// upgrade asks to join as a cluster.
func (w *world) upgrade(token string) (net.Conn, error) { return w.upgradeAt(relayapi.LinkPath, token) }

func (w *world) upgradeAt(path, token string) (net.Conn, error) {
	tr := &http.Transport{DialContext: w.dial, TLSClientConfig: &tls.Config{RootCAs: w.roots, NextProtos: []string{"http/1.1"}}}
	w.t.Cleanup(tr.CloseIdleConnections)
	req, err := http.NewRequest(http.MethodGet, "https://"+domain+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	return tunnel.UpgradeTo(w.t.Context(), tr, req, tunnel.UpgradeProtocol)
}

// preview makes a preview of an app in a cluster.
func (l *laptop) preview(c *cluster, name string) relayapi.Preview {
	l.w.t.Helper()
	var p relayapi.Preview
	l.must(relayapi.PathCreatePreview, relayapi.CreatePreviewRequest{Cluster: c.id, Name: name, Namespace: "shop", Workload: name}, &p)
	return p
}
