package agent

import (
	"context"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
)

// leaveGrace is how long connections that run may go on after their intercept has ended.
const leaveGrace = 10 * time.Second

// table is the manager's latest word on which ports are intercepted. It outlives the connection to the manager:
// while there is none, opening a flow fails at once and the app answers.
type table struct {
	mu sync.RWMutex
	// guarded by mu
	got   bool
	ports map[tableKey]engagement
}

type tableKey struct {
	protocol string
	port     uint16
}

// engagement is one intercept of a port; ctx ends some time after the intercept did.
type engagement struct {
	intercept string
	ctx       context.Context
	cancel    context.CancelFunc
}

func (t *table) init() { t.ports = map[tableKey]engagement{} }

// set replaces the table. Connections of intercepts that stay go on undisturbed.
func (t *table) set(m control.Table) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ports := make(map[tableKey]engagement, len(m.Items))
	for _, e := range m.Items {
		k := tableKey{e.Protocol, e.ContainerPort}
		if old, ok := t.ports[k]; ok && old.intercept == e.Intercept {
			ports[k] = old
			delete(t.ports, k)
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		ports[k] = engagement{intercept: e.Intercept, ctx: ctx, cancel: cancel}
	}
	for _, ended := range t.ports {
		time.AfterFunc(leaveGrace, ended.cancel)
	}
	t.ports, t.got = ports, true
}

func (t *table) lookup(protocol string, port uint16) (engagement, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	e, ok := t.ports[tableKey{protocol, port}]
	return e, ok
}

func (t *table) known() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.got
}
