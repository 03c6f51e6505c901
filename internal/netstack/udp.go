package netstack

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/doppel-dev/doppel/internal/flow"
)

const dnsPort = 53

// handleUDP sees the first datagram of a conversation. It runs on the reader's goroutine.
func (s *Stack) handleUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	if s.cfg.DialUDP == nil {
		return true
	}
	if s.udpOpen.Load() >= int64(s.cfg.MaxUDP) {
		s.udpDropped.Add(1)
		return true
	}
	if !s.enter() {
		return true
	}
	f := &udpFlow{s: s, first: quote(pkt), done: make(chan struct{})}
	// The endpoint queues datagrams while the dial runs.
	ep, terr := udp.NewForwarderRequest(s.ns, id, pkt).CreateEndpoint(&f.wq)
	if terr != nil {
		s.flows.Done()
		s.cfg.Log.Debug("udp endpoint failed", "err", terr.String())
		return true
	}
	f.ep = ep
	s.udpOpen.Add(1)
	s.udpTotal.Add(1)
	go func() {
		defer s.flows.Done()
		defer s.udpOpen.Add(-1)
		src, dst := addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort)
		if err := f.run(src, dst); err != nil {
			s.cfg.Log.Debug("udp flow ended", "src", src, "dst", dst, "err", err)
		}
	}()
	return true
}

// udpFlow joins one UDP conversation of an application with its flow.
type udpFlow struct {
	s      *Stack
	ep     tcpip.Endpoint
	wq     waiter.Queue
	first  []byte // the beginning of the first datagram, for ICMP errors
	remote flow.Packets

	last atomic.Int64 // time of the last datagram, Unix nanoseconds
	once sync.Once
	done chan struct{} // closed by stop
	err  error         // guarded by once
}

var errIdle = errors.New("idle")

func (f *udpFlow) run(src, dst netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(f.s.ctx, f.s.cfg.DialTimeout)
	remote, err := f.s.cfg.DialUDP(ctx, src, dst)
	cancel()
	if err != nil {
		f.ep.Close()
		f.s.sendUnreachable(f.first, judge(err).icmp)
		return err
	}
	f.remote = remote
	f.last.Store(time.Now().UnixNano())
	unhook := context.AfterFunc(f.s.ctx, func() { f.stop(context.Cause(f.s.ctx)) })
	defer unhook()
	down := make(chan struct{})
	go func() {
		defer close(down)
		f.stop(f.download())
	}()
	idle := f.s.cfg.UDPIdle
	if dst.Port() == dnsPort {
		idle = f.s.cfg.DNSIdle
	}
	f.stop(f.upload(idle))
	<-down
	f.ep.Close()
	if errors.Is(f.err, errIdle) {
		return nil
	}
	// What the cluster's network said of a datagram is said to the application: its next call fails (udp(7)).
	f.s.sendUnreachable(f.first, judge(f.err).icmp)
	return f.err
}

// stop ends both directions, once.
func (f *udpFlow) stop(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.done)
		f.remote.Close()
	})
}

// upload carries datagrams from the application and watches for idleness.
func (f *udpFlow) upload(idle time.Duration) error {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventErr | waiter.EventHUp)
	f.wq.EventRegister(&entry)
	defer f.wq.EventUnregister(&entry)
	timer := time.NewTimer(idle)
	defer timer.Stop()
	for {
		n, err := f.uploadOne()
		if err == nil {
			f.s.udpUpBytes.Add(uint64(n))
			f.last.Store(time.Now().UnixNano())
			continue
		}
		var eerr *endpointError
		if !errors.As(err, &eerr) {
			return err
		}
		if _, empty := eerr.err.(*tcpip.ErrWouldBlock); !empty {
			return err // the application closed its socket: connection refused by ICMP
		}
		select {
		case <-ready:
		case <-f.done:
			return nil
		case <-timer.C:
			left := idle - time.Since(time.Unix(0, f.last.Load()))
			if left <= 0 {
				return errIdle
			}
			timer.Reset(left)
		}
	}
}

func (f *udpFlow) uploadOne() (int, error) {
	b := getBuffer(udpBuffer)
	defer putBuffer(b)
	w := tcpip.SliceWriter(*b)
	res, terr := f.ep.Read(&w, tcpip.ReadOptions{})
	if terr != nil {
		return 0, &endpointError{terr}
	}
	return res.Count, f.remote.WritePacket((*b)[:res.Count])
}

// download carries datagrams to the application; one that finds no room is lost, as on a network.
func (f *udpFlow) download() error {
	var r bytes.Reader
	return flow.EachPacket(f.remote, func(p []byte) error {
		r.Reset(p)
		_, terr := f.ep.Write(&r, tcpip.WriteOptions{})
		switch terr.(type) {
		case nil:
			f.s.udpDownBytes.Add(uint64(len(p)))
			f.last.Store(time.Now().UnixNano())
		case *tcpip.ErrWouldBlock, *tcpip.ErrNoBufferSpace, *tcpip.ErrMessageTooLong:
		default:
			return &endpointError{terr}
		}
		return nil
	})
}
