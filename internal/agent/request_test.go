package agent

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// oneConn is a listener of one connection.
type oneConn struct {
	c    net.Conn
	done chan struct{}
	used bool
}

func (o *oneConn) Accept() (net.Conn, error) {
	if o.used {
		<-o.done
		return nil, net.ErrClosed
	}
	o.used = true
	return o.c, nil
}

func (o *oneConn) Close() error   { return nil }
func (o *oneConn) Addr() net.Addr { return o.c.LocalAddr() }

// serveHTTP answers the requests of one connection with a name and the request's path.
func serveHTTP(c net.Conn, who string) {
	l := &oneConn{c: c, done: make(chan struct{})}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %s", who, r.URL.Path) }),
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateClosed || s == http.StateHijacked {
				close(l.done)
			}
		},
	}
	_ = srv.Serve(l)
}

func byHeader(uid, value string) control.TableEntry {
	return control.TableEntry{Intercept: uid, Match: match.Rule{Headers: []match.Header{{Name: "x-user", Text: match.Text{Op: match.Equal, Value: value}}}}}
}

// Two people, one with all that is left, and the app share a port; the table decides about each request of an open connection.
func TestByRequest(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if h.Intercept == "refuses" {
			_ = r.Reject(wire.CodeRefused, "")
			return
		}
		if st, err := r.Accept(nil); err == nil {
			serveHTTP(st, h.Intercept)
		}
	})
	s := w.mgr.up()
	url := fmt.Sprintf("http://127.0.0.1:%d/x", w.cfg.Ports[0].AgentPort)
	c := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}, Timeout: deadline}
	t.Cleanup(c.CloseIdleConnections)
	ask := func(user string) string {
		t.Helper()
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if user != "" {
			req.Header.Set("X-User", user)
		}
		r, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	want := func(user, answer string) {
		t.Helper()
		if got := ask(user); got != answer+" /x" {
			t.Errorf("%q got %q, want %q", user, got, answer)
		}
	}
	w.table(s, byHeader("lou", "lou"), byHeader("refuses", "may"))
	for range 3 {
		want("lou", "lou")
		want("", "app")
		want("may", "app")
		want("nobody", "app")
	}
	w.table(s, byHeader("lou", "lou"), byHeader("may", "may"), control.TableEntry{Intercept: "all"})
	want("may", "may")
	want("lou", "lou")
	want("", "all")
	w.table(s)
	want("lou", "app")
	want("", "app")
}

// The more specific match is asked first, whatever the order of the table; an entry that is not understood is nobody's.
func TestTableOrder(t *testing.T) {
	var tab table
	tab.init()
	both := byHeader("both", "lou")
	both.Match.Path = &match.Text{Op: match.Prefix, Value: "/api"}
	newer := byHeader("newer", "x")
	newer.Match.Headers[0].Op = "like"
	items := []control.TableEntry{{Intercept: "all"}, byHeader("lou", "lou"), newer, both}
	for i := range items {
		items[i].Protocol, items[i].ContainerPort = "TCP", 1
	}
	tab.set(control.Table{Items: items}, slog.New(slog.DiscardHandler))
	var got []string
	for _, e := range tab.lookup("TCP", 1) {
		got = append(got, e.intercept)
	}
	if fmt.Sprint(got) != "[both lou all]" {
		t.Errorf("order %v", got)
	}
}
