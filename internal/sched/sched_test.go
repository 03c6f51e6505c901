package sched

import (
	"runtime"
	"testing"
)

func TestHalf(t *testing.T) {
	for processors, want := range map[int]int{1: 1, 2: 1, 3: 1, 4: 2, 16: 8} {
		if got := half(processors); got != want {
			t.Errorf("%d of %d, want %d", got, processors, want)
		}
	}
	was := runtime.GOMAXPROCS(4)
	defer runtime.GOMAXPROCS(was)
	t.Setenv("GOMAXPROCS", "3")
	if Half(); runtime.GOMAXPROCS(0) != 4 {
		t.Errorf("%d although the environment says how many", runtime.GOMAXPROCS(0))
	}
	t.Setenv("GOMAXPROCS", "")
	if Half(); runtime.GOMAXPROCS(0) != 2 {
		t.Errorf("%d of 4", runtime.GOMAXPROCS(0))
	}
}
