package netstack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// fate is what becomes of an inbound packet.
type fate int

const (
	// drop: anything but unicast (the kernel sends router solicitations, MLD and mDNS into every interface that is up), and ICMP that
	// is neither an error nor an echo request.
	drop fate = iota
	// deliver: to the stack.
	deliver
	// echo: an ICMP echo request or a part of one, which gVisor in promiscuous mode would answer itself, or a later part of another
	// ICMP message.
	echo
)

// ipInfo is what an inbound packet's IP headers say.
type ipInfo struct {
	proto    tcpip.NetworkProtocolNumber
	next     uint8  // the transport protocol
	payload  []byte // behind the IP headers; nil if it is not ICMP
	fragment bool
	id       uint32 // of a fragment
	offset   int    // of a fragment, in bytes
	more     bool   // fragments follow
}

// classify says what becomes of an inbound packet.
func classify(p []byte) (ipInfo, fate) {
	if len(p) == 0 {
		return ipInfo{}, drop
	}
	var in ipInfo
	var ok bool
	switch p[0] >> 4 {
	case 4:
		in, ok = parseIPv4(p)
	case 6:
		in, ok = parseIPv6(p)
	}
	switch {
	case !ok:
		return in, drop
	case in.next != uint8(header.ICMPv4ProtocolNumber) && in.next != uint8(header.ICMPv6ProtocolNumber):
		return in, deliver
	case in.fragment && in.offset > 0:
		return in, echo // whoever puts them together knows what the first one was
	case len(in.payload) == 0:
		return in, drop
	case in.proto == header.IPv4ProtocolNumber:
		return in, icmpv4Fate(header.ICMPv4Type(in.payload[0]))
	default:
		return in, icmpv6Fate(header.ICMPv6Type(in.payload[0]))
	}
}

func icmpv4Fate(t header.ICMPv4Type) fate {
	switch t {
	case header.ICMPv4Echo:
		return echo
	case header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
		return deliver
	default:
		return drop
	}
}

func icmpv6Fate(t header.ICMPv6Type) fate {
	switch {
	case t == header.ICMPv6EchoRequest:
		return echo
	case t < 128: // errors (RFC 4443, section 2.1)
		return deliver
	default:
		return drop
	}
}

func parseIPv4(p []byte) (ipInfo, bool) {
	in := ipInfo{proto: header.IPv4ProtocolNumber}
	if len(p) < header.IPv4MinimumSize {
		return in, false
	}
	hlen := int(p[0]&0x0f) * 4
	if hlen < header.IPv4MinimumSize || hlen > len(p) {
		return in, false
	}
	if p[16]&0xf0 == 0xe0 || p[16] == 255 || p[16] == 0 { // multicast, broadcast; "this" network. The rest of class E is virtual addresses
		return in, false
	}
	in.next = p[9]
	if in.next != uint8(header.ICMPv4ProtocolNumber) {
		return in, in.next != uint8(header.ICMPv6ProtocolNumber)
	}
	if total := int(binary.BigEndian.Uint16(p[2:])); total >= hlen && total < len(p) {
		p = p[:total]
	}
	flags := binary.BigEndian.Uint16(p[6:])
	in.id, in.offset, in.more = uint32(binary.BigEndian.Uint16(p[4:])), int(flags&0x1fff)*8, flags&0x2000 != 0
	in.fragment = in.more || in.offset > 0
	in.payload = p[hlen:]
	return in, true
}

func parseIPv6(p []byte) (ipInfo, bool) {
	in := ipInfo{proto: header.IPv6ProtocolNumber}
	if len(p) < header.IPv6MinimumSize {
		return in, false
	}
	if p[24] == 0xff { // multicast
		return in, false
	}
	next, rest := p[6], p[header.IPv6MinimumSize:]
	// Walk the extension headers (RFC 8200, section 4); each is bounded by the packet, and 8 are more than anybody sends.
	for range 8 {
		switch next {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			if len(rest) < 8 {
				return in, false
			}
			n := (int(rest[1]) + 1) * 8
			if n > len(rest) {
				return in, false
			}
			next, rest = rest[0], rest[n:]
		case 44: // fragment
			if len(rest) < 8 {
				return in, false
			}
			off := binary.BigEndian.Uint16(rest[2:])
			in.fragment, in.id, in.offset, in.more = true, binary.BigEndian.Uint32(rest[4:]), int(off&0xfff8), off&1 != 0
			next, rest = rest[0], rest[8:]
			if in.offset > 0 { // what follows is data
				in.next, in.payload = next, rest
				return in, next != uint8(header.ICMPv4ProtocolNumber)
			}
		default:
			in.next, in.payload = next, rest
			return in, next != uint8(header.ICMPv4ProtocolNumber)
		}
	}
	return in, false
}

// headerLen is how many bytes of a packet that classify lets through are IP and TCP headers, as far as they can be told at once; where they
// cannot, it is the IP header's least length.
func headerLen(p []byte) int {
	n, next := int(p[0]&0x0f)*4, p[9]
	if p[0]>>4 == 6 {
		n, next = header.IPv6MinimumSize, p[6]
	}
	if next == byte(header.TCPProtocolNumber) && len(p) >= n+header.TCPMinimumSize {
		n += max(int(p[n+12]>>4)*4, header.TCPMinimumSize)
	}
	return min(n, len(p))
}

// unreachable is what an ICMP destination unreachable says.
type unreachable int

const (
	unreachNone unreachable = iota
	unreachNet
	unreachHost
	unreachPort
)

// verdict is how a failed dial is told to the application.
type verdict struct {
	reset bool // TCP only
	icmp  unreachable
}

// judge reads a dial's error. What is neither refused nor unreachable stays silent: the application's kernel retransmits, and a
// tunnel that comes back meanwhile serves it.
func judge(err error) verdict {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return verdict{reset: true, icmp: unreachPort}
	case errors.Is(err, syscall.ENETUNREACH):
		return verdict{icmp: unreachNet}
	case errors.Is(err, syscall.EHOSTUNREACH):
		return verdict{icmp: unreachHost}
	case errors.Is(err, syscall.ECONNRESET): // a stream that was reset is this beside its reason: last
		return verdict{reset: true}
	}
	return verdict{}
}

// icmpQuote is how many bytes of the offending packet an error carries: the IP and TCP headers at their longest without options
// that matter; Linux wants the ports and the sequence number (RFC 792: 64 bits of the payload).
const icmpQuote = 128

// unreachablePacket builds the ICMP error for the packet that begins with orig (its IP header and at least 8 bytes more), from the
// address that it was sent to. It gives nil when orig is too short.
func unreachablePacket(orig []byte, what unreachable) []byte {
	if len(orig) == 0 || what == unreachNone {
		return nil
	}
	orig = orig[:min(len(orig), icmpQuote)]
	if orig[0]>>4 == 6 {
		return unreachable6(orig, what)
	}
	return unreachable4(orig, what)
}

func unreachable4(orig []byte, what unreachable) []byte {
	if len(orig) < header.IPv4MinimumSize+8 {
		return nil
	}
	src, dst := header.IPv4(orig).DestinationAddress(), header.IPv4(orig).SourceAddress()
	b := make([]byte, header.IPv4MinimumSize+header.ICMPv4MinimumSize+len(orig))
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(header.ICMPv4ProtocolNumber), SrcAddr: src, DstAddr: dst})
	ip.SetChecksum(^ip.CalculateChecksum())
	ic := header.ICMPv4(b[header.IPv4MinimumSize:])
	ic.SetType(header.ICMPv4DstUnreachable)
	switch what { // RFC 792
	case unreachNet:
		ic.SetCode(header.ICMPv4NetUnreachable)
	case unreachPort:
		ic.SetCode(header.ICMPv4PortUnreachable)
	case unreachHost, unreachNone:
		ic.SetCode(header.ICMPv4HostUnreachable)
	}
	copy(ic[header.ICMPv4MinimumSize:], orig)
	ic.SetChecksum(^checksum.Checksum(ic, 0))
	return b
}

func unreachable6(orig []byte, what unreachable) []byte {
	if len(orig) < header.IPv6MinimumSize+8 {
		return nil
	}
	src, dst := header.IPv6(orig).DestinationAddress(), header.IPv6(orig).SourceAddress()
	b := make([]byte, header.IPv6MinimumSize+header.ICMPv6DstUnreachableMinimumSize+len(orig))
	header.IPv6(b).Encode(&header.IPv6Fields{
		PayloadLength:     uint16(len(b) - header.IPv6MinimumSize),
		TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: 64, SrcAddr: src, DstAddr: dst,
	})
	ic := header.ICMPv6(b[header.IPv6MinimumSize:])
	ic.SetType(header.ICMPv6DstUnreachable)
	switch what { // RFC 4443, section 3.1
	case unreachNet:
		ic.SetCode(header.ICMPv6NetworkUnreachable)
	case unreachPort:
		ic.SetCode(header.ICMPv6PortUnreachable)
	case unreachHost, unreachNone:
		ic.SetCode(header.ICMPv6AddressUnreachable)
	}
	copy(ic[header.ICMPv6DstUnreachableMinimumSize:], orig)
	ic.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: ic, Src: src, Dst: dst}))
	return b
}

// addrPort is a gVisor address and port in our type.
func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(ip.Unmap(), port)
}
