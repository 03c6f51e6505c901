package manager

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

func TestDirectAddresses(t *testing.T) {
	node := func(external, internal string) corev1.Node {
		n := corev1.Node{}
		for kind, a := range map[corev1.NodeAddressType]string{corev1.NodeExternalIP: external, corev1.NodeInternalIP: internal} {
			if a != "" {
				n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: kind, Address: a})
			}
		}
		return n
	}
	inside := []corev1.Node{node("", "10.0.0.1"), node("", "fd00::2"), node("", "10.0.0.3"), node("", "10.0.0.4")}
	outside := []corev1.Node{node("", "10.0.0.1"), node("192.0.2.2", "10.0.0.2")}
	for name, tt := range map[string]struct {
		kind    corev1.ServiceType
		port    int32
		ingress []corev1.LoadBalancerIngress
		nodes   []corev1.Node
		want    []string
	}{
		"nodes":                      {corev1.ServiceTypeNodePort, 30443, nil, inside, []string{"10.0.0.1:30443", "[fd00::2]:30443", "10.0.0.3:30443"}},
		"nodes with public ones":     {corev1.ServiceTypeNodePort, 30443, nil, outside, []string{"192.0.2.2:30443"}},
		"no port yet":                {corev1.ServiceTypeNodePort, 0, nil, inside, nil},
		"load balancer":              {corev1.ServiceTypeLoadBalancer, 30443, []corev1.LoadBalancerIngress{{IP: "192.0.2.9"}, {Hostname: "lb.example.com"}}, inside, []string{"192.0.2.9:443", "lb.example.com:443"}},
		"load balancer, not yet":     {corev1.ServiceTypeLoadBalancer, 30443, nil, inside, nil},
		"ClusterIP needs to be told": {corev1.ServiceTypeClusterIP, 0, nil, inside, nil},
	} {
		svc := &corev1.Service{Spec: corev1.ServiceSpec{Type: tt.kind, Ports: []corev1.ServicePort{{Port: 443, NodePort: tt.port}}}}
		svc.Status.LoadBalancer.Ingress = tt.ingress
		if got := directAddresses(svc, tt.nodes); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}

// TestDirect: a tunnel goes on over a connection past the API server, for who has proved the session's key; others are kept to a number.
func TestDirect(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, session("mine", "ada", l.id.Fingerprint()))
	hello := wire.Hello{Version: wire.Version, Role: wire.RoleLaptop, Session: "mine"}
	s, err := l.attach(w, hello)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = w.serveDirect(ctx, listener)
	}()
	t.Cleanup(func() { cancel(); <-served })
	connect := func() net.Conn {
		c, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	join := func(id *tunnel.Identity) (*mux.Session, error) {
		got, _, err := tunnel.Client(t.Context(), connect(), tunnel.ClientConfig{Identity: id, Peer: w.identity.Fingerprint(), Hello: hello, Resume: s, Direct: true})
		return got, err
	}
	var re *mux.RejectError
	if _, err := join(newLaptop(t).id); !errors.As(err, &re) || re.Code != wire.CodeGone {
		t.Errorf("another key: %v", err)
	}
	if got, err := join(l.id); err != nil || got != s {
		t.Fatal(got, err)
	}
	if _, err := s.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	silent := make([]net.Conn, maxGreeting)
	for i := range silent {
		silent[i] = connect()
	}
	beyond := connect()
	_ = beyond.SetReadDeadline(time.Now().Add(deadline))
	if _, err := beyond.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one stranger too many: %v", err)
	}
	for _, c := range silent {
		_ = c.Close()
	}
	w.until("there is room again", func() bool {
		c := connect()
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := c.Read(make([]byte, 1))
		_ = c.Close()
		return errors.Is(err, os.ErrDeadlineExceeded)
	})
	_ = s.Close()
}

// TestConnectionsTakeTurns: no connection of a laptop is answered while the tunnel of another is not registered yet.
func TestConnectionsTakeTurns(t *testing.T) {
	l := newLaptop(t)
	w := newWorld(t, session("mine", "ada", l.id.Fingerprint()))
	leave, err := w.laptops.turns.take(t.Context(), "mine")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.laptops.turns.take(ctx, "mine"); !errors.Is(err, context.Canceled) {
		t.Errorf("it is taken: %v", err)
	}
	answered := make(chan error, 1)
	go func() {
		s, err := l.attach(w, wire.Hello{Version: wire.Version, Role: wire.RoleLaptop, Session: "mine"})
		if err == nil {
			_ = s.Close()
		}
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("it was not its turn: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	leave()
	leave()
	if err := <-answered; err != nil {
		t.Error(err)
	}
	w.until("nobody is kept in mind", func() bool {
		w.laptops.turns.mu.Lock()
		defer w.laptops.turns.mu.Unlock()
		return len(w.laptops.turns.of) == 0
	})
}
