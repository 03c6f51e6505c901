package tundev

import (
	"encoding/binary"
	"errors"
)

var errSuperPacket = errors.New("a super packet on a device that does not split packets")

// finish does in a packet what a header leaves to the kernel, for systems whose kernel does nothing: it completes the checksum (RFC 1071), of
// which the sum over the pseudo header stands in its place already.
func finish(h Header, packet []byte) error {
	if h.GSO != GSONone {
		return errSuperPacket
	}
	if !h.NeedsCsum {
		return nil
	}
	at := int(h.CsumStart) + int(h.CsumOffset)
	var sum uint64
	rest := packet[h.CsumStart:]
	for ; len(rest) >= 2; rest = rest[2:] {
		sum += uint64(binary.BigEndian.Uint16(rest))
	}
	if len(rest) == 1 {
		sum += uint64(rest[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	c := ^uint16(sum)
	if c == 0 {
		c = 0xffff // RFC 768: zero means none, and to TCP both are the same
	}
	binary.BigEndian.PutUint16(packet[at:], c)
	return nil
}
