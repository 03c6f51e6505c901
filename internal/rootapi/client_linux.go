package rootapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// Client is a connection to doppel-rootd. Whoever sets the network through it owns the network; when the connection ends, rootd
// removes all of it. Calls may run at the same time.
type Client struct {
	conn *net.UnixConn
	opts Options
	done chan struct{} // closed when the reader has ended

	wmu sync.Mutex // one packet at a time

	mu      sync.Mutex
	next    uint64                // guarded by mu
	pending map[uint64]chan reply // guarded by mu; nil after the end
	err     error                 // guarded by mu: why the connection ended
}

type reply struct {
	msg  Message
	file *os.File
}

// Dial connects to the doppel-rootd that listens on path and checks that it speaks this protocol.
func Dial(ctx context.Context, path string, opts Options) (*Client, error) {
	conn, err := dial(ctx, path)
	if err != nil {
		return nil, err
	}
	return NewClient(ctx, conn, opts)
}

func dial(ctx context.Context, path string) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, dialError(err, path)
	}
	return conn.(*net.UnixConn), nil
}

// NewClient makes a client of a connection, which it owns, and checks that the other side speaks this protocol.
func NewClient(ctx context.Context, conn *net.UnixConn, opts Options) (*Client, error) {
	c, v, err := open(ctx, conn, opts)
	if err != nil {
		return nil, err
	}
	if err := v.Fits(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// dialAny connects to a doppel-rootd of whatever protocol: to ask for its version and to quit was always the same.
func dialAny(ctx context.Context, path string) (*Client, Version, error) {
	conn, err := dial(ctx, path)
	if err != nil {
		return nil, Version{}, err
	}
	return open(ctx, conn, Options{})
}

// open makes a client of a connection and asks who is there.
func open(ctx context.Context, conn *net.UnixConn, opts Options) (*Client, Version, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{conn: conn, opts: opts, done: make(chan struct{}), pending: map[uint64]chan reply{}}
	go c.readLoop()
	ctx, cancel := context.WithTimeoutCause(ctx, versionTimeout, hangs(Version{}))
	defer cancel()
	v, err := c.Version(ctx)
	if err != nil {
		c.Close()
		return nil, v, err
	}
	return c, v, nil
}

func dialError(err error, path string) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return uerr.Wrap(errors.Join(ErrNotRunning, err), uerr.Internal, "start it with: doppel connect", "%s", path)
	case errors.Is(err, fs.ErrPermission):
		return uerr.Wrap(err, uerr.Denied, "join the group doppel, or start doppel-rootd with --uid", "connect to doppel-rootd")
	}
	return fmt.Errorf("connect to doppel-rootd: %w", err)
}

// SetNetwork makes n the machine's state. The call that creates the device returns its descriptor, which the caller then owns (see
// tundev.New); others return nil.
func (c *Client) SetNetwork(ctx context.Context, n Network) (State, *os.File, error) {
	return c.setNetwork(ctx, OpSetNetwork, n)
}

// AdoptNetwork takes over a device that this process still holds after doppel-rootd was started again: rootd checks that the
// interface n.Name is a TUN of the caller's user, and sets its addresses, routes and DNS without making a new one.
func (c *Client) AdoptNetwork(ctx context.Context, n Network) (State, error) {
	st, f, err := c.setNetwork(ctx, OpAdoptNetwork, n)
	if f != nil {
		f.Close()
	}
	return st, err
}

func (c *Client) setNetwork(ctx context.Context, op Op, n Network) (State, *os.File, error) {
	if err := n.Validate(); err != nil {
		return State{}, nil, uerr.Wrap(err, uerr.Usage, "", "network")
	}
	r, err := c.call(ctx, Message{Op: op, Network: &n})
	if err != nil {
		return State{}, nil, err
	}
	if r.msg.State == nil {
		if r.file != nil {
			r.file.Close()
		}
		return State{}, nil, errors.New("doppel-rootd answered without a state")
	}
	return *r.msg.State, r.file, nil
}

// MarkedSocket returns an unconnected, non-blocking socket whose packets the DNS capture lets pass. network is "udp4", "udp6",
// "tcp4" or "tcp6".
func (c *Client) MarkedSocket(ctx context.Context, network string) (*os.File, error) {
	if !ValidSocket(network) {
		return nil, fmt.Errorf("marked socket: unknown network %q", network)
	}
	r, err := c.call(ctx, Message{Op: OpMarkedSocket, Socket: network})
	if err != nil {
		return nil, err
	}
	if r.file == nil {
		return nil, errors.New("doppel-rootd answered without a socket")
	}
	return r.file, nil
}

// DialMarked connects a marked socket to addr; network is "udp" or "tcp".
func (c *Client) DialMarked(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	family := "4"
	if addr.Addr().Is6() && !addr.Addr().Is4In6() {
		family = "6"
	}
	f, err := c.MarkedSocket(ctx, network+family)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := connect(ctx, f, addr); err != nil {
		return nil, fmt.Errorf("dial %s %v: %w", network, addr, err)
	}
	return net.FileConn(f)
}

// Version asks who listens.
func (c *Client) Version(ctx context.Context) (Version, error) {
	r, err := c.call(ctx, Message{Op: OpVersion})
	if err != nil {
		return Version{}, err
	}
	if r.msg.Version == nil {
		return Version{}, errors.New("doppel-rootd answered without a version")
	}
	return *r.msg.Version, nil
}

// LogLevel changes doppel-rootd's log level for so many seconds, 0 until it is changed again; "" is the level it was started with.
func (c *Client) LogLevel(ctx context.Context, level string, seconds int) error {
	_, err := c.call(ctx, Message{Op: OpLogLevel, Level: level, Seconds: seconds})
	return err
}

// Quit ends doppel-rootd, after it has removed everything. With ifIdle it refuses (uerr.Conflict) while a network is set.
func (c *Client) Quit(ctx context.Context, ifIdle bool) error {
	_, err := c.call(ctx, Message{Op: OpQuit, IfIdle: ifIdle})
	return err
}

// Close ends the connection; rootd removes the network that was set through it.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// call sends a request and waits for its reply.
func (c *Client) call(ctx context.Context, m Message) (reply, error) {
	ch := make(chan reply, 1)
	c.mu.Lock()
	if c.pending == nil {
		err := c.err
		c.mu.Unlock()
		return reply{}, err
	}
	c.next++
	m.ID = c.next
	c.pending[m.ID] = ch
	c.mu.Unlock()

	if err := c.send(m); err != nil {
		c.forget(m.ID, ch)
		return reply{}, err
	}
	select {
	case r := <-ch:
		return r.result()
	case <-ctx.Done():
		c.forget(m.ID, ch)
		return reply{}, fmt.Errorf("doppel-rootd: %s: %w", m.Op, context.Cause(ctx))
	case <-c.done:
		select {
		case r := <-ch: // the last reply and the end arrive together
			return r.result()
		default:
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return reply{}, c.err
	}
}

func (r reply) result() (reply, error) {
	if r.msg.Error == nil {
		return r, nil
	}
	if r.file != nil {
		r.file.Close()
	}
	return reply{}, r.msg.Error
}

// forget drops a call; a reply that came meanwhile must not leak its descriptor.
func (c *Client) forget(id uint64, ch chan reply) {
	c.mu.Lock()
	delete(c.pending, id)
	c.mu.Unlock()
	select {
	case r := <-ch:
		if r.file != nil {
			r.file.Close()
		}
	default:
	}
}

func (c *Client) send(m Message) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := Send(c.conn, m, nil); err != nil {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return nil
}

// readLoop deals out replies and answers pings until the connection ends.
func (c *Client) readLoop() {
	defer close(c.done)
	buf := make([]byte, MaxPacket)
	for {
		m, f, err := Receive(c.conn, buf, true)
		if err == nil {
			err = c.handle(m, f)
		}
		if err != nil {
			c.end(err)
			return
		}
	}
}

func (c *Client) handle(m Message, f *os.File) error {
	switch m.Op {
	case OpPing:
		if c.opts.Alive == nil || c.opts.Alive() {
			return c.send(Message{ID: m.ID, Op: OpPong})
		}
		return nil
	case OpChanged:
		if c.opts.Changed != nil {
			c.opts.Changed(*m.State)
		}
	case OpReply:
		if m.ID == 0 && m.Error != nil {
			return m.Error
		}
		c.mu.Lock()
		ch := c.pending[m.ID]
		delete(c.pending, m.ID)
		if ch != nil {
			ch <- reply{m, f} // holds one
			f = nil
		}
		c.mu.Unlock()
	default:
		c.opts.Log.Warn("unexpected message from doppel-rootd", "op", m.Op)
	}
	if f != nil {
		f.Close()
	}
	return nil
}

// end makes err the result of all calls from now on.
func (c *Client) end(err error) {
	var ue *uerr.Error
	if errors.As(err, &ue) {
		err = refused{ue} // it says all there is to say
	} else {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	c.mu.Lock()
	c.err = err
	c.pending = nil
	c.mu.Unlock()
	c.conn.Close()
}

// refused is why rootd ended a connection; it is an ErrClosed too.
type refused struct{ err *uerr.Error }

// Error returns rootd's words.
func (r refused) Error() string { return r.err.Error() }

// Unwrap returns both.
func (r refused) Unwrap() []error { return []error{r.err, ErrClosed} }

// connect connects the non-blocking socket f within ctx.
func connect(ctx context.Context, f *os.File, addr netip.AddrPort) error {
	sa, err := sockaddr(addr)
	if err != nil {
		return err
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if dl, ok := ctx.Deadline(); ok {
		if err := f.SetWriteDeadline(dl); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	started := false
	var cerr error
	err = rc.Write(func(fd uintptr) bool {
		if !started {
			started = true
			cerr = unix.Connect(int(fd), sa)
			return !errors.Is(cerr, unix.EINPROGRESS)
		}
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			cerr = err
		case code != 0:
			cerr = syscall.Errno(code)
		default:
			// Readiness can be spurious: the connection stands when it has a peer.
			if _, err := unix.Getpeername(int(fd)); errors.Is(err, unix.ENOTCONN) {
				return false
			}
			cerr = nil
		}
		return true
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(err, cerr)
}

func sockaddr(addr netip.AddrPort) (unix.Sockaddr, error) {
	a := addr.Addr().Unmap()
	if a.Is4() {
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: a.As4()}, nil
	}
	sa := &unix.SockaddrInet6{Port: int(addr.Port()), Addr: a.As16()}
	if z := a.Zone(); z != "" {
		ifi, err := net.InterfaceByName(z)
		if err != nil {
			return nil, fmt.Errorf("zone of %v: %w", addr, err)
		}
		sa.ZoneId = uint32(ifi.Index)
	}
	return sa, nil
}
