package relay

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"

	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relay/web"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// identityProvider is a real OpenID provider with a login page, which demands PKCE of nobody and checks it of everybody who uses it.
func identityProvider(t *testing.T) web.OIDC {
	t.Helper()
	users := map[string]storage.User{}
	for _, name := range []string{"ann", "bob", "eve"} {
		users[name] = storage.User{ID: name, Username: name, Password: "pw-" + name, FirstName: strings.ToUpper(name), Email: name + "@example.com", EmailVerified: name != "eve"}
	}
	users["newcomer"] = storage.User{ID: "newcomer", Username: "newcomer", Password: "pw-newcomer", Email: "bob@example.com", EmailVerified: true} // gets bob's address
	b, err := json.Marshal(users)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "users.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	known, err := storage.StoreFromFile(file)
	if err != nil {
		t.Fatal(err)
	}
	storage.RegisterClients(storage.WebClient("relay", "the relay's secret", "https://"+domain+"/oidc/callback"))
	srv := httptest.NewUnstartedServer(nil)
	issuer := "http://" + srv.Listener.Addr().String()
	srv.Config.Handler = exampleop.SetupServer(issuer, storage.NewStorage(known), nil, false)
	srv.Start()
	t.Cleanup(srv.Close)
	return web.OIDC{Issuer: issuer, ClientID: "relay", ClientSecret: "the relay's secret", Name: "Example ID"}
}

var authRequest = regexp.MustCompile(`name="id" value="([^"]+)"`)

// provide logs somebody in at the provider, from a form of the relay's on.
func (b *browser) provide(p web.OIDC, user string, form url.Values) answer {
	b.w.t.Helper()
	a := b.submit("/oidc", form)
	m := authRequest.FindStringSubmatch(a.body)
	if !strings.HasPrefix(a.url, p.Issuer) || m == nil {
		b.w.t.Fatalf("not at the provider: %v", a)
	}
	return b.submit(p.Issuer+"/login/username", url.Values{"id": {m[1]}, "username": {user}, "password": {"pw-" + user}})
}

func TestOIDC(t *testing.T) {
	p := identityProvider(t)
	p.Team = "crew"
	w := newWorld(t, func(c *Config) { c.OIDC = p })
	ann := w.browser()
	u, err := url.Parse(w.setup)
	if err != nil {
		t.Fatal(err)
	}
	if a := ann.visit(w.setup); !strings.Contains(a.body, "Go on with Example ID") || strings.Contains(a.body, `type="password"`) {
		t.Errorf("setup: %v", a)
	}
	if a := w.browser().still().submit("/oidc", nil); a.status != http.StatusOK || !strings.Contains(a.header.Get("Refresh"), p.Issuer) { // browsers follow no redirect here
		t.Errorf("%v", a)
	}
	a := ann.provide(p, "ann", url.Values{"token": u.Query()["token"], "kind": {"setup"}, "team": {"crew"}})
	if a.url != "https://"+domain+"/" || !strings.Contains(a.body, "ann@example.com") {
		t.Fatalf("first account: %v", a)
	}
	l := ann.login()
	if a := ann.visit("https://" + domain + "/account"); !strings.Contains(a.body, "End the login of the laptop lap") || strings.Contains(a.body, "password") {
		t.Errorf("her account: %v", a)
	}
	pr := l.preview(l.cluster("prod", echo), "web")

	// the provider proves addresses: one may be shared with before its account is there
	l.must(relayapi.PathSharePreview, relayapi.ShareRequest{Preview: pr.Host, Email: "later@example.com"}, nil)

	// a colleague follows a link, logs in at the provider, and is where the link leads
	bob := w.browser()
	a = bob.visit(pr.URL + "there?x=1")
	at, err := url.Parse(a.url)
	if err != nil || at.Path != "/login" {
		t.Fatalf("not asked to log in: %v", a)
	}
	if a = bob.provide(p, "bob", url.Values{"next": at.Query()["next"]}); !strings.Contains(a.body, "GET /there?x=1 host=") {
		t.Errorf("the colleague: %v", a)
	}
	if a = bob.submit("/logout", nil); !strings.Contains(a.body, "Log in with Example ID") {
		t.Errorf("logout: %v", a)
	}
	// again, and still the same person
	if a = bob.provide(p, "bob", nil); !strings.Contains(a.body, "bob@example.com") {
		t.Errorf("again: %v", a)
	}
	members, err := w.relay.store.Members(t.Context(), w.team())
	if err != nil || len(members) != 2 || members[0].Role != store.Admin || members[1].Role != store.Member {
		t.Errorf("%+v %v", members, err)
	}

	// nobody whose address was another's
	if a = w.browser().provide(p, "newcomer", nil); a.status != http.StatusForbidden || !strings.Contains(a.body, "belongs to somebody else") {
		t.Errorf("bob's address: %v", a)
	}
	// nobody for whom the provider does not vouch
	if a = w.browser().provide(p, "eve", nil); a.status != http.StatusForbidden || !strings.Contains(a.body, "does not vouch") {
		t.Errorf("unverified: %v", a)
	}
	if err := w.relay.store.SetDisabled(t.Context(), members[1].ID, true); err != nil {
		t.Fatal(err)
	}
	if a = w.browser().provide(p, "bob", nil); a.status != http.StatusForbidden || !strings.Contains(a.body, "disabled") {
		t.Errorf("disabled: %v", a)
	}
	// no way around the provider
	if a = w.browser().submit("/login", url.Values{"email": {"ann@example.com"}, "password": {""}}); a.status != http.StatusMethodNotAllowed && a.status != http.StatusNotFound {
		t.Errorf("password: %v", a)
	}
}

// Whoever logs in first does not become the admin, nor keeps others from it; nor does an account that is disabled use the link up.
func TestOIDCSetup(t *testing.T) {
	p := identityProvider(t)
	w := newWorld(t, func(c *Config) { c.OIDC = p })
	u, err := url.Parse(w.setup)
	if err != nil {
		t.Fatal(err)
	}
	bob, ann := w.browser(), w.browser()
	for _, who := range []struct {
		name string
		b    *browser
	}{{"bob", bob}, {"ann", ann}} {
		if a := who.b.provide(p, who.name, nil); !strings.Contains(a.body, who.name+"@example.com") {
			t.Fatalf("%v", a)
		}
		who.b.submit("/logout", nil)
	}
	first, err := w.relay.store.PersonByEmail(t.Context(), "bob@example.com")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.relay.store.SetDisabled(t.Context(), first.ID, true); err != nil {
		t.Fatal(err)
	}
	setup := url.Values{"token": u.Query()["token"], "kind": {"setup"}, "team": {"crew"}}
	if a := bob.provide(p, "bob", setup); !strings.Contains(a.body, "disabled") {
		t.Errorf("%v", a)
	}
	if a := ann.provide(p, "ann", setup); a.url != "https://"+domain+"/" {
		t.Fatalf("the admin: %v", a)
	}
	members, err := w.relay.store.Members(t.Context(), w.team())
	if err != nil || len(members) != 1 || members[0].Email != "ann@example.com" || members[0].Role != store.Admin {
		t.Errorf("%+v %v", members, err)
	}
}

// Where everybody joins a team, it has the name that whoever runs the relay has said, and nobody gets an account before it is there.
func TestOIDCTeam(t *testing.T) {
	p := identityProvider(t)
	p.Team = "the crew"
	var log lines
	w := newWorld(t, func(c *Config) { c.OIDC, c.Log = p, slog.New(slog.NewTextHandler(&log, nil)) })
	u, err := url.Parse(w.setup)
	if err != nil {
		t.Fatal(err)
	}
	bob, ann := w.browser(), w.browser()
	if a := bob.provide(p, "bob", nil); a.status != http.StatusForbidden || !strings.Contains(a.body, "not set up yet. Try again later.") {
		t.Errorf("too early: %v", a)
	}
	if _, err := w.relay.store.PersonByEmail(t.Context(), "bob@example.com"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("an account without the team: %v", err)
	}
	if !strings.Contains(log.String(), `team="the crew"`) {
		t.Errorf("nothing of it in the log: %s", log.String())
	}
	if a := ann.visit(w.setup); !strings.Contains(a.body, "Your team is the crew.") || strings.Contains(a.body, `name="team"`) {
		t.Errorf("setup: %v", a)
	}
	if a := ann.provide(p, "ann", url.Values{"token": u.Query()["token"], "kind": {"setup"}, "team": {"another"}}); a.url != "https://"+domain+"/" {
		t.Fatalf("the admin: %v", a)
	}
	if a := bob.provide(p, "bob", nil); !strings.Contains(a.body, "bob@example.com") {
		t.Errorf("again: %v", a)
	}
	members, err := w.relay.store.Members(t.Context(), w.teamNamed("the crew"))
	if err != nil || len(members) != 2 || members[0].Role != store.Admin || members[1].Role != store.Member {
		t.Errorf("%+v %v", members, err)
	}
}

// lines are what was logged.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// What somebody else's login has brought is worth nothing in another browser, nor twice.
func TestOIDCForged(t *testing.T) {
	p := identityProvider(t)
	w := newWorld(t, func(c *Config) { c.OIDC = p })
	victim, attacker := w.browser(), w.browser()
	// The attacker logs in up to the callback, and gives its address to the victim (login CSRF).
	var callback string
	attacker.CheckRedirect = func(r *http.Request, _ []*http.Request) error {
		if r.URL.Path == "/oidc/callback" {
			callback = r.URL.String()
			return http.ErrUseLastResponse
		}
		return nil
	}
	attacker.provide(p, "bob", nil)
	if a := victim.visit(callback); a.status != http.StatusForbidden || !strings.Contains(a.body, "another browser") {
		t.Errorf("another browser: %v", a)
	}
	attacker.CheckRedirect = nil
	if a := attacker.visit(callback); !strings.Contains(a.body, "bob@example.com") {
		t.Errorf("the browser itself: %v", a)
	}
	if a := attacker.visit(callback); a.status != http.StatusForbidden {
		t.Errorf("twice: %v", a)
	}
	// A code of another login does not fit: PKCE and nonce are this login's own.
	var first, second string
	for _, to := range []*string{&first, &second} {
		attacker.CheckRedirect = func(r *http.Request, _ []*http.Request) error {
			if r.URL.Path == "/oidc/callback" {
				*to = r.URL.String()
				return http.ErrUseLastResponse
			}
			return nil
		}
		attacker.submit("/logout", nil)
		attacker.provide(p, "bob", nil)
	}
	one, _ := url.Parse(first)
	two, _ := url.Parse(second)
	q := two.Query()
	q.Set("code", one.Query().Get("code"))
	two.RawQuery = q.Encode()
	attacker.CheckRedirect = nil
	if a := attacker.visit(two.String()); a.status != http.StatusBadGateway {
		t.Errorf("another login's code: %v", a)
	}
	// A provider that is away is said so.
	w2 := newWorld(t, func(c *Config) { c.OIDC = p; c.OIDC.Issuer = "http://127.0.0.1:1" })
	if a := w2.browser().submit("/oidc", nil); a.status != http.StatusBadGateway || !strings.Contains(a.body, "does not answer") {
		t.Errorf("away: %v", a)
	}
}
