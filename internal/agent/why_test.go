package agent

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// An agent tells where each connection and request has gone, by whose rule, and why not where a rule would have it.
func TestWhy(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if h.Intercept == "may" || h.Intercept == "closed" {
			_ = r.Reject(wire.CodeRefused, "nobody listens on 127.0.0.1:3000")
			return
		}
		if st, err := r.Accept(nil); err == nil {
			serveHTTP(st, h.Intercept)
		}
	})
	s := w.mgr.up()
	port := control.Port{Protocol: "TCP", Number: w.cfg.Ports[0].ContainerPort}
	why := func(r *control.Request) control.Why {
		t.Helper()
		var out control.Why
		if err := tunnel.Control(t.Context(), s, control.ManagerWhy, control.AskWhy{Ports: []control.Port{port}, Request: r, Last: 100}, &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	get := func(protocol, user, target string) {
		t.Helper()
		tr := &http.Transport{Protocols: new(http.Protocols), DisableKeepAlives: true}
		tr.Protocols.SetHTTP1(protocol == "1")
		tr.Protocols.SetUnencryptedHTTP2(protocol == "2")
		defer tr.CloseIdleConnections()
		req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", w.cfg.Ports[0].AgentPort, target), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-User", user)
		r, err := (&http.Client{Transport: tr, Timeout: deadline}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Body.Close()
	}
	// told is what has been decided, without the past that was asked for before.
	seen := 0
	told := func() []string {
		t.Helper()
		all := why(nil).Decisions
		var out []string
		for _, d := range all[seen:] {
			if d.Port != port || !d.Client.Addr().IsLoopback() || d.At.IsZero() {
				t.Errorf("%+v", d)
			}
			out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s > %s %s", d.Method, d.Path, d.Taker, d.Why)))
		}
		seen = len(all)
		return out
	}
	want := func(lines ...string) {
		t.Helper()
		if d := cmp.Diff(lines, told()); d != "" {
			t.Error(d)
		}
	}

	get("1", "lou", "/idle")
	want() // there is no intercept, and nobody to be told

	w.table(s, byHeader("lou", "lou"), byHeader("may", "may"))
	get("1", "lou", "/a?secret=1")
	get("1", "may", "/b")
	get("1", "ann", "/"+strings.Repeat("x", 2*maxPath))
	refused := "nobody listens on 127.0.0.1:3000"
	want("GET /a > lou", "GET /b >  "+refused, "GET /"+strings.Repeat("x", maxPath-1)+"… >")

	c := w.dial(w.cfg.Ports[0].AgentPort)
	if _, err := c.Write([]byte("\x00\x01\x02\x03\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	w.until("it is known", func() bool { return len(why(nil).Decisions) > seen })
	_ = c.Close()
	want(">  it is not HTTP")

	w.table(s, control.TableEntry{Intercept: "all"})
	get("1", "lou", "/c")
	w.table(s, control.TableEntry{Intercept: "closed"})
	get("1", "lou", "/c")
	want("> all", ">  "+refused)

	lou := byHeader("lou", "lou")
	lou.Protocol, lou.ContainerPort = "TCP", port.Number
	all := control.TableEntry{Intercept: "all", Protocol: "TCP", ContainerPort: port.Number}
	w.tell(s, control.Table{Items: []control.TableEntry{lou, all}, Away: []string{"lou"}})
	get("1", "lou", "/d")
	w.tell(s, control.Table{Items: []control.TableEntry{all}, Away: []string{"all"}})
	get("1", "lou", "/e")
	want("GET /d >  the laptop does not answer at the moment", ">  the laptop does not answer at the moment")
	if got := why(&control.Request{Verb: "GET", Target: "/"}).Ports[0]; got.Taker != "" || !got.Rules[0].Away {
		t.Error(got)
	}

	// The rules in their order, and what they make of a request.
	lou.Match.Methods = []string{"PUT"}
	tap := byHeader("tap", "lou")
	tap.Wiretap = true
	w.table(s, control.TableEntry{Intercept: "all"}, byHeader("may", "may"), lou, tap)
	for _, tt := range []struct {
		user, method, taker string
		unmet               []string
	}{
		{"lou", "PUT", "lou", []string{"lou:", `may:header("x-user") == "may"`, "all:", "tap:"}},
		{"lou", "GET", "all", []string{"lou:method in (PUT)", `may:header("x-user") == "may"`, "all:", "tap:"}},
		{"may", "PUT", "may", []string{`lou:header("x-user") == "lou"`, "may:", "all:", `tap:header("x-user") == "lou"`}},
	} {
		got := why(&control.Request{Verb: tt.method, Target: "/", Fields: []control.Header{{Name: "X-User", Value: tt.user}}}).Ports
		if len(got) != 1 {
			t.Fatal(got)
		}
		var unmet []string
		for _, r := range got[0].Rules {
			unmet = append(unmet, r.Intercept+":"+r.Unmet)
		}
		if got[0].Taker != tt.taker || !slices.Equal(unmet, tt.unmet) {
			t.Errorf("%s of %s: %s, %q", tt.method, tt.user, got[0].Taker, unmet)
		}
	}
	w.table(s, byHeader("lou", "lou"))
	if got := why(&control.Request{Verb: "GET", Target: "/"}).Ports[0]; got.Taker != "" || got.Rules[0].Unmet == "" {
		t.Error(got)
	}
}

// HTTP/2 is told of stream by stream.
func TestWhyHTTP2(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveBoth(c, "app") }), false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if h.Intercept == "may" {
			_ = r.Reject(wire.CodeRefused, "no")
			return
		}
		if st, err := r.Accept(nil); err == nil {
			serveBoth(st, h.Intercept)
		}
	})
	s := w.mgr.up()
	w.table(s, byHeader("lou", "lou"), byHeader("may", "may"))
	tr := &http.Transport{MaxConnsPerHost: 1, Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: deadline}
	for _, user := range []string{"lou", "ann", "may"} {
		req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/%s?x=1", w.cfg.Ports[0].AgentPort, user), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-User", user)
		r, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Body.Close()
	}
	var out control.Why
	port := control.Port{Protocol: "TCP", Number: w.cfg.Ports[0].ContainerPort}
	if err := tunnel.Control(t.Context(), s, control.ManagerWhy, control.AskWhy{Ports: []control.Port{port}, Last: 100}, &out); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range out.Decisions {
		got = append(got, fmt.Sprintf("%s %s %s %s", d.Method, d.Path, d.Taker, d.Why))
	}
	if d := cmp.Diff([]string{"GET /lou lou ", "GET /ann  ", "GET /may  no"}, got); d != "" {
		t.Error(d)
	}
}

// Only so much is remembered of a port.
func TestDecisions(t *testing.T) {
	var d decisions
	p := agentcfg.Port{Protocol: "TCP", ContainerPort: 80}
	d.note(p, netip.MustParseAddrPort("10.0.0.1:1"), nil, "before", "")
	one, other := control.TableEntry{Protocol: "TCP", ContainerPort: 80}, control.TableEntry{Protocol: "TCP", ContainerPort: 81}
	d.keep(control.Table{Items: []control.TableEntry{one, one}})
	for i := range 3*control.MaxDecisions + 5 {
		d.note(p, netip.MustParseAddrPort("10.0.0.1:1"), nil, fmt.Sprint(i), "")
	}
	key := control.Port{Protocol: "TCP", Number: 80}
	got := d.last(key, 1000)
	if len(got) != control.MaxDecisions || got[len(got)-1].Taker != fmt.Sprint(3*control.MaxDecisions+4) || got[0].Taker != fmt.Sprint(2*control.MaxDecisions+5) {
		t.Errorf("%d from %s to %s", len(got), got[0].Taker, got[len(got)-1].Taker)
	}
	if got := d.last(key, 2); len(got) != 2 || got[1].Taker != fmt.Sprint(3*control.MaxDecisions+4) {
		t.Error(got)
	}
	if got := d.last(control.Port{Protocol: "UDP", Number: 80}, 2); got != nil {
		t.Error(got)
	}
	d.keep(control.Table{Items: []control.TableEntry{other, one}})
	if got := d.last(key, 2); len(got) != 2 {
		t.Errorf("another intercept: %v", got)
	}
	d.keep(control.Table{Items: []control.TableEntry{other}})
	d.note(p, netip.MustParseAddrPort("10.0.0.1:1"), nil, "after", "")
	d.keep(control.Table{Items: []control.TableEntry{one}})
	if got := d.last(key, 2); got != nil {
		t.Errorf("of an earlier intercept: %v", got)
	}
}
