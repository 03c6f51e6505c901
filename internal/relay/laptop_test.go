package relay

import (
	"context"
	"html"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// machine is a laptop that is present at the relay as doppel's daemon makes it; nothing of it is fake but its clusters.
type machine struct {
	w        *world
	presence *relayclient.Presence
	asked    chan relayapi.Wish // what it is to do
	done     chan error         // what becomes of that
	ended    chan relayapi.Wish // what it is to end; done says what becomes of that

	mu sync.Mutex
	// guarded by mu
	login relayclient.Login
	conns []relayapi.Connection
}

// in is the same laptop in a part of a test.
func (l *laptop) in(w *world) *laptop { return &laptop{w, l.token} }

// present makes a laptop present.
func (l *laptop) present(host string, conns ...relayapi.Connection) *machine {
	w := l.w
	w.t.Helper()
	ca, err := os.ReadFile(filepath.Join(w.relay.cfg.DataDir, "ca.pem"))
	if err != nil {
		w.t.Fatal(err)
	}
	m := &machine{w: w, asked: make(chan relayapi.Wish), done: make(chan error), ended: make(chan relayapi.Wish), login: relayclient.Login{URL: "https://" + domain, Token: l.token, CA: string(ca)}, conns: conns}
	m.presence = relayclient.NewPresence(relayclient.PresenceConfig{
		Logins: func() ([]relayclient.Login, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			return []relayclient.Login{m.login}, nil
		},
		Machine: m, Host: host, Dial: w.dial, Log: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() { m.presence.Run(ctx) })
	w.t.Cleanup(func() {
		cancel()
		run.Wait()
	})
	w.until("the laptop", func() bool { return w.laptop(host) != "" })
	return m
}

// laptop is the ID of a laptop that is present and has told of itself.
func (w *world) laptop(host string) string {
	for _, l := range w.relay.laptops.All() {
		if l.State.Host == host {
			return l.ID
		}
	}
	return ""
}

func (m *machine) say(p relayapi.Permission) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.login.Permission = p
}

func (m *machine) Connections(relay string) []relayapi.Connection {
	if relay != "https://"+domain {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conns
}

func (m *machine) Workloads(_ context.Context, _ string, req relayapi.WorkloadsRequest) (relayapi.Workloads, error) {
	if req.Namespace != "shop" {
		return relayapi.Workloads{}, uerr.New(uerr.Denied, "", "you may not list workloads in %s", req.Namespace)
	}
	return relayapi.Workloads{Workloads: []string{"Deployment/web", "StatefulSet/db"}}, nil
}

func (m *machine) Intercept(ctx context.Context, _ string, w relayapi.Wish, progress func(string)) (func(context.Context) error, error) {
	progress("Waiting for the agent")
	select {
	case m.asked <- w:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case err := <-m.done:
		return func(context.Context) error { m.ended <- w; return <-m.done }, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// idle fails if the machine was asked for anything.
func (m *machine) idle() {
	m.w.t.Helper()
	select {
	case w := <-m.asked:
		m.w.t.Fatalf("the laptop was made to %v", w)
	default:
	}
}

var form = url.Values{"connection": {"prod"}, "namespace": {"shop"}, "workload": {"deployment/web"}, "port": {"http"}, "local": {"3000"}, "header": {"x-user"}, "value": {"ann"}}

var wish = relayapi.Wish{Connection: "prod", Namespace: "shop", Workload: "deployment/web", Port: "http", Local: 3000, Header: "x-user", Value: "ann"}

// shows waits until a page shows something.
func (b *browser) shows(page, part string) {
	b.w.t.Helper()
	var last answer
	defer func() {
		if b.w.t.Failed() {
			b.w.t.Logf("%v", last)
		}
	}()
	b.w.until(part, func() bool {
		last = b.visit("https://" + domain + page)
		return strings.Contains(html.UnescapeString(last.body), part)
	})
}

// An intercept is started from the page, when its user has allowed that on the laptop.
func TestLaptop(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	c := ann.login().cluster("prod", echo)
	bob := w.member("bob@example.com", w.team(), store.Member)
	oli, _ := w.others()
	m := ann.login().present("thinkpad", relayapi.Connection{Name: "prod", Cluster: c.id, Namespace: "shop"})
	page := "/laptops/" + w.laptop("thinkpad")

	// who sees it
	if a := ann.visit("https://" + domain + "/"); !strings.Contains(a.body, `href="`+page+`"`) || !strings.Contains(a.body, "thinkpad") {
		t.Errorf("its owner: %v", a)
	}
	if a := bob.visit("https://" + domain + "/"); strings.Contains(a.body, page) || !strings.Contains(a.body, "thinkpad") || !strings.Contains(a.body, "of ann@example.com") {
		t.Errorf("a colleague: %v", a)
	}
	if a := oli.visit("https://" + domain + "/"); strings.Contains(a.body, "thinkpad") {
		t.Errorf("another team: %v", a)
	}

	// the first wish waits for permission
	if a := ann.visit("https://" + domain + page); a.status != http.StatusOK || strings.Contains(a.body, "Deployment/web") || !strings.Contains(a.body, "doppel relay allow") {
		t.Errorf("nobody was asked: %v", a)
	}
	if a := ann.submit(page+"/intercept", form); a.status != http.StatusOK || !strings.Contains(a.body, "deployment/web") {
		t.Errorf("%v", a)
	}
	ann.shows(page, "Waiting for your permission: run <code>doppel relay allow</code>")
	if at := m.presence.At(); len(at) != 1 || len(at[0].Waiting) != 1 || at[0].Waiting[0] != wish || at[0].Permission != "" || !at[0].Joined {
		t.Errorf("%+v", at)
	}
	m.idle()
	m.say(relayapi.Allowed)
	if got := <-m.asked; got != wish {
		t.Errorf("asked for %+v", got)
	}
	ann.shows(page, "Waiting for the agent")
	m.done <- nil
	ann.shows(page, `state good">active<`)
	ann.shows(page, "doppel leave web")
	// and ended there
	if a := ann.submit(page+"/end", url.Values{"wish": {"2"}}); a.status != http.StatusConflict || !strings.Contains(a.body, "not active") {
		t.Errorf("none: %v", a)
	}
	go func() { m.done <- uerr.New(uerr.Cluster, "", "the API server does not answer") }()
	go func() { <-m.ended }()
	if a := ann.submit(page+"/end", url.Values{"wish": {"1"}}); a.status != http.StatusConflict || !strings.Contains(a.body, "does not answer") || !strings.Contains(a.body, "active") {
		t.Errorf("it fails: %v", a)
	}
	go func() {
		if got := <-m.ended; got != wish {
			t.Errorf("ended %+v", got)
		}
		m.done <- nil
	}()
	if a := ann.submit(page+"/end", url.Values{"wish": {"1"}}); a.status != http.StatusOK || !strings.Contains(a.body, `state">ended<`) || strings.Contains(a.body, page+"/end") {
		t.Errorf("%v", a)
	}
	if a := ann.visit("https://" + domain + page); strings.Contains(a.body, "Waiting for the agent") {
		t.Errorf("what was said on the way stays: %v", a)
	}
	ann.shows(page, `<option value="StatefulSet/db">`)
	if at := m.presence.At(); len(at[0].Waiting) != 0 {
		t.Errorf("%+v", at)
	}

	// what fails says why, and what to do
	ann.submit(page+"/intercept", form)
	<-m.asked
	m.done <- uerr.New(uerr.NotFound, "see what there is with: doppel list", "no workload %q", "web")
	ann.shows(page, `no workload "web"`)
	ann.shows(page, "see what there is with: doppel list")

	if a := ann.visit("https://" + domain + page + "?connection=prod&namespace=kube-system"); !strings.Contains(a.body, "may not list workloads in kube-system") {
		t.Errorf("what its user may not see: %v", a)
	}
	m.say(relayapi.Denied)
	ann.shows(page, "You have denied this relay that")
	ann.submit(page+"/intercept", form)
	ann.shows(page, "the user of the laptop has denied this relay")
	m.idle()

	// a laptop that is not connected any more is gone
	m.mu.Lock()
	m.conns = nil
	m.mu.Unlock()
	w.until("the end of its presence", func() bool { return w.laptop("thinkpad") == "" })
	if a := ann.visit("https://" + domain + page); a.status != http.StatusNotFound {
		t.Errorf("%v", a)
	}
}

// Nobody but its owner, logged in on both sides, makes a laptop do anything.
func TestAttackLaptop(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	l := ann.login()
	c := l.cluster("prod", echo)
	bob := w.member("bob@example.com", w.team(), store.Admin)
	m := l.present("thinkpad", relayapi.Connection{Name: "prod", Cluster: c.id, Namespace: "shop"})
	m.say(relayapi.Allowed)
	id := w.laptop("thinkpad")
	for _, path := range []string{"/laptops/" + id, "/laptops/none"} { // there is nothing to tell the two apart
		if a := bob.visit("https://" + domain + path); a.status != http.StatusNotFound || !strings.Contains(a.body, "Not connected") {
			t.Errorf("an admin of the team: %v", a)
		}
		if a := bob.submit(path+"/intercept", form); a.status != http.StatusNotFound {
			t.Errorf("an admin of the team: %v", a)
		}
		if a := bob.submit(path+"/end", url.Values{"wish": {"1"}}); a.status != http.StatusNotFound {
			t.Errorf("an admin of the team: %v", a)
		}
		if a := w.browser().still().submit(path+"/end", url.Values{"wish": {"1"}}); a.status != http.StatusSeeOther {
			t.Errorf("a stranger: %v", a)
		}
		if a := w.browser().still().submit(path+"/intercept", form); a.status != http.StatusSeeOther {
			t.Errorf("a stranger: %v", a)
		}
	}
	for name, bad := range map[string]url.Values{
		"a command":         {"workload": {"web -- sh"}},
		"a file":            {"workload": {"../../etc/passwd"}},
		"another machine":   {"local": {"10.0.0.1:22"}},
		"no port":           {"local": {"0"}},
		"a port of UDP":     {"port": {"53/udp"}},
		"a second header":   {"value": {"a\r\nx: b"}},
		"no such namespace": {"namespace": {"shop/../x"}},
	} {
		f := url.Values{}
		for k, v := range form {
			f[k] = v
		}
		for k, v := range bad {
			f[k] = v
		}
		if a := ann.submit("/laptops/"+id+"/intercept", f); a.status != http.StatusBadRequest || !strings.Contains(a.body, `role="alert"`) {
			t.Errorf("%s: %v", name, a)
		}
	}
	m.idle()

	// A cluster that somebody else's laptop says it is in does not show it to that cluster's team.
	oli, _ := w.others()
	oli.login().present("spoof", relayapi.Connection{Name: "prod", Cluster: c.id, Namespace: "shop"})
	if a := bob.visit("https://" + domain + "/"); strings.Contains(a.body, "spoof") {
		t.Errorf("%v", a)
	}
	// So many wishes at once, and no more.
	for range 4 {
		ann.submit("/laptops/"+id+"/intercept", form)
	}
	if a := ann.submit("/laptops/"+id+"/intercept", form); a.status != http.StatusTooManyRequests {
		t.Errorf("one more than may be: %v", a)
	}
	// Tokens of other kinds do not join.
	for name, token := range map[string]string{"none": "", "a cluster's": c.token, "a browser's": ann.Jar.Cookies(&url.URL{Scheme: "https", Host: domain})[0].Value} {
		if conn, err := w.upgradeAt(relayapi.LaptopPath, token); err == nil || !strings.Contains(err.Error(), "401") {
			t.Errorf("%s: %v %v", name, conn, err)
		}
	}
	// A login that ends, ends the laptop within a second.
	conn, err := w.upgradeAt(relayapi.LaptopPath, oli.login().token)
	if err != nil {
		t.Fatal(err)
	}
	s, err := mux.New(conn, mux.Config{Initiator: true})
	if err != nil {
		t.Fatal(err)
	}
	oli.submit("/logout", nil)
	select {
	case <-s.Done():
		t.Error("a browser's logout ended the laptop's login")
	default:
	}
	if err := w.relay.store.SetMember(t.Context(), w.teamNamed("others"), w.person("bob@example.com").ID, store.Admin); err != nil { // a team keeps an admin
		t.Fatal(err)
	}
	start := time.Now()
	if err := w.relay.store.SetDisabled(t.Context(), w.person("oli@example.com").ID, true); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Done():
	case <-time.After(3 * time.Second):
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("cut after %v", d)
	}
	l.must(relayapi.PathLogout, struct{}{}, nil)
	w.until("the end of the laptop", func() bool { return w.laptop("thinkpad") == "" })
	if a := ann.submit("/laptops/"+id+"/intercept", form); a.status != http.StatusNotFound {
		t.Errorf("a login that has ended: %v", a)
	}
}
