package netstacktest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/doppel-dev/doppel/internal/netstack"
	"github.com/doppel-dev/doppel/internal/tundev"
)

// Host is an application's machine in memory: its connections leave through a device, best one end of a tuntest.Pair whose other end the
// netstack under test has. It needs no root.
type Host struct {
	dev    netstack.Device
	ns     *stack.Stack
	link   *channel.Endpoint
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// NewHost starts a machine with these addresses.
func NewHost(dev netstack.Device, addrs ...netip.Addr) (*Host, error) {
	const nic = 1
	h := &Host{dev: dev, link: channel.New(4096, tundev.DefaultMTU, "")}
	h.link.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	h.ns = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := h.ns.CreateNIC(nic, h.link); err != nil {
		return nil, fmt.Errorf("create nic: %s", err)
	}
	for _, a := range addrs {
		pa := tcpip.ProtocolAddress{Protocol: protocol(a), AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix()}
		if err := h.ns.AddProtocolAddress(nic, pa, stack.AddressProperties{}); err != nil {
			return nil, fmt.Errorf("add %v: %s", a, err)
		}
	}
	h.ns.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}, {Destination: header.IPv6EmptySubnet, NIC: nic}})
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	h.wg.Go(func() { h.out(ctx) })
	h.wg.Go(h.in)
	return h, nil
}

func protocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

func (h *Host) out(ctx context.Context) {
	for pkt := h.link.ReadContext(ctx); pkt != nil; pkt = h.link.ReadContext(ctx) {
		_ = h.dev.WritePacket(tundev.Header{}, pkt.AsSlices())
		pkt.DecRef()
	}
}

func (h *Host) in() {
	b := make([]byte, tundev.MaxPacket)
	for {
		n, _, err := h.dev.ReadPacket(b)
		if err != nil {
			return
		}
		proto := tcpip.NetworkProtocolNumber(header.IPv4ProtocolNumber)
		if b[0]>>4 == 6 {
			proto = header.IPv6ProtocolNumber
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b[:n])})
		h.link.InjectInbound(proto, pkt)
		pkt.DecRef()
	}
}

// Conn is a TCP connection of a Host; Close with SetLinger(0) is not there, CloseWrite is.
type Conn = gonet.TCPConn

func full(ap netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{Addr: tcpip.AddrFromSlice(ap.Addr().AsSlice()), Port: ap.Port()}
}

// DialTCP connects to dst as an application on this machine would.
func (h *Host) DialTCP(ctx context.Context, dst netip.AddrPort) (*Conn, error) {
	return gonet.DialContextTCP(ctx, h.ns, full(dst), protocol(dst.Addr()))
}

// DialUDP opens a connected UDP socket to dst.
func (h *Host) DialUDP(dst netip.AddrPort) (net.Conn, error) {
	to := full(dst)
	return gonet.DialUDP(h.ns, nil, &to, protocol(dst.Addr()))
}

// Close ends all connections and the device.
func (h *Host) Close() {
	h.ns.Close()
	h.cancel()
	h.dev.Close()
	h.wg.Wait()
	h.ns.Wait()
}
