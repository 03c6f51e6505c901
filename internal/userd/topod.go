package userd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// loopback is where a local process looks for what runs beside the app in its pod, and where it is there.
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// maxToPodClients bounds the local UDP clients of one of an intercept's --to-pod ports.
const maxToPodClients = 1024

// toPod are the sockets through which local processes reach ports on the loopback of an intercepted pod, as the app does.
type toPod struct {
	tcp []*net.TCPListener
	udp []*net.UDPConn
	wg  sync.WaitGroup
}

// listenToPod opens the sockets, before anything is changed in the cluster.
func listenToPod(ports []v1alpha1.PodPort) (*toPod, error) {
	t := &toPod{}
	for _, p := range ports {
		if err := t.listen(p); err != nil {
			t.close()
			return nil, err
		}
	}
	return t, nil
}

// parseToPod reads PORT[/tcp|/udp].
func parseToPod(word string) (v1alpha1.PodPort, error) {
	number, protocol, _ := strings.Cut(word, "/")
	n, err := strconv.ParseUint(number, 10, 16)
	protocol = cmp.Or(strings.ToUpper(protocol), "TCP")
	if err != nil || n == 0 || protocol != "TCP" && protocol != "UDP" {
		return v1alpha1.PodPort{}, uerr.New(uerr.Usage, "for example: --to-pod 9411, or --to-pod 8125/udp", "--to-pod %s: want a port number, with /udp behind it where that is meant", word)
	}
	return v1alpha1.PodPort{Port: int32(n), Protocol: protocol}, nil
}

// toPodWords are the ports as --to-pod has them.
func toPodWords(ports []v1alpha1.PodPort) (words []string) {
	for _, p := range ports {
		word := strconv.Itoa(int(p.Port))
		if p.Protocol == "UDP" {
			word += "/udp"
		}
		words = append(words, word)
	}
	return words
}

func (t *toPod) listen(p v1alpha1.PodPort) (err error) {
	at := netip.AddrPortFrom(loopback, uint16(p.Port))
	if p.Protocol == "UDP" {
		var c *net.UDPConn
		if c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at)); err == nil {
			t.udp = append(t.udp, c)
		}
	} else {
		var l *net.TCPListener
		if l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at)); err == nil {
			t.tcp = append(t.tcp, l)
		}
	}
	if err != nil {
		return uerr.Wrap(err, uerr.Conflict, fmt.Sprintf("something listens on %s here; end it, or leave --to-pod out", at), "--to-pod %d", at.Port())
	}
	return nil
}

// serve carries each connection and UDP conversation to the pod's port of the same number.
func (t *toPod) serve(x *intercepts, in *intercept) {
	ended := func(at net.Addr, err error) {
		if err != nil && !errors.Is(err, net.ErrClosed) {
			x.s.log.Error("--to-pod ended", "addr", at, "err", err)
		}
	}
	for _, l := range t.tcp {
		t.wg.Go(func() {
			for {
				c, err := lifecycle.Accept(l.AcceptTCP)
				if err != nil {
					ended(l.Addr(), err)
					return
				}
				go x.streamToPod(in, c)
			}
		})
	}
	for _, c := range t.udp {
		t.wg.Go(func() {
			port := uint16(c.LocalAddr().(*net.UDPAddr).Port)
			ended(c.LocalAddr(), flow.ServeClients(c, maxToPodClients, func(client netip.AddrPort, p flow.Packets) {
				x.packetsToPod(in, client, port, p)
			}))
		})
	}
}

func (t *toPod) close() {
	if t == nil {
		return
	}
	for _, l := range t.tcp {
		_ = l.Close()
	}
	for _, c := range t.udp {
		_ = c.Close()
	}
	t.wg.Wait()
}

// streamToPod carries one connection; what the pod's port refuses is reset here.
func (x *intercepts) streamToPod(in *intercept, c *net.TCPConn) {
	st, err := x.openToPod(in, wire.ProtoTCP, c.RemoteAddr().(*net.TCPAddr).AddrPort(), uint16(c.LocalAddr().(*net.TCPAddr).Port))
	if err != nil {
		flow.FromTCP(c).Reset()
		return
	}
	_, _, _ = flow.Relay(flow.FromTCP(c), st) // how a flow ended is between its two ends
}

// packetsToPod carries one client's datagrams; what the pod's port does not take is lost, as on any network.
func (x *intercepts) packetsToPod(in *intercept, client netip.AddrPort, port uint16, p flow.Packets) {
	st, err := x.openToPod(in, wire.ProtoUDP, client, port)
	if err != nil {
		_ = p.Close()
		return
	}
	_ = flow.RelayPackets(p, st, tunnel.UDPIdle) // how a flow ended is between its two ends
}

func (x *intercepts) openToPod(in *intercept, proto uint8, src netip.AddrPort, port uint16) (*mux.Stream, error) {
	x.mu.Lock()
	uid := string(in.object.UID)
	x.mu.Unlock()
	ctx := context.Background()
	m, err := x.s.tunnel(ctx, flowPatience)
	if err != nil {
		return nil, err
	}
	st, _, err := m.Open(ctx, wire.AppendIntercept(nil, wire.InterceptHeader{Intercept: uid, Proto: proto, Src: src, Dst: netip.AddrPortFrom(loopback, port)}))
	if err != nil {
		x.s.log.Debug("not forwarded to the pod", "intercept", in.name, "port", port, "err", err)
	}
	return st, err
}
