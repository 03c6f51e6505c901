package wan

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/lab/internal/plan"
	"github.com/doppel-dev/doppel/lab/internal/relay"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// controlSocket is where the router takes orders, in the lab's directory.
const controlSocket = "router.sock"

// linkRequest asks the router to make a laptop's link be so.
type linkRequest struct {
	Index int        `json:"index"`
	Link  state.Link `json:"link"`
}

// links are the relays of the router, by the index of the laptop. A laptop without one is joined by the kernel alone.
type links struct {
	mu     sync.Mutex
	cables map[int]*cable
}

func (l *links) serve(w http.ResponseWriter, r *http.Request) {
	var req linkRequest
	err := json.NewDecoder(r.Body).Decode(&req)
	if err == nil {
		err = l.set(req.Index, req.Link)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func (l *links) set(index int, want state.Link) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	laptop := plan.LaptopNet(index)
	c := l.cables[index]
	switch {
	case c != nil && !want.Relayed():
		delete(l.cables, index)
		if err := c.close(); err != nil {
			return err
		}
	case c != nil:
		c.relay.Set(want.Line())
	case want.Relayed():
		c, err := newCable(laptop, want.Line())
		if err != nil {
			return err
		}
		l.cables[index] = c
	}
	return setCarrier(laptop, !want.Down, l.cables[index] != nil)
}

// setCarrier takes the router's end of the link down or up: the laptop sees its cable pulled, and keeps its addresses
// and routes.
func setCarrier(laptop plan.Laptop, up, relayed bool) error {
	link, err := netlink.LinkByName(laptop.WanLink)
	if err != nil {
		return fmt.Errorf("link %s: %w", laptop.WanLink, err)
	}
	if !up {
		return netlink.LinkSetDown(link)
	}
	if err := netlink.LinkSetUp(link); err != nil || relayed {
		return err
	}
	// IPv6 addresses are gone after a link has been down.
	return withHandle(func(h *netlink.Handle) error { return configure(h, laptop.WanLink, gateways(laptop)...) })
}

func withHandle(do func(*netlink.Handle) error) error {
	h, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	return do(h)
}

// cable is a relay between a laptop's link and a TAP device that takes over the router's addresses on it.
//
//	laptop eth0 === laptopN [packet socket] relay [TAP] laptopNr  router
//
// Both carry the kernel's virtio_net_hdr before each packet, so that packets without a checksum stay right.
type cable struct {
	laptop plan.Laptop
	relay  *relay.Relay
	ends   [2]*os.File
	done   chan struct{}
}

// tapName matches the router's rules for laptops.
func tapName(laptop plan.Laptop) string { return laptop.WanLink + "r" }

func newCable(laptop plan.Laptop, line relay.Config) (*cable, error) {
	link, err := netlink.LinkByName(laptop.WanLink)
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", laptop.WanLink, err)
	}
	socket, err := openPacketSocket(link.Attrs().Index)
	if err != nil {
		return nil, fmt.Errorf("packet socket on %s: %w", laptop.WanLink, err)
	}
	tap, err := openTAP(tapName(laptop))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("TAP device: %w", err), socket.Close())
	}
	c := &cable{laptop: laptop, ends: [2]*os.File{socket, tap}, done: make(chan struct{})}
	c.relay = relay.New(port{socket}, port{tap}, line)
	if err := c.takeOver(link); err != nil {
		return nil, errors.Join(err, socket.Close(), tap.Close(), c.handBack())
	}
	go func() {
		defer close(c.done)
		// It ends when its ports are closed.
		_ = c.relay.Run(context.Background())
	}()
	return c, nil
}

// takeOver moves the router's addresses to the TAP device, with the same hardware address, so that the laptop notices
// nothing, and keeps the kernel from reading the link itself.
func (c *cable) takeOver(link netlink.Link) error {
	tap, err := netlink.LinkByName(tapName(c.laptop))
	if err != nil {
		return err
	}
	if err := netlink.LinkSetHardwareAddr(tap, link.Attrs().HardwareAddr); err != nil {
		return fmt.Errorf("hardware address: %w", err)
	}
	if err := netlink.LinkSetTxQLen(tap, 10000); err != nil {
		return fmt.Errorf("queue length: %w", err)
	}
	if err := runNFT(fmt.Sprintf(deafRules, c.laptop.WanLink)); err != nil {
		return err
	}
	for _, a := range gateways(c.laptop) {
		err := netlink.AddrDel(link, &netlink.Addr{IPNet: ipNet(a)})
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("take address %s from %s: %w", a, c.laptop.WanLink, err)
		}
	}
	return withHandle(func(h *netlink.Handle) error { return configure(h, tapName(c.laptop), gateways(c.laptop)...) })
}

// deafRules drop what comes in on a link, after packet sockets have seen it.
const deafRules = `table netdev doppel_%[1]s {
	chain ingress {
		type filter hook ingress device %[1]q priority filter; policy drop;
	}
}
`

// close puts the kernel back in the place of the relay.
func (c *cable) close() error {
	err := errors.Join(c.ends[0].Close(), c.ends[1].Close())
	<-c.done
	return errors.Join(err, c.handBack())
}

// handBack undoes takeOver once the TAP device is gone; that none of it was done is no error.
func (c *cable) handBack() error {
	name := c.laptop.WanLink
	return errors.Join(
		runNFT(fmt.Sprintf("table netdev doppel_%[1]s\ndelete table netdev doppel_%[1]s\n", name)),
		withHandle(func(h *netlink.Handle) error { return configure(h, name, gateways(c.laptop)...) }),
	)
}

func runNFT(ruleset string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(ruleset)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// port is a file whose reads and writes are whole packets.
type port struct{ f *os.File }

func (p port) ReadPacket(b []byte) (int, error) {
	for {
		n, err := p.f.Read(b)
		if errors.Is(err, unix.ENETDOWN) {
			continue // said once when the link goes down; the next read waits for its return
		}
		return n, err
	}
}

// WritePacket loses what the link does not take, as a line does.
func (p port) WritePacket(b []byte) error {
	_, err := p.f.Write(b)
	if err != nil && !errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

func openTAP(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}

func openPacketSocket(ifindex int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // in network byte order
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifindex}),
	)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "packet socket"), nil
}
