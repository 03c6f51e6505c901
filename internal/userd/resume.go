package userd

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// resumeFirst and resumeLast are the pauses after which an intercept is tried to be created again: at first, and at the longest.
const (
	resumeFirst = 500 * time.Millisecond
	resumeLast  = 30 * time.Second
)

// resume has the intercepts created again when a new session had to take the old one's place, until all are there or the session ends. A tunnel
// that ends does not end that: a request that is cut off may have been carried out.
func (x *intercepts) resume() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.resuming {
		return
	}
	x.resuming = true
	x.s.group.Go("resume", func(ctx context.Context) error {
		doubtful := map[*intercept]bool{} // whose creation failed: the object may be there all the same
		for pause := resumeFirst; ; pause = min(2*pause, resumeLast) {
			todo, session := x.stale(doubtful)
			for _, in := range todo {
				err := x.recreate(ctx, in, session, doubtful[in])
				if ctx.Err() != nil {
					return nil // what was created ends with the session
				}
				delete(doubtful, in)
				if err != nil {
					doubtful[in] = true
					x.s.log.Warn("intercept not resumed yet", "intercept", in.name, "err", err)
				}
				x.mu.Lock()
				in.resumeErr = err
				x.mu.Unlock()
			}
			switch {
			case len(todo) == 0:
				return nil
			case len(doubtful) == 0:
				continue // the session may have been replaced again meanwhile
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
		}
	})
}

// revoked forgets the intercepts of a session that somebody deleted: who ends it means to end them, and the session that takes its place has none.
// What was declared is nobody's session's, and stays.
func (x *intercepts) revoked() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for name, in := range x.byName {
		if in.object.UID != "" && !in.declared() && !in.leaving {
			x.endedLocked(name, in, "its session was deleted in the cluster at "+time.Now().Format(time.TimeOnly))
		}
	}
}

// endedLocked forgets an intercept that has ended without its user, who is told why.
func (x *intercepts) endedLocked(name string, in *intercept, why string) {
	x.s.log.Warn("intercept ended", "intercept", name, "why", why)
	x.lost[name] = why
	delete(x.byName, name)
	go in.close()
}

// stale are the intercepts of an earlier session than the one that there is now, and the doubtful ones. Without any, resuming has ended.
func (x *intercepts) stale(doubtful map[*intercept]bool) (out []*intercept, session string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	session = x.s.uid()
	out = slices.Collect(maps.Keys(doubtful))
	for _, in := range x.byName {
		if in.object.UID != "" && !in.declared() && !in.leaving && in.object.Spec.Session != session && !doubtful[in] {
			out = append(out, in)
		}
	}
	x.resuming = len(out) > 0
	return out, session
}

// recreate creates an intercept again for a session; look says that it may be there already. Who has left it meanwhile wins.
func (x *intercepts) recreate(ctx context.Context, in *intercept, session string, look bool) error {
	wanted := func() bool { return x.byName[in.name] == in && !in.leaving }
	x.mu.Lock()
	old, still := in.object, wanted()
	x.mu.Unlock()
	spec := old.Spec
	spec.Session, spec.Takeover = session, false // that was meant for then
	var o *v1alpha1.Intercept
	var err error
	if look {
		o, err = x.created(ctx, old.Namespace, spec)
	}
	if o == nil && err == nil && still {
		o, err = x.s.cluster.CreateIntercept(ctx, old.Namespace, spec)
	}
	if o == nil || err != nil {
		return err
	}
	x.mu.Lock()
	if still = wanted(); still {
		in.object = o
	}
	x.mu.Unlock()
	if !still {
		x.discard(&intercept{name: in.name, object: o})
	}
	return nil
}

// created finds the object of an intercept whose creation seemed to fail; nil: there is none.
func (x *intercepts) created(ctx context.Context, ns string, spec v1alpha1.InterceptSpec) (*v1alpha1.Intercept, error) {
	list, err := x.s.cluster.Intercepts(ctx, ns)
	if err != nil {
		return nil, fmt.Errorf("is it there already? %w", err)
	}
	if i := slices.IndexFunc(list, func(o v1alpha1.Intercept) bool { return o.Spec.Session == spec.Session && o.Spec.Name == spec.Name }); i >= 0 {
		return &list[i], nil
	}
	return nil, nil
}
