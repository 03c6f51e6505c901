package preview

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/store"
)

// Visits are stored in batches: one write to the disk for all of the last flushEvery.
const (
	flushEvery = 200 * time.Millisecond
	maxBatch   = 1024
	maxWaiting = 8192
	maxPath    = 512 // bytes
)

// visits is the list of visitors on its way to the store.
type visits struct {
	store   *store.Store
	log     *slog.Logger
	waiting chan store.Visited
	dropped atomic.Uint64 // since it was told last

	unlisted atomic.Uint64
}

func newVisits(s *store.Store, log *slog.Logger) *visits {
	return &visits{store: s, log: log, waiting: make(chan store.Visited, maxWaiting)}
}

// visit is a request whose end is to come.
type visit struct {
	of *visits
	v  store.Visited
}

func (vs *visits) begin(q *request, r *http.Request) *visit {
	addr, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		addr = r.RemoteAddr
	}
	path := r.URL.EscapedPath()
	return &visit{vs, store.Visited{
		Preview: q.preview.ID, At: time.Now(), Who: q.visitor.Name(), Address: addr, Method: r.Method, Path: path[:min(len(path), maxPath)],
	}}
}

// end notes a visit. If the store cannot keep up the list has a gap, and nobody waits for it.
func (v *visit) end(status int) {
	v.v.Status, v.v.Latency = status, time.Since(v.v.At)
	select {
	case v.of.waiting <- v.v:
	default:
		v.of.dropped.Add(1)
		v.of.unlisted.Add(1)
	}
}

// run stores visits until ctx ends, and those that are left then.
func (vs *visits) run(ctx context.Context) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for ended := false; !ended; {
		select {
		case <-ctx.Done():
			ended = true
		case <-tick.C:
		}
		for vs.flush(context.WithoutCancel(ctx)) { // what has begun is not lost by the end
		}
	}
}

// flush stores a batch, and says whether there may be another one.
func (vs *visits) flush(ctx context.Context) bool {
	batch := make([]store.Visited, min(len(vs.waiting), maxBatch))
	for i := range batch { // nobody else takes them
		batch[i] = <-vs.waiting
	}
	if n := vs.dropped.Swap(0); n > 0 {
		vs.log.Warn("visits not listed: there were too many at once", "count", n)
	}
	if len(batch) == 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, store.Patience)
	defer cancel()
	if err := vs.store.AddVisits(ctx, batch); err != nil {
		vs.log.Error("visits not stored", "count", len(batch), "err", err)
		return false
	}
	return len(batch) == maxBatch
}
