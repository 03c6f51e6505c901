package userd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/doppel-dev/doppel/internal/flow"
)

// localTLSTimeout bounds the TLS handshake with a local process.
const localTLSTimeout = 5 * time.Second

// localTLS is a connection to a local process that speaks TLS, for requests that come without. The handshake waits for the first bytes, which
// say whether HTTP/2 has to be agreed on (RFC 9113, section 3.2). The certificate is not verified: the process is the one that the user named on
// their own machine.
type localTLS struct {
	raw  *net.TCPConn
	open chan struct{} // closed when conn is there, or err is
	once sync.Once
	conn *tls.Conn
	err  error
}

func newLocalTLS(raw *net.TCPConn) *localTLS { return &localTLS{raw: raw, open: make(chan struct{})} }

// settle decides, once, what the connection is.
func (c *localTLS) settle(conn *tls.Conn, err error) {
	c.once.Do(func() {
		c.conn, c.err = conn, err
		close(c.open)
	})
}

// Write makes the handshake if it is the first.
func (c *localTLS) Write(p []byte) (int, error) {
	select {
	case <-c.open:
	default:
		c.settle(c.handshake(p))
	}
	if c.err != nil {
		return 0, c.err
	}
	return c.conn.Write(p)
}

func (c *localTLS) handshake(first []byte) (*tls.Conn, error) {
	cfg := &tls.Config{ServerName: "localhost", InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}} //nolint:gosec // see the type
	if strings.HasPrefix(http2.ClientPreface, string(first[:min(len(first), 4)])) {
		cfg.NextProtos = []string{"h2"}
	}
	conn := tls.Client(c.raw, cfg)
	ctx, cancel := context.WithTimeout(context.Background(), localTLSTimeout)
	defer cancel()
	return conn, conn.HandshakeContext(ctx)
}

func (c *localTLS) Read(p []byte) (int, error) {
	<-c.open
	if c.err != nil {
		return 0, c.err
	}
	return c.conn.Read(p)
}

// CloseWrite ends this direction in TLS and below it; before anything was written there is nothing to read either.
func (c *localTLS) CloseWrite() error {
	c.settle(nil, io.EOF)
	if c.err != nil {
		return c.raw.CloseWrite()
	}
	return errors.Join(c.conn.CloseWrite(), c.raw.CloseWrite())
}

// Close implements flow.Stream.
func (c *localTLS) Close() error {
	c.settle(nil, net.ErrClosed)
	return c.raw.Close()
}

// Reset implements flow.Stream.
func (c *localTLS) Reset() {
	c.settle(nil, net.ErrClosed)
	flow.FromTCP(c.raw).Reset()
}

// Over says that the local process has reset the connection or is gone.
func (c *localTLS) Over() bool { return flow.Over(flow.FromTCP(c.raw)) }

// LocalAddr and the rest of net.Conn are the connection's own, also before the handshake.

func (c *localTLS) LocalAddr() net.Addr                { return c.raw.LocalAddr() }
func (c *localTLS) RemoteAddr() net.Addr               { return c.raw.RemoteAddr() }
func (c *localTLS) SetDeadline(t time.Time) error      { return c.raw.SetDeadline(t) }
func (c *localTLS) SetReadDeadline(t time.Time) error  { return c.raw.SetReadDeadline(t) }
func (c *localTLS) SetWriteDeadline(t time.Time) error { return c.raw.SetWriteDeadline(t) }
