package manager

import (
	"context"
	"sync"

	"k8s.io/apimachinery/pkg/types"
)

// turns lets one at a time do something with a session.
type turns struct {
	mu sync.Mutex
	// guarded by mu
	of map[types.UID]*turn
}

type turn struct {
	taken chan struct{} // capacity 1
	users int           // who has it, and who waits
}

// take waits for the session's turn. leave gives it back; to call it again does nothing. leave is never nil.
func (t *turns) take(ctx context.Context, session types.UID) (leave func(), err error) {
	t.mu.Lock()
	it := t.of[session]
	if it == nil {
		if it = (&turn{taken: make(chan struct{}, 1)}); t.of == nil {
			t.of = map[types.UID]*turn{}
		}
		t.of[session] = it
	}
	it.users++
	t.mu.Unlock()
	forget := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if it.users--; it.users == 0 {
			delete(t.of, session)
		}
	}
	select {
	case it.taken <- struct{}{}:
		return sync.OnceFunc(func() { <-it.taken; forget() }), nil
	case <-ctx.Done():
		forget()
		return func() {}, context.Cause(ctx)
	}
}
