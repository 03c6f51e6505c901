package manager

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/rawio"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

// serveAPI serves the one port that managed control planes can reach (10250): the API server's webhook calls, which are TLS,
// and /attach through the service proxy, which is not (the tunnel brings its own TLS). The first byte tells them apart.
func (m *Manager) serveAPI(ctx context.Context, l net.Listener) error {
	split := newSplitter(l)
	attach := http.NewServeMux()
	attach.Handle("/attach", tunnel.UpgradeHandler(func(c net.Conn) { go m.laptops.serve(ctx, c) })) // the request, its buffers and its stack are not kept for as long
	hooks := http.NewServeMux()
	hooks.Handle("/inject", m.injectWebhook())
	plain, secure := httpServer(attach, m.cfg.Log), httpServer(hooks, m.cfg.Log)
	tlsL := tls.NewListener(split.tls, &tls.Config{Certificates: []tls.Certificate{m.identity.TLSCertificate()}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}})

	stop := context.AfterFunc(ctx, func() { _ = errors.Join(l.Close(), plain.Close(), secure.Close()) })
	defer stop()
	errc := make(chan error, 3)
	go func() { errc <- split.run() }()
	go func() { errc <- plain.Serve(split.plain) }()
	go func() { errc <- secure.Serve(tlsL) }()
	return <-errc
}

// splitter hands connections to one of two listeners by their first byte: 0x16 is a TLS handshake (RFC 8446, section 5.1).
type splitter struct {
	l          net.Listener
	plain, tls *chanListener
}

func newSplitter(l net.Listener) *splitter {
	return &splitter{l: l, plain: newChanListener(l.Addr()), tls: newChanListener(l.Addr())}
}

func (s *splitter) run() error {
	defer s.plain.Close()
	defer s.tls.Close()
	for {
		c, err := lifecycle.Accept(s.l.Accept)
		if err != nil {
			return err
		}
		go s.sort(c)
	}
}

func (s *splitter) sort(c net.Conn) {
	_ = c.SetReadDeadline(time.Now().Add(readHeaderTimeout))
	br := bufio.NewReaderSize(c, 512)
	first, err := br.Peek(1)
	_ = c.SetReadDeadline(time.Time{})
	if err != nil {
		_ = c.Close()
		return
	}
	pc := &peekedConn{Conn: rawio.New(c), r: br}
	if first[0] == 0x16 {
		s.tls.give(pc)
		return
	}
	s.plain.give(pc)
}

// peekedConn is a connection whose first bytes wait in a buffer.
type peekedConn struct {
	net.Conn
	r *bufio.Reader
}

// NetConn returns the connection below, whose socket tunnel.Tune looks for.
func (c *peekedConn) NetConn() net.Conn { return c.Conn }

func (c *peekedConn) Read(p []byte) (int, error) {
	if c.r.Buffered() > 0 {
		return c.r.Read(p)
	}
	return c.Conn.Read(p)
}

// chanListener is a net.Listener fed by give.
type chanListener struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newChanListener(a net.Addr) *chanListener {
	return &chanListener{addr: a, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *chanListener) give(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		_ = c.Close()
	}
}

func (l *chanListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *chanListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *chanListener) Addr() net.Addr { return l.addr }

// serveHealth serves /healthz, /readyz and /metrics.
func (m *Manager) serveHealth(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { // caches are in sync before a runnable starts that settles either
		switch {
		case !m.policy.settled():
			http.Error(w, "waiting for the admission policy", http.StatusServiceUnavailable)
		case !m.place.taken.Load():
			http.Error(w, "neither leading nor standing by yet", http.StatusServiceUnavailable)
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics.Registry, promhttp.HandlerOpts{}))
	srv := httpServer(mux, m.cfg.Log)
	srv.Addr = m.cfg.HealthAddr
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	return srv.ListenAndServe()
}
