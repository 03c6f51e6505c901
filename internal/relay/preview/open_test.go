package preview

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/access"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

// A right is looked at when it may have ended, once for all requests that are made by it, and not again and again after a publication has run out.
func TestDue(t *testing.T) {
	o := openRequests{all: map[*openRequest]bool{}, byLabel: map[string]int{}}
	now := time.Now()
	ended := &request{preview: store.Preview{Expires: now.Add(-time.Hour)}, visitor: access.Visitor{Until: now.Add(time.Hour)}} // a member's
	for range 2 {
		if _, _, ok := o.enter(t.Context(), "one", "ann's", ended); !ok {
			t.Fatal("not entered")
		}
	}
	if got := o.due(false, now); len(got) != 1 || len(got[right{"one", "ann's"}]) != 2 {
		t.Errorf("%d rights of those that have just begun are due", len(got))
	}
	for name, want := range map[string]struct {
		all bool
		at  time.Time
		n   int
	}{"now": {false, now, 0}, "after the visit": {false, now.Add(time.Hour), 1}, "after a change": {true, now, 1}} {
		if got := o.due(want.all, want.at); len(got) != want.n {
			t.Errorf("%s: %d are due, not %d", name, len(got), want.n)
		}
	}
	// One that was published still when it began.
	running := &request{preview: store.Preview{Expires: now.Add(time.Minute)}}
	if _, _, ok := o.enter(t.Context(), "two", "", running); !ok {
		t.Fatal("not entered")
	}
	o.due(false, now)
	if got := o.due(false, now.Add(time.Minute)); len(got) != 1 {
		t.Errorf("%d are due", len(got))
	}
}

// A right that ends after a request was admitted, and before it is known to be open, ends the request, though no change comes after that.
func TestEndedBeforeEntered(t *testing.T) {
	s, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "relay.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	h := New(Config{Store: s, Log: slog.New(slog.DiscardHandler)})
	watch, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- h.Watch(watch) }()
	ctx, leave, ok := h.open.enter(t.Context(), "deleted", "", &request{})
	if !ok {
		t.Fatal("not entered")
	}
	defer leave()
	select {
	case <-ctx.Done():
	case <-time.After(10 * recheck):
	}
	if got := context.Cause(ctx); !errors.Is(got, errRevoked) {
		t.Errorf("not cut: %v", got)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

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
