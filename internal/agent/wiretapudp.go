package agent

import (
	"context"
	"io"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// copyKey is one client's datagrams for one wiretap.
type copyKey struct {
	wiretap string
	client  netip.AddrPort
}

// packetsCopy is where a wiretap's laptop gets a client's datagrams from. What it answers is dropped.
type packetsCopy struct {
	a    *Agent
	in   chan []byte
	ctx  context.Context
	stop context.CancelFunc

	use use // guarded by udpPort.mu
}

// copy gives a datagram to the wiretaps of the port. What does not fit into a queue is lost to that wiretap, as it may be in any network.
func (p *udpPort) copy(ctx context.Context, a *Agent, client netip.AddrPort, d []byte, wg *sync.WaitGroup) {
	taps := a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort).wiretaps
	if len(taps) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range taps {
		c := p.copyForLocked(ctx, a, copyKey{e.intercept, client}, e, wg)
		if c == nil {
			continue
		}
		if a.copies.bytes.Add(int64(len(d))) <= copyBudget {
			select {
			case c.in <- d:
				continue
			default:
			}
		}
		a.copies.bytes.Add(-int64(len(d)))
	}
}

// copyForLocked finds or begins the copy of a client's datagrams; nil: there is none now.
func (p *udpPort) copyForLocked(ctx context.Context, a *Agent, k copyKey, e engagement, wg *sync.WaitGroup) *packetsCopy {
	if c := p.copies[k]; c != nil {
		c.use.came++
		p.idleCopies.used(&c.use)
		return c
	}
	if time.Now().Before(p.refused[e.intercept]) || p.copying >= 2*maxTalks {
		return nil
	}
	if len(p.copies) >= maxTalks {
		p.idleCopies.makeRoom()
	}
	c := &packetsCopy{a: a, in: make(chan []byte, talkQueue)}
	c.ctx, c.stop = context.WithCancel(ctx)
	remove := func() {
		c.stop()
		p.idleCopies.remove(&c.use)
		if p.copies[k] == c {
			delete(p.copies, k)
		}
	}
	p.beginLocked(&p.idleCopies, &c.use, remove)
	p.copies[k] = c
	p.copying++
	wg.Go(func() {
		defer context.AfterFunc(e.ctx, c.stop)()
		err := p.runCopy(c, k)
		p.mu.Lock()
		if err != nil && c.ctx.Err() == nil {
			p.refused[e.intercept] = time.Now().Add(refusedPause)
		}
		remove()
		p.copying--
		p.mu.Unlock()
		for { // nobody puts anything in any more
			select {
			case d := <-c.in:
				a.copies.bytes.Add(-int64(len(d)))
				continue
			default:
			}
			return
		}
	})
	return c
}

func (p *udpPort) runCopy(c *packetsCopy, k copyKey) error {
	ctx, cancel := context.WithTimeout(c.ctx, acceptTimeout)
	defer cancel()
	st, err := c.a.up.open(ctx, wire.InterceptHeader{Intercept: k.wiretap, Proto: syscall.IPPROTO_UDP, Src: k.client, Port: p.cfg.ContainerPort})
	if err != nil {
		return err
	}
	defer context.AfterFunc(c.ctx, st.Reset)()
	return flow.RelayPackets(c, st, tunnel.UDPIdle)
}

// ReadPacket implements flow.Packets.
func (c *packetsCopy) ReadPacket(b []byte) (n int, err error) {
	err = c.NextPacket(func(d []byte) error {
		n = copy(b, d)
		return nil
	})
	return n, err
}

// NextPacket implements flow.PacketSource.
func (c *packetsCopy) NextPacket(fn func([]byte) error) error {
	select {
	case d := <-c.in:
		c.a.copies.bytes.Add(-int64(len(d)))
		return fn(d)
	case <-c.ctx.Done():
		return io.EOF
	}
}

// WritePacket implements flow.Packets.
func (c *packetsCopy) WritePacket([]byte) error { return nil }

// Close implements flow.Packets.
func (c *packetsCopy) Close() error {
	c.stop()
	return nil
}
