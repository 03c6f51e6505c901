package preview

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"
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
	label, token string
	until        time.Time // when the right ends by itself; zero: it does not
	cancel       context.CancelCauseFunc
}

// errRevoked is why a request was cut.
var errRevoked = errors.New("the visitor may no longer see this preview")

// enter notes a request, if there are not too many; its context ends when its visitor's right does.
func (o *openRequests) enter(ctx context.Context, label, token string, q *request) (_ context.Context, leave func(), ok bool) {
	ctx, cancel := context.WithCancelCause(ctx)
	r := &openRequest{label: label, token: token, until: earliest(q.visitor.Until, q.preview.Expires), cancel: cancel}
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

// due are the requests to be looked at: all, or those whose time is over.
func (o *openRequests) due(all bool, now time.Time) []*openRequest {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := slices.Collect(maps.Keys(o.all))
	if all {
		return out
	}
	return slices.DeleteFunc(out, func(r *openRequest) bool { return r.until.IsZero() || now.Before(r.until) })
}

func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// watch cuts requests whose visitor may no longer be there, until ctx ends.
func (h *Handler) watch(ctx context.Context) error {
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	var last int64
	for {
		changed := h.cfg.Store.Changed()
		rev, err := h.cfg.Store.Revision(ctx)
		if err != nil && ctx.Err() == nil {
			h.cfg.Log.Error("revision not read", "err", err)
		}
		for _, r := range h.open.due(rev != last || err != nil, time.Now()) {
			// A right that cannot be looked up is none: what is cut can be asked for again.
			if _, err := h.admit(ctx, r.label, r.token); err != nil {
				r.cancel(errRevoked)
			}
		}
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
