package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/resolver"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// lookEvery is how often the machine's resolvers are looked at.
const lookEvery = 2 * time.Second

// daemon is what a doppel-rootd is to a user daemon, for a box: the same messages, but the network that they set is the box's, in which
// everything goes to the device anyway, and sockets are the machine's as they are.
type daemon struct {
	box    *Box
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	made   bool            // guarded by mu: the box has its device
	want   rootapi.Network // guarded by mu
	routes []netip.Prefix  // guarded by mu: the cluster's
	told   rootapi.State   // guarded by mu
}

func newDaemon(b *Box) *daemon {
	d := &daemon{box: b}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d
}

func (d *daemon) close() {
	d.cancel()
	d.wg.Wait()
}

// connect returns a client of d.
func (d *daemon) connect(ctx context.Context, o rootapi.Options) (*rootapi.Client, error) {
	server, file, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		server.Close()
		return nil, err
	}
	var wmu sync.Mutex
	send := func(m rootapi.Message, f *os.File) error {
		wmu.Lock()
		defer wmu.Unlock()
		return rootapi.Send(server, m, f)
	}
	cctx, cancel := context.WithCancel(d.ctx)
	d.wg.Go(func() {
		defer cancel()
		d.serve(server, send)
	})
	d.wg.Go(func() { d.watch(cctx, send) })
	context.AfterFunc(cctx, func() { server.Close() })
	return rootapi.NewClient(ctx, c.(*net.UnixConn), o)
}

type sender func(rootapi.Message, *os.File) error

// serve answers requests until the connection ends.
func (d *daemon) serve(c *net.UnixConn, send sender) {
	buf := make([]byte, rootapi.MaxPacket)
	for {
		m, _, err := rootapi.Receive(c, buf, false)
		if err != nil {
			return
		}
		reply := rootapi.Message{ID: m.ID, Op: rootapi.OpReply}
		f, err := d.handle(m, &reply)
		if err != nil {
			reply = rootapi.Message{ID: m.ID, Op: rootapi.OpReply, Error: uerr.From(err)}
		}
		if m.Op != rootapi.OpPong {
			err = send(reply, f)
		}
		if f != nil {
			f.Close()
		}
		if err != nil {
			return
		}
	}
}

func (d *daemon) handle(m rootapi.Message, reply *rootapi.Message) (*os.File, error) {
	switch m.Op {
	case rootapi.OpSetNetwork:
		st, f, err := d.set(*m.Network)
		reply.State = &st
		return f, err
	case rootapi.OpMarkedSocket:
		return plainSocket(m.Socket)
	case rootapi.OpVersion:
		reply.Version = &rootapi.Version{Program: buildinfo.String(), Protocol: rootapi.Protocol, PID: os.Getpid()}
		return nil, nil
	default:
		return nil, uerr.New(uerr.Usage, "", "%q has no meaning in namespaces of one's own", m.Op)
	}
}

// set makes n the wanted network. The device is made once; later only what is the cluster's changes.
func (d *daemon) set(n rootapi.Network) (rootapi.State, *os.File, error) {
	resolvers, search, err := resolver.ReadConfig(d.box.cfg.ResolvConf)
	if err != nil {
		return rootapi.State{}, nil, err
	}
	p, err := osroute.Make(osroute.Want{Routes: n.Routes, Exclude: n.Exclude}, nil)
	if err != nil {
		return rootapi.State{}, nil, err
	}
	st := rootapi.State{Name: n.Name, Routes: p.Routes, DNSMode: rootapi.DNSNone, Resolvers: resolvers, SearchDomains: search, Warnings: p.Warnings}
	if n.DNS != nil {
		st.DNSMode = rootapi.DNSNamespace
	}
	d.mu.Lock()
	first := !d.made && !n.IsZero()
	d.want, d.routes, d.told = n, p.Routes, st
	d.made = d.made || first
	d.mu.Unlock()
	if !first {
		return st, nil, nil
	}
	f, err := d.box.setUp(order{Network: n, Search: search})
	return st, f, err
}

// watch tells the client when the machine's resolvers have changed: DHCP, a VPN, another network.
func (d *daemon) watch(ctx context.Context, send sender) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		resolvers, search, err := resolver.ReadConfig(d.box.cfg.ResolvConf)
		if err != nil {
			continue // it is being written
		}
		d.mu.Lock()
		st := d.told
		changed := d.made && !slices.Equal(st.Resolvers, resolvers)
		st.Resolvers, st.SearchDomains = resolvers, search
		d.told = st
		d.mu.Unlock()
		if changed && send(rootapi.Message{Op: rootapi.OpChanged, State: &st}, nil) != nil {
			return
		}
	}
}

// plainSocket is what a marked socket is where nothing is captured.
func plainSocket(network string) (*os.File, error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if network == rootapi.UDP6 || network == rootapi.TCP6 {
		family = unix.AF_INET6
	}
	if network == rootapi.UDP4 || network == rootapi.UDP6 {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	return os.NewFile(uintptr(fd), network), nil
}

// place says where on the machine a connection of the command goes; ok is false for the cluster's.
func (d *daemon) place(dst netip.AddrPort) (to netip.AddrPort, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.routes {
		if r.Contains(dst.Addr()) {
			return netip.AddrPort{}, false
		}
	}
	var dns netip.AddrPort
	if d.want.DNS != nil {
		dns = d.want.DNS.Listen
	}
	return where(dst, dns), true
}

// DialTCP connects the command to what is not the cluster's, by the machine's network; ok is false for what is the cluster's.
func (b *Box) DialTCP(ctx context.Context, dst netip.AddrPort) (s flow.Stream, ok bool, err error) {
	c, ok, err := b.dial(ctx, "tcp", dst)
	if !ok || err != nil {
		return nil, ok, err
	}
	return flow.FromTCP(c.(*net.TCPConn)), true, nil
}

// DialUDP is DialTCP for a conversation.
func (b *Box) DialUDP(ctx context.Context, dst netip.AddrPort) (p flow.Packets, ok bool, err error) {
	c, ok, err := b.dial(ctx, "udp", dst)
	if !ok || err != nil {
		return nil, ok, err
	}
	return flow.FromUDP(c.(*net.UDPConn)), true, nil
}

func (b *Box) dial(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, bool, error) {
	to, ok := b.own.place(dst)
	if !ok {
		return nil, false, nil
	}
	if !to.IsValid() {
		return nil, true, errors.Join(fmt.Errorf("%v leads nowhere", dst), unix.EHOSTUNREACH)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, to.String())
	return c, true, err
}
