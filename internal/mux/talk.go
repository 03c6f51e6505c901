package mux

import "time"

const (
	// talkWindow is how much of a stream may be under way while small messages come on others, for which it would be in the way. Without them a window
	// has twice what the path takes, and more while that was measured asleep.
	talkWindow = 128 << 10
	// talkFor is how long after a small message another one is expected.
	talkFor = 100 * time.Millisecond
	// talkTrip is the longest path that talkWindow is for: 200 Mbit/s. What is longer makes more of a message's time than what is before it.
	talkTrip = 5 * time.Millisecond
)

// talkLocked notes that a small message came: not the end of a large one.
func (st *Stream) talkLocked() {
	now := moment()
	if st.rx.largeAt == 0 || now-st.rx.largeAt > int64(talkFor) {
		st.s.talked.Store(now)
	}
}

// talks says whether small messages come, over a short path.
func (s *Session) talks() bool {
	t := s.talked.Load()
	if t == 0 || moment()-t > int64(talkFor) {
		return false
	}
	trip := s.path.trip()
	return trip > 0 && trip < talkTrip
}
