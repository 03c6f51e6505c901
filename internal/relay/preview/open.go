package preview

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/store"
)

// recheck is how often it is looked whether another relay has changed who may see what; changes of this one are known at once.
const recheck = 400 * time.Millisecond

// maxOpen is how many requests of one preview may be open at once, WebSockets too, so that one takes nothing from others.
const maxOpen = 2000

// openRequests are the requests being answered: those whose visitor may no longer be there are cut, WebSockets too.
type openRequests struct {
	mu sync.Mutex
	// guarded by mu
	all     map[*openRequest]bool
	byLabel map[string]int
}

type openRequest struct {
	of     right
	until  time.Time // when the right ends by itself; zero: it does not. Guarded by openRequests.mu
	fresh  bool      // its right was not looked at since it is known to be open. Guarded by openRequests.mu
	cancel context.CancelCauseFunc
}

// right is what a request may be made by.
type right struct{ label, token string }

// errRevoked is why a request was cut.
var errRevoked = errors.New("the visitor may no longer see this preview")

// enter notes a request, if there are not too many; its context ends when its visitor's right does.
func (o *openRequests) enter(ctx context.Context, label, token string, q *request) (_ context.Context, leave func(), ok bool) {
	ctx, cancel := context.WithCancelCause(ctx)
	r := &openRequest{of: right{label, token}, until: q.until(time.Now()), fresh: true, cancel: cancel}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byLabel[label] >= maxOpen {
		cancel(nil)
		return ctx, nil, false
	}
	o.all[r] = true
	o.byLabel[label]++
	return ctx, func() {
		o.mu.Lock()
		delete(o.all, r)
		if o.byLabel[label]--; o.byLabel[label] == 0 {
			delete(o.byLabel, label)
		}
		o.mu.Unlock()
		cancel(nil)
	}, true
}

// count counts the open requests.
func (o *openRequests) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.all)
}

// due are the requests to be looked at, by their right: all, or those whose time is over, and each once: a right that was taken away after its request
// was admitted and before it was known to be open has told nobody.
func (o *openRequests) due(all bool, now time.Time) map[right][]*openRequest {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := map[right][]*openRequest{}
	for r := range o.all {
		if all || r.fresh || !r.until.IsZero() && !now.Before(r.until) {
			out[r.of] = append(out[r.of], r)
		}
		r.fresh = false
	}
	return out
}

// extend says until when requests may go on whose right was looked at.
func (o *openRequests) extend(requests []*openRequest, until time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, r := range requests {
		r.until = until
	}
}

// until is when a right ends by itself; zero: it does not. A publication that has run out is not what it is of.
func (q *request) until(now time.Time) time.Time {
	visit, publication := q.visitor.Until, q.preview.Expires
	if now.Before(publication) && (visit.IsZero() || publication.Before(visit)) {
		return publication
	}
	return visit
}

// judge cuts requests whose right has ended. One that cannot be looked up is none: what is cut can be asked for again.
func (h *Handler) judge(ctx context.Context, due map[right][]*openRequest) {
	hangs := false // the database: nobody waits for it again
	for of, requests := range due {
		if !hangs {
			ctx, cancel := context.WithTimeout(ctx, store.Patience)
			q, err := h.admit(ctx, of.label, of.token)
			hangs = ctx.Err() != nil
			cancel()
			if err == nil {
				h.open.extend(requests, q.until(time.Now()))
				continue
			}
		}
		for _, r := range requests {
			r.cancel(errRevoked)
		}
	}
}

// revision is what the store says of changes.
func (h *Handler) revision(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, store.Patience)
	defer cancel()
	return h.cfg.Store.Revision(ctx)
}

// Watch cuts requests whose visitor may no longer be there, until ctx ends.
func (h *Handler) Watch(ctx context.Context) error {
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	var last int64
	for {
		changed := h.cfg.Store.Changed()
		rev, err := h.revision(ctx)
		if err != nil && ctx.Err() == nil {
			h.cfg.Log.Error("revision not read", "err", err)
		}
		h.judge(ctx, h.open.due(rev != last || err != nil, time.Now()))
		if err == nil {
			last = rev
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}
