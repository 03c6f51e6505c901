// Package localapi owns what the CLI and the user daemon say to each other: HTTP and JSON over a unix socket,
// every answer a stream of events (progress lines, then a result or an error).
package localapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// answerTimeout is how long the user daemon may take to begin an answer; what it does for it may take longer.
const answerTimeout = 5 * time.Second

// maxRequest bounds a request's body.
const maxRequest = 1 << 20

// Event is one line of an answer: progress, or as the last line a result or an error.
type Event struct {
	Progress string          `json:"progress,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    *uerr.Error     `json:"error,omitempty"`
}

// Progress reports one step of a long operation.
type Progress func(format string, args ...any)

// Dir is the directory of a user's sockets: $XDG_RUNTIME_DIR/doppel, or a directory of the user's own below the temporary one.
func Dir() string {
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "doppel")
	}
	return filepath.Join(os.TempDir(), "doppel-"+strconv.Itoa(os.Getuid()))
}

// DaemonSocket is where the user daemon listens.
func DaemonSocket() string { return filepath.Join(Dir(), "daemon.sock") }

// StateDir is where the daemons write their logs: $XDG_STATE_HOME/doppel or ~/.local/state/doppel.
func StateDir() (string, error) {
	base := os.Getenv("XDG_STATE_HOME")
	if base == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		base = filepath.Join(home, ".local", "state")
	}
	dir := filepath.Join(base, "doppel")
	return dir, os.MkdirAll(dir, 0o700)
}

// Listen opens the socket for this user only. A socket that nobody answers on is replaced; one that is answered is an error.
// A lock beside the socket decides between two daemons that start at once; it is held until the listener is closed.
func Listen(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := checkPrivate(dir); err != nil {
		return nil, err
	}
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, fmt.Errorf("another daemon listens on %s: %w", path, err)
	}
	l, err := replace(path)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return &listener{l, lock}, nil
}

func replace(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("another daemon listens on %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// listener gives the lock back when it is closed.
type listener struct {
	net.Listener
	lock io.Closer
}

func (l *listener) Close() error { return errors.Join(l.Listener.Close(), l.lock.Close()) }

// Handle makes an HTTP handler of fn. The request's context ends when the client goes away.
func Handle[Req, Res any](fn func(context.Context, Req, Progress) (Res, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req Req
		if !decode(w, r, &req) {
			return
		}
		w.Header().Set("Content-Type", "application/x-ndjson")
		enc, flush := json.NewEncoder(w), http.NewResponseController(w)
		w.WriteHeader(http.StatusOK)
		_ = flush.Flush() // at once: it shows that this daemon lives
		send := func(e Event) {
			_ = enc.Encode(e) // a client that is gone cancels the context
			_ = flush.Flush()
		}
		res, err := fn(r.Context(), req, func(format string, args ...any) { send(Event{Progress: fmt.Sprintf(format, args...)}) })
		if err != nil {
			send(Event{Error: uerr.From(err)})
			return
		}
		b, err := json.Marshal(res)
		if err != nil {
			send(Event{Error: uerr.From(err)})
			return
		}
		send(Event{Result: b})
	})
}

// decode reads a request, or answers that it cannot be read.
func decode(w http.ResponseWriter, r *http.Request, req any) bool {
	dec := json.NewDecoder(io.LimitReader(r.Body, maxRequest))
	dec.DisallowUnknownFields()
	if err := dec.Decode(req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

// Client talks to the user daemon.
type Client struct {
	socket string
	http   http.Client
	pid    atomic.Int64 // of the daemon that was connected to last; 0: not known
}

// NewClient returns a client of the daemon at a socket.
func NewClient(socket string) *Client { return newClient(socket, answerTimeout) }

func newClient(socket string, timeout time.Duration) *Client {
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{
		DialContext:           func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		ResponseHeaderTimeout: timeout,
	}
	return c
}

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	if err := checkPrivate(filepath.Dir(c.socket)); err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err == nil {
		c.pid.Store(int64(peerPID(conn.(*net.UnixConn))))
	}
	return conn, err
}

// ErrNoDaemon means that no user daemon runs.
var ErrNoDaemon = errors.New("the user daemon is not running")

// Call sends req to a method and decodes the result into res, handing progress lines to progress (may be nil).
func (c *Client) Call(ctx context.Context, method string, req, res any, progress func(string)) error {
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://daemon/v1/"+method, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(hr)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return ErrNoDaemon
		}
		if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() && ctx.Err() == nil {
			return c.hangs()
		}
		return broken(ctx, err)
	}
	defer resp.Body.Close()
	if err := check(method, resp); err != nil {
		return err
	}
	return broken(ctx, readEvents(resp.Body, res, progress))
}

// hangs is the error for a daemon that takes connections and does not begin to answer.
func (c *Client) hangs() error {
	pid := c.pid.Load()
	if pid == 0 {
		return uerr.New(uerr.Internal, "end its process", "the user daemon does not answer")
	}
	return uerr.New(uerr.Internal, fmt.Sprintf("end it with: kill -9 %d", pid), "the user daemon (process %d) does not answer", pid)
}

// check returns an error unless the daemon knows the method.
func check(method string, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	return uerr.New(uerr.Internal, "the running daemon may be of another version; try: doppel quit -s", "the user daemon does not understand %s: %s", method, bytes.TrimSpace(b))
}

// broken says in words what a connection that ends too early means: the daemon was killed, or died.
func broken(ctx context.Context, err error) error {
	if ctx.Err() == nil && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)) {
		return ErrEnded
	}
	return err
}

// ErrEnded is a daemon that took the connection and was no more when it should have answered.
var ErrEnded = uerr.New(uerr.Internal, "see the daemon's log with: doppel status", "the user daemon ended before it answered")

func readEvents(r io.Reader, res any, progress func(string)) error {
	for dec := json.NewDecoder(r); ; {
		var e Event
		if err := dec.Decode(&e); err != nil {
			return fmt.Errorf("answer of the user daemon: %w", err)
		}
		switch {
		case e.Error != nil:
			return e.Error
		case e.Result != nil:
			if res == nil {
				return nil
			}
			return json.Unmarshal(e.Result, res)
		case progress != nil:
			progress(e.Progress)
		}
	}
}
