package manager

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// A laptop gets the environment and the files of the container that its own session has an intercept of, and of no other.
func TestApps(t *testing.T) {
	l := newLaptop(t)
	pods := webPods()
	for i, shows := range []string{`, "apps": [{"container": "app", "prefix": "P_"}]`, ""} { // the second one's agent is of an earlier doppel
		pods[2+i].(*corev1.Pod).Annotations = map[string]string{agentcfg.Annotation: strings.TrimSuffix(agentFor(8080), "}") + shows + "}"}
	}
	w := newWorld(t, append(pods, session("mine", "ada", l.id.Fingerprint()))...)
	w.cfg.HiddenVariables = "OTHER,HIDDEN"
	s, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	environment := func(uid string) (control.Environment, wire.Code) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		var out control.Environment
		err := tunnel.Control(ctx, s, control.LaptopEnvironment, control.AskEnvironment{Intercept: uid, Container: "other"}, &out)
		return out, codeOf(t, err)
	}
	files := func(uid string) (*mux.Stream, wire.Code) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		st, _, err := s.Open(ctx, wire.AppendFiles(nil, uid))
		return st, codeOf(t, err)
	}
	in := engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Shown: "app"}
	theirs := in
	theirs.UID, theirs.Session = "in-2", "theirs"
	tap := engagement{UID: "tap", Session: "mine", Workload: web, Ports: tcp(8080), Mode: v1alpha1.ModeWiretap}
	for _, g := range []engagement{in, theirs, tap} {
		w.engaged.set(g)
	}
	if _, code := environment("in-1"); code != wire.CodeUnreachable {
		t.Errorf("no agent: %s", code)
	}
	w.agent("web-2")
	w.until("the older agent knows", func() bool { return w.agents.serves("web-2", "in-1") })
	if _, code := environment("in-1"); code != wire.CodeNotFound {
		t.Errorf("an older agent's environment: %s", code)
	}
	if _, code := files("in-1"); code != wire.CodeNotFound {
		t.Errorf("an older agent's files: %s", code)
	}
	a := w.agent("web-1")
	w.until("the agent knows", func() bool { return w.agents.serves("web-1", "in-1") })
	a.mu.Lock()
	shown := a.tables[len(a.tables)-1].Shown
	a.mu.Unlock()
	if d := cmp.Diff([]control.Shown{{Intercept: "in-1", Container: "app"}, {Intercept: "in-2", Container: "app"}}, shown); d != "" {
		t.Error(d)
	}
	out, code := environment("in-1")
	if d := cmp.Diff(control.Environment{Container: "app", Pod: "web-1", Variables: map[string]string{"A": "1"}, Hidden: []string{"OTHER", "HIDDEN"}}, out); code != wire.CodeNone || d != "" {
		t.Error(code, d)
	}
	st, code := files("in-1")
	if code != wire.CodeNone {
		t.Fatalf("files: %s", code)
	}
	if b, err := io.ReadAll(st); string(b) != "files of in-1" {
		t.Errorf("%q, %v", b, err)
	}
	for _, uid := range []string{"in-2", "tap", "unknown"} {
		if _, code := environment(uid); code != wire.CodeNotFound {
			t.Errorf("environment of %s: %s", uid, code)
		}
		if _, code := files(uid); code != wire.CodeNotFound {
			t.Errorf("files of %s: %s", uid, code)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Equal(a.asked, []string{"app"}) {
		t.Errorf("asked for %v", a.asked)
	}
}

// codeOf is why the other end said no.
func codeOf(t *testing.T, err error) wire.Code {
	t.Helper()
	var re *mux.RejectError
	if errors.As(err, &re) {
		return re.Code
	}
	if err != nil {
		t.Fatal(err)
	}
	return wire.CodeNone
}

// An ingest takes no port, and wants an agent that has its container.
func TestIngest(t *testing.T) {
	in := intercept("in-1", "ada", "mine")
	in.Spec.Mode = v1alpha1.ModeIngest
	r := newReconciler(t, in)
	r.addPod("old", "rs-1", withAgent(8080), ready1)
	r.acknowledge("old", "in-1")
	st, _ := r.look("in-1")
	wantStatus(t, "an agent without it", st, v1alpha1.InterceptPending, "", "restarting the workload")
	if n := r.restarts(); n != 1 || st.Container != "app" || len(st.Ports) != 0 {
		t.Errorf("%d restarts, %+v", n, st)
	}
	if g, _ := r.engaged.get("in-1"); g.Shown != "app" || len(g.Ports) != 0 {
		t.Errorf("%+v", g)
	}
	pod := webPod("new", "rs-1")
	delete(pod.Labels, "app") // no service leads to it, and it has no port
	pod.Spec.Containers[0].Ports = nil
	out, err := r.injectPod(t.Context(), &pod)
	if err != nil || out == nil {
		t.Fatalf("not injected: %v", err)
	}
	if c := agentOf(out); c == nil || !c.Shows("app") || len(c.Ports) != 0 {
		t.Errorf("%+v", c)
	}
	if f := (fit{shown: "app"}); !f.fits(out) {
		t.Error("such a pod does not do")
	}
	r.addPod("one", "rs-1", withAgent(8080), ready1, func(p *corev1.Pod) { p.Annotations = out.Annotations })
	r.acknowledge("one", "in-1")
	st, _ = r.look("in-1")
	wantStatus(t, "one pod, while the old one is still there", st, v1alpha1.InterceptActive, "", "")
	r.must(r.kc.Delete(t.Context(), &corev1.Pod{ObjectMeta: meta("shop", "one")}))
	st, _ = r.look("in-1")
	wantStatus(t, "none", st, v1alpha1.InterceptPending, reasonInterrupted, "waiting for")
}
