package relay

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// The tests of docs/security.md, section 11: one for each row.

// send makes a request with exactly these headers.
func (b *browser) send(method, u string, body string, header ...string) answer {
	b.w.t.Helper()
	req, err := http.NewRequestWithContext(b.w.t.Context(), method, u, strings.NewReader(body))
	if err != nil {
		b.w.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	return b.do(req)
}

// still makes redirects visible.
func (b *browser) still() *browser {
	c := &browser{b.w, b.Client}
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return c
}

func TestAttackCSRF(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	l := ann.login()
	c := l.cluster("prod", echo)
	p := l.preview(c, "web")
	form := "port=7777&challenge=" + secret.Challenge("x") + "&state=s"
	for name, h := range map[string][]string{
		"another site":         {"Sec-Fetch-Site", "cross-site"},
		"a preview":            {"Sec-Fetch-Site", "same-site", "Origin", "https://" + p.Host + "." + domain},
		"another site, by old": {"Origin", "https://evil.example"},
		"a preview, by old":    {"Origin", "https://" + p.Host + "." + domain},
	} {
		for _, path := range []string{
			"/logout", "/authorize", "/device", "/login", "/account/password", "/account/end", "/reset", "/visit", "/setup", "/invite", "/join", "/people/invite", "/people/uninvite", "/people/role", "/people/disable",
			"/laptops/x/intercept", "/laptops/x/end", "/clusters", "/previews/" + p.Host + "/share", "/previews/" + p.Host + "/publish", "/previews/" + p.Host + "/unpublish", "/previews/" + p.Host + "/delete", "/clusters/" + c.id + "/token", "/clusters/" + c.id + "/delete",
		} {
			if a := ann.still().send(http.MethodPost, "https://"+domain+path, form, append(h, "Content-Type", "application/x-www-form-urlencoded")...); a.status != http.StatusForbidden {
				t.Errorf("%s, %s: %v", name, path, a)
			}
		}
	}
	if a := ann.visit("https://" + domain + "/"); !strings.Contains(a.body, p.Host) {
		t.Errorf("logged out: %v", a)
	}
	// A cookie is worth nothing to the API, and a laptop's token nothing to the pages.
	if a := ann.send(http.MethodPost, "https://"+domain+relayapi.PathListPreviews, "{}", "Sec-Fetch-Site", "same-origin"); a.status != http.StatusUnauthorized {
		t.Errorf("API by cookie: %v", a)
	}
	if a := w.browser().still().send(http.MethodGet, "https://"+domain+"/", "", "Authorization", "Bearer "+l.token); a.status != http.StatusSeeOther {
		t.Errorf("pages by a laptop's token: %v", a)
	}
}

func TestAttackSessionFixation(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	p := ann.preview(ann.cluster("prod", echo), "web")
	base, _ := url.Parse("https://" + domain)
	victim := w.browser()
	victim.Jar.SetCookies(base, []*http.Cookie{{Name: "__Host-doppel", Value: "known-to-eve", Path: "/", Secure: true}})
	if _, err := w.relay.store.AddPerson(t.Context(), store.Person{Email: "bob@example.com", Password: hash(password)}, w.team(), store.Member, ""); err != nil {
		t.Fatal(err)
	}
	login := url.Values{"email": {"bob@example.com"}, "password": {password}}
	victim.submit("/login", login)
	first := victim.Jar.Cookies(base)[0].Value
	victim.submit("/login", login)
	second := victim.Jar.Cookies(base)[0].Value
	if first == "known-to-eve" || first == second {
		t.Errorf("%q, %q", first, second)
	}
	if _, err := w.relay.store.Token(t.Context(), store.Web, first); err == nil {
		t.Error("the login before counts still")
	}

	// Eve's way into a preview, in another browser: it must not make that browser hers.
	eve := w.member("eve@example.com", w.team(), store.Member)
	var enter string
	c := eve.CheckRedirect
	eve.CheckRedirect = func(r *http.Request, via []*http.Request) error {
		if r.URL.Path == "/.doppel/enter" {
			enter = r.URL.String()
			return http.ErrUseLastResponse
		}
		return c(r, via)
	}
	eve.visit(p.URL)
	stranger := w.browser()
	stranger.still().visit(p.URL) // gets a state of its own
	if a := stranger.visit(enter); strings.Contains(a.body, "GET / host=") {
		t.Errorf("%v", a)
	}
	eve.CheckRedirect = c
	if a := eve.visit(enter); !strings.Contains(a.body, "Log in") && !strings.Contains(a.body, "GET / host=") {
		t.Errorf("%v", a)
	}
}

func TestAttackOpenRedirect(t *testing.T) {
	w := newWorld(t)
	annB := w.first("ann@example.com")
	ann := annB.login()
	p := ann.preview(ann.cluster("prod", echo), "web")
	for _, to := range []string{"https://evil.example/", "//evil.example", `/\evil.example`, `\\evil.example`, "javascript:alert(1)", "/\r\nSet-Cookie: a=b", "///evil.example", "http:evil.example", "@evil.example"} {
		q := url.QueryEscape(to)
		for _, u := range []string{
			"https://" + domain + "/login?next=" + q, "https://" + domain + "/visit?host=" + p.Host + "&state=" + secret.Hash("") + "&to=" + q,
			p.URL + ".doppel/enter?ticket=x&to=" + q,
		} {
			a := annB.still().visit(u)
			at, err := url.Parse(a.header.Get("Location"))
			if err != nil || at.Host != "" && at.Host != domain && at.Host != p.Host+"."+domain {
				t.Errorf("%s leads to %q", u, a.header.Get("Location"))
			}
			if strings.Contains(a.header.Get("Location"), "to=") { // the ticket's way, one step on
				if to := at.Query().Get("to"); to != "/" {
					t.Errorf("%s leads on to %q", u, to)
				}
			}
		}
	}
	// The code of a laptop goes to this machine and nowhere else.
	for _, port := range []string{"80@evil.example", "evil.example", "0", "99999", "080", "-1", "80/"} {
		f := url.Values{"port": {port}, "challenge": {secret.Challenge("x")}, "state": {"s"}}
		if a := annB.still().submit("/authorize", f); a.header.Get("Location") != "" {
			t.Errorf("port %q leads to %q", port, a.header.Get("Location"))
		}
	}
}

func TestAttackHost(t *testing.T) {
	w := newWorld(t)
	w.first("ann@example.com")
	for host, status := range map[string]int{
		domain: 303, strings.ToUpper(domain): 303, domain + ":443": 303, "evil.example": 421, domain + ":443:443": 421, "evil.example:443": 421, domain + ".evil.example": 421, "a.b." + domain: 421, domain + ":8443": 421, "." + domain: 421, "127.0.0.1": 421, "": 421,
	} {
		for _, head := range []string{"GET / HTTP/1.1\r\nHost: " + host + "\r\n", "GET / HTTP/1.1\r\nHost: " + host + "\r\nX-Forwarded-Host: evil.example\r\nForwarded: host=evil.example\r\n"} {
			if got, text := w.raw(head + "Connection: close\r\n\r\n"); got != status || strings.Contains(text, "evil") {
				t.Errorf("%q: %d %s", head, got, text)
			}
		}
	}
	if got, _ := w.raw("POST /login HTTP/1.1\r\nHost: " + domain + ":443\r\nOrigin: https://" + domain + "\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); got != http.StatusUnauthorized {
		t.Errorf("a form of our own, by old: %d", got)
	}
	if got, _ := w.raw("GET / HTTP/1.1\r\nHost: " + domain + "\r\nHost: evil.example\r\nConnection: close\r\n\r\n"); got != http.StatusBadRequest {
		t.Errorf("two hosts: %d", got)
	}
}

// raw sends bytes as they are and returns the first answer's status, and its location and body; 0: there was none.
func (w *world) raw(b string) (int, string) {
	w.t.Helper()
	conn, err := tls.Dial("tcp", w.addr, &tls.Config{RootCAs: w.roots, ServerName: domain})
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(conn, b); err != nil {
		return 0, err.Error()
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header.Get("Location") + " " + string(body)
}

// What is no method is none of a visit either: HTTP/2 has no rules for them here, and the list of visitors must not suffer.
func TestAttackMethod(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	p := ann.preview(ann.cluster("prod", echo), "web")
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	conn, err := tls.Dial("tcp", w.addr, &tls.Config{RootCAs: w.roots, ServerName: domain, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = io.WriteString(conn, http2.ClientPreface)
	f := http2.NewFramer(conn, conn)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	for i, tt := range []struct {
		method string
		status string
	}{{"GET", "200"}, {"PURGE", "200"}, {"\xff\xfe", "501"}, {"G T", "501"}, {strings.Repeat("x", 33), "501"}} {
		head.Reset()
		for _, field := range [][2]string{{":method", tt.method}, {":scheme", "https"}, {":authority", p.Host + "." + domain}, {":path", "/"}} {
			_ = enc.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
		}
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: head.Bytes(), EndStream: true, EndHeaders: true}); err != nil {
			t.Fatal(err)
		}
		for answered := false; !answered; {
			frame, err := f.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if h, ok := frame.(*http2.MetaHeadersFrame); ok {
				answered = true
				if got := h.PseudoValue("status"); got != tt.status {
					t.Errorf("%.20q: %s", tt.method, got)
				}
			}
		}
	}
	conn.Close()
	w.stop()
	s, err := store.Open(t.Context(), w.relay.cfg.Database)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if all, err := s.Visits(t.Context(), p.ID, 10); err != nil || len(all) != 2 {
		t.Errorf("%+v %v", all, err)
	}
}

// Requests within requests: whatever the relay makes of them, the app never gets one that the relay has not judged.
func TestAttackSmuggling(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	var mu sync.Mutex
	seen := map[string]int{}
	p := ann.preview(ann.cluster("prod", func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		mu.Lock()
		seen[r.URL.Path]++
		mu.Unlock()
	}), "web")
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	inner := "GET /smuggled HTTP/1.1\r\nHost: internal\r\n\r\n"
	for name, head := range map[string]string{
		"both lengths":         fmt.Sprintf("Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n%s", 5+len(inner), inner),
		"chunked, then length": fmt.Sprintf("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n%s", inner),
		"two lengths":          fmt.Sprintf("Content-Length: 0\r\nContent-Length: %d\r\n\r\n%s", len(inner), inner),
		"a list of lengths":    fmt.Sprintf("Content-Length: 0, %d\r\n\r\n%s", len(inner), inner),
		"a signed length":      fmt.Sprintf("Content-Length: +%d\r\n\r\n%s", len(inner), inner),
		"an unknown coding":    fmt.Sprintf("Transfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n%s", inner),
		"a coding with a tab":  fmt.Sprintf("Transfer-Encoding:\tchunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n%s", inner),
		"two codings":          fmt.Sprintf("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n%s", inner),
		"a folded coding":      fmt.Sprintf("Transfer-Encoding:\r\n chunked\r\nContent-Length: 0\r\n\r\n%s", inner),
		"a blank in a name":    fmt.Sprintf("Transfer-Encoding : chunked\r\nContent-Length: %d\r\n\r\n%s", len(inner), inner),
		"a bare line feed":     fmt.Sprintf("X: a\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n%s", len(inner), inner),
		"a length of a GET":    fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(inner), inner),
	} {
		for _, method := range []string{"GET", "POST"} {
			// What is left behind the first request is the relay's to judge: "internal" is not its host.
			_, _ = w.raw(method + " /outer HTTP/1.1\r\nHost: " + p.Host + "." + domain + "\r\n" + head)
			mu.Lock()
			if seen["/smuggled"] > 0 {
				t.Errorf("%s, %s: smuggled", name, method)
				delete(seen, "/smuggled")
			}
			mu.Unlock()
		}
	}
	if a := w.browser().visit(p.URL + "after"); a.status != http.StatusOK || seen["/after"] != 1 {
		t.Errorf("%v %v", a, seen)
	}
}

func TestAttackCookieScope(t *testing.T) {
	w := newWorld(t)
	annB := w.first("ann@example.com")
	ann := annB.login()
	c := ann.cluster("prod", echo)
	one, two := ann.preview(c, "one"), ann.preview(c, "two")
	annB.visit(one.URL)
	annB.visit(two.URL)
	at := func(u string) *url.URL { p, _ := url.Parse(u); return p }
	value := func(u string) string {
		for _, c := range annB.Jar.Cookies(at(u)) {
			if c.Name == "__Host-doppel" {
				t.Errorf("%s has the login cookie", u)
			}
			if c.Name == "__Host-doppel-visit" {
				return c.Value
			}
		}
		return ""
	}
	if value(one.URL) == "" || value(one.URL) == value(two.URL) {
		t.Error("visits are not each preview's own")
	}
	sees := func(name string, want bool, header ...string) {
		t.Helper()
		b := w.browser()
		b.Jar.SetCookies(at(two.URL), annB.Jar.Cookies(at(two.URL)))
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			a := b.still().send(method, two.URL, "", header...)
			if got := strings.Contains(a.body, " / host="); got != (want && (method == http.MethodGet || !strings.Contains(strings.Join(header, " "), "-site"))) {
				t.Errorf("%s, %s: %v", name, method, a)
			}
		}
	}
	other := "https://" + one.Host + "." + domain
	own := "https://" + two.Host + "." + domain
	sees("its own page", true, "Sec-Fetch-Site", "same-origin", "Origin", own)
	sees("its own page, by old", true, "Origin", own)
	sees("typed in", true, "Sec-Fetch-Site", "none", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document")
	sees("a link from another preview", true, "Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document")
	sees("a script of another preview", false, "Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "cors", "Origin", other)
	sees("a frame of another preview", false, "Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe")
	sees("another preview, by old", false, "Origin", other)
	sees("nowhere", false, "Origin", "null")

	// The cookie of one preview is worth nothing at another, nor at the relay itself.
	b := w.browser()
	for _, u := range []string{two.URL, "https://" + domain + "/"} {
		for _, name := range []string{"__Host-doppel-visit", "__Host-doppel"} {
			b.Jar.SetCookies(at(u), []*http.Cookie{{Name: name, Value: value(one.URL), Path: "/", Secure: true}})
		}
		if a := b.visit(u); !strings.Contains(a.body, "Log in") {
			t.Errorf("%s with another's cookie: %v", u, a)
		}
	}
}

func TestAttackEnumeration(t *testing.T) {
	w := newWorld(t)
	w.first("ann@example.com")
	there := w.browser().submit("/login", url.Values{"email": {"ann@example.com"}, "password": {"wrong password"}})
	not := w.browser().submit("/login", url.Values{"email": {"bob@example.com"}, "password": {"wrong password"}})
	if there.status != not.status || strings.ReplaceAll(there.body, "ann@", "bob@") != not.body {
		t.Errorf("there: %v\nnot: %v", there, not)
	}
	seen := map[string]bool{}
	for range 200 {
		l := secret.Label()
		if seen[l] || len(l[strings.LastIndex(l, "-")+1:]) < 13 {
			t.Errorf("label %s", l)
		}
		seen[l] = true
	}
}

func TestAttackTokenTheft(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	w := newWorld(t, func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return log.Write(p)
		}), &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	annB := w.first("ann@example.com")
	ann := annB.login()
	c := ann.cluster("prod", echo)
	p := ann.preview(c, "web")
	annB.visit(p.URL)

	// Codes: not without the verifier, and once only.
	code := func(verifier string) string {
		a := annB.submit("/authorize", url.Values{"port": {"7777"}, "challenge": {secret.Challenge(verifier)}, "state": {"s"}})
		u, _ := url.Parse(a.header.Get("Location"))
		return u.Query().Get("code")
	}
	thief := &laptop{w: w}
	stolen := code("mine")
	for _, verifier := range []string{"", "theirs", "mine"} { // the first wrong one has used it up
		if status := thief.call(relayapi.PathLogin, relayapi.LoginRequest{Code: stolen, Verifier: verifier}, nil); status != http.StatusUnauthorized {
			t.Errorf("verifier %q: %d", verifier, status)
		}
	}
	// Tokens are for what they are for.
	_, d := w.device("lap")
	base, _ := url.Parse("https://" + domain)
	web := annB.Jar.Cookies(base)[0].Value
	for name, token := range map[string]string{"a cluster's": c.token, "a machine's that waits": d.Device, "a browser's": web, "none": "", "a hash": secret.Hash(ann.token)} {
		if status := (&laptop{w: w, token: token}).call(relayapi.PathListPreviews, struct{}{}, nil); status != http.StatusUnauthorized {
			t.Errorf("API with %s token: %d", name, status)
		}
	}
	// A program's token neither makes nor ends others, and ends with its expiry, its name's deletion or the account.
	var ci, brief relayapi.Token
	ann.must(relayapi.PathAddToken, relayapi.AddTokenRequest{Name: "ci", For: time.Hour}, &ci)
	ann.must(relayapi.PathAddToken, relayapi.AddTokenRequest{Name: "brief", For: time.Millisecond}, &brief)
	program := &laptop{w: w, token: ci.Token}
	program.must(relayapi.PathListPreviews, struct{}{}, nil)
	for path, req := range map[string]any{
		relayapi.PathAddToken: relayapi.AddTokenRequest{Name: "more", For: time.Hour}, relayapi.PathListTokens: struct{}{},
		relayapi.PathDeleteToken: relayapi.DeleteTokenRequest{Name: "ci"}, relayapi.PathLogout: struct{}{},
	} {
		if status := program.call(path, req, nil); status != http.StatusUnauthorized {
			t.Errorf("%s by a program: %d", path, status)
		}
	}
	w.until("the brief token's end", func() bool {
		return (&laptop{w: w, token: brief.Token}).call(relayapi.PathListPreviews, struct{}{}, nil) == http.StatusUnauthorized
	})
	// Neither database nor log has one.
	if err := Backup(t.Context(), w.relay.cfg.DataDir, "", filepath.Join(t.TempDir(), "copy.db")); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(w.relay.cfg.DataDir, "relay.db*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	mu.Lock()
	text := log.String()
	mu.Unlock()
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		text += string(b)
	}
	for name, s := range map[string]string{"laptop's": ann.token, "program's": ci.Token, "cluster's": c.token, "browser's": web, "password": password, "kind": "doppel_"} {
		if strings.Contains(text, s) {
			t.Errorf("the %s token can be read", name)
		}
	}
	// Logged out, it is nothing any more.
	ann.must(relayapi.PathLogout, struct{}{}, nil)
	if status := ann.call(relayapi.PathListPreviews, struct{}{}, nil); status != http.StatusUnauthorized {
		t.Errorf("after logout: %d", status)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestAttackFlood(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	p := ann.preview(ann.cluster("prod", echo), "web")
	ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	b := w.browser()
	last := 0
	for range 12 {
		last = b.submit("/login", url.Values{"email": {"ann@example.com"}, "password": {"guess"}}).status
	}
	if last != http.StatusTooManyRequests {
		t.Errorf("guessing goes on: %d", last)
	}
	if a := b.send(http.MethodGet, "https://"+domain+"/login", "", "X", strings.Repeat("x", 80<<10)); a.status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a long head: %d", a.status)
	}
	if status := ann.call(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: strings.Repeat("x", 70<<10)}, nil); status != http.StatusBadRequest {
		t.Errorf("a long body: %d", status)
	}
}

// What the relay's own pages allow of themselves.
func TestAttackPages(t *testing.T) {
	w := newWorld(t)
	a := w.first("ann@example.com").visit("https://" + domain + "/")
	csp := a.header.Get("Content-Security-Policy")
	for _, part := range []string{"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"} {
		if !strings.Contains(csp, part) {
			t.Errorf("%q is missing in %q", part, csp)
		}
	}
	if strings.Contains(csp, "unsafe") || a.header.Get("X-Content-Type-Options") != "nosniff" || a.header.Get("Strict-Transport-Security") == "" || a.header.Get("Cache-Control") != "no-store" {
		t.Errorf("%v", a.header)
	}
	if strings.Contains(a.body, "<script>") || strings.Contains(a.body, "style=") || strings.Contains(a.body, "onclick") {
		t.Error("there is something inline")
	}
}
