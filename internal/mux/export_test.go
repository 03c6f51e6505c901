package mux

// MinWindow is what every stream is granted at least.
const MinWindow = minWindow

// Free returns how much of the budget's pool is free, and how large the pool is.
func (s *Session) Free() (free, pool int) {
	s.budget.mu.Lock()
	defer s.budget.mu.Unlock()
	return s.budget.free, s.budget.pool
}

// Held returns the sum of all windows, and of what is credit or stored; the latter must never be the larger.
func (s *Session) Held() (windows, used int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range s.streams {
		st.mu.Lock()
		windows += st.rx.window
		used += st.rx.credit + st.rx.buf.bytes
		st.mu.Unlock()
	}
	return windows, used
}

// Live returns the number of streams that count against MaxStreams.
func (s *Session) Live() int { return int(s.live.Load()) }

// Window returns the stream's window.
func (st *Stream) Window() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.rx.window
}

// SetNextID sets the number of the next stream.
func (s *Session) SetNextID(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextID = id
}

// Kept returns how many bytes are kept for a peer that has not acknowledged them.
func (s *Session) Kept() int {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.c.kept.bytes
}
