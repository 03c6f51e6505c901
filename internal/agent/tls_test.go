package agent

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// authority signs certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t}
	a.key = newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	if err == nil {
		a.cert, err = x509.ParseCertificate(der)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// issue returns a certificate for web.example.
func (a *authority) issue(serial int64) tls.Certificate {
	a.t.Helper()
	return a.issueFor(serial, "web.example")
}

func (a *authority) issueFor(serial int64, name string) tls.Certificate {
	a.t.Helper()
	k := newKey(a.t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "web"}, DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, k.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
}

// secret writes a certificate as a mounted secret; ca nil is one without ca.crt.
func secret(t *testing.T, dir string, c tls.Certificate, ca *authority) string {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]*pem.Block{"tls.crt": {Type: "CERTIFICATE", Bytes: c.Certificate[0]}, "tls.key": {Type: "PRIVATE KEY", Bytes: key}}
	if ca != nil {
		files["ca.crt"] = &pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// tlsApp is an app that speaks HTTP over TLS.
func tlsApp(t *testing.T, cfg *tls.Config) *app {
	t.Helper()
	return newApp(t, func(c *net.TCPConn) {
		conn := tls.Server(c, cfg)
		if conn.Handshake() != nil {
			_ = c.Close()
			return
		}
		serveAny(conn, "app", conn.ConnectionState().NegotiatedProtocol == "h2")
	})
}

// serveAny answers requests of one connection in HTTP/1.1 or HTTP/2 with a name and the protocol.
func serveAny(c net.Conn, who string, h2 bool) {
	l := &oneConn{c: plainConn{c}, done: make(chan struct{})}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %s", who, r.Proto) }),
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateClosed {
				close(l.done)
			}
		},
		Protocols: new(http.Protocols),
	}
	srv.Protocols.SetHTTP1(!h2)
	srv.Protocols.SetUnencryptedHTTP2(h2)
	_ = srv.Serve(l)
}

// plainConn hides that a connection is TLS: net/http is to take its bytes as they are.
type plainConn struct{ net.Conn }

// tlsClient asks the agent's port over TLS, on connections of its own.
func (w *world) tlsClient(cfg *tls.Config, h2 bool) *http.Client {
	w.t.Helper()
	cfg.ServerName = "web.example"
	tr := &http.Transport{TLSClientConfig: cfg, Protocols: new(http.Protocols), MaxConnsPerHost: 1}
	tr.Protocols.SetHTTP1(!h2)
	tr.Protocols.SetHTTP2(h2)
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: deadline}
}

func (w *world) askTLS(c *http.Client, user string) (string, error) {
	req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("https://127.0.0.1:%d/x", w.cfg.Ports[0].AgentPort), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	if user != "" {
		req.Header.Set("X-User", user)
	}
	r, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

// plainLaptop has an intercept's laptop answer in plain HTTP, of the client's version.
func (w *world) plainLaptop(h2 bool) {
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if st, err := r.Accept(nil); err == nil {
			serveAny(st, h.Intercept, h2)
		}
	})
}

func (w *world) wantTLS(c *http.Client, user, answer string) {
	w.t.Helper()
	if got, err := w.askTLS(c, user); err != nil || got != answer {
		w.t.Errorf("%q got %q, %v, want %q", user, got, err, answer)
	}
}

func TestTLS(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		protos, proto := []string{"http/1.1"}, "HTTP/1.1"
		if h2 {
			protos, proto = []string{"h2", "http/1.1"}, "HTTP/2.0"
		}
		t.Run(proto, func(t *testing.T) {
			ca := newAuthority(t, "ca")
			cert := ca.issue(2)
			dir := secret(t, t.TempDir(), cert, nil)
			w := startTLS(t, tlsApp(t, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: protos}), false, &agentcfg.TLS{Dir: dir})
			w.plainLaptop(h2)
			s := w.mgr.up()
			c := w.tlsClient(&tls.Config{RootCAs: ca.pool()}, h2)
			w.wantTLS(c, "lou", "app "+proto) // no intercept: TLS is the app's
			c.CloseIdleConnections()
			w.table(s, byHeader("lou", "lou"))
			for range 3 {
				w.wantTLS(c, "lou", "lou "+proto)
				w.wantTLS(c, "", "app "+proto)
			}
			if n := w.mgr.noted(); len(n) > 0 {
				t.Errorf("told %q", n)
			}
		})
	}
}

// Whoever has all connections gets TLS as the clients speak it, with a preview too, and also where somebody else takes some of the requests.
func TestTLSPreviewOfAll(t *testing.T) {
	ca := newAuthority(t, "ca")
	cert := ca.issue(2)
	w := startTLS(t, tlsApp(t, &tls.Config{Certificates: []tls.Certificate{cert}}), false, &agentcfg.TLS{Dir: secret(t, t.TempDir(), cert, nil)})
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		st, err := r.Accept(nil)
		if err != nil {
			return
		}
		if h.Intercept == "lou" {
			serveAny(st, "lou", false)
			return
		}
		conn := tls.Server(st, &tls.Config{Certificates: []tls.Certificate{cert}})
		if conn.Handshake() != nil {
			_ = st.Close()
			return
		}
		serveAny(conn, h.Intercept, false)
	})
	s := w.mgr.up()
	all := []control.TableEntry{{Intercept: "all"}, {Intercept: "all", Match: match.Preview("all-id")}}
	c := w.tlsClient(&tls.Config{RootCAs: ca.pool()}, false)
	w.table(s, all...)
	w.wantTLS(c, "lou", "all HTTP/1.1")
	c.CloseIdleConnections()
	w.table(s, append(all, byHeader("lou", "lou"))...)
	w.wantTLS(c, "lou", "lou HTTP/1.1")
	w.wantTLS(c, "", "all HTTP/1.1")
}

// What the app does not speak, no client is promised.
func TestTLSAsTheApp(t *testing.T) {
	ca := newAuthority(t, "ca")
	cert := ca.issue(2)
	w := startTLS(t, tlsApp(t, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}}), false, &agentcfg.TLS{Dir: secret(t, t.TempDir(), cert, nil)})
	w.plainLaptop(false)
	w.table(w.mgr.up(), byHeader("lou", "lou"))
	c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", w.cfg.Ports[0].AgentPort), &tls.Config{RootCAs: ca.pool(), ServerName: "web.example", NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("agreed on %q", got)
	}
	w.app.close() // what matches does not need it
	http1 := w.tlsClient(&tls.Config{RootCAs: ca.pool()}, false)
	w.wantTLS(http1, "lou", "lou HTTP/1.1")
}

// A renewed secret counts for the next connection; the app may be known by the secret's authority.
func TestTLSRenewed(t *testing.T) {
	ca := newAuthority(t, "ca")
	served := ca.issue(2)
	dir := secret(t, t.TempDir(), ca.issue(3), ca)
	w := startTLS(t, tlsApp(t, &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &served, nil }}), false, &agentcfg.TLS{Dir: dir})
	w.plainLaptop(false)
	w.table(w.mgr.up(), byHeader("lou", "lou"))
	serial := func() int64 {
		t.Helper()
		c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", w.cfg.Ports[0].AgentPort), &tls.Config{RootCAs: ca.pool(), ServerName: "web.example"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	if got := serial(); got != 3 {
		t.Errorf("certificate %d", got)
	}
	secret(t, dir, ca.issue(4), ca)
	if got := serial(); got != 4 {
		t.Errorf("certificate %d after the secret was renewed", got)
	}
	w.wantTLS(w.tlsClient(&tls.Config{RootCAs: ca.pool()}, false), "", "app HTTP/1.1")
}

// With a client certificate for the agent, clients have to show what the app would have them show.
func TestTLSClientCertificate(t *testing.T) {
	ca, people := newAuthority(t, "ca"), newAuthority(t, "people")
	cert := ca.issue(2)
	appTLS := &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: people.pool()}
	dir := secret(t, t.TempDir(), cert, nil)
	w := startTLS(t, tlsApp(t, appTLS), false, &agentcfg.TLS{Dir: dir, ClientDir: secret(t, t.TempDir(), people.issue(5), people)})
	w.plainLaptop(false)
	w.table(w.mgr.up(), byHeader("lou", "lou"))
	known := w.tlsClient(&tls.Config{RootCAs: ca.pool(), Certificates: []tls.Certificate{people.issue(6)}}, false)
	w.wantTLS(known, "", "app HTTP/1.1")
	w.wantTLS(known, "lou", "lou HTTP/1.1")
	for name, cfg := range map[string]*tls.Config{
		"nothing": {RootCAs: ca.pool()}, "somebody else's": {RootCAs: ca.pool(), Certificates: []tls.Certificate{ca.issue(7)}},
	} {
		if got, err := w.askTLS(w.tlsClient(cfg, false), "lou"); err == nil {
			t.Errorf("a client that shows %s got %q", name, got)
		}
	}
}

// The connection to the app that the handshake has made gets no request that would be lost, or answered with what the app has said before.
func TestTLSFirstConnection(t *testing.T) {
	end := func(c net.Conn) { _ = c.Close() }
	for name, tt := range map[string]struct {
		idle func(net.Conn) // what the app does with it; nil: it serves it
	}{
		"nothing":      {nil},
		"ended by app": {end},
		"answered 408": {func(c net.Conn) {
			_, _ = io.WriteString(c, "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
		}},
		"for too long": {func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ca := newAuthority(t, "ca")
			cert := ca.issue(2)
			var conns atomic.Int32
			left := make(chan struct{})
			app := newApp(t, func(raw *net.TCPConn) {
				c := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{cert}})
				if c.Handshake() != nil {
					return
				}
				if n := conns.Add(1); n == 1 && tt.idle != nil {
					tt.idle(c)
					close(left)
					return
				}
				serveAny(c, "app", false)
			})
			s := &tlsSplit{p: &port{cfg: agentcfg.Port{ContainerPort: app.port(), TLS: &agentcfg.TLS{Dir: secret(t, t.TempDir(), cert, nil)}}}}
			t.Cleanup(s.drop)
			h := &tls.ClientHelloInfo{SupportedVersions: []uint16{tls.VersionTLS13}, CipherSuites: []uint16{tls.TLS_AES_128_GCM_SHA256}}
			if _, err := s.greet(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			if tt.idle != nil {
				select {
				case <-left:
				case <-time.After(deadline):
					t.Fatal("the connection stays open")
				}
			}
			st, err := s.app(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			if _, err := io.WriteString(st, "GET / HTTP/1.1\r\nHost: web\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			r, err := http.ReadResponse(bufio.NewReader(st), nil)
			if err != nil || r.StatusCode != http.StatusOK {
				t.Fatal(r, err)
			}
			_ = r.Body.Close()
			if got := conns.Load(); got != 1 && tt.idle == nil {
				t.Errorf("%d connections", got)
			}
		})
	}
}

// Tickets that come unasked make no second handshake.
func TestTLSTickets(t *testing.T) {
	ca := newAuthority(t, "ca")
	cert := ca.issue(2)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		raw, err := l.Accept()
		if err != nil {
			return
		}
		defer raw.Close()
		// Go sends tickets after the handshake only if it has asked for a certificate, and if the client knows sessions.
		_ = tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}).Handshake()
		_, _ = io.Copy(io.Discard, raw)
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw := c.NetConn().(*net.TCPConn)
	for end := time.Now().Add(deadline); !pending(raw); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no ticket")
		}
	}
	// A machine that is busy may find no time to read it, and dials anew.
	for i := 0; !unused(c); i++ {
		if i == 100 {
			t.Fatal("a ticket counts as an answer")
		}
	}
}

// Where the agent cannot stand between the two, the client gets the app itself, and the manager is told why.
func TestTLSUntouched(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*tls.Config, *agentcfg.TLS, *authority)
		why    string
	}{
		"no secret":     {func(_ *tls.Config, e *agentcfg.TLS, _ *authority) { e.Dir = "/nonexistent" }, "doppel.dev/tls names cannot be used"},
		"no annotation": {nil, "no certificate for them"},
		"mutual":        {func(c *tls.Config, _ *agentcfg.TLS, _ *authority) { c.ClientAuth = tls.RequestClientCert }, "asks for a certificate of its client"},
		"another app":   {func(c *tls.Config, _ *agentcfg.TLS, ca *authority) { c.Certificates = []tls.Certificate{ca.issue(9)} }, "another certificate"},
		"old app": {func(c *tls.Config, _ *agentcfg.TLS, _ *authority) {
			c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
		}, "does not speak TLS with the agent"},
		"another name": {func(_ *tls.Config, e *agentcfg.TLS, ca *authority) {
			secret(ca.t, e.Dir, ca.issueFor(9, "admin.example"), ca)
		}, "for another one"},
		"no client's key": {func(_ *tls.Config, e *agentcfg.TLS, _ *authority) { e.ClientDir = "/nonexistent" }, "doppel.dev/tls-client names cannot be used"},
	} {
		t.Run(name, func(t *testing.T) {
			ca := newAuthority(t, "ca")
			cert := ca.issue(2)
			cfg := &tls.Config{Certificates: []tls.Certificate{cert}}
			ends := &agentcfg.TLS{Dir: secret(t, t.TempDir(), cert, nil)}
			if tt.change == nil {
				ends = nil
			} else {
				tt.change(cfg, ends, ca)
			}
			w := startTLS(t, tlsApp(t, cfg), false, ends)
			w.plainLaptop(false)
			w.table(w.mgr.up(), byHeader("lou", "lou"))
			c := w.tlsClient(&tls.Config{RootCAs: ca.pool(), MinVersion: tls.VersionTLS10}, false)
			w.wantTLS(c, "lou", "app HTTP/1.1")
			w.until("the manager is told", func() bool { return len(w.mgr.noted()) > 0 })
			if n := w.mgr.noted(); len(n) != 1 || !strings.Contains(n[0], tt.why) {
				t.Errorf("told %q", n)
			}
		})
	}
}

// What a client says in its hello is no format, is cut and quoted, and said to nobody again and again.
func TestTLSHello(t *testing.T) {
	ca := newAuthority(t, "ca")
	app := tlsApp(t, &tls.Config{Certificates: []tls.Certificate{ca.issue(3)}})
	w := startTLS(t, app, false, &agentcfg.TLS{Dir: secret(t, t.TempDir(), ca.issue(2), ca)})
	s := w.mgr.up()
	w.table(s, byHeader("lou", "lou"))
	long := strings.Repeat("x", 200)
	hellos := []*tls.Config{
		{NextProtos: []string{"%999999[1]d\x1b", long}},
		{ServerName: "%999999[1]d" + long, NextProtos: []string{"http/1.1"}},
	}
	for i := range 50 {
		hellos = append(hellos, &tls.Config{NextProtos: []string{fmt.Sprint("p", i)}}, &tls.Config{ServerName: fmt.Sprint("n", i)})
	}
	for _, cfg := range hellos {
		cfg.InsecureSkipVerify = true
		if c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", w.cfg.Ports[0].AgentPort), cfg); err == nil {
			_ = c.Close()
		}
	}
	w.until("the manager is told", func() bool { return len(w.mgr.noted()) > 1 })
	w.agent.up.notes.mu.Lock()
	told := len(w.agent.up.notes.told)
	w.agent.up.notes.mu.Unlock()
	if told != 2 {
		t.Errorf("%d notes are remembered", told)
	}
	texts := w.mgr.noted()
	for _, d := range w.agent.up.decisions.last(control.Port{Protocol: "TCP", Number: app.port()}, control.MaxDecisions) {
		texts = append(texts, d.Why)
	}
	for _, text := range texts {
		if len(text) > 400 || strings.ContainsRune(text, '\x1b') {
			t.Errorf("told %d bytes, %.400q", len(text), text)
		}
	}
	if n := w.mgr.noted(); len(n) != 2 || !strings.Contains(n[0]+n[1], "%999999[1]d") {
		t.Errorf("told %.400q", n)
	}
}

// A client that crypto/tls refuses is not split; one that it serves is.
func TestTLSServable(t *testing.T) {
	cert := newAuthority(t, "ca").issue(2)
	for name, tt := range map[string]struct {
		change func(*tls.ClientHelloInfo)
		ok     bool
	}{
		"TLS 1.3":      {func(*tls.ClientHelloInfo) {}, true},
		"another name": {func(h *tls.ClientHelloInfo) { h.ServerName = "other.example" }, true},
		"early data":   {func(h *tls.ClientHelloInfo) { h.Extensions = []uint16{earlyData} }, false},
		"TLS 1.1":      {func(h *tls.ClientHelloInfo) { h.SupportedVersions = []uint16{tls.VersionTLS11} }, false},
		"CCM only":     {func(h *tls.ClientHelloInfo) { h.CipherSuites = []uint16{0x1304} }, false},
		"RSA only in 1.2": {func(h *tls.ClientHelloInfo) {
			h.SupportedVersions = []uint16{tls.VersionTLS12}
			h.CipherSuites = []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
		}, false},
	} {
		h := &tls.ClientHelloInfo{
			ServerName: "web.example", SupportedVersions: []uint16{tls.VersionTLS13, tls.VersionTLS12}, CipherSuites: []uint16{tls.TLS_AES_128_GCM_SHA256},
			SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}, SupportedCurves: []tls.CurveID{tls.CurveP256}, SupportedPoints: []uint8{0},
		}
		tt.change(h)
		if err := servable(h, &cert); (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// There are only so many notes.
func TestNotesBounded(t *testing.T) {
	n, s := notes{}, &mux.Session{}
	told := 0
	for i := range 2 * maxNotes {
		for range 2 {
			if n.isNew(s, control.Note{Text: fmt.Sprint(i)}) {
				told++
			}
		}
	}
	if told != maxNotes || len(n.told) != maxNotes {
		t.Errorf("%d told, %d remembered", told, len(n.told))
	}
}

// Not everything on a TLS port is TLS.
func TestTLSPortWithoutTLS(t *testing.T) {
	ca := newAuthority(t, "ca")
	w := startTLS(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false, &agentcfg.TLS{Dir: secret(t, t.TempDir(), ca.issue(2), nil)})
	w.plainLaptop(false)
	w.table(w.mgr.up(), byHeader("lou", "lou"))
	c := &http.Client{Timeout: deadline}
	t.Cleanup(c.CloseIdleConnections)
	r, err := c.Get(fmt.Sprintf("http://127.0.0.1:%d/x", w.cfg.Ports[0].AgentPort))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if b, _ := io.ReadAll(r.Body); string(b) != "app /x" {
		t.Errorf("got %q", b)
	}
}
