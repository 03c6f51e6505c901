package peers

import (
	"log/slog"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/links"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

// A relay that says nothing any more is asked for nothing, and is forgotten later on; whose clock is wrong does not matter.
func TestSilence(t *testing.T) {
	l := links.New(slog.New(slog.DiscardHandler))
	p, err := New(Config{Links: l, Laptops: links.NewLaptops(slog.New(slog.DiscardHandler)), Address: "127.0.0.1:1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	row := store.Relay{ID: "b", Address: "127.0.0.1:2", Key: "k", Links: `{"c1": {"Since": "2030-01-01T00:00:00Z", "product": "x"}}`, Laptops: "[]"}
	there := func() bool { _, ok := l.State("c1"); return ok }
	start := time.Now()
	for _, step := range []struct {
		at    time.Duration
		beat  int64
		there bool
		gone  int
	}{
		{0, 1, true, 0},
		{beat, 2, true, 0},
		{beat + silence - 1, 2, true, 0},
		{beat + silence, 2, false, 0},
		{beat + silence + 1, 3, true, 0},
		{beat + 2*silence + 1, 3, false, 0},
		{beat + silence + forget + 1, 3, false, 1},
	} {
		row.Beat = step.beat
		if gone := p.note([]store.Relay{row, {ID: p.id}}, start.Add(step.at)); len(gone) != step.gone || there() != step.there {
			t.Errorf("after %v: there %v, gone %d", step.at, there(), len(gone))
		}
	}
	// One whose row was taken away is gone at once.
	row.ID = "d"
	p.note([]store.Relay{row}, start)
	if gone := p.note(nil, start); len(gone) != 1 || there() {
		t.Errorf("there %v, gone %d", there(), len(gone))
	}
}

func TestAddress(t *testing.T) {
	if _, err := New(Config{Address: "10.0.0.1"}); err == nil {
		t.Error("an address without a port")
	}
}
