// Package tuntest owns an in-memory pair of TUN devices for tests that must run without root.
package tuntest

import (
	"io"
	"os"
	"sync"

	"github.com/doppel-dev/doppel/internal/tundev"
)

// queueLen is how many packets wait in each direction; like a real TUN, a full queue drops.
const queueLen = 4096

type packet struct {
	hdr  tundev.Header
	data []byte
}

// Pipe is one end of a pair: what one end writes, the other reads, headers and all.
type Pipe struct {
	in, out chan packet
	done    chan struct{} // closed by Close of this end
	peer    chan struct{} // closed by Close of the other end
	once    *sync.Once
}

// Pair returns two connected devices.
func Pair() (*Pipe, *Pipe) {
	ab, ba := make(chan packet, queueLen), make(chan packet, queueLen)
	da, db := make(chan struct{}), make(chan struct{})
	return &Pipe{in: ba, out: ab, done: da, peer: db, once: new(sync.Once)},
		&Pipe{in: ab, out: ba, done: db, peer: da, once: new(sync.Once)}
}

// ReadPacket waits for the next packet; after Close it gives os.ErrClosed, after the other end's Close io.EOF.
func (p *Pipe) ReadPacket(b []byte) (int, tundev.Header, error) {
	select {
	case pkt := <-p.in:
		return copy(b, pkt.data), pkt.hdr, nil
	case <-p.done:
		return 0, tundev.Header{}, os.ErrClosed
	case <-p.peer:
		select {
		case pkt := <-p.in:
			return copy(b, pkt.data), pkt.hdr, nil
		default:
			return 0, tundev.Header{}, io.EOF
		}
	}
}

// WritePacket queues a copy of the packet for the other end, or drops it when the queue is full.
func (p *Pipe) WritePacket(h tundev.Header, parts [][]byte) error {
	n := 0
	for _, b := range parts {
		n += len(b)
	}
	if err := h.Check(n); err != nil {
		return err
	}
	data := make([]byte, 0, n)
	for _, b := range parts {
		data = append(data, b...)
	}
	select {
	case <-p.done:
		return os.ErrClosed
	default:
	}
	select {
	case p.out <- packet{hdr: h, data: data}:
	default:
	}
	return nil
}

// Splits says that super packets are passed on.
func (*Pipe) Splits() bool { return true }

// Close ends both directions of this end.
func (p *Pipe) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}
