package rootapi

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Send writes m as one packet, with at most one descriptor.
func Send(c *net.UnixConn, m Message, f *os.File) error {
	b, err := m.Encode()
	if err != nil {
		return err
	}
	var oob []byte
	if f != nil {
		rc, err := f.SyscallConn() // Fd would make the descriptor blocking, and that is shared with the receiver
		if err != nil {
			return fmt.Errorf("send %s: %w", m.Op, err)
		}
		var werr error
		err = rc.Control(func(fd uintptr) {
			oob = unix.UnixRights(int(fd))
			_, _, werr = c.WriteMsgUnix(b, oob, nil)
		})
		if err = errors.Join(err, werr); err != nil {
			return fmt.Errorf("send %s: %w", m.Op, err)
		}
		return nil
	}
	if _, _, err := c.WriteMsgUnix(b, nil, nil); err != nil {
		return fmt.Errorf("send %s: %w", m.Op, err)
	}
	return nil
}

// Receive reads one packet into buf (MaxPacket bytes) and decodes it. withFile takes at most one descriptor along; without it the
// kernel drops whatever the sender attached.
func Receive(c *net.UnixConn, buf []byte, withFile bool) (Message, *os.File, error) {
	var oob []byte
	if withFile {
		oob = make([]byte, unix.CmsgSpace(4))
	}
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return Message{}, nil, err
	}
	f, err := fileOf(oob[:oobn])
	if err != nil {
		return Message{}, nil, err
	}
	m, err := receive(buf[:n], flags)
	if err != nil {
		if f != nil {
			f.Close()
		}
		return Message{}, nil, err
	}
	return m, f, nil
}

func receive(p []byte, flags int) (Message, error) {
	switch {
	case len(p) == 0: // a packet cannot be empty: the other side has closed
		return Message{}, io.EOF
	case flags&unix.MSG_TRUNC != 0:
		return Message{}, fmt.Errorf("receive: more than %d bytes", MaxPacket)
	}
	return Decode(p)
}

// fileOf takes the descriptor out of control data; os/net have set close-on-exec.
func fileOf(oob []byte) (*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	var first *os.File
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // not descriptors
		}
		for _, fd := range fds {
			if first != nil {
				unix.Close(fd)
				continue
			}
			first = os.NewFile(uintptr(fd), "passed by doppel-rootd")
		}
	}
	return first, nil
}
