package relayclient

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// fakeMachine notes what it is asked for.
type fakeMachine struct {
	wishes chan relayapi.Wish
	hold   chan struct{} // closed: wishes come about
	ended  atomic.Int64
}

func (m *fakeMachine) Connections(string) []relayapi.Connection {
	return []relayapi.Connection{{Name: "prod", Cluster: "c", Namespace: "shop"}}
}

func (m *fakeMachine) Workloads(context.Context, string, relayapi.WorkloadsRequest) (relayapi.Workloads, error) {
	return relayapi.Workloads{Workloads: []string{"Deployment/web"}}, nil
}

func (m *fakeMachine) Intercept(ctx context.Context, _ string, w relayapi.Wish, _ func(string)) (func(context.Context) error, error) {
	m.wishes <- w
	select {
	case <-m.hold:
		return func(context.Context) error { m.ended.Add(1); return nil }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// hostile is a relay that asks for whatever it likes, at a laptop that has joined it.
func hostile(t *testing.T, m Machine, may relayapi.Permission) (session *mux.Session, allow func()) {
	t.Helper()
	joined := make(chan *mux.Session, 1)
	up := tunnel.UpgradeHandler(func(c net.Conn) {
		s, err := mux.New(c, mux.Config{})
		if err != nil {
			t.Error(err)
			return
		}
		joined <- s
		_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{})
	})
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != relayapi.LaptopPath || r.Header.Get("Authorization") != "Bearer tok" {
			t.Errorf("%s %v", r.URL, r.Header)
		}
		up.ServeHTTP(w, r)
	}))
	srv.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	var mu sync.Mutex
	login := Login{URL: srv.URL, Token: "tok", CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})), Permission: may}
	p := NewPresence(PresenceConfig{Machine: m, Log: slog.New(slog.DiscardHandler), Logins: func() ([]Login, error) {
		mu.Lock()
		defer mu.Unlock()
		return []Login{login, {URL: "https://not-logged-in.test"}}, nil
	}})
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() { p.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		run.Wait()
	})
	select {
	case s := <-joined:
		return s, func() {
			mu.Lock()
			defer mu.Unlock()
			login.Permission = relayapi.Allowed
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the laptop has not joined")
		return nil, nil
	}
}

// outcome follows a wish up to a state.
func outcome(t *testing.T, s *mux.Session, w any, state string) relayapi.Outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	watch, err := tunnel.Watch(ctx, s, relayapi.LaptopIntercept, w)
	if err != nil {
		t.Fatal(err)
	}
	var o relayapi.Outcome
	for o.State != state {
		if err := watch.Next(ctx, &o); err != nil {
			t.Fatalf("%v after %+v, want %s", err, o, state)
		}
	}
	return o
}

var good = relayapi.Wish{Connection: "prod", Namespace: "shop", Workload: "web", Local: 3000}

// A relay without its user's permission learns nothing of the cluster and starts nothing.
func TestHostileRelayNotAllowed(t *testing.T) {
	for _, may := range []relayapi.Permission{relayapi.NotAsked, relayapi.Denied} {
		m := &fakeMachine{wishes: make(chan relayapi.Wish, 1), hold: make(chan struct{})}
		s, allow := hostile(t, m, may)
		var rej *mux.RejectError
		if err := tunnel.Control(t.Context(), s, relayapi.LaptopWorkloads, relayapi.WorkloadsRequest{Connection: "prod", Namespace: "shop"}, nil); !errors.As(err, &rej) || rej.Code != wire.CodeDenied {
			t.Errorf("%q: workloads: %v", may, err)
		}
		if err := tunnel.Control(t.Context(), s, relayapi.LaptopLeave, good, nil); !errors.As(err, &rej) || rej.Code != wire.CodeDenied {
			t.Errorf("%q: leave: %v", may, err)
		}
		if may == relayapi.Denied {
			if o := outcome(t, s, good, relayapi.WishFailed); !strings.Contains(o.Message, "denied") || !strings.Contains(o.Hint, "doppel relay allow") {
				t.Errorf("%+v", o)
			}
		} else {
			outcome(t, s, good, relayapi.WishWaiting)
		}
		if len(m.wishes) > 0 {
			t.Errorf("%q: it was started", may)
		}
		allow()
		if may == relayapi.NotAsked { // the one that waits; what a relay was denied is not done later
			<-m.wishes
		}
	}
}

// An allowed relay gets what its page offers, and nothing else.
func TestHostileRelayAllowed(t *testing.T) {
	m := &fakeMachine{wishes: make(chan relayapi.Wish, 8), hold: make(chan struct{})}
	s, _ := hostile(t, m, relayapi.Allowed)
	for _, change := range []func(*relayapi.Wish){
		func(w *relayapi.Wish) { w.Workload = "deployment/../secrets" },
		func(w *relayapi.Wish) { w.Workload = "web --mount=/" },
		func(w *relayapi.Wish) { w.Port = "80:22" },
		func(w *relayapi.Wish) { w.Port = "53/udp" },
		func(w *relayapi.Wish) { w.Local = 0 },
		func(w *relayapi.Wish) { w.Header, w.Value = "a", "b\r\nc: d" },
	} {
		w := good
		change(&w)
		outcome(t, s, w, relayapi.WishFailed)
	}
	// What is not in a wish cannot be wished for.
	go func() {
		outcome(t, s, map[string]any{
			"connection": "prod", "namespace": "shop", "workload": "web", "local": 3000, "command": []string{"sh"}, "address": "10.0.0.1", "mount": "/", "toPod": []string{"22"}, "takeover": true, "mode": "replace",
		}, relayapi.WishWorking)
	}()
	if diff := cmp.Diff(good, <-m.wishes); diff != "" {
		t.Error(diff)
	}
	// Nothing that a laptop does for its cluster it does for a relay.
	var rej *mux.RejectError
	to := netip.MustParseAddrPort("127.0.0.1:22")
	for name, try := range map[string]func() error{
		"TCP":  func() error { _, err := tunnel.DialTCP(t.Context(), s, netip.AddrPort{}, to); return err },
		"UDP":  func() error { _, err := tunnel.DialUDP(t.Context(), s, netip.AddrPort{}, to); return err },
		"ping": func() error { _, err := tunnel.DialEcho(t.Context(), s, netip.Addr{}, to.Addr()); return err },
		"an intercepted flow": func() error {
			_, err := tunnel.DialIntercept(t.Context(), s, wire.InterceptHeader{Intercept: "x", Proto: wire.ProtoTCP, Src: to, Dst: to})
			return err
		},
		"DNS":   func() error { _, err := tunnel.Query(t.Context(), s, []byte("question")); return err },
		"call":  func() error { return tunnel.Control(t.Context(), s, "connect", nil, nil) },
		"watch": func() error { _, err := tunnel.Watch(t.Context(), s, "intercepts", nil); return err },
	} {
		if err := try(); !errors.As(err, &rej) || rej.Code != wire.CodeDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
	// So many at once and no more.
	for range maxWishes - 1 {
		go func() {
			if w, err := tunnel.Watch(t.Context(), s, relayapi.LaptopIntercept, good); err == nil {
				_ = w.Next(t.Context(), nil)
			}
		}()
		<-m.wishes
	}
	if o := outcome(t, s, good, relayapi.WishFailed); !strings.Contains(o.Message, "under way") {
		t.Errorf("%+v", o)
	}
	close(m.hold)
	nettest.Poll(t, 5*time.Second, "room for a wish", func() bool {
		watch, err := tunnel.Watch(t.Context(), s, relayapi.LaptopIntercept, good)
		var o relayapi.Outcome
		for err == nil && o.State != relayapi.WishActive {
			err = watch.Next(t.Context(), &o)
		}
		return err == nil
	})
	// It ends what it has started, once, and nothing else.
	another := good
	another.Workload = "db"
	end := func(w relayapi.Wish) error { return tunnel.Control(t.Context(), s, relayapi.LaptopLeave, w, nil) }
	if err := end(another); !errors.As(err, &rej) || rej.Code != wire.CodeNotFound || m.ended.Load() != 0 {
		t.Errorf("another's: %v", err)
	}
	if err := end(good); err != nil || m.ended.Load() != 1 {
		t.Errorf("its own: %v", err)
	}
	if err := end(good); !errors.As(err, &rej) || rej.Code != wire.CodeNotFound || m.ended.Load() != 1 {
		t.Errorf("twice: %v", err)
	}
}
