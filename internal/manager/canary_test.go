package manager

import (
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
		"redirected":    {redirected, []string{"10.1.2.3:8080"}},
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
		problem, known := w.proven(load, taken, since)
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
