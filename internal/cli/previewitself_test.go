//go:build linux

package cli

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
)

// Whether there is a link that nobody has asked for.
func TestChance(t *testing.T) {
	joined := localapi.RelayResult{URL: "https://relay.test", Cluster: "c1"}
	away := localapi.RelayResult{URL: "https://relay.test", Problem: "HTTP 401"}
	knows := func(cluster string) relayclient.Login {
		return relayclient.Login{Ingresses: map[string]relayclient.Ingress{cluster: {Host: "web.shop", Port: 80}}}
	}
	said := &previewFlags{ingress: localapi.Ingress{Host: "web.shop"}, port: 80}
	for name, tt := range map[string]struct {
		p        *previewFlags
		r        localapi.RelayResult
		login    relayclient.Login
		loggedIn bool
		want     chance
	}{
		"no relay":                        {&previewFlags{}, localapi.RelayResult{}, knows("c1"), true, noChance},
		"not logged in":                   {&previewFlags{}, joined, relayclient.Login{}, false, noChance},
		"not logged in, ingress said":     {said, joined, relayclient.Login{}, false, noChance},
		"not joined":                      {&previewFlags{}, away, knows("c1"), true, notJoined},
		"not joined, never made one":      {&previewFlags{}, away, relayclient.Login{}, true, noChance},
		"ingress unknown":                 {&previewFlags{}, joined, relayclient.Login{}, true, ingressAsked},
		"ingress of another cluster":      {&previewFlags{}, joined, knows("c2"), true, ingressAsked},
		"ingress known":                   {&previewFlags{}, joined, knows("c1"), true, canLink},
		"ingress said for the first time": {said, joined, relayclient.Login{}, true, canLink},
	} {
		if got := tt.p.chance(tt.r, tt.login, tt.loggedIn); got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
}

// linked is a machine whose user is logged in at a relay, and whose daemon answers.
type linked struct {
	*fakeDaemon
	created []relayapi.CreatePreviewRequest
	deleted int
	status  int              // of making a preview
	shows   relayapi.Preview // what is made
	hold    chan struct{}    // the relay answers when it is closed
}

// newLinked has the daemon answer an intercept with what is given, as a result or an error.
func newLinked(t *testing.T, ingress, intercept string) *linked {
	t.Helper()
	home := atHome(t)
	l := &linked{status: http.StatusOK, shows: relayapi.Preview{ID: "idididididididid", URL: "https://brave-otter.relay.test/", Host: "brave-otter", New: true}, hold: make(chan struct{})}
	close(l.hold)
	relay, ca := fakeRelay(t, map[string]func(*http.Request) (int, any){
		relayapi.PathCreatePreview: func(r *http.Request) (int, any) {
			var req relayapi.CreatePreviewRequest
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil || r.Header.Get("Authorization") != "Bearer doppel_laptop_X" {
				t.Errorf("%v %v", err, r.Header)
			}
			select {
			case <-l.hold:
			case <-r.Context().Done():
			}
			l.created = append(l.created, req)
			if l.status != http.StatusOK {
				return l.status, relayapi.Problem{Error: "no"}
			}
			return l.status, l.shows
		},
		relayapi.PathDeletePreview: func(*http.Request) (int, any) { l.deleted++; return http.StatusOK, struct{}{} },
	})
	pem, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	login := map[string]any{"url": relay, "token": "doppel_laptop_X", "ca": string(pem)}
	if ingress != "" {
		login["ingresses"] = map[string]any{"c1": json.RawMessage(ingress)}
	}
	b, err := json.Marshal(map[string]any{"logins": []any{login}})
	if err == nil {
		err = os.Mkdir(filepath.Join(home, "doppel"), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(home, "doppel", "relays.json"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	joined := `{"namespace": "shop", "url": "` + relay + `", "cluster": "c1"}`
	l.fakeDaemon = &fakeDaemon{answers: map[string][]answer{"relay": {{Result: json.RawMessage(joined)}}, "intercept": {{Result: json.RawMessage(intercept)}}}}
	if strings.Contains(intercept, `"kind"`) && strings.Contains(intercept, `"error"`) {
		l.answers["intercept"] = []answer{{Error: json.RawMessage(intercept)}}
	}
	ln, err := localapi.Listen(filepath.Join(home, "doppel", "daemon.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: l.fakeDaemon}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close() })
	return l
}

// asked is the request for an intercept that the daemon got.
func (l *linked) asked(t *testing.T) localapi.InterceptRequest {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var req localapi.InterceptRequest
	i := slices.IndexFunc(l.requests, func(s string) bool { return strings.HasPrefix(s, "intercept ") })
	if i < 0 {
		t.Fatalf("no intercept: %q", l.requests)
	}
	if err := json.Unmarshal([]byte(strings.TrimPrefix(l.requests[i], "intercept ")), &req); err != nil {
		t.Fatal(err)
	}
	return req
}

const (
	webShop    = `{"host": "web.shop", "port": 80, "l5Host": "shop.example"}`
	ofTCP      = `{"name": "web", "namespace": "shop", "kind": "Deployment", "workload": "web", "mode": "intercept", "state": "ACTIVE", "ports": [{"port": 80, "protocol": "TCP", "target": "127.0.0.1:3000"}], "mine": true}`
	ofUDP      = `{"name": "web", "namespace": "shop", "kind": "Deployment", "workload": "web", "mode": "intercept", "state": "ACTIVE", "ports": [{"port": 53, "protocol": "UDP", "target": "127.0.0.1:3000"}], "mine": true}`
	notTaken   = `{"kind": "conflict", "error": "eve has it", "hint": "ask eve"}`
	seesTheURL = "   Preview URL    : https://brave-otter.relay.test/\n   Seen by        : the members of your team\n"
)

// An intercept takes what it would have taken, and has a link besides.
func TestByItself(t *testing.T) {
	for name, tt := range map[string]struct {
		args []string
		all  bool
	}{
		"whole":         {nil, true},
		"all, by name":  {[]string{"--http-match=all"}, true},
		"by request":    {[]string{"--http-path-prefix=/api/"}, false},
		"and a carrier": {[]string{"--preview-propagate=baggage"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLinked(t, webShop, ofTCP)
			code, out, said := doppel(t, append([]string{"intercept", "web", "-p", "3000"}, tt.args...)...)
			if code != 0 || !strings.HasSuffix(out, seesTheURL) || said != "" {
				t.Errorf("%d %q %q", code, out, said)
			}
			req := l.asked(t)
			if req.Preview == nil || req.Preview.ID != l.shows.ID || req.Preview.Ingress.L5Host != "shop.example" || req.All != tt.all || req.Match.IsZero() != tt.all {
				t.Errorf("%+v", req)
			}
			if len(l.created) != 1 || l.created[0].Namespace != "shop" || l.created[0].Workload != "web" || l.created[0].Authority != "shop.example" || l.deleted != 0 {
				t.Errorf("%+v, %d deleted", l.created, l.deleted)
			}
			if name == "and a carrier" && l.created[0].Propagate != "baggage" {
				t.Errorf("%+v", l.created)
			}
		})
	}
	t.Run("JSON", func(t *testing.T) {
		newLinked(t, webShop, ofTCP)
		var out struct {
			PreviewURL string `json:"previewURL"`
		}
		code, text, said := doppel(t, "intercept", "web", "-p", "3000", "-o", "json")
		if err := json.Unmarshal([]byte(text), &out); code != 0 || err != nil || out.PreviewURL != "https://brave-otter.relay.test/" || said != "" {
			t.Errorf("%d %q %q", code, text, said)
		}
	})
}

// What keeps an intercept from having a link is told, at most, and the intercept comes about without.
func TestNotByItself(t *testing.T) {
	later := "doppel: hint: make one later with: doppel preview create web\n"
	for name, tt := range map[string]struct {
		ingress, intercept string
		change             func(*linked)
		args               []string
		said               string // RELAY: its URL
		deleted            int
	}{
		"forced off":           {ingress: webShop, args: []string{"--preview-url=false"}},
		"ingress unknown":      {said: "doppel: hint: your team can see it through a link: doppel preview create web\n"},
		"UDP, as it says":      {ingress: webShop, intercept: ofUDP, args: []string{"-p", "3000:53/udp"}},
		"UDP, as it turns out": {ingress: webShop, intercept: ofUDP, args: []string{"-p", "3000:dns"}, deleted: 1},
		"UDP, ingress unknown": {intercept: ofUDP, args: []string{"-p", "3000:dns"}},
		"relay broken": {
			ingress: webShop, change: func(l *linked) { l.status = 500 },
			said: "doppel: warning: no preview link: relay RELAY: no\n" + later,
		},
		"login ended": {
			ingress: webShop, change: func(l *linked) { l.status = 401 },
			said: "doppel: warning: no preview link: relay RELAY: no\ndoppel: hint: log in with: doppel login RELAY\n",
		},
		"published": {
			ingress: webShop, change: func(l *linked) { l.shows.Public, l.shows.New = true, false },
			said: "doppel: hint: its link of before is seen by everybody who has the link; to show it there again: doppel preview create web\n",
		},
		"shared": {
			ingress: webShop, change: func(l *linked) { l.shows.Shared, l.shows.New = []string{"eve@example.com"}, false },
			said: "doppel: hint: its link of before is seen by the members of your team, eve@example.com; to show it there again: doppel preview create web\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.intercept == "" {
				tt.intercept, tt.args = ofTCP, append([]string{"-p", "3000"}, tt.args...)
			}
			l := newLinked(t, tt.ingress, tt.intercept)
			if tt.change != nil {
				tt.change(l)
			}
			code, out, said := doppel(t, append([]string{"intercept", "web"}, tt.args...)...)
			logins, err := relayclient.Load(filepath.Join(os.Getenv("HOME"), "doppel", "config.yaml"), "", "")
			if err != nil {
				t.Fatal(err)
			}
			if code != 0 || strings.Contains(out, "Preview URL") || said != strings.ReplaceAll(tt.said, "RELAY", logins.Logins[0].URL) {
				t.Errorf("%d %q %q", code, out, said)
			}
			if req := l.asked(t); (req.Preview != nil || req.All) && tt.deleted == 0 || l.deleted != tt.deleted {
				t.Errorf("%+v, %d deleted", req, l.deleted)
			}
		})
	}
}

// A relay that hangs holds up an intercept for previewPatience and no longer; and an intercept that fails leaves no new link behind.
func TestByItselfFailures(t *testing.T) {
	t.Run("hangs", func(t *testing.T) {
		l := newLinked(t, webShop, ofTCP)
		l.hold = make(chan struct{})
		start := time.Now()
		code, out, said := doppel(t, "intercept", "web", "-p", "3000")
		if d := time.Since(start); d < previewPatience || d > previewPatience+2*time.Second {
			t.Errorf("it took %v", d)
		}
		if code != 0 || strings.Contains(out, "Preview URL") || !strings.Contains(said, "did not answer within 3s") || l.asked(t).Preview != nil {
			t.Errorf("%d %q %q", code, out, said)
		}
	})
	for name, isNew := range map[string]bool{"fails": true, "fails, of an old link": false} {
		t.Run(name, func(t *testing.T) {
			l := newLinked(t, webShop, notTaken)
			l.shows.New = isNew
			if code, _, said := doppel(t, "intercept", "web", "-p", "3000"); code != 1 || !strings.Contains(said, "eve has it") || (l.deleted == 1) != isNew {
				t.Errorf("%d %q, %d deleted", code, said, l.deleted)
			}
		})
	}
}

// A link for an intercept that is there: where it is, its daemon knows, also for people who may list workloads in no other namespace, and with several connections.
func TestPreviewCreate(t *testing.T) {
	session := func(connection, intercepts string) string {
		return `{"connection": "` + connection + `", "namespace": "default", "intercepts": [` + intercepts + `]}`
	}
	for name, tt := range map[string]struct {
		status, use, said string
		code              int
	}{
		"one connection":       {status: `"connected": true, "session": ` + session("prod", ofTCP), use: "prod"},
		"of two the second":    {status: `"connected": true, "session": ` + session("prod", "") + `, "others": [` + session("lab", ofTCP) + `]`, use: "lab"},
		"none of its name":     {status: `"connected": true, "session": ` + session("prod", ""), code: 1, said: `no intercept "web" of yours`},
		"no connection at all": {status: `"connected": false`, code: 4, said: "not connected"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLinked(t, webShop, ofTCP)
			l.answers["status"] = []answer{{Result: json.RawMessage(`{"version": "1", ` + tt.status + `}`)}}
			l.answers["list"] = []answer{{Error: json.RawMessage(`{"kind": "denied", "error": "deployments.apps is forbidden at the cluster scope"}`)}}
			l.answers["preview"] = []answer{{Result: json.RawMessage(ofTCP)}}
			code, out, said := doppel(t, "preview", "create", "web")
			if code != tt.code || !strings.Contains(said, tt.said) || code == 0 && (out != seesTheURL || said != "") {
				t.Fatalf("%d %q %q", code, out, said)
			}
			if code != 0 {
				return
			}
			if len(l.created) != 1 || l.created[0].Namespace != "shop" || l.created[0].Workload != "web" {
				t.Errorf("%+v", l.created)
			}
			for _, method := range []string{"relay", "preview"} {
				if !slices.ContainsFunc(l.requests, func(r string) bool { return strings.HasPrefix(r, method+` {"use":"`+tt.use+`"`) }) {
					t.Errorf("%s is not asked of %s: %q", method, tt.use, l.requests)
				}
			}
		})
	}
}
