// Package footprint owns giving memory back to the system after work.
package footprint

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// interval is how often work is looked for.
	interval = 5 * time.Second
	// quiet is the most that is allocated in an interval in which nothing worth the name was done, in bytes.
	quiet = 1 << 20
	// worth is how much must have been allocated since memory was given back last, in bytes.
	worth = 8 << 20
)

// Keep gives memory back whenever a time of work is over, until ctx ends. By itself the runtime keeps what the work has taken for minutes, and
// garbage of the last work until there is as much again; daemons and agents work now and then, beside other programs.
func Keep(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	var w work
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(sample)
		if w.over(sample[0].Value.Uint64()) {
			debug.FreeOSMemory()
		}
	}
}

// work is what was allocated since memory was given back last.
type work struct{ seen, since uint64 }

// over says whether a time of work has ended; allocs is all that was allocated so far, in bytes.
func (w *work) over(allocs uint64) bool {
	n := allocs - w.seen
	w.seen = allocs
	w.since += n
	if n > quiet || w.since < worth {
		return false
	}
	w.since = 0
	return true
}
