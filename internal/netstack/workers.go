package netstack

import "sync/atomic"

// maxIdleWorkers is how many goroutines wait for work: as many flows as are busy at once on most laptops.
const maxIdleWorkers = 32

// workers run what flows have to do. Goroutines stay for more: their stacks have grown to the depth of the work already.
type workers struct {
	hand chan func()
	idle atomic.Int32
}

// do runs fn soon. It does not block.
func (w *workers) do(fn func()) {
	select {
	case w.hand <- fn:
	default:
		go w.run(fn)
	}
}

func (w *workers) run(fn func()) {
	for fn != nil {
		fn()
		if w.idle.Add(1) > maxIdleWorkers {
			w.idle.Add(-1)
			return
		}
		fn = <-w.hand
		w.idle.Add(-1)
	}
}

// stop ends the goroutines that wait. Nothing may be done any more.
func (w *workers) stop() { close(w.hand) }

// pump is work that is done whenever there is some, by one goroutine at a time.
type pump struct {
	run   func() (more bool) // false: it is never done again
	work  func()             // runs it until there is no more
	state atomic.Int32
}

const (
	pumpIdle    = iota
	pumpRunning // kick makes it run again
	pumpAgain   // it runs again when it has run
	pumpEnded
)

func (p *pump) init(run func() bool) { p.run, p.work = run, p.runAll }

// kick says that there may be work.
func (p *pump) kick(w *workers) {
	for {
		switch p.state.Load() {
		case pumpIdle:
			if p.state.CompareAndSwap(pumpIdle, pumpRunning) {
				w.do(p.work)
				return
			}
		case pumpRunning:
			if p.state.CompareAndSwap(pumpRunning, pumpAgain) {
				return
			}
		default:
			return
		}
	}
}

func (p *pump) runAll() {
	for p.run() {
		if p.state.CompareAndSwap(pumpRunning, pumpIdle) {
			return
		}
		p.state.Store(pumpRunning)
	}
	p.state.Store(pumpEnded)
}
