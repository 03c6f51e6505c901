package netstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"

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

// serveTCP is the life of one connection; the forwarder gives it a goroutine.
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
	defer s.tcpOpen.Add(-1)
	if share := bufferShare(s.cfg.BufferBudget, s.cfg.BufferMax, int(open)); share < bufferInitial {
		ep.SocketOptions().SetReceiveBufferSize(int64(share), true)
		ep.SocketOptions().SetSendBufferSize(int64(share), true)
	}
	f := &tcpFlow{s: s, ep: ep, wq: &wq, remote: remote}
	if err := f.run(); err != nil {
		s.cfg.Log.Debug("tcp flow aborted", "src", src, "dst", dst, "err", err)
	}
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

// tcpFlow joins one connection of an application with its flow.
type tcpFlow struct {
	s      *Stack
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	remote flow.Stream

	once sync.Once // abort
	err  error     // guarded by once: why it was aborted
}

var errAppReset = errors.New("reset by the application")

// run copies both ways until both have ended. Each way ends by itself (half-close); an error in either aborts both.
func (f *tcpFlow) run() error {
	stop := context.AfterFunc(f.s.ctx, func() { f.abort(context.Cause(f.s.ctx)) })
	defer stop()
	// A RST from the application must end a copy that is blocked in remote, which knows nothing of it.
	hup := waiter.NewFunctionEntry(waiter.EventErr|waiter.EventHUp, func(waiter.EventMask) {
		f.s.flows.Add(1) // the flow's own count keeps it above zero
		go func() {
			defer f.s.flows.Done()
			if tcp.EndpointState(f.ep.State()) == tcp.StateError {
				f.abort(errAppReset)
			}
		}()
	})
	f.wq.EventRegister(&hup)

	down := make(chan struct{})
	go func() {
		defer close(down)
		if err := f.download(); err != nil {
			f.abort(fmt.Errorf("to the application: %w", err))
		}
	}()
	if err := f.upload(); err != nil {
		f.abort(fmt.Errorf("from the application: %w", err))
	}
	<-down
	f.wq.EventUnregister(&hup)
	f.ep.Close()
	f.remote.Close()
	f.once.Do(func() {}) // orders f.err
	return f.err
}

// abort resets both ends, once.
func (f *tcpFlow) abort(err error) {
	f.once.Do(func() {
		f.err = err
		f.ep.Abort()
		f.remote.Reset()
	})
}

// upload copies from the application to the flow. It holds a buffer only while it has bytes.
func (f *tcpFlow) upload() error {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventErr | waiter.EventHUp)
	f.wq.EventRegister(&entry)
	defer f.wq.EventUnregister(&entry)
	for {
		n, err := f.uploadSome()
		if err == nil {
			f.s.tcpUp.Add(uint64(n))
			continue
		}
		var werr *endpointError
		if !errors.As(err, &werr) {
			return err
		}
		switch werr.err.(type) {
		case *tcpip.ErrWouldBlock:
			<-ready
		case *tcpip.ErrClosedForReceive:
			return f.remote.CloseWrite()
		default:
			return err
		}
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

// download copies from the flow to the application.
func (f *tcpFlow) download() error {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	f.wq.EventRegister(&entry)
	defer f.wq.EventUnregister(&entry)
	w := &endpointWriter{f: f, ready: ready}
	var err error
	if wt, ok := f.remote.(io.WriterTo); ok {
		_, err = wt.WriteTo(w) // the flow brings its own buffers
	} else {
		err = copyAdaptive(w, f.remote)
	}
	if err != nil {
		return err
	}
	if terr := f.ep.Shutdown(tcpip.ShutdownWrite); terr != nil {
		if _, gone := terr.(*tcpip.ErrNotConnected); !gone {
			return &endpointError{terr}
		}
	}
	return nil
}

// endpointWriter writes to the application, waiting for room.
type endpointWriter struct {
	f     *tcpFlow
	ready <-chan struct{}
	r     bytes.Reader
}

// Write implements io.Writer.
func (w *endpointWriter) Write(p []byte) (int, error) {
	w.r.Reset(p)
	defer w.r.Reset(nil)
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
		<-w.ready
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
