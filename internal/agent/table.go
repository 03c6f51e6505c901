package agent

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
)

// leaveGrace is how long connections that run may go on after their intercept has ended.
const leaveGrace = 10 * time.Second

// table is the manager's latest word on which ports are intercepted. It outlives the connection to the manager:
// while there is none, opening a flow fails at once and the app answers.
type table struct {
	mu sync.RWMutex
	// guarded by mu
	got    bool
	ports  map[tableKey][]engagement // never changed in place; the more specific matches come first, an intercept of all connections last
	egress []string                  // intercepts for whose laptops we connect
}

type tableKey struct {
	protocol string
	port     uint16
}

// engagement is one intercept of a port; ctx ends some time after the intercept did.
type engagement struct {
	intercept string
	match     *match.Matcher
	ctx       context.Context
	cancel    context.CancelFunc
}

// whole says that the intercept takes all connections.
func (e engagement) whole() bool { return e.match.Rule().IsZero() }

func (t *table) init() { t.ports = map[tableKey][]engagement{} }

// set replaces the table. Connections of intercepts that stay go on undisturbed.
func (t *table) set(m control.Table, log *slog.Logger) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ended := map[string]engagement{}
	for _, es := range t.ports {
		for _, e := range es {
			ended[e.intercept] = e
		}
	}
	ports := make(map[tableKey][]engagement, len(m.Items))
	for _, i := range m.Items {
		e, ok := ended[i.Intercept]
		if ok {
			delete(ended, i.Intercept) // it stays
		} else {
			matcher, err := match.Compile(i.Match)
			if err != nil { // of a newer manager: the app is the one to be asked
				log.Warn("intercept not understood", "intercept", i.Intercept, "err", err)
				continue
			}
			e = engagement{intercept: i.Intercept, match: matcher}
			e.ctx, e.cancel = context.WithCancel(context.Background())
		}
		k := tableKey{i.Protocol, i.ContainerPort}
		ports[k] = append(ports[k], e)
	}
	for _, es := range ports {
		slices.SortStableFunc(es, func(a, b engagement) int { return match.Order(a.match, b.match) })
	}
	for _, e := range ended {
		time.AfterFunc(leaveGrace, e.cancel)
	}
	t.ports, t.egress, t.got = ports, m.Egress, true
}

// connects says whether this agent connects for the laptop of an intercept.
func (t *table) connects(intercept string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Contains(t.egress, intercept)
}

// lookup lists the intercepts of a port in the order in which they are asked.
func (t *table) lookup(protocol string, port uint16) []engagement {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.ports[tableKey{protocol, port}]
}

func (t *table) known() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.got
}
