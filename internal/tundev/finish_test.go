package tundev

import (
	"encoding/binary"
	"errors"
	"testing"
)

// onesSum is the folded sum of the data, which is 0xffff where a checksum in it is right.
func onesSum(parts ...[]byte) uint16 {
	var sum uint32
	for _, p := range parts {
		if len(p)%2 == 1 {
			p = append(p[:len(p):len(p)], 0)
		}
		for ; len(p) > 0; p = p[2:] {
			sum += uint32(binary.BigEndian.Uint16(p))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func TestFinish(t *testing.T) {
	for _, payload := range []string{"hello", "hello!", ""} {
		udp := append([]byte{0x30, 0x39, 0, 53, 0, byte(8 + len(payload)), 0, 0}, payload...)
		pseudo := []byte{10, 0, 0, 1, 10, 0, 0, 2, 0, 17, 0, byte(len(udp))}
		binary.BigEndian.PutUint16(udp[6:], onesSum(pseudo)) // as a stack leaves it
		packet := append(make([]byte, 20), udp...)
		if err := finish(Header{NeedsCsum: true, CsumStart: 20, CsumOffset: 6}, packet); err != nil {
			t.Fatal(err)
		}
		if got := onesSum(pseudo, packet[20:]); got != 0xffff {
			t.Errorf("%q: the sum is %#x", payload, got)
		}
	}
	whole := []byte{1, 2, 3}
	if err := finish(Header{}, whole); err != nil || whole[2] != 3 {
		t.Errorf("a finished packet: %v, %v", whole, err)
	}
	if err := finish(Header{GSO: GSOTCPv4, GSOSize: 1}, whole); !errors.Is(err, errSuperPacket) {
		t.Errorf("a super packet: %v", err)
	}
}
