package manager

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// token is what the API server says of a good agent's token; pod "" is a token that is bound to none.
func token(ns, pod string) authenticationv1.TokenReviewStatus {
	st := authenticationv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{agentcfg.Audience},
		User: authenticationv1.UserInfo{Username: "system:serviceaccount:" + ns + ":default", Extra: map[string]authenticationv1.ExtraValue{}},
	}
	if pod != "" {
		st.User.Extra["authentication.kubernetes.io/pod-name"] = []string{pod}
		st.User.Extra["authentication.kubernetes.io/pod-uid"] = []string{pod}
	}
	return st
}

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
		token authenticationv1.TokenReviewStatus
		want  string // "" is welcome
	}{
		"welcome":                    {wire.Hello{Role: wire.RoleAgent}, token("shop", "web-1"), ""},
		"says it is another pod":     {wire.Hello{Role: wire.RoleAgent, Pod: "db-1", Namespace: "data"}, token("shop", "web-1"), ""}, // only the token counts
		"a laptop":                   {wire.Hello{Role: wire.RoleLaptop}, token("shop", "web-1"), "does not connect here"},
		"not authenticated":          {wire.Hello{Role: wire.RoleAgent}, authenticationv1.TokenReviewStatus{}, "not valid"},
		"a person":                   {wire.Hello{Role: wire.RoleAgent}, change(token("shop", "web-1"), func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "ada" }), "not valid"},
		"a person called like it":    {wire.Hello{Role: wire.RoleAgent}, change(token("shop", "web-1"), func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:node:shop:x" }), "not valid"},
		"bound to no pod":            {wire.Hello{Role: wire.RoleAgent}, token("shop", ""), "not valid"},
		"audience not confirmed":     {wire.Hello{Role: wire.RoleAgent}, change(token("shop", "web-1"), func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }), "not valid"},
		"a pod without an agent":     {wire.Hello{Role: wire.RoleAgent}, token("shop", "web-2"), "no agent"},
		"a pod that is gone":         {wire.Hello{Role: wire.RoleAgent}, token("shop", "web-9"), "not found"},
		"a pod of another namespace": {wire.Hello{Role: wire.RoleAgent}, token("other", "web-1"), "not found"},
		"a pod of an earlier time": {wire.Hello{Role: wire.RoleAgent}, change(token("shop", "web-1"), func(s *authenticationv1.TokenReviewStatus) {
			s.User.Extra["authentication.kubernetes.io/pod-uid"] = []string{"old"}
		}), "no agent"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, webPods()...)
			w.tokens["t"] = tt.token
			tt.hello.Token = "t"
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
}

// connect has the agent connect for laptops by fn.
func (a *agent) connect(fn func(*mux.Request, wire.InterceptHeader)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.out = fn
}

func (w *world) agent(pod string) *agent {
	w.t.Helper()
	w.set(func() { w.tokens[pod] = token("shop", pod) })
	s, err := dial(w, nil, wire.Hello{Role: wire.RoleAgent, Token: pod}, nil, func(ctx context.Context, c net.Conn) { w.agents.handle(ctx, c) })
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
		_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{Intercept: intercept, Control: func(_ context.Context, _ string, body []byte) (any, error) {
			a.mu.Lock()
			defer a.mu.Unlock()
			var t control.Table
			err := json.Unmarshal(body, &t)
			a.tables = append(a.tables, t)
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
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Protocol: "TCP", Port: 8080})
	w.engaged.set(engagement{UID: "other", Session: "mine", Workload: workloadKey{"shop", "Deployment", "db"}, Protocol: "TCP", Port: 1})
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
	w.engaged.set(engagement{UID: "in-2", Session: "mine", Workload: web, Protocol: "TCP", Port: 8080})
	w.until("the new one serves", func() bool { return w.agents.serves("web-1", "in-2") })
	_ = b.Close()
	w.until("it is forgotten", func() bool { return !w.agents.serves("web-1", "in-2") })
}

// An agent that does not take its table is not counted on, and has to connect anew.
func TestAgentRefusesTable(t *testing.T) {
	w := newWorld(t, webPods()...)
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Protocol: "TCP", Port: 8080})
	a := w.agent("web-1")
	a.mu.Lock()
	a.refuse = errors.New("no")
	a.mu.Unlock()
	w.until("it was tried", func() bool { return a.table() != nil })
	w.engaged.set(engagement{UID: "in-2", Session: "mine", Workload: web, Protocol: "TCP", Port: 8081})
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
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Protocol: "TCP", Port: 8080})
	w.engaged.set(engagement{UID: "db", Session: "mine", Workload: workloadKey{"shop", "Deployment", "db"}, Protocol: "TCP", Port: 8080})

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

// A laptop that hangs costs one connection its wait; the others are refused at once until it answers a ping.
func TestForwardToHangingLaptop(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, append(webPods(), session("mine", "ada", l.id.Fingerprint()))...)
	w.engaged.set(engagement{UID: "in-1", Session: "mine", Workload: web, Protocol: "TCP", Port: 8080})
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

// An agent that runs and is not connected is called, once; one that has just started is left to itself.
func TestCall(t *testing.T) {
	w := newWorld(t, webPods()...)
	w.tokens["t"] = token("shop", "web-1")
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
	s, _, err := tunnel.Client(t.Context(), c, tunnel.ClientConfig{Identity: id, Peer: w.identity.Fingerprint(), Hello: wire.Hello{Version: wire.Version, Role: wire.RoleAgent, Token: "t"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	w.until("the agent is connected", func() bool { return w.agents.connected("web-1") })
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
