package relayclient

import (
	"path/filepath"
	"testing"

	"github.com/doppel-dev/doppel/internal/relayapi"
)

// Commands that run at once do not undo what the others have kept: one may wait for a person for minutes.
func TestLoginsAtOnce(t *testing.T) {
	config := filepath.Join(t.TempDir(), "doppel", "config.yaml")
	load := func() *Logins {
		t.Helper()
		l, err := Load(config, "", "")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	const a, b = "https://a.example", "https://b.example"
	who := relayapi.Who{Email: "louise@example.com"}
	if _, err := load().Put(Login{URL: a, Token: "old", Who: who}); err != nil {
		t.Fatal(err)
	}
	if found, err := load().Permit(a, relayapi.Allowed); !found || err != nil {
		t.Fatal(found, err)
	}
	waits, asks := load(), load() // a login at b, and an intercept that asks for its ingress
	if found, err := load().Permit(a, relayapi.Denied); !found || err != nil {
		t.Fatal(found, err)
	}
	if _, err := load().Put(Login{URL: a, Token: "new", Who: who}); err != nil {
		t.Fatal(err)
	}
	if _, err := waits.Put(Login{URL: b, Token: "b", Who: who}); err != nil {
		t.Fatal(err)
	}
	login, _ := asks.At(a)
	if err := asks.Enter(login, "prod", Ingress{Host: "web.shop", Port: 80}); err != nil {
		t.Fatal(err)
	}
	l := load()
	got, _ := l.At(a)
	if got.Token != "new" || got.Permission != relayapi.Denied || got.Ingresses["prod"].Host != "web.shop" {
		t.Errorf("%+v", got)
	}
	if newest, _ := l.At(""); newest.URL != b {
		t.Errorf("%+v", newest)
	}
	if _, err := l.Put(Login{URL: a, Token: "theirs", Who: relayapi.Who{Email: "carl@example.com"}}); err != nil {
		t.Fatal(err)
	}
	if got, _ := load().At(a); got.Permission != relayapi.NotAsked || got.Ingresses != nil {
		t.Errorf("another account has what the first one had: %+v", got)
	}
	if err := load().Remove(a); err != nil {
		t.Fatal(err)
	}
	if _, there := load().At(a); there {
		t.Error("still there")
	}
}
