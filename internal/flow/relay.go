package flow

import (
	"cmp"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	// bufferSize takes any datagram.
	bufferSize = wire.MaxPayload
	// streamSize is what is read of a stream of bytes at once: the payload of a full frame of the tunnel.
	streamSize = wire.FullPayload
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// Relay copies both ways between a and b until both directions have ended, and closes both. The end of a direction (FIN) is
// passed on while the other goes on; any failure, a RST among them, resets both ends and is returned. What an end has said before it
// reset is passed on first: a server may answer and close while its client is still sending.
func Relay(a, b Stream) (aToB, bToA int64, err error) {
	var errA, errB error
	var over atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() { aToB, errA = direction(b, a, &over) })
	bToA, errB = direction(a, b, &over)
	wg.Wait()
	err = first(errA, errB)
	if err == nil {
		return aToB, bToA, errors.Join(a.Close(), b.Close())
	}
	a.Reset()
	b.Reset()
	return aToB, bToA, err
}

// first returns the error that came first: the other one is the consequence of both ends having been reset.
func first(errA, errB error) error {
	var cause *directionError
	for _, err := range []error{errA, errB} {
		var d *directionError
		if errors.As(err, &d) && (cause == nil || d.at.Before(cause.at)) {
			cause = d
		}
	}
	if cause == nil {
		return nil
	}
	return cause.err
}

type directionError struct {
	err error
	at  time.Time
}

func (e *directionError) Error() string { return e.err.Error() }
func (e *directionError) Unwrap() error { return e.err }

// direction copies src to dst until EOF and passes the EOF on. After an error both ends are reset, but if dst is over, the other direction reads first
// what came from it. It sets over then: the other's EOF is none.
func direction(dst, src Stream, over *atomic.Bool) (int64, error) {
	n, err := Copy(dst, src)
	switch {
	case err != nil:
	case over.Load():
		err = syscall.ECONNRESET
	default:
		err = dst.CloseWrite()
	}
	if err == nil {
		return n, nil
	}
	err = &directionError{err, time.Now()}
	if Over(dst) {
		over.Store(true)
		return n, err
	}
	dst.Reset()
	src.Reset()
	return n, err
}

// Over reports whether the peer of s has reset it or is gone. Nothing can be written any more; what came before can still be read. A read that follows a
// failed write may show io.EOF instead of the reset (Linux tells an error of a socket once). Of a stream that cannot say so it reports false.
func Over(s Stream) bool {
	switch s := s.(type) {
	case interface{ Over() bool }:
		return s.Over()
	case interface{ Err() error }: // mux.Stream
		return s.Err() != nil
	}
	return false
}

// Copy copies from src to dst until EOF, in the fastest way the two have. It passes no end on.
func Copy(dst, src Stream) (int64, error) {
	if n, ok, err := splice(dst, src, -1); ok {
		return n, err
	}
	if w, ok := src.(io.WriterTo); ok {
		return w.WriteTo(dst)
	}
	if r, ok := dst.(io.ReaderFrom); ok {
		return r.ReadFrom(src)
	}
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buf[:streamSize])
}

// ErrStopped is the error of CopyWhile when it was told to stop.
var ErrStopped = errors.New("copying was stopped")

// CopyWhile is Copy that shows pass what has come before it is passed on, or nil for much at once that only the kernel has seen. It stops,
// without passing that on, when pass returns false.
func CopyWhile(dst, src Stream, pass func(p []byte) bool) (int64, error) {
	d, ok1 := dst.(*tcpStream)
	s, ok2 := src.(*tcpStream)
	if ok1 && ok2 {
		return spliceWhile(d.c, s.c, pass)
	}
	if t, ok := dst.(tryWriter); ok {
		return Copy(shownTry{shown{dst, pass}, t}, src)
	}
	return Copy(shown{dst, pass}, src)
}

type shown struct {
	Stream
	pass func(p []byte) bool
}

// Write implements Stream.
func (s shown) Write(p []byte) (int, error) {
	if !s.pass(p) {
		return 0, ErrStopped
	}
	return s.Stream.Write(p)
}

type tryWriter interface {
	TryWrite(p []byte) (int, error)
}

// shownTry is shown that still never blocks where it is asked not to.
type shownTry struct {
	shown
	t tryWriter
}

func (s shownTry) TryWrite(p []byte) (int, error) {
	if !s.pass(p) {
		return 0, ErrStopped
	}
	return s.t.TryWrite(p)
}

// spliceWhile reads what is little and has the kernel copy what is much (splice(2) on Linux). It waits with neither a buffer nor a pipe.
func spliceWhile(dst, src *net.TCPConn, pass func(p []byte) bool) (total int64, err error) {
	r, err := newReadiness(src, streamSize)
	if err != nil {
		return 0, err
	}
	for much := false; ; {
		if n := unread(src, much); n >= streamSize/4 {
			if !pass(nil) {
				return total, ErrStopped
			}
			m, err := dst.ReadFrom(&io.LimitedReader{R: src, N: int64(n)})
			total += m
			if err != nil {
				return total, err
			}
			continue
		}
		buf, n, err := r.read()
		much = n == streamSize
		if n > 0 {
			if pass(buf[:n]) {
				m, werr := dst.Write(buf[:n])
				total += int64(m)
				err = cmp.Or(werr, err)
			} else {
				err = ErrStopped
			}
		}
		if buf != nil {
			buffers.Put(buf)
		}
		if err == io.EOF { //nolint:errorlint // read returns io.EOF itself
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// CopyN is Copy of n bytes; an earlier end is io.ErrUnexpectedEOF.
func CopyN(dst, src Stream, n int64) error {
	if n == 0 {
		return nil
	}
	m, ok, err := splice(dst, src, n)
	if !ok {
		buf := buffers.Get().(*[bufferSize]byte)
		defer buffers.Put(buf)
		m, err = io.CopyBuffer(struct{ io.Writer }{dst}, &io.LimitedReader{R: src, N: n}, buf[:streamSize])
	}
	if err == nil && m < n {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// RelayPackets copies datagrams both ways between a and b until one end fails or closes, or nothing came for idle, and closes
// both, telling an Aborter of a failure. Idling out and io.EOF are no errors.
func RelayPackets(a, b Packets, idle time.Duration) error {
	r := packetRelay{a: a, b: b, idle: idle}
	r.last.Store(time.Now().UnixNano())
	r.mu.Lock()
	r.timer = time.AfterFunc(idle, r.check)
	r.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { r.stop(r.direction(b, a)) })
	r.stop(r.direction(a, b))
	wg.Wait()
	if errors.Is(r.err, io.EOF) {
		return nil
	}
	return r.err
}

type packetRelay struct {
	a, b Packets
	idle time.Duration
	last atomic.Int64 // when the last datagram came, Unix nanoseconds

	mu sync.Mutex
	// guarded by mu:
	timer   *time.Timer
	stopped bool
	err     error
}

// stop ends both directions; the first caller's error is the relay's.
func (r *packetRelay) stop(err error) {
	r.mu.Lock()
	if r.stopped {
		r.mu.Unlock()
		return
	}
	r.stopped, r.err = true, err
	r.timer.Stop()
	r.mu.Unlock()
	for _, p := range []Packets{r.a, r.b} {
		if a, ok := p.(Aborter); ok && err != nil && !errors.Is(err, io.EOF) {
			a.Abort(err)
		} else {
			_ = p.Close()
		}
	}
}

func (r *packetRelay) check() {
	left := r.idle - time.Duration(time.Now().UnixNano()-r.last.Load())
	if left <= 0 {
		r.stop(nil)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stopped {
		r.timer.Reset(left)
	}
}

func (r *packetRelay) direction(dst, src Packets) error {
	return EachPacket(src, func(p []byte) error {
		r.last.Store(time.Now().UnixNano())
		return dst.WritePacket(p)
	})
}

// EachPacket calls fn with every datagram of src until one of the two fails.
func EachPacket(src Packets, fn func(p []byte) error) error {
	if s, ok := src.(PacketSource); ok {
		for {
			if err := s.NextPacket(fn); err != nil {
				return err
			}
		}
	}
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	for {
		n, err := src.ReadPacket(buf[:])
		if err != nil {
			return err
		}
		if err := fn(buf[:n]); err != nil {
			return err
		}
	}
}
