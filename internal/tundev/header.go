// Package tundev owns the TUN device of each operating system: opening it, and moving whole unsplit packets in and out of it.
package tundev

import (
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	// HeaderLen is the length of the virtio_net_hdr in front of every packet (linux/virtio_net.h, without num_buffers).
	HeaderLen = 10
	// MaxPacket is the longest IP packet that a device carries: a super packet that the kernel left unsplit.
	MaxPacket = 65535
	// ipv6HeaderLen is what a packet of TCP over IPv6 may have more, since its length does not count the header (RFC 8200, section 3).
	ipv6HeaderLen = 40
	// DefaultMTU is used where a caller gives no MTU.
	DefaultMTU = 1500
)

// GSO says how the kernel splits a super packet (VIRTIO_NET_HDR_GSO_*).
type GSO uint8

// The kinds that doppel turns on (TUN_F_TSO4, TUN_F_TSO6); UDP is never unsplit.
const (
	GSONone  GSO = 0
	GSOTCPv4 GSO = 1
	GSOTCPv6 GSO = 4
)

const (
	flagNeedsCsum = 0x01 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	flagDataValid = 0x02 // VIRTIO_NET_HDR_F_DATA_VALID
	gsoECN        = 0x80 // VIRTIO_NET_HDR_GSO_ECN
)

// Header is what stands beside a packet: the checksum still to be filled in and the size to split it to. The zero value is a
// finished packet.
type Header struct {
	// NeedsCsum says that the bytes from CsumStart on are to be summed and the result put CsumOffset bytes after CsumStart.
	NeedsCsum             bool
	CsumStart, CsumOffset uint16
	// GSO and GSOSize (payload bytes a segment, the MSS) describe a super packet; HdrLen is the length of its IP and TCP headers.
	GSO     GSO
	GSOSize uint16
	HdrLen  uint16
	// ECN says that only the first segment may carry CWR (RFC 3168).
	ECN bool
}

var (
	errShortHeader = errors.New("vnet header: shorter than 10 bytes")
	errCsumRange   = errors.New("vnet header: checksum outside the packet")
	errGSOSize     = errors.New("vnet header: super packet without segment size")
)

// ParseHeader reads a virtio_net_hdr in the host's byte order (what a TUN without TUNSETVNETLE speaks).
func ParseHeader(p []byte) (Header, error) {
	if len(p) < HeaderLen {
		return Header{}, errShortHeader
	}
	h := Header{
		GSO:       GSO(p[1] &^ gsoECN),
		ECN:       p[1]&gsoECN != 0,
		NeedsCsum: p[0]&flagNeedsCsum != 0,
		HdrLen:    binary.NativeEndian.Uint16(p[2:]),
		GSOSize:   binary.NativeEndian.Uint16(p[4:]),
	}
	if p[0]&^(flagNeedsCsum|flagDataValid) != 0 {
		return Header{}, fmt.Errorf("vnet header: unknown flags %#x", p[0])
	}
	switch h.GSO {
	case GSONone:
		// hdr_len and gso_size mean nothing here, and a lone ECN bit neither.
		h.HdrLen, h.GSOSize, h.ECN = 0, 0, false
	case GSOTCPv4, GSOTCPv6:
		if h.GSOSize == 0 {
			return Header{}, errGSOSize
		}
	default:
		return Header{}, fmt.Errorf("vnet header: unknown gso type %#x", p[1])
	}
	if h.NeedsCsum {
		h.CsumStart = binary.NativeEndian.Uint16(p[6:])
		h.CsumOffset = binary.NativeEndian.Uint16(p[8:])
	}
	return h, nil
}

// Check says whether h can belong to a packet of n bytes.
func (h Header) Check(n int) error {
	most := MaxPacket
	if h.GSO == GSOTCPv6 {
		most += ipv6HeaderLen
	}
	if n <= 0 || n > most {
		return fmt.Errorf("vnet header: packet of %d bytes", n)
	}
	if h.NeedsCsum && int(h.CsumStart)+int(h.CsumOffset)+2 > n {
		return errCsumRange
	}
	if h.GSO != GSONone && int(h.HdrLen) > n {
		return fmt.Errorf("vnet header: header length %d in a packet of %d bytes", h.HdrLen, n)
	}
	return nil
}

// Put writes h in the kernel's form.
func (h Header) Put(p *[HeaderLen]byte) {
	*p = [HeaderLen]byte{}
	if h.NeedsCsum {
		p[0] = flagNeedsCsum
		binary.NativeEndian.PutUint16(p[6:], h.CsumStart)
		binary.NativeEndian.PutUint16(p[8:], h.CsumOffset)
	}
	if h.GSO == GSONone {
		return
	}
	p[1] = byte(h.GSO)
	if h.ECN {
		p[1] |= gsoECN
	}
	binary.NativeEndian.PutUint16(p[2:], h.HdrLen)
	binary.NativeEndian.PutUint16(p[4:], h.GSOSize)
}
