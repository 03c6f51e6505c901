package mount

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

const (
	// pieceSize is what is read ahead at once: as much as the kernel asks for at most.
	pieceSize = 128 << 10
	// maxAhead is how many pieces a file that is read in order is read ahead.
	maxAhead = 32
	// keptBehind is how many pieces are kept behind the last one that was asked for: the kernel does not ask in order.
	keptBehind = 4
	// pieceAge is how long a piece is kept for somebody who may ask for it.
	pieceAge = 5 * time.Second
)

// reader reads a file, ahead of one who reads it in order.
type reader struct {
	at   func(p []byte, off int64) (int, error) // as io.ReaderAt, at the server
	room *room

	mu sync.Mutex
	// guarded by mu
	next   int64 // where one who reads in order goes on
	ahead  int   // pieces to have behind next
	pieces map[int64]*piece
	closed bool
}

// piece is a part of the file that has come or is on its way.
type piece struct {
	done   chan struct{}
	expire *time.Timer
	users  atomic.Int32 // who may look at data: the reader that keeps it, who fills it, and views
	buf    *[pieceSize]byte
	// constant when done
	data []byte
	err  error
}

// buffers are those of pieces that nobody looks at any more.
var buffers = sync.Pool{New: func() any { return new([pieceSize]byte) }}

func (p *piece) release() {
	if p.users.Add(-1) == 0 {
		buffers.Put(p.buf)
	}
}

// view is what was read, in the memory into which it came: it goes to the kernel from there. It implements fuse.ReadResult, and what go-fuse
// looks for besides.
type view struct {
	parts  [][]byte
	size   int
	pieces []*piece
}

func (v *view) add(p []byte) { v.parts, v.size = append(v.parts, p), v.size+len(p) }

// Size returns how much it is.
func (v *view) Size() int { return v.size }

// Slices returns the parts.
func (v *view) Slices() ([][]byte, fuse.Status) { return v.parts, fuse.OK }

// Bytes returns all of it.
func (v *view) Bytes([]byte) ([]byte, fuse.Status) { return bytes.Join(v.parts, nil), fuse.OK }

// Done says that nobody looks at it any more.
func (v *view) Done() {
	for _, p := range v.pieces {
		p.release()
	}
	v.pieces = nil
}

// read returns n bytes, or fewer at the end of the file.
func (r *reader) read(off int64, n int, size int64) (*view, error) {
	first, last := off/pieceSize, (off+int64(n)-1)/pieceSize
	v := &view{}
	r.mu.Lock()
	r.follow(off, n)
	if r.ahead > 0 {
		for i := first; i <= last+int64(r.ahead); i++ {
			pc := r.pieces[i]
			if pc == nil && (i <= last || i*pieceSize < size) {
				pc = r.start(i)
			}
			if pc == nil {
				break // no room, or the end of the file
			}
			if i <= last {
				pc.users.Add(1)
				v.pieces = append(v.pieces, pc)
			}
		}
	}
	r.mu.Unlock()

	for i, pc := range v.pieces {
		<-pc.done
		if pc.err != nil {
			v.Done()
			return nil, pc.err
		}
		from := off + int64(v.size) - (first+int64(i))*pieceSize
		if from < int64(len(pc.data)) {
			v.add(pc.data[from:min(int64(len(pc.data)), from+int64(n-v.size))])
		}
		if len(pc.data) < pieceSize { // the end of the file, when it was read
			break
		}
	}
	if v.size == n {
		return v, nil
	}
	rest := make([]byte, n-v.size)
	m, err := r.at(rest, off+int64(v.size))
	if err != nil && !errors.Is(err, io.EOF) {
		v.Done()
		return nil, err
	}
	v.add(rest[:m])
	return v, nil
}

// follow finds out whether the file is read in order, and lets go of what is no longer of use.
func (r *reader) follow(off int64, n int) {
	const near = keptBehind * pieceSize
	if off > r.next+near || off < r.next-near {
		r.ahead, r.next = 0, off+int64(n)
	} else {
		if off+int64(n) > pieceSize/2 { // the heads of small files are all that is read of them
			r.ahead = min(max(1, 2*r.ahead), maxAhead)
		}
		r.next = max(r.next, off+int64(n))
	}
	at := r.next / pieceSize
	for i, pc := range r.pieces {
		if i < at-keptBehind || i > at+maxAhead+keptBehind {
			r.drop(i, pc)
		}
	}
}

// drop lets go of a piece, if it is still there.
func (r *reader) drop(i int64, pc *piece) {
	if r.pieces[i] == pc {
		delete(r.pieces, i)
		pc.expire.Stop()
		r.room.give(pieceSize)
		pc.release()
	}
}

// start begins to read a piece, if there is room for it.
func (r *reader) start(i int64) *piece {
	if r.closed || !r.room.try(pieceSize) {
		return nil
	}
	pc := &piece{done: make(chan struct{}), buf: buffers.Get().(*[pieceSize]byte)}
	pc.users.Store(2)
	remove := func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.drop(i, pc)
	}
	pc.expire = time.AfterFunc(pieceAge, remove)
	if r.pieces == nil {
		r.pieces = map[int64]*piece{}
	}
	r.pieces[i] = pc
	go func() {
		defer pc.release()
		defer close(pc.done)
		n, err := r.at(pc.buf[:], i*pieceSize)
		if err != nil && !errors.Is(err, io.EOF) {
			pc.err = err
			remove() // the next one who asks tries again
		}
		pc.data = pc.buf[:n]
	}()
	return pc
}

// forget lets go of everything: the file has changed, or is closed for good.
func (r *reader) forget(closed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = r.closed || closed
	for i, pc := range r.pieces {
		r.drop(i, pc)
	}
}
