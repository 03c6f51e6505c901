package tundev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxParts is how many slices one packet may come in; packets in more are joined first.
const maxParts = 16

// Device reads and writes the packets of a TUN that was opened with IFF_VNET_HDR. One goroutine may read; any number may write.
type Device struct {
	f      *os.File
	rc     syscall.RawConn
	rd     readOp    // one reader at a time
	writes sync.Pool // *writeOp
	closed atomic.Bool
}

// readOp holds what one readv needs, so that reading allocates nothing.
type readOp struct {
	hdr   [HeaderLen]byte
	iov   [2]unix.Iovec
	n     uintptr
	errno syscall.Errno
	try   func(fd uintptr) bool
}

type writeOp struct {
	hdr   [HeaderLen]byte
	iov   [maxParts + 1]unix.Iovec
	used  int
	n     uintptr
	errno syscall.Errno
	try   func(fd uintptr) bool
}

// New takes over f, a TUN's descriptor from Open (perhaps passed by another process). Close of the Device closes f.
func New(f *os.File) (*Device, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("tun descriptor: %w", err)
	}
	if err := checkTUN(rc); err != nil {
		return nil, err
	}
	d := &Device{f: f, rc: rc}
	d.rd.try = d.rd.readv
	d.writes.New = func() any {
		w := new(writeOp)
		w.try = w.writev
		return w
	}
	return d, nil
}

// checkTUN refuses what is no TUN with vnet_hdr: reading packets at the wrong offset would be the only symptom.
func checkTUN(rc syscall.RawConn) error {
	var err error
	cerr := rc.Control(func(fd uintptr) {
		var ifr *unix.Ifreq
		if ifr, err = unix.NewIfreq(""); err != nil {
			return
		}
		if err = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, ifr); err != nil {
			return
		}
		const want = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR
		if flags := ifr.Uint16(); flags&want != want {
			err = fmt.Errorf("flags %#x, want %#x", flags, uint16(want))
			return
		}
		err = unix.SetNonblock(int(fd), true)
	})
	if err = errors.Join(cerr, err); err != nil {
		return fmt.Errorf("tun descriptor: %w", err)
	}
	return nil
}

// Name returns the interface's name now (it may have been renamed).
func (d *Device) Name() (string, error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return "", err
	}
	var ierr error
	err = d.rc.Control(func(fd uintptr) { ierr = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, ifr) })
	if err = errors.Join(err, ierr); err != nil {
		return "", fmt.Errorf("tun name: %w", err)
	}
	return ifr.Name(), nil
}

// ReadPacket waits for the next packet and puts it into p, which should hold MaxPacket bytes: what does not fit is cut off. After
// Close it gives os.ErrClosed.
func (d *Device) ReadPacket(p []byte) (int, Header, error) {
	if len(p) == 0 {
		return 0, Header{}, io.ErrShortBuffer
	}
	r := &d.rd
	r.iov[0].Base = &r.hdr[0]
	r.iov[0].SetLen(HeaderLen)
	r.iov[1].Base = &p[0]
	r.iov[1].SetLen(len(p))
	if err := d.rc.Read(r.try); err != nil {
		return 0, Header{}, fmt.Errorf("read tun: %w", d.closing(err))
	}
	r.iov[1].Base = nil
	if r.errno != 0 {
		return 0, Header{}, fmt.Errorf("read tun: %w", r.errno)
	}
	if r.n <= HeaderLen {
		return 0, Header{}, fmt.Errorf("read tun: %w", io.ErrUnexpectedEOF)
	}
	h, err := ParseHeader(r.hdr[:])
	return int(r.n) - HeaderLen, h, err
}

// readv does not tell the scheduler: see package rawio.
func (r *readOp) readv(fd uintptr) bool {
	for {
		r.n, _, r.errno = syscall.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&r.iov[0])), uintptr(len(r.iov)))
		if r.errno == syscall.EINTR {
			continue
		}
		return r.errno != syscall.EAGAIN
	}
}

// WritePacket hands one IP packet, given in parts, to the kernel. The parts are not kept.
func (d *Device) WritePacket(h Header, parts [][]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if err := h.Check(n); err != nil {
		return err
	}
	if len(parts) > maxParts {
		joined := make([]byte, 0, n)
		for _, p := range parts {
			joined = append(joined, p...)
		}
		parts = [][]byte{joined}
	}
	w := d.writes.Get().(*writeOp)
	defer d.writes.Put(w)
	h.Put(&w.hdr)
	w.iov[0].Base = &w.hdr[0]
	w.iov[0].SetLen(HeaderLen)
	w.used = 1
	for _, p := range parts {
		if len(p) == 0 {
			continue
		}
		w.iov[w.used].Base = &p[0]
		w.iov[w.used].SetLen(len(p))
		w.used++
	}
	err := d.rc.Write(w.try)
	clear(w.iov[:w.used]) // the packet's memory must not hang on the pool
	switch {
	case err != nil:
		return fmt.Errorf("write tun: %w", d.closing(err))
	case w.errno != 0:
		return fmt.Errorf("write tun: %w", w.errno)
	}
	return nil
}

// writev does not tell the scheduler either.
func (w *writeOp) writev(fd uintptr) bool {
	for {
		w.n, _, w.errno = syscall.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.iov[0])), uintptr(w.used))
		if w.errno == syscall.EINTR {
			continue
		}
		return w.errno != syscall.EAGAIN
	}
}

// Splits says that super packets are taken: the kernel splits them (IFF_VNET_HDR).
func (*Device) Splits() bool { return true }

// Close closes the descriptor; a blocked ReadPacket returns. The interface goes when no other process holds it.
func (d *Device) Close() error {
	d.closed.Store(true)
	return d.f.Close()
}

// closing gives err as os.ErrClosed after Close: a RawConn's own error for that is not exported.
func (d *Device) closing(err error) error {
	if d.closed.Load() {
		return os.ErrClosed
	}
	return err
}
