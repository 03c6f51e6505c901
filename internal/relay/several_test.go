package relay

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relay/store/storetest"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// balance spreads connections over relays as a load balancer does that knows TCP only; those that do not answer are left out.
func balance(t *testing.T, relays ...*world) string {
	t.Helper()
	l := listen(t)
	t.Cleanup(func() { l.Close() })
	var n atomic.Uint64
	var wg sync.WaitGroup
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				for range relays {
					to, err := net.Dial("tcp", relays[n.Add(1)%uint64(len(relays))].addr)
					if err != nil {
						continue
					}
					wg.Go(func() { defer to.Close(); _, _ = io.Copy(to, conn) })
					_, _ = io.Copy(conn, to)
					return
				}
			})
		}
	}()
	return l.Addr().String()
}

// several are relays that share a database, and a world in which a load balancer stands before them.
func several(t *testing.T) (front, a, b *world) {
	t.Helper()
	db := storetest.Postgres(t)
	share := func(c *Config) { c.Database, c.PeerAddr = db, "any" }
	a = newWorld(t, share)
	b = &world{t: t, roots: a.roots}
	b.setup = b.start(a.relay.cfg.DataDir, share)
	front = &world{t: t, roots: a.roots, setup: a.setup, relay: a.relay}
	front.addr = balance(t, a, b)
	return front, a, b
}

// Any relay serves any preview, whichever of them holds the cluster's link, and what is taken back at one acts at the other within a second.
func TestSeveralRelays(t *testing.T) {
	front, a, b := several(t)
	annB := front.first("ann@example.com") // by a's link, which is the older one
	for name, setup := range map[string]string{"a": a.setup, "b": b.setup} {
		if got := front.browser().visit(setup); setup == "" || !strings.Contains(got.body, "does not work") {
			t.Errorf("%s's link %q after the first account: %v", name, setup, got)
		}
	}
	ann := annB.login()
	c := ann.cluster("prod", echo)
	p := ann.preview(c, "web")
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	if n := a.relay.links.Len() + b.relay.links.Len(); n != 1 {
		t.Fatalf("%d links", n)
	}
	holder, other := a, b
	if b.relay.links.Len() == 1 {
		holder, other = b, a
	}
	other.until("news of the link", func() bool { st, ok := other.relay.links.State(c.id); return ok && st.Product == "test" })
	for range 6 {
		if got := front.browser().visit(p.URL); !strings.Contains(got.body, "GET / ") {
			t.Fatalf("through the load balancer: %v", got)
		}
	}
	for name, w := range map[string]*world{"the holder": holder, "the other": other} {
		if got := w.browser().visit(p.URL + "x"); !strings.Contains(got.body, "GET /x ") || !strings.Contains(got.body, "for=127.0.0.1") {
			t.Errorf("through %s: %v", name, got)
		}
		w.until(name+"'s requests end", func() bool { return w.relay.previews.Open() == 0 })
	}

	// A WebSocket through the other relay, revoked at the holder.
	stranger := other.browser()
	ws := stranger.webSocket(p.URL)
	revoked := time.Now()
	hl := &laptop{w: holder, token: ann.token}
	hl.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host}, nil)
	if _, err := ws.ReadByte(); err == nil || time.Since(revoked) > time.Second {
		t.Errorf("cut after %v: %v", time.Since(revoked), err)
	}
	if got := stranger.visit(p.URL); !strings.Contains(got.url, "/login") {
		t.Errorf("after it was unpublished: %v", got)
	}
	hl.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)

	// The holder ends: the cluster joins the other one, and nobody is told to ask a relay that is gone.
	holder.stop()
	<-c.mux.Done()
	if got := other.browser().visit(p.URL); got.status != http.StatusServiceUnavailable || !strings.Contains(got.body, "not connected") {
		t.Errorf("without a link: %v", got)
	}
	front.join(c)
	if got := front.browser().visit(p.URL); !strings.Contains(got.body, "GET / ") {
		t.Errorf("after the holder's end: %v", got)
	}

	// And a third one comes.
	third := &world{t: t, roots: a.roots}
	third.start(a.relay.cfg.DataDir, func(c *Config) { c.Database, c.PeerAddr = other.relay.cfg.Database, "any" })
	third.until("news of the link", func() bool { _, ok := third.relay.links.State(c.id); return ok })
	if got := third.browser().visit(p.URL); !strings.Contains(got.body, "GET / ") {
		t.Errorf("through a third relay: %v", got)
	}
	// A cluster's token that is revoked there ends the link here.
	start := time.Now()
	if _, err := third.relay.store.ReplaceTokens(t.Context(), store.Token{Kind: store.Link, Subject: c.id}, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.mux.Done():
	case <-time.After(5 * time.Second):
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("the link was cut after %v", d)
	}
}

// Attempts to log in are limited for all relays together.
func TestAttackFloodSeveral(t *testing.T) {
	front, a, b := several(t)
	front.first("ann@example.com")
	passed := 0
	for i := range 2 * 12 { // each relay alone would let 10 of them pass
		w := []*world{a, b}[i%2]
		if w.browser().submit("/login", url.Values{"email": {"ann@example.com"}, "password": {"guess"}}).status != http.StatusTooManyRequests {
			passed++
		}
	}
	if passed < 9 || passed > 11 { // one more is due after 6 s; the first account logged in, too
		t.Errorf("%d attempts passed", passed)
	}
	if err := a.relay.store.Sweep(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
}

// A laptop that hangs on one relay is on the pages of the others as well: it is listed, asked, and ends there what was started there.
func TestSeveralRelaysLaptop(t *testing.T) {
	front, a, b := several(t)
	laptop := front.first("ann@example.com").login()
	c := laptop.cluster("prod", echo)
	m := laptop.present("thinkpad", relayapi.Connection{Name: "prod", Cluster: c.id, Namespace: "shop"})
	m.say(relayapi.Allowed)
	page := "/laptops/" + front.laptop("thinkpad")
	holder, other := a, b
	if len(b.relay.laptops.Local()) == 1 {
		holder, other = b, a
	}
	ann, bob := other.browser(), other.member("bob@example.com", other.team(), store.Member)
	ann.submit("/login", url.Values{"email": {"ann@example.com"}, "password": {password}})

	ann.shows("/", page)
	bob.shows("/", "thinkpad")
	if got := bob.visit("https://" + domain + page); got.status != http.StatusNotFound {
		t.Errorf("a colleague: %v", got)
	}
	ann.shows(page, `<option value="StatefulSet/db">`)
	live, _ := ann.listen(page)
	live.hears(changed)
	ann.submit(page+"/intercept", form)
	if got := <-m.asked; got != wish {
		t.Errorf("asked for %+v", got)
	}
	ann.shows(page, "Waiting for the agent")
	m.done <- nil
	ann.shows(page, `state good">active<`)
	live.hears(changed)
	go func() { <-m.ended; m.done <- nil }()
	if got := ann.submit(page+"/end", url.Values{"wish": {"1"}}); !strings.Contains(got.body, `state">ended<`) {
		t.Errorf("%v", got)
	}
	if got := ann.submit(page+"/end", url.Values{"wish": {"1"}}); got.status != http.StatusConflict || !strings.Contains(got.body, "not active") {
		t.Errorf("twice: %v", got)
	}
	for range 4 {
		ann.submit(page+"/intercept", form)
	}
	if got := ann.submit(page+"/intercept", form); got.status != http.StatusTooManyRequests {
		t.Errorf("one more than may be: %v", got)
	}

	// The laptop's relay ends: it joins another one, and is on its page.
	holder.stop()
	other.until("the laptop at the other relay", func() bool { return len(other.relay.laptops.Local()) == 1 && other.laptop("thinkpad") != "" })
	ann.shows(page, "Nothing since it is connected")
}

// Who reaches the port for other relays and is none gets nothing there.
func TestAttackPeers(t *testing.T) {
	front, a, _ := several(t)
	ann := front.first("ann@example.com").login()
	ann.cluster("prod", echo)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	mine := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	// What a relay shows of itself is no secret; without its key it is worth nothing.
	probe, err := tls.Dial("tcp", a.relay.cfg.PeerAddr, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{mine}})
	if err != nil {
		t.Fatal(err)
	}
	shown := probe.ConnectionState().PeerCertificates[0].Raw
	probe.Close()
	for name, certs := range map[string][]tls.Certificate{
		"no certificate": nil, "one of its own": {mine}, "the relay's, without its key": {{Certificate: [][]byte{shown}, PrivateKey: key}},
	} {
		conn, err := tls.Dial("tcp", a.relay.cfg.PeerAddr, &tls.Config{InsecureSkipVerify: true, Certificates: certs})
		if err == nil { // in TLS 1.3 the client learns it with the first byte
			_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
			_, err = conn.Read(make([]byte, 1))
			conn.Close()
		}
		var timeout net.Error
		if err == nil || errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Silence takes no room for long from those who belong here.
	for range 100 {
		conn, err := net.Dial("tcp", a.relay.cfg.PeerAddr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	// In plain text it says nothing at all.
	conn, err := net.Dial("tcp", a.relay.cfg.PeerAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if b, _ := io.ReadAll(conn); strings.Contains(string(b), "HTTP") {
		t.Errorf("%q", b)
	}
}
