package agent

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// TestEarlyAnswer has the app, then a laptop, answer and close with a request unread while its client ends: whichever the agent sees first, the client
// gets the answer.
func TestEarlyAnswer(t *testing.T) {
	const answer = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nno"
	early := func(s flow.Stream) {
		_, _ = s.Read(make([]byte, 4))
		_, _ = io.WriteString(s, answer)
		s.Reset()
	}
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { early(flow.FromTCP(c)) }), false)
	try := func(to string) {
		t.Helper()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 100 {
					c := w.dial(w.cfg.Ports[0].AgentPort)
					_ = c.SetDeadline(time.Now().Add(deadline))
					_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
					_ = c.CloseWrite()
					got, err := io.ReadAll(c)
					_ = c.Close()
					if string(got) != answer || err != nil && !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("%s: %q, %v", to, got, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	try("app")
	s := w.mgr.up()
	w.mgr.set(func(r *mux.Request, _ wire.InterceptHeader) {
		if st, err := r.Accept(nil); err == nil {
			early(st)
		}
	})
	w.intercept(s, "blue")
	try("laptop")
}
