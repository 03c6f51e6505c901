package netstack

import (
	"errors"
	"io"
	"sync"

	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	// copyBuffer is a mux frame's payload, so that a full read becomes one frame.
	copyBuffer = wire.FullPayload
	// waitBuffer is what a flow holds while it waits for bytes: 1,000 idle flows hold 4 MiB, not 64.
	waitBuffer = 4 << 10
	// udpBuffer takes any datagram.
	udpBuffer = 64 << 10
)

var (
	copyPool = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}
	waitPool = sync.Pool{New: func() any { b := make([]byte, waitBuffer); return &b }}
	udpPool  = sync.Pool{New: func() any { b := make([]byte, udpBuffer); return &b }}
)

func poolOf(size int) *sync.Pool {
	switch size {
	case waitBuffer:
		return &waitPool
	case udpBuffer:
		return &udpPool
	}
	return &copyPool
}

func getBuffer(size int) *[]byte { return poolOf(size).Get().(*[]byte) }
func putBuffer(b *[]byte)        { poolOf(len(*b)).Put(b) }

// copyAdaptive copies r to w until EOF. It waits with a small buffer and takes the large one while reads fill what they get.
func copyAdaptive(w io.Writer, r io.Reader) error {
	b := getBuffer(waitBuffer)
	defer func() { putBuffer(b) }()
	for {
		n, err := r.Read(*b)
		if n > 0 {
			if _, werr := w.Write((*b)[:n]); werr != nil {
				return werr
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		switch {
		case len(*b) == waitBuffer && n == waitBuffer:
			putBuffer(b)
			b = getBuffer(copyBuffer)
		case len(*b) == copyBuffer && n < waitBuffer:
			putBuffer(b)
			b = getBuffer(waitBuffer)
		}
	}
}
