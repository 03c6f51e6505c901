package footprint

import "testing"

func TestOver(t *testing.T) {
	var w work
	var total uint64
	for i, step := range []struct {
		allocates uint64
		over      bool
	}{
		{3 << 20, false}, // the start
		{100, false},     // not worth it
		{90 << 20, false},
		{50 << 20, false},
		{100, true},
		{100, false}, // once
		{1 << 20, false},
		{7 << 20, false},
		{0, true},
	} {
		total += step.allocates
		if got := w.over(total); got != step.over {
			t.Errorf("step %d: %v", i, got)
		}
	}
}

func TestGarbage(t *testing.T) {
	now := usual
	for i, step := range []struct {
		inUse uint64
		want  int
	}{{1 << 20, usual}, {40 << 20, usual}, {48 << 20, lean}, {40 << 20, lean}, {200 << 20, lean}, {31 << 20, usual}, {40 << 20, usual}} {
		if now = garbage(step.inUse, now); now != step.want {
			t.Errorf("step %d: %d", i, now)
		}
	}
}
