package footprint

import "testing"

func TestOver(t *testing.T) {
	var w work
	var total uint64
	for i, step := range []struct {
		allocates uint64
		over      bool
	}{
		{6 << 20, false}, // the start
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
