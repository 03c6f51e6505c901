package manager

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// Whoever reaches a port of the manager keeps no connection by being slow or silent.
func TestSlowStrangers(t *testing.T) {
	for name, tt := range map[string]struct {
		begin string
		drip  string // once a second
		limit time.Duration
	}{
		"says nothing":                      {"", "", readHeaderTimeout},
		"a head, a byte a second":           {"GET / HTTP/1.1\r\nX: ", "x", readHeaderTimeout},
		"a body, a byte a second":           {"POST / HTTP/1.1\r\nHost: m\r\nContent-Length: 1000000\r\n\r\n", "x", 2 * readHeaderTimeout},
		"chunks without an end":             {"POST / HTTP/1.1\r\nHost: m\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n", 2 * readHeaderTimeout},
		"is silent after a request":         {"GET / HTTP/1.1\r\nHost: m\r\n\r\n", "", idleTimeout},
		"asks again, and then is silent":    {"GET / HTTP/1.1\r\nHost: m\r\n\r\nGET / HTTP/1.1\r\nHost: m\r\n\r\n", "", idleTimeout},
		"does not read a long answer":       {"GET /long HTTP/1.1\r\nHost: m\r\n\r\n", "", readHeaderTimeout},
		"the beginning of a second request": {"GET / HTTP/1.1\r\nHost: m\r\n\r\nGET / HT", "", readHeaderTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := http.NewServeMux()
				h.HandleFunc("/", func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
				h.HandleFunc("/long", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 1<<20)) })
				srv := httpServer(h, slog.New(slog.DiscardHandler))
				l := &pipeListener{make(chan net.Conn)}
				served := make(chan error)
				go func() { served <- srv.Serve(l) }()
				here, there := net.Pipe()
				ended := &watchedConn{Conn: there, closed: make(chan struct{})}
				l.conns <- ended
				var wg sync.WaitGroup
				wg.Go(func() {
					_, err := io.WriteString(here, tt.begin)
					for err == nil && tt.drip != "" {
						time.Sleep(time.Second)
						_, err = io.WriteString(here, tt.drip)
					}
				})
				if !strings.Contains(tt.begin, "/long") {
					wg.Go(func() { _, _ = io.Copy(io.Discard, here) })
				}
				begin := time.Now()
				select {
				case <-ended.closed:
				case <-time.After(time.Hour):
					t.Error("the connection is kept")
				}
				if d := time.Since(begin); d > tt.limit+time.Second {
					t.Errorf("the connection is kept for %v", d)
				}
				_ = here.Close()
				close(l.conns)
				<-served
				_ = srv.Close()
				wg.Wait()
			})
		})
	}
}

// watchedConn tells that it was closed.
type watchedConn struct {
	net.Conn
	closed chan struct{}
	once   sync.Once
}

func (c *watchedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// However many ask for sessions that nobody knows, the API server is asked by one at a time, and who asks late is not told of an earlier list.
func TestFreshSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f freshSessions
		answer := make(chan []v1alpha1.Session)
		asked := 0
		ask := func(context.Context) ([]v1alpha1.Session, error) {
			asked++
			return <-answer, nil
		}
		var wg sync.WaitGroup
		crowd := func(n, want int) {
			for range n {
				wg.Go(func() {
					if got, err := f.list(t.Context(), ask); err != nil || len(got) != want {
						t.Errorf("%d sessions, %v, want %d", len(got), err, want)
					}
				})
			}
			synctest.Wait()
		}
		crowd(1, 0)
		crowd(10_000, 1) // a session was made after the first list began
		if asked != 1 {
			t.Errorf("asked %d times while nothing is answered", asked)
		}
		answer <- nil
		synctest.Wait()
		if asked != 2 {
			t.Errorf("then asked %d times", asked)
		}
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			if _, err := f.list(ctx, ask); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
		synctest.Wait()
		cancel() // one who goes away waits for nobody
		answer <- make([]v1alpha1.Session, 1)
		answer <- nil // of who went away
		wg.Wait()
	})
}
