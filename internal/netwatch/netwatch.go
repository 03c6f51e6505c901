// Package netwatch owns the news that the machine's network may have changed or that the machine has slept.
package netwatch

import (
	"context"
	"fmt"
	"time"
)

const (
	// settle is how long after news further news is held back: a link that comes up makes a dozen changes.
	settle = 100 * time.Millisecond
	// beat is how often the clock is looked at.
	beat = time.Second
	// late is by how much a beat has to be late to mean that nothing ran meanwhile: neither this process nor, perhaps, the machine.
	late = 2 * time.Second
)

// Watch calls changed, on the caller's goroutine, after links, addresses or routes have changed and after this process has not run
// for some seconds, until ctx ends. It does not say what happened: look again.
func Watch(ctx context.Context, changed func()) error {
	news := make(chan struct{}, 1)
	poke := func() {
		select {
		case news <- struct{}{}:
		default:
		}
	}
	if err := Network(ctx, poke); err != nil {
		return fmt.Errorf("watch the network: %w", err)
	}
	return watch(ctx, news, poke, changed)
}

func watch(ctx context.Context, news <-chan struct{}, poke, changed func()) error {
	tick := time.NewTicker(beat)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			now := time.Now()
			if slept(last, now) {
				poke()
			}
			last = now
		case <-news:
			changed()
			select {
			case <-ctx.Done():
			case <-time.After(settle):
			}
			last = time.Now() // changed may have taken its time
		}
	}
}

// slept says whether nothing ran between two beats. The wall clock counts: the monotonic one stands still while a machine sleeps
// (CLOCK_MONOTONIC, clock_gettime(2)), the wall clock does not, nor while a process is stopped. A clock that is set forward looks
// the same, and does no harm.
func slept(last, now time.Time) bool {
	return now.Round(0).Sub(last.Round(0)) > beat+late
}
