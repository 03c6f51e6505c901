package netwatch

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestSlept(t *testing.T) {
	t0 := time.Now()
	for _, tt := range []struct {
		name string
		now  time.Time
		want bool
	}{
		{"a beat", t0.Add(beat), false},
		{"busy machine", t0.Add(beat + late), false},
		{"stopped", t0.Add(2 * time.Minute), true},
		{"asleep: the monotonic clock stood still", t0.Round(0).Add(time.Hour), true},
		{"clock set back", t0.Round(0).Add(-time.Hour), false},
	} {
		if got := slept(t0, tt.now); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// TestWatchQuiet: beats alone are no news.
func TestWatchQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		news := make(chan struct{}, 1)
		poke := func() { news <- struct{}{} }
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := watch(ctx, news, poke, func() { t.Error("news") }); err != nil {
			t.Error(err)
		}
	})
}

// TestWatchBurst: the first of many changes is told at once, the others together.
func TestWatchBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		news := make(chan struct{}, 1)
		poke := func() {
			select {
			case news <- struct{}{}:
			default:
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		var told []time.Duration
		done := make(chan error)
		go func() { done <- watch(ctx, news, poke, func() { told = append(told, time.Since(start)) }) }()
		for range 10 {
			poke()
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(told) != 2 || told[0] != 0 || told[1] != settle {
			t.Error(told)
		}
	})
}
