package manager

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// A laptop that has an intercept hears from the agents of its workload what they do with its ports, and no other does.
func TestWhy(t *testing.T) {
	l := newLaptop(t)
	mine, theirs := intercept("in-1", "ada", "mine"), intercept("in-2", "bob", "theirs")
	pods := webPods()
	for _, p := range pods[2:] {
		p.(*corev1.Pod).Annotations = map[string]string{agentcfg.Annotation: agentFor(8080)}
	}
	w := newWorld(t, append(pods, session("mine", "ada", l.id.Fingerprint()), mine, theirs)...)
	s, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	why := func(ask control.AskWhy) (control.Why, wire.Code) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		var out control.Why
		err := tunnel.Control(ctx, s, control.LaptopWhy, ask, &out)
		return out, codeOf(t, err)
	}
	in := engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080)}
	other := engagement{UID: "in-2", Session: "theirs", Workload: web, Ports: tcp(8080)}
	egress := engagement{UID: "out", Session: "mine", Workload: web, Ports: tcp(8080), Mode: v1alpha1.ModeEgress}
	ingest := engagement{UID: "ingest", Session: "mine", Workload: web, Mode: v1alpha1.ModeIngest}
	for _, g := range []engagement{in, other, egress, ingest} {
		w.engaged.set(g)
	}
	if _, code := why(control.AskWhy{Intercept: "in-1"}); code != wire.CodeUnreachable {
		t.Errorf("no agent: %s", code)
	}
	for _, uid := range []string{"in-2", "out", "ingest", "unknown", ""} {
		if _, code := why(control.AskWhy{Intercept: uid, Last: 10}); code != wire.CodeNotFound {
			t.Errorf("%q: %s", uid, code)
		}
	}

	rules := func(uids ...string) []control.PortRules {
		p := control.PortRules{Port: tcp(8080)[0], Taker: "in-1"}
		for _, uid := range uids {
			p.Rules = append(p.Rules, control.Rule{Intercept: uid, Match: match.Preview(uid)})
		}
		return []control.PortRules{p}
	}
	at := func(sec int64, path string) control.Decision {
		return control.Decision{At: time.Unix(sec, 0).UTC(), Port: tcp(8080)[0], Method: "GET", Path: path}
	}
	one, two := w.agent("web-1"), w.agent("web-2")
	w.until("both are there", func() bool { return len(w.agents.all(web)) == 2 })
	set := func(a *agent, why control.Why, older bool) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.why, a.older = why, older
	}
	set(one, control.Why{Ports: rules("in-2", "in-1"), Decisions: []control.Decision{at(1, "/a"), at(3, "/c")}}, false)
	set(two, control.Why{Ports: rules("in-1"), Decisions: []control.Decision{at(2, "/b"), at(4, "/d")}}, false)

	req := &control.Request{Verb: "GET", Target: "/"}
	got, code := why(control.AskWhy{Intercept: "in-1", Ports: tcp(22), Request: req, Last: 3})
	if code != wire.CodeNone {
		t.Fatal(code)
	}
	from := func(d control.Decision, pod string) control.Decision { d.Pod = pod; return d }
	named := rules("in-2", "in-1")
	named[0].Rules[0].User, named[0].Rules[0].Name = "bob", "web"
	named[0].Rules[1].User, named[0].Rules[1].Name, named[0].Rules[1].Mine = "ada", "web", true
	want := control.Why{
		Ports: named, Pods: []string{"web-1", "web-2"}, Differing: []string{"web-2"},
		Decisions: []control.Decision{from(at(2, "/b"), "web-2"), from(at(3, "/c"), "web-1"), from(at(4, "/d"), "web-2")},
	}
	if d := cmp.Diff(want, got, cmpopts.IgnoreFields(control.Rule{}, "Since"), cmpopts.EquateComparable(control.Decision{}.Client)); d != "" {
		t.Error(d)
	}
	one.mu.Lock()
	if d := cmp.Diff(control.AskWhy{Ports: tcp(8080), Request: req, Last: 3}, one.askWhy); d != "" {
		t.Errorf("the agent was asked: %s", d)
	}
	one.mu.Unlock()

	set(two, control.Why{}, true)
	got, code = why(control.AskWhy{Intercept: "in-1", Last: 1000})
	if d := cmp.Diff([][]string{{"web-1"}, {"web-2"}, nil}, [][]string{got.Pods, got.Silent, got.Differing}); d != "" || len(got.Decisions) != 2 {
		t.Error(code, d, got.Decisions)
	}
}
