package tundev

import (
	"encoding/binary"
	"testing"
)

func TestHeaderRoundTrip(t *testing.T) {
	for _, h := range []Header{
		{},
		{NeedsCsum: true, CsumStart: 20, CsumOffset: 16},
		{NeedsCsum: true, CsumStart: 20, CsumOffset: 16, GSO: GSOTCPv4, GSOSize: 1448, HdrLen: 52},
		{NeedsCsum: true, CsumStart: 40, CsumOffset: 16, GSO: GSOTCPv6, GSOSize: 1428, HdrLen: 72, ECN: true},
	} {
		var b [HeaderLen]byte
		h.Put(&b)
		got, err := ParseHeader(b[:])
		if err != nil || got != h {
			t.Errorf("%+v became %+v, %v", h, got, err)
		}
		if err := h.Check(3000); err != nil {
			t.Errorf("%+v: %v", h, err)
		}
	}
}

func TestParseHeaderRefuses(t *testing.T) {
	for name, b := range map[string][]byte{
		"short":           make([]byte, HeaderLen-1),
		"UDP offload":     {0, 3, 0, 0, 1, 1, 0, 0, 0, 0},
		"unknown flag":    {8, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"no segment size": {0, 1, 40, 40, 0, 0, 0, 0, 0, 0},
	} {
		if h, err := ParseHeader(b); err == nil {
			t.Errorf("%s: accepted as %+v", name, h)
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		h Header
		n int
	}{
		"empty":             {Header{}, 0},
		"too long":          {Header{}, MaxPacket + 1},
		"too long for IPv4": {Header{GSO: GSOTCPv4, GSOSize: 1400}, MaxPacket + 1},
		"too long for IPv6": {Header{GSO: GSOTCPv6, GSOSize: 1400}, MaxPacket + 41},
		"checksum outside":  {Header{NeedsCsum: true, CsumStart: 20, CsumOffset: 16}, 37},
		"checksum overflow": {Header{NeedsCsum: true, CsumStart: 65535, CsumOffset: 65535}, 100},
		"headers outside":   {Header{GSO: GSOTCPv4, GSOSize: 1, HdrLen: 101}, 100},
	} {
		if tc.h.Check(tc.n) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseHeader(f *testing.F) {
	f.Add(make([]byte, HeaderLen), 100)
	f.Add([]byte{1, 1, 52, 0, 0xa8, 5, 20, 0, 16, 0}, 1500)
	f.Fuzz(func(t *testing.T, p []byte, n int) {
		h, err := ParseHeader(p)
		if err != nil {
			return
		}
		var b [HeaderLen]byte
		h.Put(&b)
		if again, err := ParseHeader(b[:]); err != nil || again != h {
			t.Errorf("%+v became %+v, %v", h, again, err)
		}
		if h.Check(n) == nil && h.NeedsCsum {
			packet := make([]byte, n)
			binary.BigEndian.PutUint16(packet[int(h.CsumStart)+int(h.CsumOffset):], 0) // must be inside
		}
	})
}
