package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// webPods are Deployment web in namespace shop with two pods: web-1 has an agent, web-2 has none.
func webPods() []client.Object {
	p1 := &corev1.Pod{ObjectMeta: owned(meta("shop", "web-1"), "ReplicaSet", "web-rs")}
	p1.Annotations = map[string]string{agentcfg.Annotation: "{}"}
	return []client.Object{
		&appsv1.Deployment{ObjectMeta: meta("shop", "web")},
		&appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "web-rs"), "Deployment", "web")},
		p1, &corev1.Pod{ObjectMeta: owned(meta("shop", "web-2"), "ReplicaSet", "web-rs")},
	}
}

func TestAgentAuthorize(t *testing.T) {
	for name, tt := range map[string]struct {
		hello wire.Hello
		token claims
		want  string // "" is welcome
	}{
		"welcome":                    {wire.Hello{Role: wire.RoleAgent}, token("shop", "web-1"), ""},
		"says it is another pod":     {wire.Hello{Role: wire.RoleAgent, Pod: "db-1", Namespace: "data"}, token("shop", "web-1"), ""}, // only the token counts
		"a laptop":                   {wire.Hello{Role: wire.RoleLaptop}, token("shop", "web-1"), "does not connect here"},
		"a person":                   {wire.Hello{Role: wire.RoleAgent}, change(token("shop", "web-1"), func(c *claims) { c.Subject = "ada" }), "not valid"},
		"bound to no pod":            {wire.Hello{Role: wire.RoleAgent}, token("shop", ""), "not valid"},
		"a pod without an agent":     {wire.Hello{Role: wire.RoleAgent}, token("shop", "web-2"), "no agent"},
		"a pod that is gone":         {wire.Hello{Role: wire.RoleAgent}, token("shop", "web-9"), "not found"},
		"a pod of another namespace": {wire.Hello{Role: wire.RoleAgent}, token("other", "web-1"), "not found"},
		"a pod of an earlier time": {wire.Hello{Role: wire.RoleAgent}, change(token("shop", "web-1"), func(c *claims) {
			c.Kubernetes["pod"] = map[string]any{"name": "web-1", "uid": "old"}
		}), "no agent"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, webPods()...)
			tt.hello.Token = sign(t, jose.ES256, signKey(), "k", tt.token)
			conn := &agentConn{}
			err := w.agents.authorize(t.Context(), tt.hello, conn)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
			if want := (workloadKey{"shop", "Deployment", "web"}); err == nil && (conn.workload != want || conn.pod != "web-1" || conn.podName != "shop/web-1") {
				t.Errorf("taken for %+v", conn)
			}
		})
	}
}

func change[T any](v T, fn func(*T)) T {
	fn(&v)
	return v
}

func TestWorkloadOf(t *testing.T) {
	w := newWorld(t,
		&appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "web-rs"), "Deployment", "web")},
		&appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "canary-rs"), "Rollout", "canary")},
		&appsv1.ReplicaSet{ObjectMeta: meta("shop", "bare-rs")},
	)
	for name, tt := range map[string]struct{ kind, owner, wantKind, wantName string }{
		"a Deployment's":      {"ReplicaSet", "web-rs", "Deployment", "web"},
		"an Argo Rollout's":   {"ReplicaSet", "canary-rs", "Rollout", "canary"},
		"a bare ReplicaSet's": {"ReplicaSet", "bare-rs", "ReplicaSet", "bare-rs"},
		"a StatefulSet's":     {"StatefulSet", "db", "StatefulSet", "db"},
		"a Job's":             {"Job", "migrate", "Job", "migrate"},
		"a bare pod":          {"", "", "Pod", "p"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &corev1.Pod{ObjectMeta: meta("shop", "p")}
			if tt.kind != "" {
				p.ObjectMeta = owned(p.ObjectMeta, tt.kind, tt.owner)
			}
			got, err := w.workloadOf(t.Context(), p)
			if want := (workloadKey{"shop", tt.wantKind, tt.wantName}); err != nil || got != want {
				t.Errorf("got %v, %v, want %v", got, err, want)
			}
		})
	}
	if _, err := w.workloadOf(t.Context(), &corev1.Pod{ObjectMeta: owned(meta("shop", "p"), "ReplicaSet", "gone")}); err == nil {
		t.Error("a ReplicaSet that is gone has an owner")
	}
}

// agent is an agent's end of a tunnel.
type agent struct {
	*mux.Session
	mu sync.Mutex
	// guarded by mu
	tables []control.Table
	refuse error
	out    func(*mux.Request, wire.InterceptHeader) // connects for laptops
	dns    func([]byte) ([]byte, error)             // resolves names
	asked  []string                                 // of which containers the environment was asked for
	canary *control.Canary                          // the last that was announced
	older  bool                                     // it knows nothing of canaries, nor of why
	why    control.Why                              // what it says to that
	askWhy control.AskWhy                           // the last
	slow   chan struct{}                            // its answer to a table waits for that; nil: it does not
}

// connect has the agent connect for laptops by fn.
func (a *agent) connect(fn func(*mux.Request, wire.InterceptHeader)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.out = fn
}

// names has the agent resolve names by fn.
func (a *agent) names(fn func([]byte) ([]byte, error)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dns = fn
}

func (w *world) agent(pod string) *agent {
	w.t.Helper()
	s, err := dial(w, nil, wire.Hello{Role: wire.RoleAgent, Token: sign(w.t, jose.ES256, signKey(), "k", token("shop", pod))}, nil, func(ctx context.Context, c net.Conn) { w.agents.handle(ctx, c) })
	if err != nil {
		w.t.Fatal(err)
	}
	a := &agent{Session: s}
	done := make(chan struct{})
	go func() {
		defer close(done)
		intercept := func(r *mux.Request, h wire.InterceptHeader) {
			a.mu.Lock()
			out := a.out
			a.mu.Unlock()
			out(r, h)
		}
		files := func(r *mux.Request, intercept string) {
			if st, err := r.Accept(nil); err == nil {
				_, _ = io.WriteString(st, "files of "+intercept)
				_ = st.Close()
			}
		}
		resolve := func(_ context.Context, msg []byte) ([]byte, error) {
			a.mu.Lock()
			fn := a.dns
			a.mu.Unlock()
			return fn(msg)
		}
		_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{Intercept: intercept, Files: files, DNS: resolve, Control: func(_ context.Context, method string, body []byte) (any, error) {
			a.mu.Lock()
			defer a.mu.Unlock()
			if method == control.ManagerEnvironment {
				var ask control.AskEnvironment
				err := json.Unmarshal(body, &ask)
				a.asked = append(a.asked, ask.Container)
				return control.Environment{Container: ask.Container, Variables: map[string]string{"A": "1", "HIDDEN": "2"}}, err
			}
			if a.older && (method == control.ManagerCanary || method == control.ManagerCanaryUDP || method == control.ManagerWhy) {
				return nil, errors.New("unknown method")
			}
			if method == control.ManagerWhy {
				a.askWhy = control.AskWhy{}
				return a.why, json.Unmarshal(body, &a.askWhy)
			}
			if method == control.ManagerCanary || method == control.ManagerCanaryUDP {
				a.canary = new(control.Canary)
				return nil, json.Unmarshal(body, a.canary)
			}
			var t control.Table
			err := json.Unmarshal(body, &t)
			a.tables = append(a.tables, t)
			if slow := a.slow; slow != nil {
				a.mu.Unlock()
				<-slow
				a.mu.Lock()
			}
			return nil, errors.Join(err, a.refuse)
		}})
	}()
	w.t.Cleanup(func() { _ = s.Close(); <-done })
	return a
}

// table returns the intercepts of the last table that came.
func (a *agent) table() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.tables) == 0 {
		return nil
	}
	out := []string{}
	for _, e := range a.tables[len(a.tables)-1].Items {
		out = append(out, e.Intercept)
	}
	return out
}

var web = workloadKey{"shop", "Deployment", "web"}

// An agent gets its workload's table when it connects and whenever it changes; its acknowledgement counts.
func TestAgentTables(t *testing.T) {
	w := newWorld(t, webPods()...)
	a := w.agent("web-1")
	w.until("the empty table came", func() bool { return a.table() != nil })
	if len(a.table()) != 0 || w.agents.serves("web-1", "in-1") {
		t.Errorf("table %v", a.table())
	}
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	w.engaged.set(engagement{UID: "other", Session: "mine", Workload: workloadKey{"shop", "Deployment", "db"}, Ports: tcp(1), Rules: whole})
	w.until("the agent serves it", func() bool { return w.agents.serves("web-1", "in-1") })
	if got := a.table(); !slices.Equal(got, []string{"in-1"}) {
		t.Errorf("table %v", got)
	}
	if w.agents.serves("web-1", "other") || w.agents.serves("web-2", "in-1") {
		t.Error("serves too much")
	}
	w.engaged.remove("in-1")
	w.until("the agent knows", func() bool { return len(a.table()) == 0 && !w.agents.serves("web-1", "in-1") })

	// The pod's agent starts again before its old connection is seen to be gone.
	b := w.agent("web-1")
	select {
	case <-a.Done():
	case <-time.After(deadline):
		t.Error("the old connection is still up")
	}
	w.engaged.set(engagement{UID: "in-2", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	w.until("the new one serves", func() bool { return w.agents.serves("web-1", "in-2") })
	_ = b.Close()
	w.until("it is forgotten", func() bool { return !w.agents.serves("web-1", "in-2") })
}

// What has ended is the laptop's until all agents know: who has left may rely on the app.
func TestAgentsAreToldOfTheEnd(t *testing.T) {
	w := newWorld(t, webPods()...)
	watch := w.watchers.add("mine")
	lists := func(want bool) func() bool {
		return func() bool {
			items, err := w.interceptsFor(t.Context(), "mine")
			if err != nil {
				t.Fatal(err)
			}
			is := len(items) == 1 && items[0].UID == "in-1" && items[0].State == control.StateEnding
			return is == want && (want || len(items) == 0)
		}
	}
	slow := func(a *agent) chan struct{} {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.slow = make(chan struct{})
		return a.slow
	}
	told := func() {
		t.Helper()
		for {
			select {
			case <-watch:
				if lists(false)() {
					return
				}
			case <-time.After(deadline):
				t.Fatal("the laptop is not told")
			}
		}
	}
	g := engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole}
	a := w.agent("web-1")
	w.until("the empty table came", func() bool { return a.table() != nil })

	w.engaged.set(g)
	w.until("the agent serves it", func() bool { return w.agents.serves("web-1", "in-1") })
	answer := slow(a)
	w.engaged.remove("in-1")
	w.until("the table came", func() bool { return len(a.table()) == 0 })
	if !lists(true)() {
		t.Error("ended before the agent has said that it knows")
	}
	<-watch
	close(answer)
	told()

	// It ends when the agent has heard of it, and not yet said so.
	answer = slow(a)
	w.engaged.set(g)
	w.until("the table came", func() bool { return len(a.table()) == 1 })
	w.engaged.remove("in-1")
	if !lists(true)() {
		t.Error("ended, and the agent may act on it")
	}
	<-watch
	close(answer)
	told()

	// The agent connects again, and goes.
	w.engaged.set(g)
	w.until("the agent serves it", func() bool { return w.agents.serves("web-1", "in-1") })
	close(slow(a))
	b := w.agent("web-1")
	answer = slow(b)
	w.engaged.remove("in-1")
	if !lists(true)() {
		t.Error("ended when the agent connected again")
	}
	<-watch
	_ = b.Close()
	told()
	close(answer)

	// What exists is not ending, whether or not its status says already whose it is.
	w.create(intercept("in-1", "ada", ""))
	w.engaged.set(g)
	if !lists(false)() {
		t.Error("a declared intercept is ending when it begins")
	}
}

// A manager that has just begun to lead tells agents nothing of a workload until it has looked at all of its intercepts: they have the table of the one before.
func TestFirstTable(t *testing.T) {
	failed := intercept("in-3", "ada", "mine")
	failed.Status.State = v1alpha1.InterceptFailed
	in := intercept("in-1", "ada", "mine")
	elsewhere := intercept("in-2", "ada", "mine")
	elsewhere.Spec.Workload.Name = "db"
	w := newWorld(t, append(webPods(), in, elsewhere, failed)...)
	a := w.agent("web-1")
	w.until("it was looked whether the table is whole", func() bool { return w.agents.connected("web-1") })
	if whole, err := w.whole(t.Context(), web); whole || err != nil || a.table() != nil {
		t.Errorf("whole: %v, table %v, %v", whole, a.table(), err)
	}
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	w.lookedAt(in)
	w.until("the table came", func() bool { return a.table() != nil })
	if got := a.table(); !slices.Equal(got, []string{"in-1"}) {
		t.Errorf("the first table is %v", got)
	}
	w.create(intercept("in-4", "ada", "mine")) // one that comes later holds up nobody
	w.engaged.remove("in-1")
	w.until("the next came", func() bool { return len(a.table()) == 0 })

	w.started = time.Now().Add(-wholePatience)
	if whole, err := w.whole(t.Context(), workloadKey{"shop", "Deployment", "db"}); !whole || err != nil {
		t.Errorf("an intercept that cannot be looked at holds the others up for ever: %v", err)
	}
}

// A table that is too long costs no agent its tunnel.
func TestTableTooLong(t *testing.T) {
	w := newWorld(t, webPods()...)
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	a := w.agent("web-1")
	w.until("the table came", func() bool { return slices.Equal(a.table(), []string{"in-1"}) })
	w.engaged.set(engagement{UID: "in-2", Session: "mine", Workload: web, Ports: tcp(8081), Rules: []match.Rule{{Methods: []string{strings.Repeat("X", mux.MaxHeader)}}}})
	w.until("it was tried", func() bool {
		w.agents.mu.Lock()
		c := w.agents.byPod["web-1"]
		w.agents.mu.Unlock()
		return c == nil || c.mayKnow()["in-2"].UID != ""
	})
	w.engaged.set(engagement{UID: "in-3", Session: "mine", Workload: web, Ports: tcp(8082), Rules: whole})
	w.engaged.remove("in-2")
	w.until("the next came", func() bool { return slices.Equal(a.table(), []string{"in-1", "in-3"}) })
	select {
	case <-a.Done():
		t.Error("the tunnel was closed")
	default:
	}
}

// An agent that does not take its table is not counted on, and has to connect anew.
func TestAgentRefusesTable(t *testing.T) {
	w := newWorld(t, webPods()...)
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	a := w.agent("web-1")
	a.mu.Lock()
	a.refuse = errors.New("no")
	a.mu.Unlock()
	w.until("it was tried", func() bool { return a.table() != nil })
	w.engaged.set(engagement{UID: "in-2", Session: "mine", Workload: web, Ports: tcp(8081), Rules: whole})
	select {
	case <-a.Done():
	case <-time.After(deadline):
		t.Error("the connection is still up")
	}
	if w.agents.serves("web-1", "in-2") {
		t.Error("counted on all the same")
	}
}

// A change that comes between an agent's registration and its first table does not stop the connection.
func TestAgentChangeWhileConnecting(t *testing.T) {
	w := newWorld(t, webPods()...)
	c := &agentConn{pod: "web-1", workload: web, kick: make(chan struct{}, 1)}
	c.wake()
	done := make(chan struct{})
	go func() { defer close(done); w.agents.add(c) }()
	select {
	case <-done:
	case <-time.After(deadline):
		t.Fatal("add hangs")
	}
}

// flow opens an intercepted flow as an agent does.
func (a *agent) flow(t *testing.T, uid string) (*mux.Stream, wire.Code) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	st, err := tunnel.DialIntercept(ctx, a.Session, wire.InterceptHeader{Intercept: uid, Proto: 6, Port: 8080})
	var re *mux.RejectError
	if errors.As(err, &re) {
		return nil, re.Code
	}
	if err != nil {
		t.Fatal(err)
	}
	return st, wire.CodeNone
}

func TestForward(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, append(webPods(), session("mine", "ada", l.id.Fingerprint()))...)
	a := w.agent("web-1")
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	w.engaged.set(engagement{UID: "db", Session: "mine", Workload: workloadKey{"shop", "Deployment", "db"}, Ports: tcp(8080), Rules: whole})

	if _, code := a.flow(t, "nothing"); code != wire.CodeNotFound {
		t.Errorf("unknown intercept: %s", code)
	}
	if _, code := a.flow(t, "in-1"); code != wire.CodeGone {
		t.Errorf("laptop away: %s", code)
	}
	s, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	take := make(chan func(*mux.Request), 1)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{Intercept: func(r *mux.Request, h wire.InterceptHeader) {
			if h.Intercept == "in-1" && h.Port == 8080 {
				(<-take)(r)
			}
		}})
	}()
	t.Cleanup(func() { _ = s.Close(); <-served })
	w.until("the laptop is there", func() bool { return w.laptops.tunnel("mine") != nil })

	if _, code := a.flow(t, "db"); code != wire.CodeNotFound {
		t.Errorf("an agent reached the laptop through another workload's intercept: %s", code)
	}

	take <- func(r *mux.Request) {
		st, err := r.Accept(nil)
		if err != nil {
			t.Error(err)
			return
		}
		b, _ := io.ReadAll(st)
		_, _ = st.Write(append([]byte("laptop heard "), b...))
		_ = st.Close()
	}
	st, code := a.flow(t, "in-1")
	if code != wire.CodeNone {
		t.Fatalf("refused: %s", code)
	}
	_, _ = io.WriteString(st, "hello")
	_ = st.CloseWrite()
	if b, err := io.ReadAll(st); err != nil || string(b) != "laptop heard hello" {
		t.Errorf("%q, %v", b, err)
	}
	_ = st.Close()

	take <- func(r *mux.Request) { _ = r.Reject(wire.CodeRefused, "connection refused") }
	if _, code := a.flow(t, "in-1"); code != wire.CodeRefused {
		t.Errorf("the laptop refuses: %s", code)
	}
}

// Agents are told whose laptops do not answer.
func TestAway(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, append(webPods(), session("mine", "ada", l.id.Fingerprint()))...)
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	w.engaged.set(engagement{UID: "in-2", Session: "another's", Workload: web, Ports: tcp(8081), Rules: whole})
	a := w.agent("web-1")
	away := func(want ...string) {
		t.Helper()
		w.until(fmt.Sprintf("%v are away", want), func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return len(a.tables) > 0 && slices.Equal(a.tables[len(a.tables)-1].Away, want)
		})
	}
	away("in-1", "in-2")
	s, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	away("in-2")
	w.laptops.suspect("mine", w.laptops.tunnel("mine"))
	away("in-2") // it has answered a ping
	_ = s.Close()
	away("in-1", "in-2")
}

// mutedConn is a connection on which nothing is heard while gate is locked.
type mutedConn struct {
	net.Conn
	gate sync.RWMutex
}

// Read implements net.Conn.
func (c *mutedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.gate.RLock()
	defer c.gate.RUnlock()
	return n, err
}

// A laptop that falls silent is away, also for those who only use flows that it has taken.
func TestSilentLaptop(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, append(webPods(), session("mine", "ada", l.id.Fingerprint()))...)
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	a := w.agent("web-1")
	conns := make(chan *mutedConn, 1)
	s, err := dial(w, l.id, wire.Hello{Role: wire.RoleLaptop, Session: "mine"}, nil, func(ctx context.Context, c net.Conn) {
		m := &mutedConn{Conn: c}
		conns <- m
		w.laptops.serve(ctx, m)
	})
	if err != nil {
		t.Fatal(err)
	}
	line := <-conns
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{Intercept: func(r *mux.Request, _ wire.InterceptHeader) {
			if st, err := r.Accept(nil); err == nil {
				_, _ = io.Copy(st, st)
			}
		}})
	}()
	ctx, cancel := context.WithCancel(t.Context())
	watched := make(chan error, 1)
	go func() { watched <- w.laptops.runSilence(ctx) }()
	t.Cleanup(func() {
		cancel()
		_ = s.Close()
		<-served
		if err := <-watched; err != nil {
			t.Error(err)
		}
	})
	w.until("the laptop is there", func() bool { return w.laptops.answers("mine") })
	st, code := a.flow(t, "in-1")
	if code != wire.CodeNone {
		t.Fatalf("refused: %s", code)
	}
	echo := make([]byte, 5)
	say := func() error {
		_, err := io.WriteString(st, "hello")
		return err
	}
	if err := say(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(st, echo); err != nil {
		t.Fatal(err)
	}
	line.gate.Lock()
	w.until("it is away", func() bool {
		if err := say(); err != nil {
			t.Fatal(err)
		}
		return !w.laptops.answers("mine")
	})
	line.gate.Unlock()
	w.until("it is back", func() bool { return w.laptops.answers("mine") })
	if _, err := io.ReadFull(st, echo); err != nil {
		t.Errorf("what was said meanwhile: %v", err)
	}
}

// A laptop that hangs costs one connection its wait; the others are refused at once until it answers a ping.
func TestForwardToHangingLaptop(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, append(webPods(), session("mine", "ada", l.id.Fingerprint()))...)
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Ports: tcp(8080), Rules: whole})
	a := w.agent("web-1")
	s, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	w.until("the laptop is there", func() bool { return w.laptops.tunnel("mine") != nil })
	// Nobody accepts flows at the laptop; its tunnel answers pings all the same, so that it is a suspect for a moment only.
	begin := time.Now()
	if _, code := a.flow(t, "in-1"); code != wire.CodeTimeout {
		t.Errorf("first connection: %s", code)
	}
	if d := time.Since(begin); d < forwardTimeout || d > forwardTimeout+time.Second {
		t.Errorf("first connection waited %s", d)
	}
	tun := w.laptops.tunnel("mine")
	w.until("the ping cleared it", func() bool {
		w.laptops.mu.Lock()
		defer w.laptops.mu.Unlock()
		return !w.laptops.suspects[tun]
	})
	// As it would be if the ping did not come back.
	w.laptops.mu.Lock()
	w.laptops.suspects[tun] = true
	w.laptops.mu.Unlock()
	begin = time.Now()
	for range 5 {
		if _, code := a.flow(t, "in-1"); code != wire.CodeGone {
			t.Errorf("connection to a suspect: %s", code)
		}
	}
	if d := time.Since(begin); d > forwardTimeout {
		t.Errorf("five connections to a suspect waited %s", d)
	}
	_ = s.Close()
}

// Of the connections of an agent that dials while it is called one is let in; the others are refused before the agent may use them.
func TestClaim(t *testing.T) {
	w := newWorld(t, webPods()...)
	own := func() *agentConn { return &agentConn{pod: "web-1"} }
	call := func() *agentConn { return &agentConn{pod: "web-1", called: true} }
	first := call()
	if err := w.agents.claim(first); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*agentConn{own(), call()} {
		if err := w.agents.claim(c); !errors.Is(err, errConnected) {
			t.Errorf("called %v, beside one that is arriving: %v", c.called, err)
		}
		w.agents.disclaim(c)
	}
	w.agents.disclaim(first) // its handshake failed
	if err := w.agents.claim(first); err != nil {
		t.Errorf("after another that has failed: %v", err)
	}
	w.agents.disclaim(first)

	s := w.agent("web-1") // its own
	w.until("it is there", func() bool { return w.agents.connected("web-1") })
	if err := w.agents.claim(call()); !errors.Is(err, errConnected) {
		t.Errorf("a call of an agent that is connected: %v", err)
	}
	again := own()
	if err := w.agents.claim(again); err != nil {
		t.Errorf("an agent that has lost its connection: %v", err)
	}
	w.agents.disclaim(again)

	w.agents.mu.Lock()
	up := w.agents.byPod["web-1"]
	up.called = true
	w.agents.mu.Unlock()
	if err := w.agents.claim(own()); !errors.Is(err, errConnected) {
		t.Errorf("an agent that has just answered a call: %v", err)
	}
	w.agents.mu.Lock()
	up.since = up.since.Add(-callTimeout)
	w.agents.mu.Unlock()
	again = own()
	if err := w.agents.claim(again); err != nil {
		t.Errorf("an agent that has lost the connection of a call: %v", err)
	}
	w.agents.disclaim(again)
	_ = s.Close()
	w.until("it is gone", func() bool { return w.agents.claim(call()) == nil })
}

// An agent that runs and is not connected is called, once; one that has just started is left to itself.
func TestCall(t *testing.T) {
	w := newWorld(t, webPods()...)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan net.Conn)
	mux := http.NewServeMux()
	mux.Handle(agentcfg.CallPath, tunnel.UpgradeHandler(func(c net.Conn) { conns <- c }))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: deadline}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l) }()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.agents.call(ctx) }()
	t.Cleanup(func() {
		cancel()
		_ = srv.Close()
		<-served
		if err := <-done; err != nil {
			t.Error(err)
		}
	})

	ac := agentcfg.Config{Managers: []string{"10.96.0.1:8082"}, ManagerKey: "sha256:key", HealthPort: uint16(l.Addr().(*net.TCPAddr).Port)}
	pod := &corev1.Pod{ObjectMeta: owned(meta("shop", "web-1"), "ReplicaSet", "web-rs")}
	pod.Annotations = map[string]string{agentcfg.Annotation: ac.String()}
	pod.Spec.Containers = []corev1.Container{{Name: agentcfg.Container}}
	pod.Status.PodIP = "127.0.0.1"
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: agentcfg.Container}}
	running := func(since time.Duration) {
		pod = pod.DeepCopy()
		pod.Status.ContainerStatuses[0].State.Running = &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(time.Now().Add(-since))}
		w.agents.wantCall(pod)
	}
	w.agents.wantCall(pod)
	running(0)
	if n := len(w.agents.calls); n != 0 {
		t.Fatalf("%d calls of an agent that has yet to start", n)
	}
	running(time.Minute)
	running(time.Minute)
	id, err := tunnel.NewIdentity("web-1")
	if err != nil {
		t.Fatal(err)
	}
	c := <-conns
	s, _, err := tunnel.Client(t.Context(), c, tunnel.ClientConfig{Identity: id, Peer: w.identity.Fingerprint(), Hello: wire.Hello{Version: wire.Version, Role: wire.RoleAgent, Token: sign(t, jose.ES256, signKey(), "k", token("shop", "web-1"))}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	w.until("the agent is connected", func() bool { return w.agents.connected("web-1") })
	if err := w.agents.claim(&agentConn{pod: "web-1"}); !errors.Is(err, errConnected) {
		t.Errorf("the agent's own connection that met the call: %v", err)
	}
	running(time.Minute)
	w.until("the last call is dealt with", func() bool { return len(w.agents.calls) == 0 })
	select {
	case c := <-conns:
		_ = c.Close()
		t.Error("an agent that is connected was called")
	case <-time.After(50 * time.Millisecond): // to see that nothing comes
	}
}

// The agents' port ends with its context.
func TestAgentsServe(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.agents.serve(ctx, l) }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
	_ = c.SetReadDeadline(time.Now().Add(deadline))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a stranger was answered")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
