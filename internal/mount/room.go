package mount

import "sync"

// room bounds the bytes that all files of a file system keep for later: read ahead, or not written yet.
type room struct {
	mu   sync.Mutex
	cond sync.Cond
	// guarded by mu
	free int
}

func newRoom(n int) *room {
	r := &room{free: n}
	r.cond.L = &r.mu
	return r
}

// try takes n bytes if they are free.
func (r *room) try(n int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.free < n {
		return false
	}
	r.free -= n
	return true
}

// take takes n bytes, when they are free.
func (r *room) take(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.free < n {
		r.cond.Wait()
	}
	r.free -= n
}

func (r *room) give(n int) {
	r.mu.Lock()
	r.free += n
	r.mu.Unlock()
	r.cond.Broadcast()
}
