package agent

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/httproute"
	"github.com/doppel-dev/doppel/internal/match"
)

// leaveGrace is how long connections that run may go on after their intercept has ended.
const leaveGrace = 10 * time.Second

// table is the manager's latest word on which ports are intercepted. It outlives the connection to the manager:
// while there is none, opening a flow fails at once and the app answers.
type table struct {
	silent func() bool // the manager does not answer: all laptops are away; nil: it does

	mu sync.RWMutex
	// guarded by mu
	got    bool
	ports  map[tableKey]taken // never changed in place
	egress []string           // intercepts for whose laptops we connect
	shown  map[string]string  // intercepts whose laptops see a container, and which

	changes map[*func()]struct{} // called after each change, and when the manager falls silent or answers again
}

type tableKey struct {
	protocol string
	port     uint16
}

// taken is what is wanted of one port.
type taken struct {
	intercepts []engagement // the more specific matches come first, an intercept of all connections last
	wiretaps   []engagement
}

// byRequest says that requests have to be looked at one by one: somebody wants some of them, and does not have all the others as well.
func (t taken) byRequest() bool {
	all := ""
	if n := len(t.intercepts); n > 0 && t.intercepts[n-1].whole() {
		all = t.intercepts[n-1].intercept
	}
	some := func(e engagement) bool { return !e.whole() }
	return slices.ContainsFunc(t.intercepts, func(e engagement) bool { return some(e) && e.intercept != all }) || slices.ContainsFunc(t.wiretaps, some)
}

// engagement is one rule of an intercept of a port; ctx ends some time after the intercept did.
type engagement struct {
	key       string // tells it from others
	intercept string
	match     *match.Matcher
	away      bool // its laptop does not answer at the moment: the app gets what it would
	ctx       context.Context
	cancel    context.CancelFunc
}

// whole says that the intercept takes all connections.
func (e engagement) whole() bool { return e.match.Rule().IsZero() }

// to is where requests of the intercept go.
func (e engagement) to() string {
	if e.away {
		return httproute.App
	}
	return e.intercept
}

func (t *table) init() { t.ports, t.changes = map[tableKey]taken{}, map[*func()]struct{}{} }

// subscribe has fn called after each change, until the function it returns is called. It must not wait.
func (t *table) subscribe(fn func()) (end func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changes[&fn] = struct{}{}
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.changes, &fn)
	}
}

// set replaces the table, and returns what it has left out of it. Connections of intercepts that stay go on undisturbed.
func (t *table) set(m control.Table, log *slog.Logger) (unknown []control.TableEntry) {
	unknown = t.replace(m, log)
	t.changed()
	return unknown
}

func (t *table) changed() {
	t.mu.RLock()
	changes := slices.Collect(maps.Keys(t.changes))
	t.mu.RUnlock()
	for _, fn := range changes {
		(*fn)()
	}
}

func (t *table) replace(m control.Table, log *slog.Logger) (unknown []control.TableEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old, now := map[string]engagement{}, map[string]engagement{}
	for _, p := range t.ports {
		for _, e := range slices.Concat(p.intercepts, p.wiretaps) {
			old[e.key] = e
		}
	}
	ports := make(map[tableKey]taken, len(m.Items))
	for _, i := range m.Items {
		key := i.Intercept + " " + i.Match.String() // an intercept may have several rules
		e, ok := now[key]                           // another port of the same one
		if !ok {
			e, ok = old[key] // it stays
		}
		if !ok || i.Match.Newer {
			matcher, err := match.Compile(i.Match)
			if err != nil { // of a newer manager: the app is the one to be asked
				log.Warn("intercept not understood", "intercept", i.Intercept, "err", err)
				unknown = append(unknown, i)
				continue
			}
			e = engagement{key: key, intercept: i.Intercept, match: matcher}
			e.ctx, e.cancel = context.WithCancel(context.Background())
		}
		e.away = slices.Contains(m.Away, i.Intercept)
		now[key] = e
		k := tableKey{i.Protocol, i.ContainerPort}
		p := ports[k]
		if i.Wiretap {
			p.wiretaps = append(p.wiretaps, e)
		} else {
			p.intercepts = append(p.intercepts, e)
		}
		ports[k] = p
	}
	for _, p := range ports {
		slices.SortStableFunc(p.intercepts, func(a, b engagement) int { return match.Order(a.match, b.match) })
	}
	for key, e := range old {
		if _, stays := now[key]; !stays {
			time.AfterFunc(leaveGrace, e.cancel)
		}
	}
	t.ports, t.egress, t.got = ports, m.Egress, true
	t.shown = make(map[string]string, len(m.Shown))
	for _, s := range m.Shown {
		t.shown[s.Intercept] = s.Container
	}
	return unknown
}

// shows returns the container whose environment and files the laptop of an intercept sees.
func (t *table) shows(intercept string) (container string, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	container, ok = t.shown[intercept]
	return container, ok
}

// connects says whether this agent connects for the laptop of an intercept.
func (t *table) connects(intercept string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Contains(t.egress, intercept)
}

// lookup says what is wanted of a port now.
func (t *table) lookup(protocol string, port uint16) taken {
	t.mu.RLock()
	defer t.mu.RUnlock()
	p := t.ports[tableKey{protocol, port}]
	if t.silent != nil && t.silent() {
		p.intercepts = slices.Clone(p.intercepts)
		for i := range p.intercepts {
			p.intercepts[i].away = true
		}
	}
	return p
}

func (t *table) known() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.got
}
