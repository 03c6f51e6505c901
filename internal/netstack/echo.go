package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/wire"
)

// icmpEchoLen is an ICMP echo's header: type, code, checksum, identifier, sequence number (RFC 792, RFC 4443 section 4.1).
const icmpEchoLen = 8

// echoQueue is how many requests wait while the dial runs or the flow has no room; more are lost, as on a network.
const echoQueue = 16

// echoKey tells conversations apart: one for each ping that runs.
type echoKey struct {
	src, dst netip.Addr
	id       uint16
}

// echoRequest is one whole ICMP echo request.
type echoRequest struct {
	echoKey
	seq  uint16
	data []byte
}

// message is an ICMP message behind the headers of the packet (or first fragment) that it came in.
type message struct {
	src, dst netip.Addr
	head     []byte // the packet's beginning, for ICMP errors
	icmp     []byte
}

// parseEcho reads an echo request.
func parseEcho(m message) (echoRequest, bool) {
	if len(m.icmp) < icmpEchoLen || m.icmp[1] != 0 {
		return echoRequest{}, false
	}
	b := m.icmp
	return echoRequest{
		echoKey: echoKey{src: m.src, dst: m.dst, id: binary.BigEndian.Uint16(b[4:])},
		seq:     binary.BigEndian.Uint16(b[6:]), data: b[icmpEchoLen:],
	}, true
}

// reassembler puts fragments of ICMP messages together. They come from this machine's kernel, in order and without gaps: what comes
// otherwise is lost. It is for one goroutine.
type reassembler struct {
	parts [8]partial // a ring: the oldest is forgotten
	next  int
}

type partial struct {
	message
	id   uint32
	used bool
}

// add takes a packet that classify calls echo, and gives the message that it completes. The message's memory is the packet's, where the
// packet is whole.
func (r *reassembler) add(p []byte, in ipInfo) (message, bool) {
	m := message{head: p[:min(len(p), icmpQuote)], icmp: in.payload}
	m.src, m.dst = addresses(p, in.proto)
	if !in.fragment || in.offset == 0 && !in.more {
		return m, true
	}
	if in.offset == 0 {
		r.parts[r.next] = partial{message: message{src: m.src, dst: m.dst, head: append([]byte(nil), m.head...), icmp: append([]byte(nil), m.icmp...)}, id: in.id, used: true}
		r.next = (r.next + 1) % len(r.parts)
		return message{}, false
	}
	for i := range r.parts {
		f := &r.parts[i]
		if !f.used || f.id != in.id || f.src != m.src || f.dst != m.dst {
			continue
		}
		if in.offset != len(f.icmp) || len(f.icmp)+len(in.payload) > tundev.MaxPacket {
			*f = partial{}
			return message{}, false
		}
		f.icmp = append(f.icmp, in.payload...)
		if in.more {
			return message{}, false
		}
		m = f.message
		*f = partial{}
		return m, true
	}
	return message{}, false
}

// addresses returns source and destination of a packet whose header is whole.
func addresses(p []byte, proto tcpip.NetworkProtocolNumber) (src, dst netip.Addr) {
	if proto == header.IPv4ProtocolNumber {
		return netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
	}
	return netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
}

// handleEcho sees every packet that classify calls echo. It runs on the reader's goroutine.
func (s *Stack) handleEcho(p []byte, in ipInfo) {
	m, whole := s.parts.add(p, in)
	if !whole || s.cfg.DialEcho == nil {
		return
	}
	r, ok := parseEcho(m)
	if !ok {
		return
	}
	s.request(m.head, r)
}

// request gives a request to the conversation that it belongs to, a new one if there is none; it is lost when there are too many.
func (s *Stack) request(head []byte, r echoRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := r.echoKey
	f := s.echoes[k]
	if f != nil {
		f.request(head, r)
		return
	}
	if s.stopped || len(s.echoes) >= s.cfg.MaxEcho {
		return
	}
	f = &echoFlow{s: s, key: k, requests: make(chan []byte, echoQueue), done: make(chan struct{})}
	f.request(head, r) // before it runs: a dial that fails at once has a packet to answer
	s.echoes[k] = f
	s.flows.Add(1)
	s.echoTotal.Add(1)
	go func() {
		defer s.flows.Done()
		if err := f.run(); err != nil {
			s.cfg.Log.Debug("echo flow ended", "src", k.src, "dst", k.dst, "err", err)
		}
	}()
}

// echoFlow joins the echo requests of one ping with their flow. To the relay it is the application's end.
type echoFlow struct {
	s        *Stack
	key      echoKey
	requests chan []byte // messages of wire.KindEcho
	done     chan struct{}

	mu   sync.Mutex
	once sync.Once // Close
	head []byte    // guarded by mu: the beginning of the last request's packet, for ICMP errors
}

// request queues a request, or loses it.
func (f *echoFlow) request(head []byte, r echoRequest) {
	msg := wire.AppendEchoMessage(make([]byte, 0, wire.EchoHeaderLen+len(r.data)), r.seq, r.data)
	f.mu.Lock()
	f.head = append(f.head[:0], head...)
	f.mu.Unlock()
	select {
	case f.requests <- msg:
	default:
	}
}

func (f *echoFlow) run() error {
	ctx, cancel := context.WithTimeout(f.s.ctx, f.s.cfg.DialTimeout)
	remote, err := f.s.cfg.DialEcho(ctx, f.key.src, f.key.dst)
	cancel()
	if err == nil {
		unhook := context.AfterFunc(f.s.ctx, func() { _ = f.Close() })
		err = flow.RelayPackets(f, remote, f.s.cfg.EchoIdle)
		unhook()
	}
	f.s.mu.Lock()
	delete(f.s.echoes, f.key)
	f.s.mu.Unlock()
	if what := judge(err).icmp; what == unreachHost || what == unreachNet {
		f.mu.Lock()
		head := f.head
		f.mu.Unlock()
		f.s.sendUnreachable(head, what)
	}
	return err
}

// ReadPacket implements flow.Packets: the next request.
func (f *echoFlow) ReadPacket(p []byte) (int, error) {
	select {
	case m := <-f.requests:
		return copy(p, m), nil
	case <-f.done:
		return 0, net.ErrClosed
	}
}

var errLongEcho = errors.New("echo reply longer than a packet")

// WritePacket implements flow.Packets: a reply goes to the application, in one packet however long it is.
func (f *echoFlow) WritePacket(p []byte) error {
	seq, data, err := wire.ParseEchoMessage(p)
	if err != nil {
		return err
	}
	b := echoReply(f.key, seq, data)
	if b == nil {
		return errLongEcho
	}
	f.s.echoReplies.Add(1) // before anybody has it
	if err := f.s.cfg.Device.WritePacket(tundev.Header{}, [][]byte{b}); err != nil {
		f.s.echoReplies.Add(^uint64(0)) // minus one
		f.s.link.writeFails.Add(1)
	}
	return nil // if lost, then as on a network
}

// Close implements flow.Packets.
func (f *echoFlow) Close() error {
	f.once.Do(func() { close(f.done) })
	return nil
}

// echoReply builds the packet that answers request seq of k; nil if it would be too long.
func echoReply(k echoKey, seq uint16, data []byte) []byte {
	hlen := header.IPv4MinimumSize
	if k.src.Is6() {
		hlen = header.IPv6MinimumSize
	}
	size := hlen + icmpEchoLen + len(data)
	if size > tundev.MaxPacket {
		return nil
	}
	b := make([]byte, size)
	src, dst := tcpip.AddrFromSlice(k.dst.AsSlice()), tcpip.AddrFromSlice(k.src.AsSlice())
	ic := b[hlen:]
	binary.BigEndian.PutUint16(ic[4:], k.id)
	binary.BigEndian.PutUint16(ic[6:], seq)
	copy(ic[icmpEchoLen:], data)
	if k.src.Is4() {
		ip := header.IPv4(b)
		ip.Encode(&header.IPv4Fields{TotalLength: uint16(size), TTL: 64, Protocol: uint8(header.ICMPv4ProtocolNumber), SrcAddr: src, DstAddr: dst})
		ip.SetChecksum(^ip.CalculateChecksum())
		header.ICMPv4(ic).SetType(header.ICMPv4EchoReply)
		header.ICMPv4(ic).SetChecksum(^checksum.Checksum(ic, 0))
		return b
	}
	header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(size - hlen), TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: 64, SrcAddr: src, DstAddr: dst})
	header.ICMPv6(ic).SetType(header.ICMPv6EchoReply)
	header.ICMPv6(ic).SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: ic, Src: src, Dst: dst}))
	return b
}

var _ flow.Packets = (*echoFlow)(nil)
