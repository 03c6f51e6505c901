package preview

import "testing"

// One preview takes nothing from others: so many open requests of one, and no more.
func TestMaxOpen(t *testing.T) {
	o := openRequests{all: map[*openRequest]bool{}, byLabel: map[string]int{}}
	var last func()
	for range maxOpen {
		_, leave, ok := o.enter(t.Context(), "one", "", &request{})
		if !ok {
			t.Fatal("too few")
		}
		last = leave
	}
	if _, _, ok := o.enter(t.Context(), "one", "", &request{}); ok {
		t.Error("too many")
	}
	if _, leave, ok := o.enter(t.Context(), "two", "", &request{}); !ok {
		t.Error("another preview has to suffer")
	} else {
		leave()
	}
	last()
	if _, _, ok := o.enter(t.Context(), "one", "", &request{}); !ok || o.count() != maxOpen {
		t.Error("one that has left takes a place")
	}
}
