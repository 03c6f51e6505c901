package manager

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/tunnel"
)

// pipeListener gives out connections that a test puts in.
type pipeListener struct{ conns chan net.Conn }

func (l *pipeListener) Accept() (net.Conn, error) {
	c, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (l *pipeListener) Close() error   { return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// The first byte decides; nothing that was read to see it is lost. Who says nothing is cut off, and keeps nobody waiting.
func TestSplitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &pipeListener{make(chan net.Conn)}
		s := newSplitter(l)
		done := make(chan error, 1)
		go func() { done <- s.run() }()
		dial := func() net.Conn {
			a, b := net.Pipe()
			l.conns <- a
			return b
		}
		silent := dial()
		for first, want := range map[string]*chanListener{"\x16\x03\x01": s.tls, "GET /attach": s.plain, "DOPPEL1\n": s.plain, "\x00": s.plain} {
			c := dial()
			go func() { _, _ = io.WriteString(c, first) }()
			got, err := want.Accept()
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, len(first))
			if _, err := io.ReadFull(got, b); err != nil || string(b) != first {
				t.Errorf("%q arrived as %q, %v", first, b, err)
			}
			_ = got.Close()
			_ = c.Close()
		}
		begin := time.Now()
		if _, err := silent.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("silent client: %v", err)
		}
		if d := time.Since(begin); d > readHeaderTimeout {
			t.Errorf("cut off after %s", d)
		}
		gone := dial()
		_ = gone.Close()
		late := dial()
		close(l.conns)
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("run: %v", err)
		}
		if _, err := s.tls.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("tls: %v", err)
		}
		// Who is sorted after the end is closed, not left hanging.
		go func() { _, _ = io.WriteString(late, "GET") }()
		if _, err := io.ReadAll(late); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("late client: %v", err)
		}
	})
}

// The API port serves the webhook over TLS with the published certificate, /attach without, and nothing else.
// Tune finds the sockets of what the splitter gives on.
func TestSplitterTuned(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newSplitter(l)
	done := make(chan error, 1)
	go func() { done <- s.run() }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, "\x16")
	got, err := s.tls.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if err := tunnel.Tune(tls.Server(got, nil)); err != nil {
		t.Error(err)
	}
	below, ok := got.(interface{ NetConn() net.Conn })
	if !ok {
		t.Fatalf("%T hides its socket", got)
	}
	if _, ok := below.NetConn().(syscall.Conn); !ok {
		t.Errorf("%T is no socket", below.NetConn())
	}
	_ = l.Close()
	<-done
}

func TestServeAPI(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.serveAPI(ctx, l) }()
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(cs tls.ConnectionState) error {
		if got := tunnel.Fingerprint(cs.PeerCertificates[0]); got != w.identity.Fingerprint() {
			return fmt.Errorf("certificate %s", got)
		}
		return nil
	}}}
	defer tr.CloseIdleConnections()
	get := func(url string) (int, string) {
		r, err := (&http.Client{Transport: tr, Timeout: deadline}).Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(b)
	}
	addr := l.Addr().String()
	if code, body := get("http://" + addr + "/attach"); code != http.StatusUpgradeRequired {
		t.Errorf("/attach without Upgrade: %d %s", code, body)
	}
	for _, url := range []string{"http://" + addr + "/inject", "http://" + addr + "/metrics", "http://" + addr + "/", "https://" + addr + "/attach", "https://" + addr + "/"} {
		if code, _ := get(url); code != http.StatusNotFound {
			t.Errorf("%s: %d", url, code)
		}
	}
	if code, _ := get("https://" + addr + "/inject"); code == http.StatusNotFound {
		t.Error("no webhook")
	}
	// A real upgrade ends at the laptops' door.
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	fmt.Fprintf(c, "GET /attach HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", tunnel.UpgradeProtocol)
	br := bufio.NewReader(c)
	if line, err := br.ReadString('\n'); err != nil || !strings.Contains(line, "101") {
		t.Errorf("%q, %v", line, err)
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("serveAPI ended without saying why")
	}
}

func TestServeHealth(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.HealthAddr = l.Addr().String()
	_ = l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.serveHealth(ctx) }()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	answers := func(path string, status int) {
		t.Helper()
		w.until(path, func() bool {
			r, err := (&http.Client{Transport: tr, Timeout: deadline}).Get("http://" + w.cfg.HealthAddr + path)
			if err != nil {
				return false
			}
			defer r.Body.Close()
			_, _ = io.Copy(io.Discard, r.Body)
			return r.StatusCode == status
		})
	}
	answers("/healthz", http.StatusOK)
	answers("/metrics", http.StatusOK)
	answers("/readyz", http.StatusServiceUnavailable) // nobody has seen the admission policy yet
	w.policy.mu.Lock()
	w.policy.seen = true
	w.policy.mu.Unlock()
	w.until("it says what it waits for", func() bool { // whether it leads or stands by
		r, err := (&http.Client{Transport: tr, Timeout: deadline}).Get("http://" + w.cfg.HealthAddr + "/readyz")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		return err == nil && strings.Contains(string(b), "neither leading nor standing by")
	})
	w.place.taken.Store(true)
	answers("/readyz", http.StatusOK)
	cancel()
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}
