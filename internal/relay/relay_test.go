package relay

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// echo is an app that tells what reached it, and sets cookies.
func echo(w http.ResponseWriter, r *http.Request) {
	if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = io.Copy(conn, buf)
		return
	}
	w.Header().Add("Set-Cookie", "app=1; Domain="+domain+"; Path=/")
	w.Header().Add("Set-Cookie", "__Host-doppel-visit=stolen; Path=/; Secure")
	body, _ := io.ReadAll(r.Body)
	fmt.Fprintf(w, "%s %s host=%s id=%q proto=%s for=%s cookie=%q body=%d\n", r.Method, r.RequestURI, r.Host, r.Header["X-Doppel-Intercept-Id"],
		r.Header.Get("X-Forwarded-Proto"), r.Header.Get("X-Forwarded-For"), r.Header.Get("Cookie"), len(body))
	for name, v := range r.Header {
		if name != "X-Doppel-Intercept-Id" && strings.HasPrefix(name, "X-Doppel") {
			fmt.Fprintf(w, "%s: %s\n", name, v)
		}
	}
}

func TestPreview(t *testing.T) { onBoth(t, testPreview) }

func testPreview(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	admin := w.first("ann@example.com")
	l := admin.login()
	p := l.preview(l.cluster("prod", echo), "web")
	if !strings.HasSuffix(p.URL, "."+domain+"/") || strings.Contains(p.URL, p.ID) || p.State != "not intercepted" || !p.Mine {
		t.Errorf("%+v", p)
	}
	a := admin.visit(p.URL + "a%2Fb?x=1;y&z=%zz")
	host := p.Host + "." + domain
	for _, part := range []string{"GET /a%2Fb?x=1;y&z=%zz ", "host=" + host, fmt.Sprintf("id=[%q]", p.ID), "proto=https", "for=127.0.0.1", `cookie=""`} {
		if !strings.Contains(a.body, part) {
			t.Errorf("%q is missing in %v", part, a)
		}
	}
	if got := a.header["Set-Cookie"]; len(got) != 1 || got[0] != "app=1; Path=/" {
		t.Errorf("cookies %q", got)
	}
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, p.URL+"up", io.LimitReader(zeros{}, 5<<20))
	req.Header = http.Header{"Sec-Fetch-Site": {"same-origin"}, "X-Doppel-Intercept-Id": {"forged"}, "X-Doppel-Other": {"x"}, "X-Forwarded-For": {"10.0.0.1"}}
	a = admin.do(req)
	for _, part := range []string{"body=5242880", `cookie="app=1"`, fmt.Sprintf("id=[%q]", p.ID), "for=127.0.0.1"} {
		if !strings.Contains(a.body, part) {
			t.Errorf("%q is missing in %v", part, a)
		}
	}
	if strings.Contains(a.body, "X-Doppel-Other") || strings.Contains(a.body, "forged") {
		t.Errorf("%v", a)
	}
	w.until("the visits", func() bool {
		all, err := w.relay.store.Visits(t.Context(), p.ID, 10)
		if err != nil {
			t.Fatal(err)
		}
		return len(all) == 2 && all[0].Path == "/up" && all[0].Who == "ann@example.com" && all[0].Status == 200 && all[1].Path == "/a%2Fb" && all[1].Latency > 0
	})
	if a := admin.visit("https://" + domain + "/"); !strings.Contains(a.body, p.Host) || !strings.Contains(a.body, "prod") {
		t.Errorf("dashboard: %v", a)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// A setup link counts until it has made an admin, whoever gets an account before, and an attempt that fails leaves nothing.
func TestSetup(t *testing.T) { onBoth(t, testSetup) }

func testSetup(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	gus := w.member("gus@example.com", "", "")
	if empty, err := w.relay.store.Empty(t.Context()); err != nil || !empty {
		t.Errorf("nobody is an admin: %v %v", empty, err)
	}
	u, err := url.Parse(w.setup)
	if err != nil {
		t.Fatal(err)
	}
	form := url.Values{"token": u.Query()["token"], "email": {"gus@example.com"}, "team": {"crew"}, "password": {password}}
	if a := gus.submit("/setup", form); a.status != http.StatusConflict || !strings.Contains(a.body, "There is an account with that") {
		t.Errorf("%v", a)
	}
	w.first("ann@example.com")
	if a := w.browser().visit(w.setup); a.status != http.StatusNotFound {
		t.Errorf("used: %v", a)
	}
	if empty, err := w.relay.store.Empty(t.Context()); err != nil || empty {
		t.Errorf("there is an admin: %v %v", empty, err)
	}
}

// member makes an account in a team, or in none.
func (w *world) member(email, team string, role store.Role) *browser {
	w.t.Helper()
	if _, err := w.relay.store.AddPerson(w.t.Context(), store.Person{Email: email, Name: email, Password: hash(password)}, team, role, ""); err != nil {
		w.t.Fatal(err)
	}
	b := w.browser()
	if a := b.submit("/login", url.Values{"email": {email}, "password": {password}}); a.status != http.StatusOK || !strings.Contains(a.body, email) {
		w.t.Fatalf("login: %v", a)
	}
	return b
}

func (w *world) team() string { return w.teamNamed("crew") }

func (w *world) teamNamed(name string) string {
	w.t.Helper()
	t, err := w.relay.store.TeamByName(w.t.Context(), name)
	if err != nil {
		w.t.Fatal(name, err)
	}
	return t.ID
}

func TestWhoMaySee(t *testing.T) { onBoth(t, testWhoMaySee) }

func testWhoMaySee(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	ann := w.first("ann@example.com").login()
	c := ann.cluster("prod", echo)
	p, other := ann.preview(c, "web"), ann.preview(c, "api")
	colleague, guest, stranger := w.member("bob@example.com", w.team(), store.Member), w.member("gus@example.com", "", ""), w.browser()

	sees := func(who string, b *browser, u string, want bool) {
		t.Helper()
		if a := b.visit(u); strings.Contains(a.body, "GET / host=") != want {
			t.Errorf("%s: sees it: %v, want %v: %v", who, !want, want, a)
		}
	}
	sees("a member", colleague, p.URL, true)
	sees("a guest", guest, p.URL, false)
	sees("a stranger", stranger, p.URL, false)

	// What is private and what does not exist look the same, but for the name that was asked for.
	for _, b := range []*browser{stranger, guest} {
		there, not := b.visit(p.URL), b.visit("https://brave-otter-aaaaaaaaaaaaa."+domain+"/")
		same := func(s string) string {
			return strings.ReplaceAll(strings.ReplaceAll(s, p.Host, "H"), "brave-otter-aaaaaaaaaaaaa", "H")
		}
		if there.status != not.status || len(there.body) != len(not.body)+len(p.Host)-len("brave-otter-aaaaaaaaaaaaa") && same(there.body) != same(not.body) {
			t.Errorf("there: %v\nnot: %v", there, not)
		}
	}

	ann.must(relayapi.PathSharePreview, relayapi.ShareRequest{Preview: p.URL, Email: "Gus@Example.com"}, nil)
	sees("a guest it is shared with", guest, p.URL, true)
	sees("a guest, another one", guest, other.URL, false)
	ann.must(relayapi.PathSharePreview, relayapi.ShareRequest{Preview: p.URL, Email: "gus@example.com", Remove: true}, nil)
	sees("a guest it is no longer shared with", guest, p.URL, false)

	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web", Public: true}, nil)
	sees("a stranger, published", stranger, p.URL, true)
	sees("a stranger, another one", stranger, other.URL, false)
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web", Public: true, For: 300 * time.Millisecond}, nil)
	sees("a stranger, for a time", stranger, p.URL, true)
	w.until("the end of the time", func() bool { return !strings.Contains(stranger.visit(p.URL).body, "GET / host=") })

	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web", Public: true, Password: "open sesame"}, nil)
	a := stranger.visit(p.URL)
	if !strings.Contains(a.body, "published with a password") {
		t.Fatalf("%v", a)
	}
	u, _ := url.Parse(a.url)
	form := u.Query()
	form.Set("password", "close sesame")
	if a := stranger.submit("/visit", form); a.status != http.StatusUnauthorized {
		t.Errorf("%v", a)
	}
	form.Set("password", "open sesame")
	if a := stranger.submit("/visit", form); !strings.Contains(a.body, "GET / host=") {
		t.Errorf("%v", a)
	}
	sees("a stranger who knows the password", stranger, p.URL, true)
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web", Public: true, Password: "another one"}, nil)
	sees("a stranger who knows the last password", stranger, p.URL, false)
	// A password stays until it is said that there shall be none, or the preview is taken back.
	var got relayapi.Preview
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web", Public: true, For: time.Hour}, &got)
	sees("a stranger, for another time", stranger, p.URL, false)
	if !got.Password || got.Expires == nil {
		t.Errorf("%+v", got)
	}
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web", Public: true, NoPassword: true}, &got)
	sees("a stranger, without the password", stranger, p.URL, true)
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web", Public: true, Password: "another one"}, nil)
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web"}, nil)
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "web", Public: true}, nil)
	sees("a stranger, published anew", stranger, p.URL, true)

	if status := colleague.login().call(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil); status != http.StatusForbidden {
		t.Errorf("a member publishes another's: %d", status)
	}
	if status := guest.login().call(relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: p.Host}, nil); status != http.StatusNotFound {
		t.Errorf("a guest deletes: %d", status)
	}
	ann.must(relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: p.Host}, nil)
	sees("a member, deleted", colleague, p.URL, false)
}

// A name that several previews of one's own have says of none what is to be done with it; a link does, and a name that one has alone.
func TestPreviewNamed(t *testing.T) {
	w := newWorld(t)
	annB := w.first("ann@example.com")
	ann := annB.login()
	prod, test := ann.cluster("prod", echo), ann.cluster("test", echo)
	one, two := ann.preview(prod, "web"), ann.preview(test, "web")
	theirs := w.member("bob@example.com", w.team(), store.Member).login().preview(prod, "api") // Bob's, and newer
	alone := ann.preview(test, "api")
	changes := map[string]func(name string) any{
		relayapi.PathPublishPreview: func(name string) any { return relayapi.PublishRequest{Preview: name, Public: true} },
		relayapi.PathSharePreview:   func(name string) any { return relayapi.ShareRequest{Preview: name, Email: "bob@example.com"} },
		relayapi.PathDeletePreview:  func(name string) any { return relayapi.PreviewRequest{Preview: name} },
	}
	changed := func(host string) bool {
		p, err := w.relay.store.PreviewByHost(t.Context(), host)
		if errors.Is(err, store.ErrNotFound) {
			return true
		}
		shares, serr := w.relay.store.Shares(t.Context(), p.ID)
		if err = errors.Join(err, serr); err != nil {
			t.Fatal(err)
		}
		return p.Public || len(shares) > 0
	}
	for path, req := range changes {
		a := ann.ask(path, req("web"))
		if a.status != http.StatusConflict || !strings.Contains(a.body, one.URL+" (in shop of prod)") || !strings.Contains(a.body, two.URL+" (in shop of test)") {
			t.Errorf("%s: %v", path, a)
		}
	}
	if a := annB.visit("https://" + domain + "/previews/web"); a.status != http.StatusConflict || !strings.Contains(a.body, one.URL) {
		t.Errorf("%v", a)
	}
	if changed(one.Host) || changed(two.Host) {
		t.Error("one of several was changed")
	}
	// A link is for the preview that has it, even if an intercept is called like it.
	odd := ann.preview(prod, one.Host)
	for _, name := range []string{one.Host, one.URL, strings.ToUpper(one.URL)} {
		ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: name, Public: true}, nil)
	}
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: "api", Public: true}, nil)
	for host, want := range map[string]bool{one.Host: true, two.Host: false, odd.Host: false, alone.Host: true, theirs.Host: false} {
		if changed(host) != want {
			t.Errorf("%s: changed: %v", host, !want)
		}
	}
	ann.must(relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: one.URL}, nil)
	ann.must(relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: "web"}, nil)
	if !changed(two.Host) {
		t.Error("the one that is left has its name alone, and was not deleted")
	}
}

// webSocket opens an upgraded connection to a preview as a browser that visits it.
func (b *browser) webSocket(u string) *bufio.ReadWriter {
	w := b.w
	w.t.Helper()
	conn, err := tls.Dial("tcp", w.addr, &tls.Config{RootCAs: w.roots, ServerName: domain})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	at, _ := url.Parse(u)
	req, _ := http.NewRequest(http.MethodGet, u, nil)
	req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Origin": {"https://" + at.Host}, "Sec-Fetch-Site": {"same-origin"}}
	for _, c := range b.Jar.Cookies(at) {
		req.AddCookie(c)
	}
	if err := req.Write(conn); err != nil {
		w.t.Fatal(err)
	}
	rw := bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
	resp, err := http.ReadResponse(rw.Reader, req) //nolint:bodyclose // a 101 has none
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		w.t.Fatal(resp, err)
	}
	if got := w.ping(rw); got != nil {
		w.t.Fatal(got)
	}
	return rw
}

func (w *world) ping(rw *bufio.ReadWriter) error {
	fmt.Fprint(rw, "ping\n")
	if err := rw.Flush(); err != nil {
		return err
	}
	line, err := rw.ReadString('\n')
	if err == nil && line != "ping\n" {
		err = errors.New(line)
	}
	return err
}

// A right that is taken away acts within a second, also on what is open.
func TestRevocation(t *testing.T) { onBoth(t, testRevocation) }

func testRevocation(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	annB := w.first("ann@example.com")
	ann := annB.login()
	c := ann.cluster("prod", echo)
	bob := w.member("bob@example.com", w.team(), store.Member)
	gus := w.member("gus@example.com", "", "")
	person := func(email string) string {
		p, err := w.relay.store.PersonByEmail(t.Context(), email)
		if err != nil {
			t.Fatal(err)
		}
		return p.ID
	}
	public := relayapi.PublishRequest{Public: true}
	for name, tt := range map[string]struct {
		visitor *browser
		before  func(p relayapi.Preview)
		revoke  func(p relayapi.Preview)
	}{
		"unpublished": {w.browser(), func(p relayapi.Preview) {
			public.Preview = p.Host
			ann.must(relayapi.PathPublishPreview, public, nil)
		}, func(p relayapi.Preview) {
			ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host}, nil)
		}},
		"expired": {w.browser(), func(p relayapi.Preview) {
			ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true, For: 700 * time.Millisecond}, nil)
		}, func(relayapi.Preview) {}},
		"deleted": {bob, nil, func(p relayapi.Preview) {
			ann.must(relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: p.Host}, nil)
		}},
		"no longer shared": {gus, func(p relayapi.Preview) {
			ann.must(relayapi.PathSharePreview, relayapi.ShareRequest{Preview: p.Host, Email: "gus@example.com"}, nil)
		}, func(p relayapi.Preview) {
			ann.must(relayapi.PathSharePreview, relayapi.ShareRequest{Preview: p.Host, Email: "gus@example.com", Remove: true}, nil)
		}},
		"logged out": {annB, nil, func(relayapi.Preview) { annB.submit("/logout", nil) }},
		"out of the team": {bob, nil, func(relayapi.Preview) {
			if err := w.relay.store.SetMember(t.Context(), w.team(), person("bob@example.com"), ""); err != nil {
				t.Fatal(err)
			}
		}},
		"by another relay": {w.member("eve@example.com", w.team(), store.Member), nil, func(relayapi.Preview) {
			other, err := store.Open(t.Context(), w.relay.cfg.Database)
			if err != nil {
				t.Fatal(err)
			}
			defer other.Close()
			if err := other.SetDisabled(t.Context(), person("eve@example.com"), true); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "deleted" || name == "out of the team" { // bob may have been put out by the other
				if err := w.relay.store.SetMember(t.Context(), w.team(), person("bob@example.com"), store.Member); err != nil {
					t.Fatal(err)
				}
			}
			p := ann.preview(c, "web")
			if tt.before != nil {
				tt.before(p)
			}
			if a := tt.visitor.visit(p.URL); !strings.Contains(a.body, "GET / host=") {
				t.Fatalf("%v", a)
			}
			rw := tt.visitor.webSocket(p.URL)
			start := time.Now()
			tt.revoke(p)
			for w.ping(rw) == nil {
				if time.Since(start) > 3*time.Second {
					t.Fatal("still open")
				}
			}
			if d := time.Since(start); d > 1700*time.Millisecond || name != "expired" && d > time.Second {
				t.Errorf("cut after %v", d)
			}
			if a := tt.visitor.visit(p.URL); strings.Contains(a.body, "GET / host=") {
				t.Errorf("%v", a)
			}
		})
	}
}

// A visit ends no later than the login by which it was made: what is open ends with it.
func TestVisitEndsWithLogin(t *testing.T) {
	w := newWorld(t)
	annB := w.first("ann@example.com")
	ann := annB.login()
	p := ann.preview(ann.cluster("prod", echo), "web")
	person, err := w.relay.store.PersonByEmail(t.Context(), "ann@example.com")
	if err != nil {
		t.Fatal(err)
	}
	login, err := w.relay.store.AddToken(t.Context(), store.Token{Kind: store.Web, Person: person.ID}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	at, _ := url.Parse("https://" + domain)
	annB.Jar.SetCookies(at, []*http.Cookie{{Name: "__Host-doppel", Value: login, Path: "/", Secure: true}})
	if a := annB.visit(p.URL); !strings.Contains(a.body, "GET / host=") {
		t.Fatalf("%v", a)
	}
	parent, err := w.relay.store.Token(t.Context(), store.Web, login)
	if err != nil {
		t.Fatal(err)
	}
	visits, err := w.relay.store.Tokens(t.Context(), store.Visit, p.ID, "")
	if err != nil || len(visits) != 1 || visits[0].Expires.After(parent.Expires) {
		t.Errorf("%+v %v, login until %v", visits, err, parent.Expires)
	}
}

func TestLink(t *testing.T) { onBoth(t, testLink) }

func testLink(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	annB := w.first("ann@example.com")
	ann := annB.login()
	c := ann.cluster("prod", echo)
	two := ann.cluster("other", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "the other cluster") })
	p, q := ann.preview(c, "web"), ann.preview(two, "web")
	if a := annB.visit(q.URL); !strings.Contains(a.body, "the other cluster") {
		t.Errorf("%v", a)
	}
	for _, token := range []string{"", "x", ann.token, w.setup} {
		if conn, err := w.upgrade(token); err == nil || !strings.Contains(err.Error(), "401") {
			t.Errorf("token %q: %v %v", token, conn, err)
		}
	}
	if err := w.relay.store.Revoke(t.Context(), secret.Hash(c.token)); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	select {
	case <-c.mux.Done():
	case <-time.After(3 * time.Second):
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("cut after %v", d)
	}
	if _, err := w.upgrade(c.token); err == nil {
		t.Error("a revoked token joins")
	}
	if a := annB.visit(p.URL); a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, "not connected") {
		t.Errorf("%v", a)
	}
	if a := annB.visit(q.URL); !strings.Contains(a.body, "the other cluster") {
		t.Errorf("%v", a)
	}
	_ = two.mux.Close()
	w.until("the loss of the link", func() bool { return w.relay.links.Len() == 0 })
	w.join(two)
	if a := annB.visit(q.URL); !strings.Contains(a.body, "the other cluster") {
		t.Errorf("after joining again: %v", a)
	}
}

// A relay that ends and starts again has lost nothing, and its database is one file then.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	p := ann.preview(ann.cluster("prod", echo), "web")
	copied := filepath.Join(t.TempDir(), "copy.db")
	if err := Backup(t.Context(), w.relay.cfg.DataDir, "", copied); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), copied)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.PreviewByHost(t.Context(), p.Host); err != nil || got.ID != p.ID {
		t.Errorf("%+v %v", got, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(filepath.Dir(copied))
	if err != nil || len(files) != 1 {
		t.Errorf("%v %v", files, err)
	}
}
