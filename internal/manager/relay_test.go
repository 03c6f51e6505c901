package manager

import (
	"bufio"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

func previewOf(id string) *v1alpha1.Preview {
	return &v1alpha1.Preview{ID: id, Ingress: v1alpha1.Ingress{Host: "127.0.0.1", Port: 80}}
}

// fakeRelay takes links and nothing else.
func fakeRelay(t *testing.T) (url, dir string, links chan *mux.Session) {
	t.Helper()
	links = make(chan *mux.Session, 4)
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != relayapi.LinkPath || r.Header.Get("Authorization") != "Bearer sesame" {
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		tunnel.UpgradeHandler(func(c net.Conn) {
			s, err := mux.New(c, mux.Config{})
			if err != nil {
				t.Error(err)
				return
			}
			links <- s
		}).ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	dir = t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := errors.Join(os.WriteFile(filepath.Join(dir, relayTokenFile), []byte("sesame\n"), 0o600), os.WriteFile(filepath.Join(dir, relayCAFile), ca, 0o600)); err != nil {
		t.Fatal(err)
	}
	return srv.URL, dir, links
}

// ingress is a server at an address that is this machine's, and no loopback: a manager dials none of its own. It speaks TLS if that agrees on a protocol.
func ingress(t *testing.T, h http.HandlerFunc, proto string) netip.AddrPort {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !mayDial(netip.AddrPortFrom(p.Addr(), 1)) {
			continue
		}
		l, err := net.Listen("tcp", netip.AddrPortFrom(p.Addr(), 0).String())
		if err != nil {
			continue
		}
		srv := httptest.NewUnstartedServer(h)
		srv.Listener.Close()
		srv.Listener = l
		if proto != "" {
			srv.EnableHTTP2 = proto == "h2"
			srv.StartTLS()
		} else {
			srv.Start()
		}
		t.Cleanup(srv.Close)
		return netip.MustParseAddrPort(l.Addr().String())
	}
	t.Skip("this machine has no address but its loopback")
	return netip.AddrPort{}
}

func TestRelayLink(t *testing.T) {
	at := ingress(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %v", r.Host, r.TLS != nil) }, "")
	name := func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %s", r.Host, r.TLS.ServerName) }
	secure, old := ingress(t, name, "h2"), ingress(t, name, "http/1.1")
	node := &corev1.Node{ObjectMeta: meta("", "n"), Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: at.Addr().String()}}}}
	outside := session("mine", "ada", "k")
	outside.Spec.Reach = v1alpha1.Reach{Namespaces: []string{"shop"}, Outside: true}
	narrow := session("narrow", "eve", "k")
	narrow.Spec.Reach = v1alpha1.Reach{Namespaces: []string{"shop"}}
	w := newWorld(t, node, outside, narrow)
	var links chan *mux.Session
	w.cfg.CheckReach = true
	w.cfg.RelayURL, w.cfg.RelaySecret, links = fakeRelay(t)
	l, err := newRelayLink(w.Manager)
	if err != nil {
		t.Fatal(err)
	}
	w.relay = l
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	s := <-links
	defer func() { s.Close() }()
	watch := func() (*tunnel.Watcher, relayapi.ClusterState) {
		t.Helper()
		wt, err := tunnel.Watch(t.Context(), s, relayapi.RelayPreviews, relayapi.Welcome{Cluster: "c1"})
		if err != nil {
			t.Fatal(err)
		}
		var st relayapi.ClusterState
		if err := wt.Next(t.Context(), &st); err != nil {
			t.Fatal(err)
		}
		return wt, st
	}
	wt, st := watch()
	if len(st.Previews) != 0 {
		t.Errorf("%+v", st)
	}
	if r := w.relay.state(); r.Cluster != "c1" || r.Problem != "" {
		t.Errorf("%+v", r)
	}

	// what is shown, and what is not
	ingressOf := func(id string, host netip.AddrPort, tls bool) *v1alpha1.Preview {
		return &v1alpha1.Preview{ID: id, Ingress: v1alpha1.Ingress{Host: host.Addr().String(), Port: int32(host.Port()), TLS: tls, L5Host: "shop.example"}}
	}
	w.engaged.set(engagement{UID: "a", Session: "mine", Workload: web, Preview: ingressOf("plain", at, false)})
	w.engaged.set(engagement{UID: "b", Session: "mine", Workload: web, Preview: ingressOf("secure", secure, true)})
	w.engaged.set(engagement{UID: "o", Session: "mine", Workload: web, Preview: ingressOf("old", old, true)})
	w.engaged.set(engagement{UID: "c", Session: "narrow", Workload: web, Preview: ingressOf("narrow", at, false)})
	w.engaged.set(engagement{UID: "d", Session: "mine", Workload: web, Preview: ingressOf("self", netip.MustParseAddrPort("127.0.0.1:1"), false)})
	w.engaged.set(engagement{UID: "e", Session: "mine", Workload: web, Preview: ingressOf("metadata", netip.MustParseAddrPort("169.254.169.254:80"), false)})
	open := func(id string) (*mux.Stream, error) {
		st, _, err := s.Open(t.Context(), wire.AppendPreview(nil, wire.PreviewHeader{ID: id}))
		return st, err
	}
	refused := func(id string, want wire.Code) {
		t.Helper()
		_, err := open(id)
		var re *mux.RejectError
		if !errors.As(err, &re) || re.Code != want {
			t.Errorf("%s: %v, want %v", id, err, want)
		}
	}
	refused("plain", wire.CodeGone)
	w.laptops.mu.Lock()
	w.laptops.tunnels["mine"], w.laptops.tunnels["narrow"] = &mux.Session{}, &mux.Session{}
	w.laptops.mu.Unlock()
	refused("none", wire.CodeNotFound)
	refused("narrow", wire.CodeDenied)
	refused("self", wire.CodeDenied)
	refused("metadata", wire.CodeDenied)
	for id, want := range map[string]string{"plain": "", "secure": "h2", "old": "http/1.1"} {
		st, proto, err := s.Open(t.Context(), wire.AppendPreview(nil, wire.PreviewHeader{ID: id, HTTP2: true}))
		if err != nil {
			t.Fatalf("%s: %v", id, err)
		}
		_ = st.Close()
		if string(proto) != want {
			t.Errorf("%s: agreed on %q, want %q", id, proto, want)
		}
	}
	for id, want := range map[string]string{"plain": "h false", "secure": "h shop.example", "old": "h shop.example"} {
		st, err := open(id)
		if err != nil {
			t.Fatalf("%s: %v", id, err)
		}
		if got := get(t, st); got != want {
			t.Errorf("%s: %q, want %q", id, got, want)
		}
		if id != "plain" {
			st.Close()
			continue
		}
		// The relay keeps the connection; it ends with the intercept.
		w.engaged.remove("a")
		st.SetReadDeadline(time.Now().Add(deadline))
		if n, err := st.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("still open: %d %v", n, err)
		}
	}
	for len(st.Previews) != 5 || !st.Previews[0].Laptop {
		if err := wt.Next(t.Context(), &st); err != nil {
			t.Fatal(err)
		}
	}
	_ = wt.Close()

	// lost, and joined again
	s.Close()
	s = <-links
	if _, st = watch(); len(st.Previews) != 5 {
		t.Errorf("%+v", st)
	}
	// a token that counts no more is said to those who are connected
	if err := os.WriteFile(filepath.Join(w.cfg.RelaySecret, relayTokenFile), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Close()
	w.until("the problem", func() bool { return strings.Contains(w.relay.state().Problem, "401") })
}

func get(t *testing.T, c net.Conn) string {
	t.Helper()
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
