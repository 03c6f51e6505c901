package agent

import (
	"sync"

	"github.com/doppel-dev/doppel/internal/control"
)

// table is the manager's latest word on which ports are intercepted. It outlives the connection to the manager:
// while there is none, opening a flow fails at once and the app answers.
type table struct {
	mu sync.RWMutex
	// guarded by mu
	got   bool
	ports map[tableKey]control.TableEntry
}

type tableKey struct {
	protocol string
	port     uint16
}

func (t *table) init() { t.ports = map[tableKey]control.TableEntry{} }

// set replaces the table.
func (t *table) set(m control.Table) {
	ports := make(map[tableKey]control.TableEntry, len(m.Items))
	for _, e := range m.Items {
		ports[tableKey{e.Protocol, e.ContainerPort}] = e
	}
	t.mu.Lock()
	t.ports, t.got = ports, true
	t.mu.Unlock()
}

func (t *table) lookup(protocol string, port uint16) (control.TableEntry, bool) {
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
