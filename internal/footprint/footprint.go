// Package footprint owns how much memory is kept: it is given back to the system after work, and garbage is kept small where much is in use.
package footprint

import (
	"context"
	"os"
	"runtime"
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
	worth = 4 << 20
	// many are the bytes in use from which on garbage may be lean percent as much, until they are few. With less the runtime's own way, as much garbage as
	// there is in use, costs little memory; with a thousand tunnels it costs more than they do.
	many, few = 48 << 20, 32 << 20
	lean      = 25
	usual     = 100
)

// Nobody can ask for a profile of the heap, for which the runtime has a table of 1.5 MB and looks at where memory is allocated.
func init() { runtime.MemProfileRate = 0 }

// Keep gives memory back whenever a time of work is over, until ctx ends. By itself the runtime keeps what the work has taken for minutes, and
// garbage of the last work until there is as much again; daemons and agents work now and then, beside other programs. Where much is in use, less garbage is let
// be beside it, unless GOGC says how much. What the start alone has used of the program is forgotten soon after it: later, what is used again and again
// would be missed.
func Keep(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	var w work
	percent := usual
	for started := false; ; started = true {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !started {
			_ = forgetProgram() // a sandbox may have no /proc
		}
		metrics.Read(sample)
		if next := garbage(sample[1].Value.Uint64(), percent); next != percent && os.Getenv("GOGC") == "" {
			percent = next
			debug.SetGCPercent(percent)
		}
		if w.over(sample[0].Value.Uint64()) {
			runtime.GC() // what pools keep outlives one collection (sync.Pool)
			debug.FreeOSMemory()
		}
	}
}

// garbage is how many percent of what is in use garbage may be; now is how many it may be so far.
func garbage(inUse uint64, now int) int {
	switch {
	case inUse >= many:
		return lean
	case inUse < few:
		return usual
	}
	return now
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
