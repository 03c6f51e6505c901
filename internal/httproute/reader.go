package httproute

import (
	"io"
	"sync"
)

const (
	smallBuffer = 4 << 10
	largeBuffer = MaxHead + smallBuffer
)

var (
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}
)

// reader reads ahead: small at first, since most heads are, and into a large buffer when that is full or was filled by the last read.
type reader struct {
	src   io.Reader
	small *[smallBuffer]byte
	large *[largeBuffer]byte
	r, w  int
	full  bool // the last read filled the buffer
}

// buf is the buffer in use.
func (b *reader) buf() []byte {
	switch {
	case b.large != nil:
		return b.large[:]
	case b.small != nil:
		return b.small[:]
	}
	return nil
}

// peek returns what was read and not discarded. It is valid until the next call of more or release.
func (b *reader) peek() []byte { return b.buf()[b.r:b.w] }

func (b *reader) discard(n int) {
	b.r += n
	if b.r == b.w {
		b.r, b.w = 0, 0
	}
}

// more reads once. It returns an error only if nothing was read.
func (b *reader) more() error {
	b.room()
	for {
		n, err := b.src.Read(b.buf()[b.w:])
		b.w += n
		if n > 0 {
			b.full = b.w == len(b.buf())
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// room makes sure that there is some behind what was read.
func (b *reader) room() {
	switch {
	case b.buf() == nil:
		b.small = smallBuffers.Get().(*[smallBuffer]byte)
	case b.w < len(b.buf()) && (!b.full || b.small == nil):
	case b.r > 0:
		b.w = copy(b.buf(), b.peek())
		b.r = 0
	case b.large == nil:
		b.large = largeBuffers.Get().(*[largeBuffer]byte)
		copy(b.large[:], b.small[:])
		smallBuffers.Put(b.small)
		b.small = nil
	}
}

// unread has p, at most MaxHead bytes, read first.
func (b *reader) unread(p []byte) {
	if len(p) == 0 {
		return
	}
	b.large = largeBuffers.Get().(*[largeBuffer]byte)
	b.w = copy(b.large[:], p)
}

// release gives the buffer back, if nothing is in it: an idle connection needs none until it reads again.
func (b *reader) release() {
	if b.r < b.w {
		return
	}
	b.drop()
}

// drop gives the buffer back with what is in it.
func (b *reader) drop() {
	if b.small != nil {
		smallBuffers.Put(b.small)
	}
	if b.large != nil {
		largeBuffers.Put(b.large)
	}
	*b = reader{src: b.src}
}
