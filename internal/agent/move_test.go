package agent

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// kept is a client's connection that it keeps.
type kept struct {
	t *testing.T
	c net.Conn
	r *bufio.Reader
}

func (w *world) kept(t *testing.T) *kept {
	t.Helper()
	c := w.dial(w.cfg.Ports[0].AgentPort)
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(deadline))
	return &kept{t, c, bufio.NewReader(c)}
}

func (k *kept) write(s string) {
	k.t.Helper()
	if _, err := io.WriteString(k.c, s); err != nil {
		k.t.Fatal(err)
	}
}

// answer reads a response and returns its body.
func (k *kept) answer() string {
	k.t.Helper()
	r, err := http.ReadResponse(k.r, nil)
	if err != nil {
		k.t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		k.t.Fatal(err)
	}
	return string(b)
}

func (k *kept) get(user, want string) {
	k.t.Helper()
	k.write("GET /x HTTP/1.1\r\nHost: web\r\nX-User: " + user + "\r\n\r\n")
	if got := k.answer(); got != want+" /x" {
		k.t.Errorf("%q, want %q", got, want)
	}
}

// An open connection goes where a new one would with the next request after an intercept has begun or ended.
func TestMove(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if st, err := r.Accept(nil); err == nil {
			serveHTTP(st, h.Intercept)
		}
	})
	s := w.mgr.up()
	fresh, used := w.kept(t), w.kept(t)
	for range 3 {
		used.get("", "app")
		w.table(s, control.TableEntry{Intercept: "all"})
		used.get("", "all")
		used.get("", "all")
		w.table(s, control.TableEntry{Intercept: "another"})
		used.get("", "another")
		w.table(s)
	}
	used.get("", "app")
	w.table(s, control.TableEntry{Intercept: "all"})
	w.table(s) // between two requests
	used.get("", "app")
	w.table(s, byHeader("lou", "lou"))
	for _, k := range []*kept{used, fresh} {
		k.get("lou", "lou")
		k.get("mary", "app")
		k.get("lou", "lou")
	}
}

// While its laptop does not answer nothing of an intercept goes there, on connections that it has taken neither.
func TestMoveWhileAway(t *testing.T) {
	for name, e := range map[string]control.TableEntry{"by request": byHeader("lou", "lou"), "all": {Intercept: "lou"}} {
		t.Run(name, func(t *testing.T) {
			w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false)
			w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
				if st, err := r.Accept(nil); err == nil {
					serveHTTP(st, h.Intercept)
				}
			})
			s := w.mgr.up()
			e.Protocol, e.ContainerPort = "TCP", w.cfg.Ports[0].ContainerPort
			w.tableOf(s, e)
			k := w.kept(t)
			for range 2 {
				k.get("lou", "lou")
				w.tell(s, control.Table{Items: []control.TableEntry{e}, Away: []string{"another", "lou"}})
				k.get("lou", "app")
				w.kept(t).get("lou", "app")
				w.tableOf(s, e)
				k.get("lou", "lou")
			}
		})
	}
}

// A connection that a laptop has refused is offered again with a later request, but not with each.
func TestMoveAfterRefusal(t *testing.T) {
	var refuse atomic.Bool
	var offers atomic.Int32
	refuse.Store(true)
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		offers.Add(1)
		if refuse.Load() {
			_ = r.Reject(wire.CodeRefused, "")
			return
		}
		if st, err := r.Accept(nil); err == nil {
			serveHTTP(st, h.Intercept)
		}
	})
	s := w.mgr.up()
	w.table(s, control.TableEntry{Intercept: "all"})
	k := w.kept(t)
	for range 5 {
		k.get("", "app")
	}
	if got := offers.Load(); got > 2 {
		t.Errorf("offered %d times", got)
	}
	refuse.Store(false)
	w.until("the laptop has it", func() bool {
		k.write("GET /x HTTP/1.1\r\nHost: web\r\n\r\n")
		return k.answer() == "all /x"
	})
}

// A client that does not wait for an answer gets no other one amid it, whatever becomes of the laptop that gives it.
func TestMoveAmidAnAnswer(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false)
	half := make(chan struct{}, 1)
	w.mgr.set(func(r *mux.Request, _ wire.InterceptHeader) {
		st, err := r.Accept(nil)
		if err != nil {
			return
		}
		br := bufio.NewReader(st)
		if _, err := http.ReadRequest(br); err == nil {
			_, _ = io.WriteString(st, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
			half <- struct{}{}
			_, _ = br.ReadByte()
		}
		_ = st.Close()
	})
	s := w.mgr.up()
	w.table(s, control.TableEntry{Intercept: "all"})
	k := w.kept(t)
	k.write("GET /x HTTP/1.1\r\nHost: web\r\n\r\n")
	<-half
	got := make([]byte, len("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf"))
	if _, err := io.ReadFull(k.r, got); err != nil {
		t.Fatal(err)
	}
	w.table(s)
	k.write("GET /y HTTP/1.1\r\nHost: web\r\n\r\n")
	if rest, err := io.ReadAll(k.r); err == nil || len(rest) > 0 {
		t.Errorf("%q, %v", rest, err)
	}
}

// What only looks like a request, in the midst of one, stays with it.
func TestMoveBetweenRequests(t *testing.T) {
	const inner = "GET /x HTTP/1.1\r\nHost: web\r\n\r\n"
	slow, seen := make(chan struct{}), make(chan string, 10)
	w := startBefore(t, newApp(t, func(c *net.TCPConn) {
		serveHandler(c, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			seen <- r.URL.Path
			half := make([]byte, len(inner))
			n, _ := io.ReadFull(r.Body, half)
			if n > 0 {
				seen <- "half"
			}
			b, _ := io.ReadAll(r.Body)
			if r.URL.Path == "/slow" {
				<-slow
			}
			fmt.Fprintf(w, "app %s%s%s", r.URL.Path, half[:n], b)
		}))
	}), false)
	see := func(what string) {
		t.Helper()
		for got := range seen {
			if got == what {
				return
			}
		}
	}
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if st, err := r.Accept(nil); err == nil {
			serveHTTP(st, h.Intercept)
		}
	})
	s := w.mgr.up()
	all := control.TableEntry{Intercept: "all"}

	t.Run("a body like a request", func(t *testing.T) {
		k := w.kept(t)
		k.get("", "app")
		k.write(fmt.Sprintf("POST /post HTTP/1.1\r\nHost: web\r\nContent-Length: %d\r\n\r\n", 2*len(inner)))
		see("/post")
		w.table(s, all)
		k.write(inner)
		see("half") // so that it comes in two
		k.write(inner)
		if got := k.answer(); got != "app /post"+inner+inner {
			t.Errorf("%q", got)
		}
		k.get("", "all")
		w.table(s)
	})
	t.Run("a pipeline", func(t *testing.T) {
		k := w.kept(t)
		k.get("", "app")
		k.write("GET /slow HTTP/1.1\r\nHost: web\r\n\r\n")
		see("/slow")
		w.table(s, all)
		k.write(inner)
		close(slow)
		if got := k.answer(); got != "app /slow" {
			t.Errorf("%q", got)
		}
		if got := k.answer(); got != "app /x" && got != "all /x" {
			t.Errorf("%q", got)
		}
		k.get("", "all")
		w.table(s)
	})
	t.Run("another protocol", func(t *testing.T) {
		k := w.kept(t)
		k.write("HELO\r\n")
		if line, err := k.r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 400") {
			t.Errorf("%q, %v", line, err)
		}
	})
}

// A client that speaks HTTP/2 makes another connection for its next requests when an intercept has begun or ended. None fails, and those that run go on
// where they are.
func TestMoveHTTP2(t *testing.T) {
	slow := make(chan struct{})
	release := sync.OnceFunc(func() { close(slow) })
	both := new(http.Protocols)
	both.SetHTTP1(true)
	both.SetUnencryptedHTTP2(true)
	serve := func(c net.Conn, who string) {
		serveProtocols(c, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				_ = http.NewResponseController(w).Flush()
				<-slow
			}
			fmt.Fprintf(w, "%s %s", who, r.URL.Path)
		}), both)
	}
	var refuse atomic.Bool
	var offers atomic.Int32
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serve(c, "app") }), false)
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		offers.Add(1)
		if refuse.Load() {
			_ = r.Reject(wire.CodeRefused, "")
			return
		}
		if st, err := r.Accept(nil); err == nil {
			serve(st, h.Intercept)
		}
	})
	s := w.mgr.up()
	two := new(http.Protocols)
	two.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: two} // it closes no connection by itself that it was asked to leave
	t.Cleanup(func() { release(); tr.CloseIdleConnections() })
	ask := func(path, user string) (answer func() string) { // returns when the head of the answer is there
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", w.cfg.Ports[0].AgentPort, path), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-User", user)
		res, err := tr.RoundTrip(r) //nolint:bodyclose // whoever reads the answer closes it
		if err != nil {
			t.Fatal(err)
		}
		return func() string {
			t.Helper()
			defer res.Body.Close()
			b, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
	}
	get := func(user string) string {
		t.Helper()
		return ask("/x", user)()
	}
	moves := func(user, to string) {
		t.Helper()
		w.until("requests of "+user+" go to "+to, func() bool { return get(user) == to+" /x" })
	}
	moves("", "app")
	runs := ask("/slow", "")
	for range 3 {
		w.table(s, control.TableEntry{Intercept: "all"})
		moves("", "all")
		w.table(s)
		moves("", "app")
	}
	w.table(s, byHeader("lou", "lou"))
	moves("lou", "lou")
	if got := get("mary"); got != "app /x" {
		t.Error(got)
	}
	release()
	if got := runs(); got != "app /slow" {
		t.Error(got)
	}
	w.table(s)
	tr.CloseIdleConnections() // requests of a split connection stay with it
	refuse.Store(true)
	w.table(s, control.TableEntry{Intercept: "all"})
	moves("", "app")
	before := offers.Load()
	for range 100 {
		get("")
	}
	if n := offers.Load() - before; n > 1 {
		t.Errorf("offered %d times more", n)
	}
	refuse.Store(false)
	moves("", "all")
}

// Plain text on a port for TLS is the app's, before and after an intercept of some requests has begun.
func TestMoveNotOnTLSPort(t *testing.T) {
	w := startTLS(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false, &agentcfg.TLS{Dir: t.TempDir()})
	s := w.mgr.up()
	k := w.kept(t)
	k.get("lou", "app")
	w.table(s, byHeader("lou", "lou"))
	k.get("lou", "app")
}

// What runs when the end comes for the connections of an intercept that was left ends with it. A connection that lies between two requests goes on, and so
// does one that is on its way to another side.
func TestMoveAtTheEnd(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveHTTP(c, "app") }), false)
	taken, ended := make(chan *mux.Stream, 10), make(chan error, 1)
	eof, release := make(chan struct{}), make(chan struct{})
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		st, err := r.Accept(nil)
		if err != nil {
			return
		}
		taken <- st
		if h.Intercept != "slow" {
			serveHandler(st, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/events" {
					_, _ = io.WriteString(w, "one\n")
					_ = http.NewResponseController(w).Flush()
					<-r.Context().Done()
				}
				fmt.Fprintf(w, "%s %s", h.Intercept, r.URL.Path)
			}))
			return
		}
		br := bufio.NewReader(st)
		if _, err := http.ReadRequest(br); err == nil {
			_, _ = io.WriteString(st, "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nslow /x")
		}
		_, err = br.ReadByte()
		ended <- err
		close(eof)
		<-release
		_ = st.Close()
	})
	s := w.mgr.up()
	// leave takes the intercept away, and returns what leaveGrace does later.
	leave := func() (end func()) {
		end = w.agent.table.lookup("TCP", w.cfg.Ports[0].ContainerPort).intercepts[0].cancel
		w.table(s)
		return end
	}
	all := control.TableEntry{Intercept: "all"}

	t.Run("between two requests", func(t *testing.T) {
		w.table(s, all)
		idle, used, events := w.kept(t), w.kept(t), w.kept(t)
		for _, k := range []*kept{idle, used} {
			k.get("", "all")
			k.get("", "all")
		}
		events.write("GET /events HTTP/1.1\r\nHost: web\r\n\r\n")
		for line := ""; line != "one\n"; {
			var err error
			if line, err = events.r.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
		}
		leave()()
		if _, err := io.ReadAll(events.r); err == nil {
			t.Error("an answer without an end has come to one")
		}
		for range 2 {
			used.get("", "app")
		}
		w.table(s, byHeader("lou", "lou"))
		idle.get("lou", "lou")
		idle.get("", "app")
		w.table(s)
	})
	t.Run("on its way", func(t *testing.T) {
		w.table(s, control.TableEntry{Intercept: "slow"})
		k := w.kept(t)
		k.get("", "slow")
		end := leave()
		k.write("GET /x HTTP/1.1\r\nHost: web\r\n\r\n")
		<-eof
		if err := <-ended; err != io.EOF { //nolint:errorlint // the end itself
			t.Errorf("the laptop read %v", err)
		}
		end()
		time.AfterFunc(50*time.Millisecond, func() { close(release) })
		if got := k.answer(); got != "app /x" {
			t.Errorf("%q", got)
		}
		k.get("", "app")
	})
	t.Run("the laptop's process dies", func(t *testing.T) {
		for len(taken) > 0 {
			<-taken
		}
		w.table(s, all)
		k := w.kept(t)
		k.get("", "all")
		for i := range 3 {
			select {
			case st := <-taken: // the client's
				if i < 2 {
					st.Reset()
				}
			case <-time.After(deadline):
				t.Fatal("the client has no other one")
			}
		}
		k.get("", "all")
	})
}
