package netstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/doppel-dev/doppel/internal/flow"
)

// handleTCP sees every segment that belongs to no connection. It runs on the reader's goroutine.
func (s *Stack) handleTCP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize || h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck|header.TCPFlagRst) != header.TCPFlagSyn {
		return false // the stack answers with a RST where RFC 9293 wants one
	}
	s.mu.Lock()
	if _, dup := s.connecting[id]; dup || s.stopped {
		s.mu.Unlock()
		return true // a retransmitted SYN while its dial runs
	}
	if len(s.connecting) >= s.cfg.MaxConnecting {
		s.mu.Unlock()
		s.synDropped.Add(1)
		return true
	}
	s.connecting[id] = quote(pkt)
	s.flows.Add(1)
	s.mu.Unlock()
	if !s.tcp.HandlePacket(id, pkt) { // starts serveTCP
		s.connected(id)
		s.flows.Done()
		return false
	}
	return true
}

// connected forgets the SYN of id.
func (s *Stack) connected(id stack.TransportEndpointID) {
	s.mu.Lock()
	delete(s.connecting, id)
	s.mu.Unlock()
}

// serveTCP dials for one connection and begins its life; the forwarder gives it a goroutine.
func (s *Stack) serveTCP(r *tcp.ForwarderRequest) {
	defer s.flows.Done()
	id := r.ID()
	src, dst := addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort)
	remote, err := s.dialTCP(src, dst)
	if err != nil {
		s.refuse(r, id, err)
		s.cfg.Log.Debug("tcp dial failed", "src", src, "dst", dst, "err", err)
		return
	}
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq) // SYN-ACK, and waits for the application's ACK
	r.Complete(false)
	s.connected(id)
	if terr != nil {
		remote.Reset()
		s.cfg.Log.Debug("tcp handshake failed", "src", src, "dst", dst, "err", terr.String())
		return
	}
	s.tcpTotal.Add(1)
	open := s.tcpOpen.Add(1)
	if share := bufferShare(s.cfg.BufferBudget, s.cfg.BufferMax, int(open)); share < bufferInitial {
		ep.SocketOptions().SetReceiveBufferSize(int64(share), true)
		ep.SocketOptions().SetSendBufferSize(int64(share), true)
	}
	s.begin(&tcpFlow{s: s, ep: ep, wq: &wq, remote: remote, src: src, dst: dst})
}

func (s *Stack) dialTCP(src, dst netip.AddrPort) (flow.Stream, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.cfg.DialTimeout)
	defer cancel()
	return s.cfg.DialTCP(ctx, src, dst)
}

// refuse tells the application of a failed dial, as far as a network would.
func (s *Stack) refuse(r *tcp.ForwarderRequest, id stack.TransportEndpointID, err error) {
	s.tcpRefused.Add(1)
	v := judge(err)
	if !v.reset && v.icmp != unreachNone {
		s.mu.Lock()
		syn := s.connecting[id]
		s.mu.Unlock()
		s.sendUnreachable(syn, v.icmp)
	}
	r.Complete(v.reset)
	s.connected(id)
}

// tcpFlow joins one connection of an application with its flow. Each way ends by itself (half-close); an error in either aborts both. A way that has
// nothing to do has no goroutine: most flows are silent most of the time.
type tcpFlow struct {
	s        *Stack
	ep       tcpip.Endpoint
	wq       *waiter.Queue
	remote   flow.Stream
	src, dst netip.AddrPort

	entry    waiter.Entry
	upload   pump
	download func()       // runs while there is something to do
	left     atomic.Int32 // ways that have not ended

	once sync.Once // abort
	err  error     // guarded by once: why it was aborted
}

// pourer is a flow that is copied from without a goroutine that waits (mux.Stream).
type pourer interface {
	WriteSome(w io.Writer, wake func()) (more bool, err error)
}

var errAppReset = errors.New("reset by the application")

// begin copies both ways until both have ended.
func (s *Stack) begin(f *tcpFlow) {
	f.left.Store(2)
	f.upload.init(f.up)
	w := &endpointWriter{f: f}
	f.download = func() { f.down(w) }
	if p, ok := f.remote.(pourer); ok {
		again := func() { s.workers.do(f.download) }
		f.download = func() {
			if more, err := p.WriteSome(w, again); !more {
				f.downEnded(err)
			}
		}
	}
	s.mu.Lock()
	stopped := s.stopped
	if !stopped {
		s.open[f] = struct{}{}
		s.flows.Add(1)
	}
	s.mu.Unlock()
	if stopped {
		f.abort(context.Cause(s.ctx))
		s.tcpOpen.Add(-1)
		return
	}
	f.entry = waiter.NewFunctionEntry(waiter.ReadableEvents|waiter.EventErr|waiter.EventHUp, func(what waiter.EventMask) {
		if what&(waiter.EventErr|waiter.EventHUp) != 0 { // a RST from the application ends what the flow is in the middle of, which knows nothing of it
			s.flows.Add(1) // the flow's own count keeps it above zero
			s.workers.do(func() {
				defer s.flows.Done()
				if tcp.EndpointState(f.ep.State()) == tcp.StateError {
					f.abort(errAppReset)
				}
			})
		}
		f.upload.kick(&s.workers)
	})
	f.wq.EventRegister(&f.entry)
	f.upload.kick(&s.workers) // for what came before
	s.workers.do(f.download)
}

// ended notes that a way has ended, the last one also that the flow has.
func (f *tcpFlow) ended(err error) {
	if err != nil {
		f.abort(err)
	}
	if f.left.Add(-1) > 0 {
		return
	}
	f.wq.EventUnregister(&f.entry)
	f.ep.Close()
	f.remote.Close()
	f.once.Do(func() {}) // orders f.err
	if f.err != nil {
		f.s.cfg.Log.Debug("tcp flow aborted", "src", f.src, "dst", f.dst, "err", f.err)
	}
	f.s.mu.Lock()
	delete(f.s.open, f)
	f.s.mu.Unlock()
	f.s.tcpOpen.Add(-1)
	f.s.flows.Done()
}

// abort resets both ends, once.
func (f *tcpFlow) abort(err error) {
	f.once.Do(func() {
		f.err = err
		f.ep.Abort()
		f.remote.Reset()
	})
}

// up copies from the application to the flow what is there. It holds a buffer only while it has bytes. It returns true when it is to be called again
// once there is more. Of a flow that is over the other way reads first what came from it, and then why.
func (f *tcpFlow) up() (more bool) {
	for {
		n, err := f.uploadSome()
		if err == nil {
			f.s.tcpUp.Add(uint64(n))
			continue
		}
		var werr *endpointError
		if errors.As(err, &werr) {
			switch werr.err.(type) {
			case *tcpip.ErrWouldBlock:
				return true
			case *tcpip.ErrClosedForReceive:
				err = f.remote.CloseWrite()
			}
		}
		switch {
		case err == nil:
		case !errors.As(err, &werr) && flow.Over(f.remote):
			err = nil
		default:
			err = fmt.Errorf("from the application: %w", err)
		}
		f.ended(err)
		return false
	}
}

// uploadSome moves what is there, up to a buffer.
func (f *tcpFlow) uploadSome() (int, error) {
	b := getBuffer(copyBuffer)
	defer putBuffer(b)
	w := tcpip.SliceWriter(*b)
	res, terr := f.ep.Read(&w, tcpip.ReadOptions{})
	if terr != nil {
		return 0, &endpointError{terr}
	}
	return f.remote.Write((*b)[:res.Count])
}

// down copies from a flow that has to be waited for.
func (f *tcpFlow) down(w *endpointWriter) {
	var err error
	if wt, ok := f.remote.(io.WriterTo); ok {
		_, err = wt.WriteTo(w) // the flow brings its own buffers
	} else {
		err = copyAdaptive(w, f.remote)
	}
	f.downEnded(err)
}

// downEnded passes the end of the flow's direction on.
func (f *tcpFlow) downEnded(err error) {
	if err == nil {
		if terr := f.ep.Shutdown(tcpip.ShutdownWrite); terr != nil {
			if _, gone := terr.(*tcpip.ErrNotConnected); !gone {
				err = &endpointError{terr}
			}
		}
	}
	if err != nil {
		err = fmt.Errorf("to the application: %w", err)
	}
	f.ended(err)
}

// endpointWriter writes to the application, waiting for room.
type endpointWriter struct {
	f *tcpFlow
	r bytes.Reader
}

// Write implements io.Writer.
func (w *endpointWriter) Write(p []byte) (int, error) {
	w.r.Reset(p)
	defer w.r.Reset(nil)
	var ready <-chan struct{}
	done := 0
	for done < len(p) {
		n, terr := w.f.ep.Write(&w.r, tcpip.WriteOptions{})
		done += int(n)
		w.f.s.tcpDown.Add(uint64(n))
		if terr == nil {
			// Without an error n may still be less than was read from r, where room went meanwhile.
			if w.r.Len() != len(p)-done {
				w.r.Reset(p[done:])
			}
			continue
		}
		if _, full := terr.(*tcpip.ErrWouldBlock); !full {
			return done, &endpointError{terr}
		}
		if w.r.Len() != len(p)-done {
			w.r.Reset(p[done:])
		}
		if ready == nil {
			var entry waiter.Entry
			entry, ready = waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
			w.f.wq.EventRegister(&entry)
			defer w.f.wq.EventUnregister(&entry)
			continue // there may be room since
		}
		<-ready
	}
	return done, nil
}

// TryWrite writes what fits into the endpoint's buffer, and with that to the device, on the goroutine of the tunnel's reader: a small answer
// wakes nobody on its way (mux.TryWriter).
func (w *endpointWriter) TryWrite(p []byte) (int, error) {
	w.r.Reset(p)
	defer w.r.Reset(nil)
	n, terr := w.f.ep.Write(&w.r, tcpip.WriteOptions{})
	w.f.s.tcpDown.Add(uint64(n))
	if terr != nil {
		if _, full := terr.(*tcpip.ErrWouldBlock); !full {
			return int(n), &endpointError{terr}
		}
	}
	return int(n), nil
}

// endpointError is a gVisor error as an error.
type endpointError struct{ err tcpip.Error }

// Error implements error.
func (e *endpointError) Error() string { return e.err.String() }
