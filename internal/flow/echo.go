package flow

import (
	"net/netip"

	"github.com/doppel-dev/doppel/internal/wire"
)

// icmpEchoLen is an ICMP echo's header: type, code, checksum, identifier, sequence number (RFC 792; RFC 4443, section 4.1).
const icmpEchoLen = 8

// The types of ICMP echo requests and replies.
const (
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
)

// EchoAllowed says why this process may not send ICMP echo requests, or nil.
func EchoAllowed() error {
	p, err := DialEcho(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	if err != nil {
		return err
	}
	return p.Close()
}

// DialEcho makes a flow's end of an unprivileged ICMP socket (icmp(7)): messages of wire.KindEcho go to dst as echo requests, and the
// replies come back as such. An ICMP error from the network is the error of the next call. It works on Linux, in the groups that the sysctl
// net.ipv4.ping_group_range names.
func DialEcho(dst netip.Addr) (Packets, error) {
	c, err := pingSocket(dst)
	if err != nil {
		return nil, err
	}
	e := &echoPackets{udp: &udpPackets{c: c}, request: echoRequest4, reply: echoReply4}
	if dst.Is6() {
		e.request, e.reply = echoRequest6, echoReply6
	}
	return e, nil
}

// echoPackets translates between messages and ICMP; the kernel fills in identifier and checksum.
type echoPackets struct {
	udp            *udpPackets // net knows the socket as one for datagrams
	request, reply byte
}

func (e *echoPackets) WritePacket(p []byte) error {
	seq, data, err := wire.ParseEchoMessage(p)
	if err != nil {
		return err
	}
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	b := append(buf[:0], e.request, 0, 0, 0, 0, 0, byte(seq>>8), byte(seq))
	return e.udp.WritePacket(append(b, data...))
}

// NextPacket implements PacketSource.
func (e *echoPackets) NextPacket(fn func(p []byte) error) error {
	return e.udp.NextPacket(func(p []byte) error {
		if len(p) < icmpEchoLen || p[0] != e.reply {
			return nil
		}
		return fn(p[icmpEchoLen-wire.EchoHeaderLen:]) // sequence number and data, as in a message
	})
}

func (e *echoPackets) ReadPacket(p []byte) (n int, err error) {
	err = e.NextPacket(func(m []byte) error {
		n = copy(p, m)
		return nil
	})
	return n, err
}

func (e *echoPackets) Close() error { return e.udp.Close() }
