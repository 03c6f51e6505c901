package netstack

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/doppel-dev/doppel/internal/tundev"
)

func v4(proto byte, dst [4]byte, payload ...byte) []byte {
	p := make([]byte, 20, 20+len(payload))
	header.IPv4(p).Encode(&header.IPv4Fields{
		TotalLength: uint16(20 + len(payload)), TTL: 64, Protocol: proto,
		SrcAddr: tcpip.AddrFrom4([4]byte{10, 0, 0, 1}), DstAddr: tcpip.AddrFrom4(dst),
	})
	return append(p, payload...)
}

func v6(next byte, dst0 byte, payload ...byte) []byte {
	p := make([]byte, 40, 40+len(payload))
	p[0], p[6], p[7], p[5] = 0x60, next, 64, byte(len(payload))
	p[8], p[23], p[24], p[39] = 0xfd, 1, dst0, 2
	return append(p, payload...)
}

func TestClassify(t *testing.T) {
	unicast := [4]byte{10, 0, 0, 2}
	frag := v4(1, unicast, 1, 2, 3, 4, 5, 6, 7, 8)
	frag[7] = 10
	for _, tc := range []struct {
		name string
		p    []byte
		want fate
	}{
		{"empty", nil, drop},
		{"version 5", []byte{0x50, 0, 0}, drop},
		{"short", v4(6, unicast)[:19], drop},
		{"header length over the end", append([]byte{0x4f}, v4(6, unicast)[1:]...), drop},
		{"tcp", v4(6, unicast, make([]byte, 20)...), deliver},
		{"udp", v4(17, unicast, make([]byte, 8)...), deliver},
		{"multicast", v4(17, [4]byte{224, 0, 0, 251}), drop},
		{"more multicast", v4(17, [4]byte{239, 1, 2, 3}), drop},
		{"class E", v4(6, [4]byte{240, 0, 0, 1}), deliver},
		{"broadcast", v4(17, [4]byte{255, 255, 255, 255}), drop},
		{"echo", v4(1, unicast, 8, 0, 0, 0), echo},
		{"echo reply", v4(1, unicast, 0, 0, 0, 0), drop},
		{"unreachable", v4(1, unicast, 3, 3, 0, 0), deliver},
		{"icmp without header", v4(1, unicast), drop},
		{"icmp fragment", frag, echo},
		{"tcp6", v6(6, 0xfd, make([]byte, 20)...), deliver},
		{"short6", v6(6, 0xfd)[:39], drop},
		{"multicast6", v6(17, 0xff), drop},
		{"echo6", v6(58, 0xfd, 128, 0, 0, 0), echo},
		{"neighbour solicitation", v6(58, 0xfd, 135, 0, 0, 0), drop},
		{"unreachable6", v6(58, 0xfd, 1, 4, 0, 0), deliver},
		{"icmp6 without header", v6(58, 0xfd), drop},
		{"echo6 behind hop-by-hop", v6(0, 0xfd, 58, 0, 0, 0, 0, 0, 0, 0, 128, 0), echo},
		{"tcp behind options", v6(60, 0xfd, 6, 0, 0, 0, 0, 0, 0, 0, 1, 2), deliver},
		{"echo6, first fragment", v6(44, 0xfd, 58, 0, 0, 1, 0, 0, 0, 1, 128, 0), echo},
		{"icmp6, later fragment", v6(44, 0xfd, 58, 0, 1, 0, 0, 0, 0, 1, 3, 0), echo},
		{"udp, later fragment", v6(44, 0xfd, 17, 0, 1, 0, 0, 0, 0, 1, 3, 0), deliver},
		{"extension over the end", v6(0, 0xfd, 58, 200, 0, 0, 0, 0, 0, 0), drop},
		{"icmp6 in IPv4", v4(58, unicast, 128, 0, 0, 0), drop},
		{"icmp in IPv6", v6(1, 0xfd, 8, 0, 0, 0), drop},
	} {
		if _, got := classify(tc.p); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

func FuzzPackets(f *testing.F) {
	f.Add(v4(6, [4]byte{10, 0, 0, 2}, make([]byte, 20)...))
	f.Add(v6(44, 0xfd, 58, 0, 0, 1, 0, 0, 0, 1, 128, 0))
	f.Add(v6(6, 0xfd, make([]byte, 20)...))
	f.Add(v4(1, [4]byte{10, 0, 0, 2}, 8, 0, 0, 0, 0, 1, 0, 1, 'x'))
	f.Fuzz(func(t *testing.T, p []byte) {
		in, what := classify(p)
		if what == echo {
			var r reassembler
			if m, ok := r.add(p, in); ok {
				_, _ = parseEcho(m)
			}
		}
		if what != deliver {
			return
		}
		proto := in.proto
		if n := headerLen(p); n < 20 || n > len(p) {
			t.Errorf("headers of %d bytes in %d", n, len(p))
		}
		for _, what := range []unreachable{unreachNet, unreachHost, unreachPort} {
			u := unreachablePacket(p, what)
			if u == nil {
				continue
			}
			if proto == header.IPv4ProtocolNumber && !header.IPv4(u).IsValid(len(u)) || proto == header.IPv6ProtocolNumber && !header.IPv6(u).IsValid(len(u)) {
				t.Errorf("invalid error packet %x", u)
			}
		}
	})
}

func TestUnreachablePacket(t *testing.T) {
	if unreachablePacket(nil, unreachHost) != nil || unreachablePacket(v4(6, [4]byte{10, 0, 0, 2}, 1, 2), unreachHost) != nil || unreachablePacket(v4(6, [4]byte{10, 0, 0, 2}, make([]byte, 20)...), unreachNone) != nil {
		t.Error("want none")
	}
	orig := v4(6, [4]byte{10, 0, 0, 2}, []byte("0123456789abcdefghij")...)
	p := header.IPv4(unreachablePacket(orig, unreachHost))
	if !p.IsChecksumValid() || p.SourceAddress().String() != "10.0.0.2" || p.DestinationAddress().String() != "10.0.0.1" {
		t.Errorf("header %s", hex.EncodeToString(p))
	}
	ic := header.ICMPv4(p.Payload())
	if ic.Type() != 3 || ic.Code() != 1 || checksum.Checksum(ic, 0) != 0xffff || !strings.HasSuffix(string(p), string(orig)) {
		t.Errorf("icmp %s", hex.EncodeToString(ic))
	}
	p6 := header.IPv6(unreachablePacket(v6(6, 0xfd, make([]byte, 400)...), unreachNet))
	if len(p6) != 48+icmpQuote || header.ICMPv6(p6.Payload()).Type() != 1 || header.ICMPv6(p6.Payload()).Code() != 0 {
		t.Errorf("icmp6 %s", hex.EncodeToString(p6))
	}
}

func TestJudge(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want verdict
	}{
		{syscall.ECONNREFUSED, verdict{reset: true, icmp: unreachPort}},
		{fmt.Errorf("dial: %w", syscall.ECONNRESET), verdict{reset: true}},
		{syscall.EHOSTUNREACH, verdict{icmp: unreachHost}},
		{syscall.ENETUNREACH, verdict{icmp: unreachNet}},
		{syscall.ETIMEDOUT, verdict{}},
		{context.DeadlineExceeded, verdict{}},
		{errors.New("tunnel is down"), verdict{}},
	} {
		if got := judge(tc.err); got != tc.want {
			t.Errorf("%v: %+v", tc.err, got)
		}
	}
}

func TestHeaderLen(t *testing.T) {
	opts := make([]byte, 32)
	opts[12] = 8 << 4
	short := make([]byte, 20)
	short[12] = 1 << 4 // less than a TCP header
	for _, tc := range []struct {
		p    []byte
		want int
	}{
		{v4(6, [4]byte{10, 0, 0, 2}, opts...), 52},
		{v4(6, [4]byte{10, 0, 0, 2}, short...), 40},
		{v4(17, [4]byte{10, 0, 0, 2}, opts...), 20},
		{v6(6, 0xfd, opts...), 72},
		{v6(44, 0xfd, opts...), 40},
	} {
		if got := headerLen(tc.p); got != tc.want {
			t.Errorf("got %d, want %d", got, tc.want)
		}
	}
}

func TestBufferShare(t *testing.T) {
	const mib = 1 << 20
	for _, tc := range []struct{ open, want int }{{0, 4 * mib}, {1, 4 * mib}, {4, 4 * mib}, {8, 2 * mib}, {64, mib / 4}, {256, mib / 16}, {10000, mib / 16}} {
		if got := bufferShare(32*mib, 4*mib, tc.open); got != tc.want {
			t.Errorf("%d open: %d, want %d", tc.open, got, tc.want)
		}
	}
}

// fragment is an IPv4 packet with a part of an ICMP message.
func fragment(id byte, offset int, more bool, payload ...byte) []byte {
	p := v4(1, [4]byte{10, 0, 0, 2}, payload...)
	p[5] = id
	binary.BigEndian.PutUint16(p[6:], uint16(offset/8))
	if more {
		p[6] |= 0x20
	}
	return p
}

func TestReassembler(t *testing.T) {
	head := []byte{8, 0, 0, 0, 0, 9, 0, 7}
	for _, tc := range []struct {
		name  string
		parts [][]byte
		want  string // the data of the echo request that the last part completes
	}{
		{"whole", [][]byte{fragment(1, 0, false, append(head, "abc"...)...)}, "abc"},
		{"two", [][]byte{fragment(1, 0, true, append(head, "abcdefgh"...)...), fragment(1, 16, false, 'i', 'j')}, "abcdefghij"},
		{"two messages interleaved", [][]byte{fragment(1, 0, true, head...), fragment(2, 0, true, head...), fragment(2, 8, false, 'x'), fragment(1, 8, false, 'y')}, "y"},
		{"no beginning", [][]byte{fragment(1, 8, false, 'x')}, ""},
		{"a gap", [][]byte{fragment(1, 0, true, head...), fragment(1, 16, false, 'x')}, ""},
		{"after a gap", [][]byte{fragment(1, 0, true, head...), fragment(1, 16, false, 'x'), fragment(1, 8, false, 'x')}, ""},
		{"another identification", [][]byte{fragment(1, 0, true, head...), fragment(2, 8, false, 'x')}, ""},
		{"no end", [][]byte{fragment(1, 0, true, head...), fragment(1, 8, true, head...)}, ""},
	} {
		var r reassembler
		got := ""
		for i, p := range tc.parts {
			in, what := classify(p)
			if what != echo {
				t.Fatalf("%s: part %d is %v", tc.name, i, what)
			}
			if m, ok := r.add(p, in); ok {
				req, ok := parseEcho(m)
				if !ok || req.id != 9 || req.seq != 7 || req.dst.String() != "10.0.0.2" || len(m.head) < 28 {
					t.Errorf("%s: %+v", tc.name, req)
				}
				if i == len(tc.parts)-1 {
					got = string(req.data)
				}
			}
		}
		if got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

// BenchmarkPacket is what becomes of a packet between the device and the stack.
func BenchmarkPacket(b *testing.B) {
	for _, size := range []int{100, 1400, 60000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			tcp := make([]byte, size)
			tcp[12] = 5 << 4 // five words of header
			packet := v4(6, [4]byte{10, 96, 0, 1}, tcp...)
			v := buffer.NewViewSize(tundev.MaxPacket)
			b.ReportAllocs()
			for b.Loop() {
				n := copy(v.AsSlice(), packet)
				if _, what := classify(v.AsSlice()[:n]); what != deliver {
					b.Fatal(what)
				}
				var p buffer.Buffer
				p, v = packetBuffer(v, n)
				p.Release()
			}
			v.Release()
		})
	}
}
