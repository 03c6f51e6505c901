package mux

import (
	"sync"
	"time"
)

// deadline is a point in time after which waiting on cond ends. All fields are guarded by cond.L.
type deadline struct {
	cond    *sync.Cond
	passed  func() // is told, with cond.L held; may be nil
	expired bool
	timer   *time.Timer
	set     uint64 // counts changes: an old timer that fires late must do nothing
}

func (d *deadline) change(t time.Time) {
	d.cond.L.Lock()
	defer d.cond.L.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.set++
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
	if d.passed != nil {
		d.passed()
	}
	d.cond.Broadcast()
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
