package httproute

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/match"
)

// world is a client's way to an app and to laptops, over TCP on loopback.
type world struct {
	t     testing.TB
	front net.Listener
	ends  chan error // of each connection
	gone  context.Context
	leave context.CancelFunc // ends gone

	mu sync.Mutex
	// guarded by mu:
	rules map[string]*match.Matcher
	rest  string
	addrs map[string]string // by intercept; App is the app's
	opens map[string]int
	wrap  func(flow.Stream) flow.Stream // what Open returns, if it is set
	copy  func(match.Head, bool) Copy   // if it is set
	limit *Budget
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, ends: make(chan error, 1000), rules: map[string]*match.Matcher{}, addrs: map[string]string{}, opens: map[string]int{}}
	w.front = listen(t)
	w.gone, w.leave = context.WithCancel(t.Context())
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := w.front.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				w.ends <- Serve(ctx, flow.FromTCP(c.(*net.TCPConn)), Config{Pick: w.pick, Rest: w.whoRests, Open: w.open, Copy: w.copyOf, Gone: w.gone, Budget: w.budget()})
			})
		}
	})
	t.Cleanup(func() {
		w.front.Close()
		cancel()
		wg.Wait()
	})
	return w
}

func listen(t testing.TB) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (w *world) pick(h match.Head) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, m := range w.rules {
		if m.Match(h) {
			return id
		}
	}
	return w.rest
}

func (w *world) whoRests() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rest
}

func (w *world) open(ctx context.Context, to string) (flow.Stream, error) {
	w.mu.Lock()
	addr, wrap := w.addrs[to], w.wrap
	w.opens[to]++
	w.mu.Unlock()
	if addr == "" {
		return nil, errors.New("refused")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	s := flow.FromTCP(c.(*net.TCPConn))
	if wrap != nil {
		s = wrap(s)
	}
	return s, nil
}

func (w *world) copyOf(h match.Head, alone bool) Copy {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.copy == nil {
		return nil
	}
	return w.copy(h, alone)
}

func (w *world) budget() *Budget {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.limit
}

// bound gives all connections from now on a budget.
func (w *world) bound(n int) {
	w.mu.Lock()
	w.limit = NewBudget(n)
	w.mu.Unlock()
}

// at says where connections to the app or a laptop go.
func (w *world) at(to, addr string) {
	w.mu.Lock()
	w.addrs[to] = addr
	w.mu.Unlock()
}

func (w *world) opened(to string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.opens[to]
}

// rule gives the intercept "id" the requests with a header x-id of that value, and "addr" as its laptop.
func (w *world) rule(id, addr string) {
	m, err := match.Compile(match.Rule{Headers: []match.Header{{Name: "x-id", Text: match.Text{Op: match.Equal, Value: id}}}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	w.rules[id], w.addrs[id] = m, addr
	w.mu.Unlock()
}

func (w *world) forget(id string) {
	w.mu.Lock()
	delete(w.rules, id)
	w.mu.Unlock()
}

func (w *world) dial() *client {
	c, err := net.Dial("tcp", w.front.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return &client{t: w.t, TCPConn: c.(*net.TCPConn), r: bufio.NewReader(c)}
}

// client speaks raw bytes.
type client struct {
	t testing.TB
	*net.TCPConn
	r *bufio.Reader
}

func (c *client) send(s string) {
	if _, err := io.WriteString(c.TCPConn, s); err != nil {
		c.t.Fatalf("send %.40q: %v", s, err)
	}
}

// answer reads one response to a request with that method.
func (c *client) answer(method string) (int, string) {
	c.t.Helper()
	r, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("answer: %v", err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		c.t.Fatalf("answer's body: %v", err)
	}
	return r.StatusCode, string(b)
}

// rest reads to the end of the connection.
func (c *client) rest() string {
	c.t.Helper()
	b, err := io.ReadAll(c.r)
	if err != nil {
		c.t.Fatalf("rest: %v (after %.80q)", err, b)
	}
	return string(b)
}

// httpServer answers with its name, the request's target and its body.
func httpServer(t testing.TB, name string) string {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		fmt.Fprintf(w, "%s %s %d", name, r.URL.Path, len(b))
	})
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		for i := range 3 {
			fmt.Fprintf(w, "%s %d\n", name, i)
			w.(http.Flusher).Flush()
		}
	})
	mux.HandleFunc("/empty", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/early", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprint(w, name)
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	l := listen(t)
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return l.Addr().String()
}

// rawServer runs handle for each connection.
func rawServer(t testing.TB, handle func(c *net.TCPConn, r *bufio.Reader)) string {
	l := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(20 * time.Second))
			wg.Go(func() { defer c.Close(); handle(c.(*net.TCPConn), bufio.NewReader(c)) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}
