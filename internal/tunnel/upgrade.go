package tunnel

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// UpgradeProtocol is the tunnel's name in the HTTP headers Upgrade and Connection (RFC 9110, section 7.8).
const UpgradeProtocol = "doppel/1"

// maxErrorBody is how much of an unwanted answer's body an UpgradeError keeps, in bytes.
const maxErrorBody = 1024

// UpgradeError is an answer other than 101: the server, or a proxy on the way, does not switch.
type UpgradeError struct {
	Status int
	Body   string // its start
}

// Error returns the status and the start of the body.
func (e *UpgradeError) Error() string {
	s := fmt.Sprintf("HTTP %d instead of 101 Switching Protocols", e.Status)
	if body := strings.TrimSpace(e.Body); body != "" {
		s += ": " + body
	}
	return s
}

// Upgrade asks url, through rt, to switch to the tunnel's protocol and returns the raw connection.
func Upgrade(ctx context.Context, rt http.RoundTripper, url string) (net.Conn, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil) //nolint:noctx // UpgradeTo sets it
	if err != nil {
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	return UpgradeTo(ctx, rt, req, UpgradeProtocol)
}

// UpgradeTo sends req, which it changes, through rt with the wish to switch to protocol and returns the raw connection. rt must
// speak HTTP/1.1: over HTTP/2 there is no Upgrade, and a Kubernetes API server answers 200. ctx bounds the request, not the
// connection. The connection has no deadlines: only Close interrupts a Read or Write.
func UpgradeTo(ctx context.Context, rt http.RoundTripper, req *http.Request, protocol string) (net.Conn, error) {
	// The request's context would end the connection later on: it is kept apart from ctx.
	rctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	req = req.WithContext(rctx)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		stop()
		cancel(err)
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	rwc, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok || !strings.EqualFold(resp.Header.Get("Upgrade"), protocol) {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
		stop()
		_ = resp.Body.Close()
		err := &UpgradeError{Status: resp.StatusCode, Body: string(body)}
		cancel(err)
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	if !stop() { // ctx ended just now
		_ = rwc.Close()
		return nil, fmt.Errorf("upgrade: %w", context.Cause(ctx))
	}
	return &upgradedConn{ReadWriteCloser: rwc, cancel: cancel}, nil
}

// upgradedConn is the body of a 101 answer as a net.Conn.
type upgradedConn struct {
	io.ReadWriteCloser
	under  *cork // what TLS writes to; nil: it is not known
	cancel context.CancelCauseFunc
	once   sync.Once
	err    error
}

// Write writes p; one goroutine writes at a time.
func (c *upgradedConn) Write(p []byte) (int, error) {
	if c.under == nil {
		return c.ReadWriteCloser.Write(p)
	}
	c.under.hold()
	n, err := c.ReadWriteCloser.Write(p)
	if ferr := c.under.release(); err == nil {
		err = ferr
	}
	return n, err
}

// Close does not wait for the API server's TLS, which tries for 5 s to send its last record.
func (c *upgradedConn) Close() error {
	c.once.Do(func() {
		if c.under != nil {
			defer time.AfterFunc(closeTimeout, func() { _ = c.under.Conn.Close() }).Stop()
		}
		c.err = c.ReadWriteCloser.Close()
		c.cancel(net.ErrClosed)
	})
	return c.err
}

func (*upgradedConn) LocalAddr() net.Addr              { return upgradedAddr{} }
func (*upgradedConn) RemoteAddr() net.Addr             { return upgradedAddr{} }
func (*upgradedConn) SetDeadline(time.Time) error      { return nil }
func (*upgradedConn) SetReadDeadline(time.Time) error  { return nil }
func (*upgradedConn) SetWriteDeadline(time.Time) error { return nil }

type upgradedAddr struct{}

func (upgradedAddr) Network() string { return "http" }
func (upgradedAddr) String() string  { return "upgrade" }

// UpgradeHandler switches requests for the tunnel's protocol and gives the raw connection to accept, which owns it. Requests
// for anything else get 426 Upgrade Required.
func UpgradeHandler(accept func(net.Conn)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !hasToken(r.Header, "Connection", "upgrade") || !hasToken(r.Header, "Upgrade", UpgradeProtocol) {
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", UpgradeProtocol)
			http.Error(w, "this is the way into a doppel tunnel: Upgrade: "+UpgradeProtocol+" is required", http.StatusUpgradeRequired)
			return
		}
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, "HTTP/1.1 is required", http.StatusHTTPVersionNotSupported)
			return
		}
		_ = conn.SetDeadline(time.Time{}) // the HTTP server's
		const answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + UpgradeProtocol + "\r\n\r\n"
		if _, err := io.WriteString(conn, answer); err != nil {
			_ = conn.Close()
			return
		}
		_ = Tune(conn) // a wish; before the socket is hidden
		if n := buf.Reader.Buffered(); n > 0 {
			conn = &bufferedConn{Conn: conn, r: buf.Reader, left: n}
		}
		accept(conn)
	})
}

func hasToken(h http.Header, name, token string) bool {
	for _, v := range h.Values(name) {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), token) {
				return true
			}
		}
	}
	return false
}

// bufferedConn is a connection of which the HTTP server has read some bytes already.
type bufferedConn struct {
	net.Conn
	r    *bufio.Reader
	left int
}

func (c *bufferedConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		return c.Conn.Read(p)
	}
	n, err := c.r.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}
