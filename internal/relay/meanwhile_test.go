package relay

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// meanwhile makes a request of which something happens after the relay has seen whose it is, and before it has seen what is asked for.
func (w *world) meanwhile(path, header, body string, fn func()) (status int, location string) {
	w.t.Helper()
	conn, err := tls.Dial("tcp", w.addr, &tls.Config{RootCAs: w.roots, ServerName: domain})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nSec-Fetch-Site: same-origin\r\nContent-Length: %d\r\nExpect: 100-continue\r\n%s\r\n\r\n", path, domain, len(body), header)
	r := bufio.NewReader(conn)
	if line, err := r.ReadString('\n'); err != nil || line != "HTTP/1.1 100 Continue\r\n" {
		w.t.Fatal(line, err)
	}
	if _, err := r.ReadString('\n'); err != nil {
		w.t.Fatal(err)
	}
	fn()
	if _, err := io.WriteString(conn, body); err != nil {
		w.t.Fatal(err)
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode, resp.Header.Get("Location")
}

// Who takes away all that a person has misses nothing that is just being made with it.
func TestTakenAwayMeanwhile(t *testing.T) { onBoth(t, testTakenAwayMeanwhile) }

func testTakenAwayMeanwhile(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	w.first("ann@example.com")
	st := w.relay.store
	for name, takeAway := range map[string]func(p store.Person) error{
		"changed":  func(p store.Person) error { return st.SetPassword(t.Context(), p.ID, p.Password, hash(otherPassword)) },
		"disabled": func(p store.Person) error { return st.SetDisabled(t.Context(), p.ID, true) },
	} {
		email := name + "@example.com"
		w.member(email, w.team(), store.Admin)
		p := w.person(email)
		restore := func() {
			t.Helper()
			now := w.person(email)
			if now.Password != p.Password {
				if err := st.SetPassword(t.Context(), p.ID, now.Password, p.Password); err != nil {
					t.Fatal(err)
				}
			}
			if err := st.SetDisabled(t.Context(), p.ID, false); err != nil {
				t.Fatal(err)
			}
		}
		_, d := w.device("build-7")
		const form = "Content-Type: application/x-www-form-urlencoded"
		forms := map[string]url.Values{
			"/people/invite":       {"team": {w.team()}, "role": {"member"}},
			relayapi.PathAuthorize: {"port": {"7777"}, "challenge": {secret.Challenge("x")}, "state": {"s"}},
			"/device":              {"code": {d.Code}, "allow": {"yes"}},
		}
		for path, v := range forms {
			token, err := st.AddToken(t.Context(), store.Token{Kind: store.Web, Person: p.ID}, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			status, location := w.meanwhile(path, form+"\r\nCookie: __Host-doppel="+token, v.Encode(), func() {
				if err := takeAway(p); err != nil {
					t.Fatal(err)
				}
			})
			if status != http.StatusSeeOther || !strings.HasPrefix(location, "/login") {
				t.Errorf("%s, %s: %d %s", name, path, status, location)
			}
			restore()
		}
		token, err := st.AddToken(t.Context(), store.Token{Kind: store.Laptop, Person: p.ID}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		body, err := json.Marshal(relayapi.AddTokenRequest{Name: "ci", For: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		if status, _ := w.meanwhile(relayapi.PathAddToken, "Authorization: Bearer "+token, string(body), func() {
			if err := takeAway(p); err != nil {
				t.Fatal(err)
			}
		}); status != http.StatusUnauthorized {
			t.Errorf("%s, a program's token: %d", name, status)
		}
		restore()
		for _, kind := range []store.Kind{store.Web, store.Laptop, store.API, store.Invite, store.Code, store.Device} {
			if left, err := st.Tokens(t.Context(), kind, "", p.ID); err != nil || len(left) > 0 {
				t.Errorf("%s: a token of kind %s is left: %v %v", name, kind, left, err)
			}
		}
	}
}
