//go:build !linux

package rootapi

import (
	"context"
	"net"
	"net/netip"
	"os"

	"github.com/doppel-dev/doppel/internal/uerr"
)

var errUnsupported = uerr.Wrap(ErrNotRunning, uerr.Internal, "use doppel on Linux, or in a Linux virtual machine (WSL 2)", "doppel-rootd is not supported on this operating system yet")

// Client is not supported here yet.
type Client struct{ done chan struct{} }

// Dial is not supported here yet.
func Dial(ctx context.Context, path string, opts Options) (*Client, error) {
	return nil, errUnsupported
}

func dialAny(context.Context, string) (*Client, Version, error) {
	return nil, Version{}, errUnsupported
}

// SetNetwork is not supported here yet.
func (c *Client) SetNetwork(ctx context.Context, n Network) (State, *os.File, error) {
	return State{}, nil, errUnsupported
}

// AdoptNetwork is not supported here yet.
func (c *Client) AdoptNetwork(ctx context.Context, n Network) (State, error) {
	return State{}, errUnsupported
}

// MarkedSocket is not supported here yet.
func (c *Client) MarkedSocket(ctx context.Context, network string) (*os.File, error) {
	return nil, errUnsupported
}

// DialMarked is not supported here yet.
func (c *Client) DialMarked(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	return nil, errUnsupported
}

// Version is not supported here yet.
func (c *Client) LogLevel(context.Context, string, int) error { return errUnsupported }

// Version is for Linux only so far.
func (c *Client) Version(ctx context.Context) (Version, error) { return Version{}, errUnsupported }

// Quit is not supported here yet.
func (c *Client) Quit(ctx context.Context, ifIdle bool) error { return errUnsupported }

// Close is not supported here yet.
func (c *Client) Close() error { return errUnsupported }

// Done is not supported here yet.
func (c *Client) Done() <-chan struct{} { return c.done }
