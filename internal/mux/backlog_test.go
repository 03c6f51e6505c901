package mux

import "testing"

// TestBacklogRoom: a backlog in which always somebody waits takes no more room the longer it goes on, and keeps the order.
func TestBacklogRoom(t *testing.T) {
	const most = 100
	for _, waiting := range []int{0, 1, 2, 50, most - 1} {
		b := newBacklog(most)
		var next, taken uint32
		put := func() {
			t.Helper()
			if !b.put(&Request{st: &Stream{id: next}}) {
				t.Fatalf("%d wait: no room for another", waiting)
			}
			next++
		}
		for range waiting {
			put()
		}
		for range 100_000 {
			put()
			if r := b.take(); r == nil || r.st.id != taken {
				t.Fatalf("%d wait: took %v, want %d", waiting, r, taken)
			}
			taken++
		}
		if c := cap(b.waiting); c > 4*most {
			t.Errorf("%d wait: there is room for %d", waiting, c)
		}
		for range most - waiting {
			put()
		}
		if b.put(&Request{}) {
			t.Errorf("%d wait: more than %d do now", waiting, most)
		}
	}
}
