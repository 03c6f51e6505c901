package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

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
func serveHTTP(c net.Conn, who string) { serveHandler(c, sayPath(who)) }

// serveBoth is serveHTTP that knows HTTP/2 too.
func serveBoth(c net.Conn, who string) {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	serveProtocols(c, sayPath(who), p)
}

func sayPath(who string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%s %s", who, r.URL.Path)
	})
}

func serveHandler(c net.Conn, h http.Handler) { serveProtocols(c, h, nil) }

func serveProtocols(c net.Conn, h http.Handler, p *http.Protocols) {
	l := &oneConn{c: c, done: make(chan struct{})}
	srv := &http.Server{
		Handler:   h,
		Protocols: p,
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
	mark := ""
	ask := func(user string) string {
		t.Helper()
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if user != "" {
			req.Header.Set("X-User", user)
		}
		if mark != "" {
			req.Header.Set(match.PreviewHeader, mark)
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
	// An intercept may have several rules, and what is a preview's comes first.
	preview := control.TableEntry{Intercept: "may", Match: match.Preview("lou-may")}
	w.table(s, byHeader("lou", "lou"), byHeader("may", "may"), preview)
	want("lou", "lou")
	want("may", "may")
	mark = "lou-may"
	want("lou", "may")
	want("", "may")
	mark = "another"
	want("", "app")
	mark = ""
	w.table(s, preview)
	want("may", "app")
	w.table(s)
	want("lou", "app")
	want("", "app")
}

// When the manager is silent, requests on an HTTP/2 connection that its laptop has had some of are the app's, also if nobody offers another flow meanwhile.
func TestSilentManagerByRequest(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveBoth(c, "app") }), false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if st, err := r.Accept(nil); err == nil {
			serveBoth(st, h.Intercept)
		}
	})
	w.mgr.up()
	held := w.hold()
	w.table(w.mgr.up(), byHeader("lou", "lou"))
	line := <-held
	t.Cleanup(line.release)
	two := new(http.Protocols)
	two.SetUnencryptedHTTP2(true)
	var dials atomic.Int32
	c := &http.Client{Timeout: 300 * time.Millisecond, Transport: &http.Transport{Protocols: two, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials.Add(1)
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}}
	t.Cleanup(c.CloseIdleConnections)
	ask := func() string {
		r, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/x", w.cfg.Ports[0].AgentPort), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-User", "lou")
		res, err := c.Do(r)
		if err != nil {
			return err.Error()
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	w.until("the laptop answers", func() bool { return ask() == "lou /x" })
	before := dials.Load()
	line.hold()
	w.until("the app answers", func() bool { return ask() == "app /x" })
	line.release()
	w.until("the laptop answers again", func() bool { return ask() == "lou /x" })
	if got := dials.Load(); got != before {
		t.Errorf("it took %d connections", got-before)
	}
}

// An intercept of all connections that has a preview stays one of whole connections, whatever is on them: what the preview's rule takes it has anyway.
func TestPreviewOfAll(t *testing.T) {
	w := start(t, false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if st, err := r.Accept(nil); err == nil {
			all, _ := io.ReadAll(st) // what is missing is seen below
			_, _ = st.Write(all)
			_ = st.Close()
		}
	})
	w.table(w.mgr.up(), control.TableEntry{Intercept: "all"}, control.TableEntry{Intercept: "all", Match: match.Preview("all-id")})
	c, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(w.cfg.Ports[0].AgentPort)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const said = "GET / HTTP/1.1\r\nHost: h\r\n\r\nno request at all\r\n" // the second line is the app's, if requests are looked at
	if err := errors.Join(c.SetDeadline(time.Now().Add(deadline)), second(io.WriteString(c, said)), c.CloseWrite()); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != said || err != nil {
		t.Errorf("%q %v", got, err)
	}
}

func second(_ int, err error) error { return err }

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
	for _, e := range tab.lookup("TCP", 1).intercepts {
		got = append(got, e.intercept)
	}
	if fmt.Sprint(got) != "[both lou all]" {
		t.Errorf("order %v", got)
	}
}

// TestDrainIdleRequests: a connection of HTTP/1 that is idle does not hold the drain up when the app has gone, though a laptop had its last request.
func TestDrainIdleRequests(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if st, err := r.Accept(nil); err == nil {
			serveHTTP(st, h.Intercept)
		}
	})
	w.table(w.mgr.up(), byHeader("lou", "lou"))
	c := w.dial(w.cfg.Ports[0].AgentPort)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	if _, err := io.WriteString(c, "GET /x HTTP/1.1\r\nHost: h\r\nX-User: lou\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "lou /x" {
		t.Fatalf("%q %v", b, err)
	}
	w.stop()
	w.app.close()
	if b, err := io.ReadAll(r); err != nil || len(b) > 0 {
		t.Errorf("%q %v", b, err)
	}
	c.Close()
	if err := w.wait(); err != nil {
		t.Errorf("drained with %v", err)
	}
}
