package flow

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
)

// clientQueue is how many datagrams of a client wait for the other end; more are lost, as in a full socket buffer.
const clientQueue = 64

// ServeClients reads datagrams until c is closed, and hands each new client's conversation to serve, in a goroutine of its own. The conversation
// is the client's until serve returns; what comes from more than limit clients at once is lost.
func ServeClients(c *net.UDPConn, limit int, serve func(client netip.AddrPort, p Packets)) error {
	var mu sync.Mutex
	var wg sync.WaitGroup
	clients := map[netip.AddrPort]*client{}
	defer wg.Wait()
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for _, p := range clients {
			_ = p.Close()
		}
	}()
	buf := make([]byte, bufferSize)
	for {
		n, addr, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		mu.Lock()
		p, known := clients[addr]
		if !known && len(clients) < limit {
			p = &client{c: c, addr: addr, in: make(chan []byte, clientQueue), done: make(chan struct{})}
			clients[addr] = p
			wg.Go(func() {
				defer func() {
					mu.Lock()
					defer mu.Unlock()
					delete(clients, addr)
				}()
				serve(addr, p)
			})
		}
		mu.Unlock()
		if p != nil {
			select {
			case p.in <- append([]byte(nil), buf[:n]...):
			default:
			}
		}
	}
}

// client is one client's end of a conversation with a socket that many share.
type client struct {
	c    *net.UDPConn
	addr netip.AddrPort
	in   chan []byte
	done chan struct{}
	once sync.Once
}

// ReadPacket implements Packets.
func (p *client) ReadPacket(b []byte) (n int, err error) {
	err = p.NextPacket(func(d []byte) error {
		n = copy(b, d)
		return nil
	})
	return n, err
}

// NextPacket implements PacketSource.
func (p *client) NextPacket(fn func([]byte) error) error {
	select {
	case d := <-p.in:
		return fn(d)
	case <-p.done:
		return io.EOF
	}
}

// WritePacket implements Packets.
func (p *client) WritePacket(b []byte) error {
	_, err := p.c.WriteToUDPAddrPort(b, p.addr)
	return err
}

// Close implements Packets.
func (p *client) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}
