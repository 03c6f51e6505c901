package localapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/uerr"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// deadline bounds every wait of a test.
const deadline = 20 * time.Second

type request struct {
	Name string `json:"name"`
}

type result struct {
	Text string `json:"text"`
}

// serve serves a method "m" on a socket and returns a client.
func serve(t *testing.T, fn func(context.Context, request, Progress) (result, error)) *Client {
	t.Helper()
	return serveHandler(t, Handle(fn))
}

func serveHandler(t *testing.T, h http.Handler) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "run", "daemon.sock")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("POST /v1/m", h)
	srv := &http.Server{Handler: mux}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	c := NewClient(socket)
	t.Cleanup(func() {
		c.http.CloseIdleConnections()
		_ = srv.Close()
		<-done
	})
	return c
}

// A daemon that hangs (stopped by SIGSTOP, for one) takes connections, and says nothing; one that has much to do says so at once.
func TestCallHangs(t *testing.T) {
	const patience = 100 * time.Millisecond
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "daemon.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	err = newClient(l.Addr().String(), patience).Call(ctx, "m", request{}, nil, nil)
	ue, ok := errors.AsType[*uerr.Error](err)
	if pid := fmt.Sprint(os.Getpid()); !ok || !strings.Contains(ue.Msg, "process "+pid+") does not answer") || ue.Hint != "end it with: kill -9 "+pid {
		t.Errorf("%v", err)
	}
	c := serve(t, func(context.Context, request, Progress) (result, error) {
		time.Sleep(5 * patience)
		return result{"late"}, nil
	})
	busy := newClient(c.socket, patience)
	defer busy.http.CloseIdleConnections()
	var res result
	if err := busy.Call(ctx, "m", request{}, &res, nil); err != nil || res.Text != "late" {
		t.Errorf("busy: %q, %v", res.Text, err)
	}
}

func TestCall(t *testing.T) {
	c := serve(t, func(_ context.Context, r request, p Progress) (result, error) {
		p("step %d", 1)
		p("%s", "100 % done\nreally")
		return result{"hello " + r.Name}, nil
	})
	var steps []string
	var res result
	if err := c.Call(t.Context(), "m", request{"ada"}, &res, func(s string) { steps = append(steps, s) }); err != nil {
		t.Fatal(err)
	}
	if res.Text != "hello ada" || !slices.Equal(steps, []string{"step 1", "100 % done\nreally"}) {
		t.Errorf("%q, steps %q", res.Text, steps)
	}
	if err := c.Call(t.Context(), "m", request{"ada"}, nil, nil); err != nil {
		t.Errorf("without interest in result and progress: %v", err)
	}
}

// Progress arrives when it is made, not with the result.
func TestProgressIsLive(t *testing.T) {
	next := make(chan struct{})
	c := serve(t, func(_ context.Context, _ request, p Progress) (result, error) {
		p("one")
		<-next
		p("two")
		<-next
		return result{}, nil
	})
	if err := c.Call(t.Context(), "m", request{}, nil, func(string) { next <- struct{}{} }); err != nil {
		t.Fatal(err)
	}
}

// Every kind of error crosses the socket with its words and hint.
func TestErrors(t *testing.T) {
	for _, kind := range []uerr.Kind{uerr.Internal, uerr.Usage, uerr.Denied, uerr.NotConnected, uerr.Cluster, uerr.NotFound, uerr.NoManager, uerr.Conflict, uerr.LeftBehind, uerr.Canceled} {
		c := serve(t, func(_ context.Context, _ request, p Progress) (result, error) {
			p("trying")
			return result{"ignored"}, fmt.Errorf("outer: %w", uerr.Wrap(io.EOF, kind, "do this", "inner"))
		})
		var res result
		err := c.Call(t.Context(), "m", request{}, &res, nil)
		var e *uerr.Error
		if !errors.As(err, &e) || e.Kind != kind || e.Error() != "outer: inner: EOF" || e.Hint != "do this" || res.Text != "" {
			t.Errorf("%s: got %#v", kind, err)
		}
	}
	c := serve(t, func(context.Context, request, Progress) (result, error) { return result{}, errors.New("plain") })
	var e *uerr.Error
	if err := c.Call(t.Context(), "m", request{}, nil, nil); !errors.As(err, &e) || e.Kind != uerr.Internal || e.Msg != "plain" {
		t.Errorf("a plain error: %#v", err)
	}
}

func TestOtherVersion(t *testing.T) {
	c := serve(t, func(context.Context, request, Progress) (result, error) { return result{}, nil })
	var e *uerr.Error
	if err := c.Call(t.Context(), "brandnew", request{}, nil, nil); !errors.As(err, &e) || !strings.Contains(e.Msg, "does not understand brandnew") || !strings.Contains(e.Hint, "doppel quit -s") {
		t.Errorf("unknown method: %v", err)
	}
	if err := c.Call(t.Context(), "m", map[string]any{"name": "x", "future": true}, nil, nil); !errors.As(err, &e) || !strings.Contains(e.Msg, `unknown field "future"`) {
		t.Errorf("unknown field: %v", err)
	}
	if err := c.Call(t.Context(), "m", strings.Repeat("x", maxRequest+1), nil, nil); err == nil {
		t.Error("a request without end was read")
	}
	if err := c.Call(t.Context(), "m", func() {}, nil, nil); err == nil {
		t.Error("what is not JSON was sent")
	}
}

// Ctrl-C in the CLI ends the work in the daemon.
func TestClientGone(t *testing.T) {
	started, ended := make(chan struct{}), make(chan error, 1)
	c := serve(t, func(ctx context.Context, _ request, p Progress) (result, error) {
		close(started)
		select {
		case <-ctx.Done():
			ended <- ctx.Err()
		case <-time.After(deadline):
			ended <- errors.New("goes on without a client")
		}
		return result{}, nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Call(ctx, "m", request{}, nil, nil) }()
	<-started
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("the client got %v", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the handler: %v", err)
	}
}

func TestBigAnswer(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB
	c := serve(t, func(_ context.Context, _ request, p Progress) (result, error) {
		p("%s", big[:1<<20])
		return result{big}, nil
	})
	var res result
	got := 0
	if err := c.Call(t.Context(), "m", request{}, &res, func(s string) { got = len(s) }); err != nil || res.Text != big || got != 1<<20 {
		t.Errorf("%d bytes, progress %d, %v", len(res.Text), got, err)
	}
}

// A daemon that is killed in the middle of an answer, or before it, is told from one that says no.
func TestDaemonDies(t *testing.T) {
	for name, before := range map[string]string{
		"before the answer": "",
		"in the answer":     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n13\r\n{\"progress\":\"one\"}\n\r\n5\r\n{\"re",
		"between events":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n13\r\n{\"progress\":\"one\"}\n\r\n",
		"without a result":  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n13\r\n{\"progress\":\"one\"}\n\r\n0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Chmod(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			socket := filepath.Join(dir, "d.sock")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Read(make([]byte, 4096))
					_, _ = io.WriteString(conn, before)
					_ = conn.Close()
				}
			})
			c := NewClient(socket)
			err = c.Call(t.Context(), "m", request{}, nil, nil)
			var e *uerr.Error
			if !errors.As(err, &e) || e.Msg != "the user daemon ended before it answered" || e.Hint == "" {
				t.Errorf("got %v", err)
			}
			c.http.CloseIdleConnections()
			_ = l.Close()
			wg.Wait()
		})
	}
}

func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "run", "daemon.sock")
	if err := NewClient(socket).Call(t.Context(), "m", request{}, nil, nil); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("no socket: %v", err)
	}
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	keep(t, l)
	if err := NewClient(socket).Call(t.Context(), "m", request{}, nil, nil); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("a socket that nobody listens on: %v", err)
	}
}

// keep closes a listener as kill -9 does: the socket's file stays.
func keep(t *testing.T, l net.Listener) {
	t.Helper()
	l.(*listener).Listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestListen(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "daemon.sock")
	first, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{socket: 0o600, filepath.Dir(socket): 0o700} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, fi.Mode(), err)
		}
	}
	if _, err := Listen(socket); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("a second daemon: %v", err)
	}
	if c, err := net.Dial("unix", socket); err != nil {
		t.Errorf("the first was disturbed: %v", err)
	} else {
		_ = c.Close()
	}
	keep(t, first)
	again, err := Listen(socket) // after kill -9
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

// An older daemon that knows of no lock is not driven out either.
func TestListenBesideOlderDaemon(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	old, err := net.Listen("unix", filepath.Join(dir, "daemon.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if _, err := Listen(filepath.Join(dir, "daemon.sock")); err == nil {
		t.Error("driven out")
	}
}

// Of daemons that start at once, one listens and the others say so.
func TestListenAtOnce(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "daemon.sock")
	for range 20 {
		var mu sync.Mutex
		var got []net.Listener
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if l, err := Listen(socket); err == nil {
					mu.Lock()
					got = append(got, l)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if len(got) != 1 {
			t.Fatalf("%d listen", len(got))
		}
		if c, err := net.Dial("unix", socket); err != nil {
			t.Fatalf("the one that listens cannot be reached: %v", err)
		} else {
			_ = c.Close()
		}
		_ = got[0].Close()
	}
}

// A directory that somebody else can write to (or made, in /tmp) is neither served from nor trusted.
func TestForeignDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	check := func(what string) {
		t.Helper()
		if _, err := Listen(filepath.Join(dir, "d.sock")); err == nil || !strings.Contains(err.Error(), "only you can write to") {
			t.Errorf("%s: Listen: %v", what, err)
		}
		if err := NewClient(filepath.Join(dir, "d.sock")).Call(t.Context(), "m", request{}, nil, nil); err == nil || errors.Is(err, ErrNoDaemon) || !strings.Contains(err.Error(), "only you can write to") {
			t.Errorf("%s: Call: %v", what, err)
		}
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	check("writable for all")
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chmod(dir, 0o700), os.Chown(dir, 65534, 65534)); err != nil {
			t.Fatal(err)
		}
		check("somebody else's")
	}
	link := filepath.Join(filepath.Dir(dir), "link")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	dir = link
	check("a link")
}

func TestPlaces(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	if got := DaemonSocket(); got != "/run/user/7/doppel/daemon.sock" {
		t.Error(got)
	}
	home := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("TMPDIR", "/tmp/x")
	if got, want := Dir(), fmt.Sprintf("/tmp/x/doppel-%d", os.Getuid()); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	t.Setenv("XDG_STATE_HOME", "")
	t.Setenv("HOME", home)
	dir, err := StateDir()
	if err != nil || dir != home+"/.local/state/doppel" {
		t.Errorf("%s, %v", dir, err)
	}
	t.Setenv("XDG_STATE_HOME", home+"/state")
	if dir, err = StateDir(); err != nil || dir != home+"/state/doppel" {
		t.Errorf("%s, %v", dir, err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
}

// pipe is a stream whose other end is peer.
func pipe(t *testing.T) (st Stream, peer *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	if peer, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = peer.Close() })
	return c, peer
}

func TestStream(t *testing.T) {
	st, peer := pipe(t)
	c := serveHandler(t, HandleStream(func(_ context.Context, r request) (Stream, error) {
		if r.Name != "web" {
			return nil, uerr.New(uerr.NotFound, "look", "no %s", r.Name)
		}
		return st, nil
	}))
	_, err := c.Stream(t.Context(), "m", request{"none"})
	if e := new(uerr.Error); !errors.As(err, &e) || e.Kind != uerr.NotFound || e.Hint != "look" {
		t.Errorf("refused: %v", err)
	}
	if _, err := c.Stream(t.Context(), "n", request{"web"}); err == nil || !strings.Contains(err.Error(), "does not understand n") {
		t.Errorf("unknown: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got, err := c.Stream(ctx, "m", request{"web"})
	if err != nil {
		t.Fatal(err)
	}
	cancel() // bounds the request alone
	for _, x := range []struct{ from, to Stream }{{got, peer}, {peer, got}} {
		if _, err := io.WriteString(x.from, "text"); err != nil {
			t.Fatal(err)
		}
		if err := x.from.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(x.to); string(b) != "text" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
	}
	_ = got.Close()
	if _, err := c.Stream(ctx, "m", request{"web"}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled before: %v", err)
	}
	if _, err := NewClient(filepath.Join(t.TempDir(), "none")).Stream(t.Context(), "m", request{}); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("no daemon: %v", err)
	}
}
