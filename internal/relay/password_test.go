package relay

import (
	"bytes"
	"errors"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relay/web"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

const otherPassword = "another one, as long"

// logsIn says whether a browser gets in with a password.
func (w *world) logsIn(email, password string) bool {
	w.t.Helper()
	a := w.browser().submit("/login", url.Values{"email": {email}, "password": {password}})
	return a.status == http.StatusOK && strings.Contains(a.body, email)
}

// everythingOf gives somebody one of all that ends with their password, and returns a check that it has ended.
func (w *world) everythingOf(b *browser) (ended func()) {
	w.t.Helper()
	l := b.login()
	invitation := inviteLink.FindString(b.submit("/people/invite", url.Values{"team": {w.team()}, "role": {"member"}}).body)
	if invitation == "" {
		w.t.Fatal("no invitation")
	}
	return func() {
		w.t.Helper()
		if a := b.visit("https://" + domain + "/people"); !strings.HasPrefix(a.url, "https://"+domain+"/login") {
			w.t.Errorf("a browser that was logged in: %v", a)
		}
		if status := l.call(relayapi.PathListPreviews, struct{}{}, nil); status != http.StatusUnauthorized {
			w.t.Errorf("a laptop that was logged in: %d", status)
		}
		if a := w.browser().visit(invitation); a.status != http.StatusNotFound {
			w.t.Errorf("an invitation: %v", a)
		}
	}
}

func TestPasswordChange(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	ended := w.everythingOf(ann)
	here := w.browser()
	here.submit("/login", url.Values{"email": {"ann@example.com"}, "password": {password}})
	for name, c := range map[string]struct {
		current, password, problem string
		status                     int
	}{
		"not the one of now": {"wrong, and long", otherPassword, "not your password", http.StatusForbidden},
		"none of now":        {"", otherPassword, "not your password", http.StatusForbidden},
		"too short":          {password, "short", "at least", http.StatusBadRequest},
	} {
		a := here.submit("/account/password", url.Values{"current": {c.current}, "password": {c.password}})
		if a.status != c.status || !strings.Contains(a.body, c.problem) {
			t.Errorf("%s: %v", name, a)
		}
	}
	if !w.logsIn("ann@example.com", password) || w.logsIn("ann@example.com", otherPassword) {
		t.Error("it was changed")
	}
	if a := w.browser().still().submit("/account/password", url.Values{"current": {password}, "password": {otherPassword}}); a.status != http.StatusSeeOther {
		t.Errorf("a stranger: %v", a)
	}
	here.shows("/account", "Change the password")
	if a := here.submit("/account/password", url.Values{"current": {password}, "password": {otherPassword}}); a.status != http.StatusOK || !strings.Contains(a.body, "ann@example.com") {
		t.Errorf("%v", a)
	}
	here.shows("/people", "ann@example.com")
	if w.logsIn("ann@example.com", password) || !w.logsIn("ann@example.com", otherPassword) {
		t.Error("the old one counts, or the new one does not")
	}
	ended()
}

// Everybody ends the logins of theirs that they have lost, and nobody else's, with an identity provider as well.
func TestEndLogin(t *testing.T) { onBoth(t, testEndLogin) }

func testEndLogin(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	ann := w.first("ann@example.com")
	lost, bob := ann.login(), w.member("bob@example.com", w.team(), store.Member)
	bobs, elsewhere := bob.login(), w.browser()
	elsewhere.submit("/login", url.Values{"email": {"ann@example.com"}, "password": {password}})
	ends := regexp.MustCompile(`name="login" value="(\w+)"><button class="quiet" aria-label="End the login of ([^"]+) since`)
	a := ann.visit("https://" + domain + "/account")
	found := ends.FindAllStringSubmatch(a.body, -1)
	if len(found) != 2 || found[0][2] != "the laptop lap" || found[1][2] != "a browser" || !strings.Contains(a.body, "Browser (this one)") {
		t.Fatalf("%q in %v", found, a)
	}
	theLaptop, theBrowser := url.Values{"login": {found[0][1]}}, url.Values{"login": {found[1][1]}}

	bob.submit("/account/end", theLaptop)
	ann.submit("/account/end", url.Values{"login": {secret.Hash(bobs.token)}})
	w.browser().submit("/account/end", theLaptop)
	for name, l := range map[string]*laptop{"hers, by others": lost, "another's": bobs} {
		if status := l.call(relayapi.PathListPreviews, struct{}{}, nil); status != http.StatusOK {
			t.Errorf("%s: %d", name, status)
		}
	}
	for range 2 { // a second time there is nothing to be done
		if a := ann.submit("/account/end", theLaptop); a.status != http.StatusOK || a.url != "https://"+domain+"/account" || strings.Contains(a.body, "the laptop lap") {
			t.Errorf("%v", a)
		}
	}
	ann.submit("/account/end", theBrowser)
	if status := lost.call(relayapi.PathListPreviews, struct{}{}, nil); status != http.StatusUnauthorized {
		t.Errorf("a laptop that was lost: %d", status)
	}
	if a := elsewhere.visit("https://" + domain + "/"); !strings.HasPrefix(a.url, "https://"+domain+"/login") {
		t.Errorf("a browser elsewhere: %v", a)
	}
	ann.shows("/people", "ann@example.com")
}

// A token for programs outlives the laptop that has made it: its person sees it beside the logins, and ends it there.
func TestEndToken(t *testing.T) { onBoth(t, testEndToken) }

func testEndToken(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	ann := w.first("ann@example.com")
	bob := w.member("bob@example.com", w.team(), store.Member)
	lap := ann.login()
	var ci relayapi.Token
	lap.must(relayapi.PathAddToken, relayapi.AddTokenRequest{Name: "ci", For: time.Hour}, &ci)
	account := "https://" + domain + "/account"
	ann.submit("/account/end", url.Values{"login": {secret.Hash(lap.token)}})
	program := &laptop{w: w, token: ci.Token}
	if a := ann.visit(account); !strings.Contains(a.body, "Token ci") || !strings.Contains(a.body, "never used") {
		t.Errorf("%v", a)
	}
	program.must(relayapi.PathWho, struct{}{}, nil)
	a := ann.visit(account)
	found := regexp.MustCompile(`name="login" value="(\w+)"><button class="quiet" aria-label="End the token ci since`).FindStringSubmatch(a.body)
	if found == nil || !strings.Contains(a.body, "last used") {
		t.Fatalf("%v", a)
	}
	end := url.Values{"login": {found[1]}}

	if a := bob.visit(account); strings.Contains(a.body, "Token ci") {
		t.Errorf("another's: %v", a)
	}
	bob.submit("/account/end", end)
	program.must(relayapi.PathWho, struct{}{}, nil)
	if a := ann.submit("/account/end", end); a.status != http.StatusOK || a.url != account || strings.Contains(a.body, "Token ci") {
		t.Errorf("%v", a)
	}
	if status := program.call(relayapi.PathWho, struct{}{}, nil); status != http.StatusUnauthorized {
		t.Errorf("ended: %d", status)
	}
}

func TestPasswordReset(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	ended := w.everythingOf(ann)
	cfg := w.relay.cfg
	cfg.Database = "" // as the command has it
	reset := func(email string) (string, error) {
		var out bytes.Buffer
		cfg.Out = &out
		err := Reset(t.Context(), cfg, email)
		return regexp.MustCompile(`https://` + domain + `/reset\?token=[\w-]+`).FindString(out.String()), err
	}
	if link, err := reset("nobody@example.com"); err == nil || link != "" {
		t.Errorf("%q %v", link, err)
	}
	link, err := reset("Ann@example.com")
	if err != nil || link == "" {
		t.Fatalf("%q %v", link, err)
	}
	second, err := reset("ann@example.com")
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(link)
	if err != nil {
		t.Fatal(err)
	}
	form := url.Values{"token": u.Query()["token"], "password": {"short"}}
	b := w.browser()
	if a := b.visit(link); a.status != http.StatusOK || !strings.Contains(a.body, "ann@example.com") {
		t.Errorf("%v", a)
	}
	if a := b.submit("/reset", form); a.status != http.StatusBadRequest || !strings.Contains(a.body, "at least") {
		t.Errorf("too short: %v", a)
	}
	form.Set("password", otherPassword)
	if a := b.submit("/reset", form); a.status != http.StatusOK || !strings.Contains(a.body, "ann@example.com") {
		t.Errorf("%v", a)
	}
	if w.logsIn("ann@example.com", password) || !w.logsIn("ann@example.com", otherPassword) {
		t.Error("the old one counts, or the new one does not")
	}
	ended()
	for name, link := range map[string]string{"used twice": link, "another one": second, "none": "https://" + domain + "/reset"} {
		if a := w.browser().visit(link); a.status != http.StatusNotFound {
			t.Errorf("%s: %v", name, a)
		}
	}
	if a := w.browser().submit("/reset", form); a.status != http.StatusNotFound {
		t.Errorf("used twice: %v", a)
	}

	// A link is for an account that counts, and for that alone.
	w.member("bob@example.com", w.team(), store.Member)
	link, err = reset("bob@example.com")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.relay.store.SetDisabled(t.Context(), w.person("bob@example.com").ID, true); err != nil {
		t.Fatal(err)
	}
	if a := w.browser().visit(link); a.status != http.StatusNotFound {
		t.Errorf("of a disabled account: %v", a)
	}
	if link, err := reset("bob@example.com"); !errors.Is(err, web.ErrDisabled) || link != "" {
		t.Errorf("of a disabled account: %q %v", link, err)
	}
	cfg.OIDC = web.OIDC{Issuer: "https://id.example", ClientID: "x"}
	if _, err := reset("ann@example.com"); err == nil || !strings.Contains(err.Error(), "https://id.example") {
		t.Errorf("with an identity provider: %v", err)
	}
	cfg.OIDC, cfg.DataDir = web.OIDC{}, t.TempDir()
	if _, err := reset("ann@example.com"); err == nil {
		t.Error("without a database")
	}
}
