package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/tundev"
)

const (
	nicID = 1
	// timeWait keeps the pair of ports of a connection that the cluster ended first. The only peer is this machine's kernel, over a
	// link that loses and reorders nothing: a minute (RFC 9293) would only hold memory.
	timeWait = time.Second
	// wholeViewMin is the size from which a packet keeps the 64 KiB that it was read into; shorter ones are copied to their size.
	wholeViewMin = 32 << 10
	// splitMin is the size from which a packet's headers get memory of their own.
	splitMin = 2 << 10
)

// Stats is a moment's state. "Up" is from the application to the cluster.
type Stats struct {
	TCPOpen, UDPOpen         int    // flows open now
	TCPConnecting            int    // dials and handshakes running now
	TCPTotal, UDPTotal       uint64 // flows opened since the start
	TCPRefused               uint64 // dials that failed
	SYNDropped, UDPDropped   uint64 // beyond MaxConnecting and MaxUDP
	TCPUpBytes, TCPDownBytes uint64
	UDPUpBytes, UDPDownBytes uint64
	EchoOpen                 int    // echo conversations open now
	EchoTotal, EchoReplies   uint64 // echo conversations opened, and replies given, since the start
	WriteFails               uint64 // packets that the device did not take
}

// Stack ends the TCP connections and UDP conversations that come in through a device. Use New.
type Stack struct {
	cfg  Config
	link *link
	ns   *stack.Stack
	tcp  *tcp.Forwarder

	ctx    context.Context // of all flows; cancelled when Run ends
	cancel context.CancelCauseFunc

	tcpOpen, udpOpen         atomic.Int64
	tcpTotal, udpTotal       atomic.Uint64
	tcpRefused               atomic.Uint64
	synDropped, udpDropped   atomic.Uint64
	tcpUp, tcpDown           atomic.Uint64
	udpUpBytes, udpDownBytes atomic.Uint64
	echoTotal, echoReplies   atomic.Uint64

	parts   reassembler // the reader goroutine's
	workers workers

	mu         sync.Mutex
	connecting map[stack.TransportEndpointID][]byte // guarded by mu: the beginning of the SYN of each running dial, for ICMP errors
	echoes     map[echoKey]*echoFlow                // guarded by mu: the open ones
	open       map[*tcpFlow]struct{}                // guarded by mu
	stopped    bool                                 // guarded by mu
	flows      sync.WaitGroup                       // Add only under mu while not stopped
}

// New checks cfg and builds a stack; Run starts it.
func New(cfg Config) (*Stack, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	s := &Stack{cfg: cfg, link: newLink(cfg.Device, cfg.MTU), connecting: map[stack.TransportEndpointID][]byte{}, echoes: map[echoKey]*echoFlow{}, open: map[*tcpFlow]struct{}{}, workers: workers{hand: make(chan func())}}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.ns = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := s.tune(); err != nil {
		s.ns.Destroy()
		return nil, fmt.Errorf("netstack: %w", err)
	}
	s.tcp = tcp.NewForwarder(s.ns, bufferInitial, cfg.MaxConnecting+1, s.serveTCP)
	s.ns.SetTransportProtocolHandler(tcp.ProtocolNumber, s.handleTCP)
	s.ns.SetTransportProtocolHandler(udp.ProtocolNumber, s.handleUDP)
	return s, nil
}

// tune sets what datapath.md found: SACK on, RACK off (it retransmitted spuriously on every lossless run), large buffers.
func (s *Stack) tune() error {
	sack, rack, moderate, tw := tcpip.TCPSACKEnabled(true), tcpip.TCPRecovery(0), tcpip.TCPModerateReceiveBufferOption(true), tcpip.TCPTimeWaitTimeoutOption(timeWait)
	initial := min(bufferInitial, s.cfg.BufferMax)
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: bufferMin, Default: initial, Max: s.cfg.BufferMax}
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: bufferMin, Default: initial, Max: s.cfg.BufferMax}
	for _, opt := range []tcpip.SettableTransportProtocolOption{&sack, &rack, &moderate, &tw, &rcv, &snd} {
		if err := s.ns.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return fmt.Errorf("set %T: %s", opt, err)
		}
	}
	if err := s.ns.CreateNIC(nicID, s.link); err != nil {
		return fmt.Errorf("create nic: %s", err)
	}
	// Every destination is ours to end, and every answer leaves from the address that was asked.
	if err := s.ns.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("set promiscuous mode: %s", err)
	}
	if err := s.ns.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("set spoofing: %s", err)
	}
	s.ns.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}, {Destination: header.IPv6EmptySubnet, NIC: nicID}})
	return nil
}

// Run moves packets until ctx ends or the device fails, then closes the device, aborts all flows and waits for them. A stack runs
// once. The device's own end (os.ErrClosed, io.EOF) is no error.
func (s *Stack) Run(ctx context.Context) error {
	g := lifecycle.New(ctx, s.cfg.Log)
	unblock := context.AfterFunc(g.Context(), func() { s.cfg.Device.Close() })
	g.Go("tun reader", func(ctx context.Context) error {
		defer g.Stop()
		return s.readLoop(ctx)
	})
	err := g.Wait()
	unblock()
	s.shutdown(context.Cause(g.Context()))
	if errors.Is(err, os.ErrClosed) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (s *Stack) readLoop(ctx context.Context) error {
	v := buffer.NewViewSize(tundev.MaxPacket)
	defer func() { v.Release() }()
	for {
		n, _, err := s.cfg.Device.ReadPacket(v.AsSlice())
		if err != nil {
			return err
		}
		in, what := classify(v.AsSlice()[:n])
		switch what {
		case drop:
			continue
		case echo:
			s.handleEcho(v.AsSlice()[:n], in)
			continue
		case deliver:
		}
		var b buffer.Buffer
		b, v = packetBuffer(v, n)
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: b})
		s.link.deliver(in.proto, pkt)
		pkt.DecRef()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// packetBuffer makes a buffer of the n bytes read into v, and returns the view to read into next. gVisor looks at headers in a packet that it
// has cloned, and copies the whole memory that they lie in when it does (Buffer.PullUp): so they get memory of their own.
func packetBuffer(v *buffer.View, n int) (buffer.Buffer, *buffer.View) {
	p := v.AsSlice()[:n]
	if n < splitMin {
		return buffer.MakeWithView(buffer.NewViewWithData(p)), v
	}
	h := headerLen(p)
	b := buffer.MakeWithView(buffer.NewViewWithData(p[:h]))
	if n < wholeViewMin {
		_ = b.Append(buffer.NewViewWithData(p[h:])) // fails for nil only
		return b, v
	}
	v.CapLength(n)
	v.TrimFront(h)
	_ = b.Append(v)
	return b, buffer.NewViewSize(tundev.MaxPacket)
}

// shutdown ends all flows and the stack's own goroutines.
func (s *Stack) shutdown(cause error) {
	s.mu.Lock()
	s.stopped = true
	open := slices.Collect(maps.Keys(s.open))
	s.mu.Unlock()
	s.cancel(cause)
	for _, f := range open {
		f.abort(cause)
	}
	s.ns.Close()
	s.cfg.Device.Close()
	done := make(chan struct{})
	go func() {
		s.flows.Wait()
		close(done)
	}()
	// A dial that succeeded just now may still begin a handshake that nobody will answer: abort until all flows are gone.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		for _, ep := range s.ns.RegisteredEndpoints() {
			ep.Abort()
		}
		select {
		case <-done:
			s.workers.stop()
			s.ns.Wait()
			return
		case <-tick.C:
		}
	}
}

// enter counts a new flow in, unless the stack is stopping.
func (s *Stack) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	s.flows.Add(1)
	return true
}

// sendUnreachable answers the packet that begins with orig.
func (s *Stack) sendUnreachable(orig []byte, what unreachable) {
	if p := unreachablePacket(orig, what); p != nil {
		if err := s.cfg.Device.WritePacket(tundev.Header{}, [][]byte{p}); err != nil {
			s.link.writeFails.Add(1)
		}
	}
}

// quote copies the beginning of a packet for a later ICMP error.
func quote(pkt *stack.PacketBuffer) []byte {
	nh, th := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	b := make([]byte, 0, min(len(nh)+len(th), icmpQuote))
	b = append(b, nh...)
	b = append(b, th...)
	return b[:min(len(b), icmpQuote)]
}

// Stats returns the counters.
func (s *Stack) Stats() Stats {
	s.mu.Lock()
	connecting, echoes := len(s.connecting), len(s.echoes)
	s.mu.Unlock()
	return Stats{
		TCPOpen: int(s.tcpOpen.Load()), UDPOpen: int(s.udpOpen.Load()), TCPConnecting: connecting,
		TCPTotal: s.tcpTotal.Load(), UDPTotal: s.udpTotal.Load(), TCPRefused: s.tcpRefused.Load(),
		SYNDropped: s.synDropped.Load(), UDPDropped: s.udpDropped.Load(),
		TCPUpBytes: s.tcpUp.Load(), TCPDownBytes: s.tcpDown.Load(),
		UDPUpBytes: s.udpUpBytes.Load(), UDPDownBytes: s.udpDownBytes.Load(),
		EchoOpen: echoes, EchoTotal: s.echoTotal.Load(), EchoReplies: s.echoReplies.Load(),
		WriteFails: s.link.writeFails.Load(),
	}
}
