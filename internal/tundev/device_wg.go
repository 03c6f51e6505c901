//go:build darwin || windows

package tundev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.zx2c4.com/wireguard/tun"
)

// prefixLen is the room that the library wants in front of a packet: macOS puts the address family there.
const prefixLen = 4

// Device reads and writes the packets of a TUN (utun of macOS, Wintun of Windows), which knows no super packets. One goroutine may read; any
// number may write. It compiles and its parts are tested, but nobody has run it yet.
type Device struct {
	t     tun.Device
	buf   []byte // one reader at a time
	bufs  [][]byte
	sizes [1]int
	pool  sync.Pool // *[]byte
}

func newDevice(t tun.Device) *Device {
	d := &Device{t: t, buf: make([]byte, prefixLen+MaxPacket)}
	d.bufs = [][]byte{d.buf}
	d.pool.New = func() any { b := make([]byte, prefixLen+MaxPacket); return &b }
	return d
}

// Name returns the interface's name.
func (d *Device) Name() (string, error) { return d.t.Name() }

// ReadPacket waits for the next packet and puts it into p; what does not fit is cut off. After Close it gives os.ErrClosed.
func (d *Device) ReadPacket(p []byte) (int, Header, error) {
	if len(p) == 0 {
		return 0, Header{}, io.ErrShortBuffer
	}
	for {
		n, err := d.t.Read(d.bufs, d.sizes[:], prefixLen)
		if err != nil && !errors.Is(err, tun.ErrTooManySegments) {
			return 0, Header{}, fmt.Errorf("read tun: %w", err)
		}
		if n > 0 && d.sizes[0] > 0 {
			return copy(p, d.buf[prefixLen:prefixLen+d.sizes[0]]), Header{}, nil
		}
	}
}

// WritePacket hands one finished IP packet, given in parts, to the system. The parts are not kept.
func (d *Device) WritePacket(h Header, parts [][]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if err := h.Check(n); err != nil {
		return err
	}
	b := d.pool.Get().(*[]byte)
	defer d.pool.Put(b)
	packet := (*b)[:prefixLen]
	for _, p := range parts {
		packet = append(packet, p...)
	}
	if err := finish(h, packet[prefixLen:]); err != nil {
		return err
	}
	if _, err := d.t.Write([][]byte{packet}, prefixLen); err != nil {
		return fmt.Errorf("write tun: %w", err)
	}
	return nil
}

// Splits says that super packets are not taken.
func (*Device) Splits() bool { return false }

// Close closes the device; a blocked ReadPacket returns.
func (d *Device) Close() error {
	err := d.t.Close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}
