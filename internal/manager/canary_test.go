package manager

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
)

// swallows answers connections as the agent does that was told of them, and says nothing on others.
func swallows(a *agent) func(net.Conn) {
	return func(c net.Conn) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.canary != nil && a.canary.Source.String() == c.RemoteAddr().String() && a.canary.Port.Number == 8080 {
			_, _ = io.WriteString(c, a.canary.Nonce)
		}
	}
}

// Where a connection of the manager's ends is what the intercept's user is told. It says nothing, wherever that is.
func TestCanary(t *testing.T) {
	for name, tt := range map[string]struct {
		older  bool
		serve  func(a *agent, heard *[]byte) func(net.Conn) // nil: nobody listens
		silent bool                                         // the connection gets no answer to its SYN
		want   string
	}{
		"arrives": {serve: func(a *agent, _ *[]byte) func(net.Conn) { return swallows(a) }},
		"an app that waits": {serve: func(_ *agent, heard *[]byte) func(net.Conn) {
			return func(c net.Conn) { *heard, _ = io.ReadAll(c) }
		}, want: "something else accepts them"},
		"an app that speaks first": {serve: func(*agent, *[]byte) func(net.Conn) {
			return func(c net.Conn) { _, _ = io.WriteString(c, "220 mail.example.com ESMTP Postfix\r\n") }
		}, want: "something else accepts them"},
		"an app that hangs up": {serve: func(*agent, *[]byte) func(net.Conn) { return func(net.Conn) {} }, want: "something else accepts them"},
		"nobody":               {want: "are refused"},
		"not answered":         {silent: true, want: "is not answered"},
		"an older agent":       {older: true, serve: func(*agent, *[]byte) func(net.Conn) { return func(net.Conn) {} }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, webPods()...)
			a := w.agent("web-1")
			a.mu.Lock()
			a.older = tt.older
			a.mu.Unlock()
			w.until("the agent is there", func() bool { return a.table() != nil })
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := l.Addr().(*net.TCPAddr).AddrPort()
			var heard []byte
			served := make(chan struct{})
			switch {
			case tt.silent:
				_ = l.Close()
				addr = full(t)
				close(served)
			case tt.serve == nil:
				_ = l.Close()
				close(served)
			default:
				defer l.Close()
				go func() {
					defer close(served)
					if c, err := l.Accept(); err == nil {
						tt.serve(a, &heard)(c)
						_ = c.Close()
					}
				}()
			}
			to := target{port: control.Port{Protocol: "TCP", Number: 8080}, addr: addr, at: []*agentConn{w.agents.byPod["web-1"]}, where: "port 8080 of pod web-1"}
			if tt.older {
				if got := explain(to, w.agents.canary(t.Context(), to)); got != "" {
					t.Error(got)
				}
				return
			}
			got := explain(to, w.agents.canary(t.Context(), to))
			if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
			<-served
			if len(heard) > 0 {
				t.Errorf("the app heard %q", heard)
			}
		})
	}
}

// full returns the address of a listener whose backlog is full, so that a SYN gets no answer.
func full(t *testing.T) netip.AddrPort {
	t.Helper()
	addr := listenOne(t)
	for range 3 { // a backlog of 0 holds one or two
		d := net.Dialer{Timeout: 100 * time.Millisecond}
		if c, err := d.DialContext(context.Background(), "tcp", addr.String()); err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
	}
	return addr
}

// targets are the ways by which clients reach the agents: the port itself where it is redirected, the agent's where it has taken the name.
func TestCanaryTargets(t *testing.T) {
	w := newWorld(t, webPods()...)
	a := w.agent("web-1")
	w.until("the agent is there", func() bool { return a.table() != nil })
	pod := func(name, cfg string) corev1.Pod {
		p := corev1.Pod{ObjectMeta: meta("shop", name)}
		p.UID = "web-1"
		p.Annotations = map[string]string{agentcfg.Annotation: cfg}
		p.Spec.Containers = []corev1.Container{{Name: agentcfg.Container}}
		p.Status = corev1.PodStatus{PodIP: "10.1.2.3", Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
		return p
	}
	const head = `{"managers":["m:1"],"managerKey":"k","healthPort":9900,"ports":[`
	byName := pod("web-1", head+`{"protocol":"TCP","containerPort":8080,"container":"app","agentPort":9901,"way":"name","name":"http"}]}`)
	redirected := pod("web-1", head+`{"protocol":"TCP","containerPort":8080,"container":"app","agentPort":9901,"probePort":9902,"way":"redirect"},{"protocol":"UDP","containerPort":8080,"container":"app","agentPort":9903,"way":"redirect"}]}`)
	gone := *byName.DeepCopy()
	gone.UID = "web-9"
	both := []inject.Taken{{ContainerPort: 8080, Protocol: corev1.ProtocolTCP}, {ContainerPort: 8080, Protocol: corev1.ProtocolUDP}}
	for name, tt := range map[string]struct {
		pod  corev1.Pod
		want []string
	}{
		"by name":       {byName, []string{"10.1.2.3:9901"}},
		"redirected":    {redirected, []string{"10.1.2.3:8080", "10.1.2.3:8080"}},
		"not connected": {gone, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, x := range w.agents.targets(&workload{key: web, pods: []corev1.Pod{tt.pod}}, both) {
				got = append(got, x.addr.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%v, want %v", got, tt.want)
			}
		})
	}
}

// The intercepts of a port share a proof, and none is active by one that is older than itself.
func TestProofShared(t *testing.T) {
	w := newWorld(t, webPods()...)
	a := w.agent("web-1")
	w.until("the agent is there", func() bool { return a.table() != nil })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var made atomic.Int32
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			made.Add(1)
			swallows(a)(c)
			_ = c.Close()
		}
	}()
	p := corev1.Pod{ObjectMeta: meta("shop", "web-1")}
	p.Annotations = map[string]string{agentcfg.Annotation: fmt.Sprintf(
		`{"managers":["m:1"],"managerKey":"k","healthPort":9900,"ports":[{"protocol":"TCP","containerPort":8080,"container":"app","agentPort":%d,"way":"name","name":"http"}]}`, l.Addr().(*net.TCPAddr).Port)}
	p.Spec.Containers = []corev1.Container{{Name: agentcfg.Container}}
	p.Status = corev1.PodStatus{PodIP: "127.0.0.1", Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
	load, taken := &workload{key: web, pods: []corev1.Pod{p}}, []inject.Taken{{ContainerPort: 8080, Protocol: corev1.ProtocolTCP}}

	proven := func(since time.Time) bool {
		problem, known := w.proven(load, taken, since, proofTimeout)
		if problem != "" {
			t.Error(problem)
		}
		return known
	}
	first := time.Now()
	if proven(first) {
		t.Error("known before there was a proof")
	}
	w.until("it is proven", func() bool { return proven(first) })
	if !proven(first) || !proven(time.Time{}) || made.Load() != 1 {
		t.Errorf("%d connections for intercepts that were there before", made.Load())
	}
	second := time.Now()
	if proven(second) {
		t.Error("an older proof was taken for an intercept")
	}
	w.until("it is proven anew", func() bool { return proven(second) })
	if made.Load() != 2 {
		t.Errorf("%d connections, want 2", made.Load())
	}
	w.proofs.forget(web)
	if proven(first) {
		t.Error("known of a workload that was forgotten")
	}
	w.until("it is proven once more", func() bool { return proven(first) })
}

// kube-proxy is waited for where pods are new: until an intercept is active for which they were restarted.
func TestPatience(t *testing.T) {
	r := &interceptReconciler{restarted: map[types.UID]restart{"restarting": {}, "restarted": {done: true}}}
	for uid, want := range map[types.UID]time.Duration{"restarting": restartedTimeout, "restarted": proofTimeout, "other": proofTimeout} {
		if got := r.patience(uid); got != want {
			t.Errorf("%s: %v, want %v", uid, got, want)
		}
	}
}

// Through a service datagrams are sent, too, but only when nobody but an agent can have them. It is tried until kube-proxy knows.
func TestProveService(t *testing.T) {
	selector := map[string]string{"app": "web"}
	for name, tt := range map[string]struct {
		protocol    string
		late        int  // so many are refused before the agent has them
		older       bool // the agent
		other       bool // a pod without an agent runs
		ending      bool // one ends, and is gone with the first look after
		never       bool // one ends and is not gone in time
		comes       bool // a pod without an agent begins to run a moment later
		lost        bool // the agent's connection is, a moment later
		headless    bool
		want        string
		wantCanary  bool
		wantPatient bool // until the time is over
	}{
		"tcp":                        {protocol: "TCP", wantCanary: true},
		"tcp, kube-proxy is late":    {protocol: "TCP", late: 1, wantCanary: true},
		"udp":                        {protocol: "UDP", wantCanary: true},
		"udp, kube-proxy is late":    {protocol: "UDP", late: 2, wantCanary: true},
		"udp, refused for ever":      {protocol: "UDP", late: 1000, wantCanary: true, wantPatient: true, want: "datagrams to service web, port 0 are refused"},
		"udp, an older agent":        {protocol: "UDP", older: true},
		"udp, headless":              {protocol: "UDP", headless: true},
		"udp, another pod":           {protocol: "UDP", other: true},
		"udp, an old one ends":       {protocol: "UDP", ending: true, wantCanary: true},
		"tcp, an old one ends":       {protocol: "TCP", ending: true, wantCanary: true},
		"udp, an old one goes on":    {protocol: "UDP", never: true},
		"tcp, an old one goes on":    {protocol: "TCP", never: true},
		"udp, another and an ending": {protocol: "UDP", other: true, ending: true},
		"udp, another comes":         {protocol: "UDP", late: 1000, comes: true, wantCanary: true},
		"udp, the agent goes":        {protocol: "UDP", late: 1000, lost: true, wantCanary: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			objs := webPods()
			for _, o := range objs {
				if p, ok := o.(*corev1.Pod); ok {
					p.Labels, p.Status.Phase = selector, corev1.PodRunning
					if p.Name == "web-2" && !tt.other {
						p.Status.Phase = corev1.PodSucceeded
					}
				}
			}
			svc := &corev1.Service{ObjectMeta: meta("shop", "web"), Spec: corev1.ServiceSpec{ClusterIP: "127.0.0.1", Selector: selector}}
			if tt.headless {
				svc.Spec.ClusterIP = corev1.ClusterIPNone
			}
			objs = append(objs, svc)
			if tt.ending || tt.never {
				p := &corev1.Pod{ObjectMeta: meta("shop", "old"), Status: corev1.PodStatus{Phase: corev1.PodRunning}}
				p.Labels, p.Finalizers, p.DeletionTimestamp = selector, []string{"test.example.com/waits"}, &metav1.Time{Time: time.Now()}
				objs = append(objs, p)
			}
			w := newWorld(t, objs...)
			a := w.agent("web-1")
			w.until("the agent is there", func() bool { return a.table() != nil })
			a.mu.Lock()
			a.older = tt.older
			a.mu.Unlock()
			to := target{port: control.Port{Protocol: tt.protocol, Number: 8080}, at: []*agentConn{w.agents.byPod["web-1"]}}
			sp := inject.ServicePort{Service: "web", Port: int32(behindKubeProxy(t, a, tt.protocol, tt.late))}
			began := time.Now()
			later := func(do func() error) { // while it is waited for
				timer := time.AfterFunc(2*proofPause, func() {
					if err := do(); err != nil {
						t.Error(err)
					}
				})
				t.Cleanup(func() { timer.Stop() })
			}
			pod := func(name string) (*corev1.Pod, error) {
				p := new(corev1.Pod)
				return p, w.kc.Get(context.Background(), client.ObjectKey{Namespace: "shop", Name: name}, p)
			}
			switch {
			case tt.ending && !tt.other:
				later(func() error {
					p, err := pod("old")
					p.Finalizers = nil
					return cmp.Or(err, w.kc.Update(context.Background(), p))
				})
			case tt.comes:
				later(func() error {
					p, err := pod("web-2")
					p.Status.Phase = corev1.PodRunning
					return cmp.Or(err, w.kc.Status().Update(context.Background(), p))
				})
			case tt.lost:
				later(to.at[0].mux.Close)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*proofTimeout)
			defer cancel()
			got := w.proveService(ctx, began, "shop", sp, to)
			got = strings.Replace(got, fmt.Sprint("port ", sp.Port), "port 0", 1)
			if (got == "") != (tt.want == "") || !strings.HasPrefix(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
			a.mu.Lock()
			defer a.mu.Unlock()
			if (a.canary != nil) != tt.wantCanary {
				t.Errorf("announced: %v", a.canary)
			}
			if (ctx.Err() != nil) != tt.wantPatient {
				t.Errorf("it took %v", time.Since(began))
			}
		})
	}
}

// A try that ends at its deadline was cut off, also where the socket noticed first, and does not hide what an earlier one has shown.
func TestProveServiceCutOff(t *testing.T) {
	selector := map[string]string{"app": "web"}
	w := newWorld(t, append(webPods(), &corev1.Service{ObjectMeta: meta("shop", "web"), Spec: corev1.ServiceSpec{ClusterIP: "127.0.0.1", Selector: selector}})...)
	a := w.agent("web-1")
	w.until("the agent is there", func() bool { return a.table() != nil })
	to := target{port: control.Port{Protocol: "UDP", Number: 8080}, at: []*agentConn{w.agents.byPod["web-1"]}}
	sp := inject.ServicePort{Service: "web", Port: int32(behindKubeProxy(t, a, "UDP", 1000))}
	ctx, cancel := context.WithTimeout(t.Context(), 3*proofPause)
	defer cancel()
	got := w.proveService(unaware{ctx, time.Now()}, time.Now(), "shop", sp, to)
	if !strings.Contains(got, "are refused") {
		t.Errorf("%q", got)
	}
}

// unaware is a context whose deadline is over before it knows.
type unaware struct {
	context.Context
	deadline time.Time
}

func (u unaware) Deadline() (time.Time, bool) { return u.deadline, true }

// behindKubeProxy returns a port of localhost at which the agent answers the manager, after so many connections or clients have been refused.
func behindKubeProxy(t *testing.T, a *agent, protocol string, late int) int {
	t.Helper()
	known := func(addr net.Addr) string {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.canary != nil && a.canary.Source.String() == addr.String() {
			return a.canary.Nonce
		}
		return ""
	}
	if protocol == "TCP" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for i := 0; ; i++ {
				c, err := l.Accept()
				if err != nil {
					return
				}
				if i >= late {
					_, _ = io.WriteString(c, known(c.RemoteAddr()))
				}
				_ = c.Close()
			}
		}()
		return l.Addr().(*net.TCPAddr).Port
	}
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := c.LocalAddr().(*net.UDPAddr).Port
	answer := func(c net.PacketConn) {
		for b := make([]byte, 1500); ; {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if n > 0 {
				t.Errorf("%d bytes came", n)
			}
			_, _ = c.WriteTo([]byte(known(from)), from)
		}
	}
	if late == 0 {
		t.Cleanup(func() { _ = c.Close() })
		go answer(c)
		return port
	}
	refuse(t, c.(*net.UDPConn))
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer close(done)
		select {
		case <-time.After(time.Duration(late) * proofPause):
		case <-ctx.Done():
			_ = c.Close()
			return
		}
		_ = c.Close()
		c, err := net.ListenPacket("udp", fmt.Sprint("127.0.0.1:", port))
		if err != nil {
			t.Error(err)
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = c.Close() })
		defer stop()
		answer(c)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return port
}
