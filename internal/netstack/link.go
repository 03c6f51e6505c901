package netstack

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/doppel-dev/doppel/internal/tundev"
)

// gsoMaxSize lets as much go into one super packet as IP can carry, 65,535 bytes with the longest headers of TCP over IPv4: gVisor takes 161 off for
// headers. A full DATA frame of a download has to fit. What is left over of one costs as much as a full one does but for the copy, and an
// acknowledgement more.
const gsoMaxSize = 65535 - header.IPv4MinimumSize - header.TCPHeaderMaximumSize + header.TCPTotalHeaderMaximumSize + 1

// link is gVisor's way to the device: packets go out unsplit and without checksum, where that does both if anybody must, and come
// in as they are, since the kernel's own packets carry only partial checksums.
type link struct {
	dev Device
	mtu uint32

	dispatcher atomic.Pointer[stack.NetworkDispatcher]
	writeFails atomic.Uint64
	parts      sync.Pool // *[][]byte
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

func newLink(dev Device, mtu int) *link {
	l := &link{dev: dev, mtu: uint32(mtu)}
	l.parts.New = func() any {
		p := make([][]byte, 0, 8)
		return &p
	}
	return l
}

// deliver gives an inbound packet to the stack.
func (l *link) deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if d := l.dispatcher.Load(); d != nil {
		(*d).DeliverNetworkPacket(proto, pkt)
	}
}

// WritePackets implements stack.LinkWriter.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for i, pkt := range pkts.AsSlice() {
		if err := l.write(pkt); err != nil {
			if errors.Is(err, os.ErrClosed) {
				return i, &tcpip.ErrClosedForSend{}
			}
			// The interface is down, or the kernel refused this packet: lost, as on a wire.
			l.writeFails.Add(1)
		}
	}
	return pkts.Len(), nil
}

func (l *link) write(pkt *stack.PacketBuffer) error {
	pp := l.parts.Get().(*[][]byte)
	parts := (*pp)[:0]
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		parts = append(parts, b[skip:])
		skip = 0
	}
	err := l.dev.WritePacket(vnetHeader(pkt), parts)
	clear(parts)
	*pp = parts
	l.parts.Put(pp)
	return err
}

// vnetHeader translates what gVisor left to the device.
func vnetHeader(pkt *stack.PacketBuffer) tundev.Header {
	g := pkt.GSOOptions
	if g.Type == stack.GSONone {
		return tundev.Header{}
	}
	var h tundev.Header
	if g.NeedsCsum {
		h.NeedsCsum, h.CsumStart, h.CsumOffset = true, g.L3HdrLen, g.CsumOffset
	}
	if pkt.Data().Size() > int(g.MSS) {
		h.GSO = tundev.GSOTCPv4
		if g.Type == stack.GSOTCPv6 {
			h.GSO = tundev.GSOTCPv6
		}
		h.GSOSize, h.HdrLen = g.MSS, uint16(pkt.HeaderSize())
	}
	return h
}

// MTU implements stack.NetworkLinkEndpoint.
func (l *link) MTU() uint32 { return l.mtu }

// SetMTU implements stack.NetworkLinkEndpoint; the MTU is fixed.
func (*link) SetMTU(uint32) {}

// MaxHeaderLength implements stack.NetworkLinkEndpoint.
func (*link) MaxHeaderLength() uint16 { return 0 }

// LinkAddress implements stack.NetworkLinkEndpoint.
func (*link) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress implements stack.NetworkLinkEndpoint.
func (*link) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities implements stack.NetworkLinkEndpoint.
func (*link) Capabilities() stack.LinkEndpointCapabilities { return stack.CapabilityRXChecksumOffload }

// Attach implements stack.NetworkLinkEndpoint.
func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

// IsAttached implements stack.NetworkLinkEndpoint.
func (l *link) IsAttached() bool { return l.dispatcher.Load() != nil }

// Wait implements stack.NetworkLinkEndpoint; the reader belongs to Stack.Run.
func (*link) Wait() {}

// ARPHardwareType implements stack.NetworkLinkEndpoint.
func (*link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader implements stack.NetworkLinkEndpoint.
func (*link) AddHeader(*stack.PacketBuffer) {}

// ParseHeader implements stack.NetworkLinkEndpoint.
func (*link) ParseHeader(*stack.PacketBuffer) bool { return true }

// Close implements stack.NetworkLinkEndpoint.
func (*link) Close() {}

// SetOnCloseAction implements stack.NetworkLinkEndpoint.
func (*link) SetOnCloseAction(func()) {}

// GSOMaxSize implements stack.GSOEndpoint.
func (*link) GSOMaxSize() uint32 { return gsoMaxSize }

// SupportedGSO implements stack.GSOEndpoint.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.dev.Splits() {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}
