package agent

import (
	"fmt"
	"net/http"
	"runtime"
	"runtime/metrics"
)

// liveHeap is what the last collection of garbage has left, in bytes (runtime/metrics).
const liveHeap = "/gc/heap/live:bytes"

// serveMetrics writes them as Prometheus reads them. A library for that would be larger than the agent.
func (a *Agent) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	sample := []metrics.Sample{{Name: liveHeap}}
	metrics.Read(sample)
	for _, m := range []struct {
		name, help string
		value      uint64
	}{
		{"doppel_agent_connections", "Connections that are served.", uint64(a.active.Load())},
		{"doppel_agent_rules", "Rules of intercepts and wiretaps in force.", uint64(a.table.count())},
		{"go_goroutines", "Goroutines.", uint64(runtime.NumGoroutine())},
		{"go_gc_heap_live_bytes", "Heap that the last collection of garbage has left.", sample[0].Value.Uint64()},
	} {
		fmt.Fprintf(w, "# HELP %[1]s %[2]s\n# TYPE %[1]s gauge\n%[1]s %[3]d\n", m.name, m.help, m.value)
	}
}

// count is how many rules there are.
func (t *table) count() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := 0
	for _, p := range t.ports {
		n += len(p.intercepts) + len(p.wiretaps)
	}
	return n
}
