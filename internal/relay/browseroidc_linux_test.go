package relay

import (
	"strings"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// TestBrowserOIDC logs in with a real browser at a real identity provider, on another origin: the first admin by the setup link, and a colleague on the way to a
// preview.
func TestBrowserOIDC(t *testing.T) {
	if !nettest.Inside(t) { // as TestBrowser
		return
	}
	p := identityProvider(t)
	p.Team = "crew"
	w := newWorld(t, func(c *Config) { c.OIDC = p })
	chrome := w.chrome()
	provide := func(a *tab, user string) {
		t.Helper()
		soon(a, "the provider", chromedp.Location(), func(at string) bool { return strings.HasPrefix(at, p.Issuer) })
		a.fill("Username:", user)
		a.fill("Password:", "pw-"+user)
		a.follow("Login")
	}

	ann := chrome.tab(t)
	ann.open(strings.TrimPrefix(w.setup, "https://"+domain))
	ann.sees("Your team is crew.", true)
	ann.follow("Go on with " + p.Name)
	provide(ann, "ann")
	ann.sees("ann@example.com", true)

	b := w.browser()
	b.provide(p, "ann", nil)
	l := b.login()
	pr := l.preview(l.cluster("prod", app), "web")
	colleague := chrome.tab(t)
	colleague.open(pr.URL)
	colleague.follow("Log in with " + p.Name)
	provide(colleague, "bob")
	colleague.sees(appSays, true) // where the link leads
	if cookies := js[string](colleague, "document.cookie"); cookies != "" {
		t.Errorf("the app's page reads %q", cookies)
	}
	colleague.open("/")
	colleague.sees("bob@example.com", true)
	colleague.shot("oidc")
	colleague.follow("Log out")
	colleague.open(pr.URL)
	colleague.sees(appSays, false)

	stranger := chrome.tab(t)
	stranger.open("/")
	stranger.follow("Log in with " + p.Name)
	provide(stranger, "eve")
	stranger.sees("does not vouch", true)
	l.must(relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: pr.Host}, nil)
}
