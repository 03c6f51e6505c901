package manager

import (
	"cmp"
	"reflect"
	"slices"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
)

// workloadKey names a workload in the cluster.
type workloadKey struct {
	Namespace, Kind, Name string
}

// engagement is one intercept as the data path needs it: which port of which workload, or which of its requests, goes to which session.
type engagement struct {
	UID      types.UID
	Session  types.UID
	Workload workloadKey
	Protocol string
	Port     uint16
	Match    match.Rule // zero: all connections
	Egress   bool       // the port's traffic stays; the agents connect for the session
	ToPod    []int32    // the agents connect for the session to these ports on their loopback
}

// engagements is the set of intercepts in force; it is rebuilt from the Intercept objects after a restart.
type engagements struct {
	mu sync.Mutex
	// guarded by mu
	byUID   map[types.UID]engagement
	changed uint64
	notify  []func(workloadKey)
}

func newEngagements() *engagements { return &engagements{byUID: map[types.UID]engagement{}} }

// onChange registers fn to be called, without a lock held, after the set of a workload changed.
func (e *engagements) onChange(fn func(workloadKey)) { e.notify = append(e.notify, fn) }

func (e *engagements) set(g engagement) {
	e.mu.Lock()
	old, had := e.byUID[g.UID]
	e.byUID[g.UID] = g
	changed := !had || !reflect.DeepEqual(old, g)
	if changed {
		e.changed++
	}
	e.mu.Unlock()
	if changed {
		e.tell(g.Workload)
	}
}

// remove returns what was removed.
func (e *engagements) remove(uid types.UID) (engagement, bool) {
	e.mu.Lock()
	g, had := e.byUID[uid]
	delete(e.byUID, uid)
	e.changed++
	e.mu.Unlock()
	if had {
		e.tell(g.Workload)
	}
	return g, had
}

func (e *engagements) tell(w workloadKey) {
	for _, fn := range e.notify {
		fn(w)
	}
}

func (e *engagements) get(uid types.UID) (engagement, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	g, ok := e.byUID[uid]
	return g, ok
}

// of lists the intercepts of one workload.
func (e *engagements) of(w workloadKey) []engagement {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []engagement
	for _, g := range e.byUID {
		if g.Workload == w {
			out = append(out, g)
		}
	}
	slices.SortFunc(out, func(a, b engagement) int { return cmp.Compare(a.UID, b.UID) })
	return out
}

// inNamespace says whether any workload of the namespace is intercepted; the webhook asks it first.
func (e *engagements) inNamespace(ns string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, g := range e.byUID {
		if g.Workload.Namespace == ns {
			return true
		}
	}
	return false
}

// table is what the agents of a workload are told.
func (e *engagements) table(w workloadKey) control.Table {
	e.mu.Lock()
	gen := e.changed
	e.mu.Unlock()
	t := control.Table{Generation: gen, Items: []control.TableEntry{}}
	for _, g := range e.of(w) {
		if g.Egress || len(g.ToPod) > 0 {
			t.Egress = append(t.Egress, string(g.UID))
		}
		if g.Egress {
			continue
		}
		t.Items = append(t.Items, control.TableEntry{Intercept: string(g.UID), Protocol: g.Protocol, ContainerPort: g.Port, Match: g.Match})
	}
	return t
}
