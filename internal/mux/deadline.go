package mux

import (
	"sync"
	"time"
)

// deadline is a point in time after which waiting on cond ends. All fields are guarded by cond.L.
type deadline struct {
	cond    *sync.Cond
	expired bool
	timer   *time.Timer
	set     uint64        // counts changes: an old timer that fires late must do nothing
	ch      chan struct{} // closed when expired; made when a waiter needs it
}

func (d *deadline) change(t time.Time) {
	d.cond.L.Lock()
	defer d.cond.L.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.set++
	if d.expired && d.ch != nil {
		d.ch = nil
	}
	d.expired = false
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.expireLocked()
		return
	}
	set := d.set
	d.timer = time.AfterFunc(wait, func() {
		d.cond.L.Lock()
		defer d.cond.L.Unlock()
		if d.set == set {
			d.expireLocked()
		}
	})
}

func (d *deadline) expireLocked() {
	d.expired = true
	if d.ch != nil {
		close(d.ch)
	}
	d.cond.Broadcast()
}

// channel returns what is closed when the deadline expires; nil while no deadline is set.
func (d *deadline) channel(mu *sync.Mutex) <-chan struct{} {
	mu.Lock()
	defer mu.Unlock()
	if d.timer == nil && !d.expired {
		return nil
	}
	if d.ch == nil {
		d.ch = make(chan struct{})
		if d.expired {
			close(d.ch)
		}
	}
	return d.ch
}

// SetReadDeadline ends a Read that waits, and those that come after, with os.ErrDeadlineExceeded at t; zero means never.
func (st *Stream) SetReadDeadline(t time.Time) error {
	st.readDeadline.change(t)
	return nil
}

// SetWriteDeadline is SetReadDeadline for Write. It does not interrupt a write to the transport that is under way: half a
// frame would end the session.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	st.writeDeadline.change(t)
	return nil
}

// SetDeadline sets both deadlines.
func (st *Stream) SetDeadline(t time.Time) error {
	st.readDeadline.change(t)
	st.writeDeadline.change(t)
	return nil
}
