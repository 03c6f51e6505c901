package mount

import (
	"slices"
	"sync"
)

// maxFlying is how many writes of a file are on their way at once.
const maxFlying = 16

// writer writes a file behind one who writes it: small writes are put together, and many are on their way at once.
//
// A write is sent at once if none is on its way; else it is kept until it is as large as one may be, does not go on where the last one
// ended, or the last one that was on its way has arrived.
type writer struct {
	at   func(p []byte, off int64) error // at the server
	room *room
	most int // on their way at once

	mu   sync.Mutex
	cond sync.Cond
	// guarded by mu
	run    []byte // not sent yet
	runOff int64
	flying []span
	err    error // of a write that came to nothing, until somebody is told
}

// span is a write that is on its way.
type span struct {
	off int64
	n   int
}

func (s span) meets(o span) bool { return s.off < o.off+int64(o.n) && o.off < s.off+int64(s.n) }

func newWriter(room *room, most int, at func(p []byte, off int64) error) *writer {
	w := &writer{at: at, room: room, most: most}
	w.cond.L = &w.mu
	return w
}

// take takes as much of p as needs no wait, and says how much that is; unless all is well, the rest is for write, if only none.
func (w *writer) take(p []byte, off int64) (n int, well bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n < len(p) && w.err == nil {
		if len(w.run) > 0 && w.ends(off+int64(n)) && !w.trySend() {
			return n, false
		}
		n += w.add(p[n:], off+int64(n))
	}
	return n, w.err == nil && (len(w.flying) > 0 || w.trySend())
}

// write takes p. The error may be one of an earlier write.
func (w *writer) write(p []byte, off int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(p) > 0 && w.err == nil {
		if len(w.run) > 0 && w.ends(off) {
			w.send()
			continue // what was waited for may have changed everything
		}
		n := w.add(p, off)
		p, off = p[n:], off+int64(n)
	}
	if len(w.flying) == 0 {
		w.send()
	}
	return w.err
}

// ends says whether the run has to be sent before something is written at off.
func (w *writer) ends(off int64) bool {
	return off != w.runOff+int64(len(w.run)) || len(w.run) == maxData
}

// add puts the beginning of p into the run, and says how much.
func (w *writer) add(p []byte, off int64) int {
	if len(w.run) == 0 {
		w.runOff = off
	}
	n := min(len(p), maxData-len(w.run))
	switch {
	case len(w.run)+n <= cap(w.run):
	case len(w.run)+n <= smallRun:
		w.run = append(make([]byte, 0, smallRun), w.run...)
	default:
		w.run = append(runs.Get().(*[maxData]byte)[:0], w.run...)
	}
	w.run = append(w.run, p[:n]...)
	return n
}

// smallRun is how long a run is that has memory of its own.
const smallRun = 32 << 10

// runs is the memory of long runs that have been written.
var runs = sync.Pool{New: func() any { return new([maxData]byte) }}

// trySend sends the run if that needs no wait.
func (w *writer) trySend() bool {
	if len(w.run) == 0 {
		return true
	}
	if w.blocked() || !w.room.try(len(w.run)) {
		return false
	}
	w.fly()
	return true
}

// send sends the run. It waits while there are too many on their way, or one to the same place: the server may do them in any order.
func (w *writer) send() {
	for len(w.run) > 0 && w.blocked() {
		w.cond.Wait()
	}
	if len(w.run) == 0 {
		return
	}
	w.room.take(len(w.run)) // who has some gives it back without w.mu
	w.fly()
}

func (w *writer) blocked() bool { return len(w.flying) >= w.most || w.meets() }

// fly has the run on its way, for which there is room.
func (w *writer) fly() {
	p, s := w.run, span{w.runOff, len(w.run)}
	w.run = nil
	w.flying = append(w.flying, s)
	go func() {
		err := w.at(p, s.off)
		if cap(p) == maxData {
			runs.Put((*[maxData]byte)(p[:maxData]))
		}
		w.room.give(s.n)
		w.mu.Lock()
		defer w.mu.Unlock()
		for i, f := range w.flying {
			if f == s {
				w.flying = append(w.flying[:i], w.flying[i+1:]...)
				break
			}
		}
		if err != nil && w.err == nil {
			w.err = err
		}
		if len(w.flying) == 0 && w.err == nil {
			w.send()
		}
		w.cond.Broadcast()
	}()
}

// meets says whether the run overlaps a write that is on its way.
func (w *writer) meets() bool {
	return slices.ContainsFunc(w.flying, span{w.runOff, len(w.run)}.meets)
}

// holds says whether something of the span has not arrived; of nil, whether anything has not.
func (w *writer) holds(s *span) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s == nil {
		return len(w.run) > 0 || len(w.flying) > 0
	}
	return len(w.run) > 0 && s.meets(span{w.runOff, len(w.run)}) || slices.ContainsFunc(w.flying, s.meets)
}

// drain waits until everything has been written, and tells what of it came to nothing.
func (w *writer) drain() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && (len(w.run) > 0 || len(w.flying) > 0) {
		w.send()
		if len(w.flying) > 0 {
			w.cond.Wait()
		}
	}
	for len(w.flying) > 0 {
		w.cond.Wait()
	}
	err := w.err
	w.err, w.run = nil, nil
	return err
}
