package manager

import (
	"cmp"
	"encoding/json"
	"reflect"
	"slices"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
)

// workloadKey names a workload in the cluster.
type workloadKey struct {
	Namespace, Kind, Name string
}

func (w workloadKey) String() string { return w.Namespace + "/" + w.Kind + "/" + w.Name }

// engagement is one intercept as the data path needs it: which ports of which workload, or which of their requests, go to which session.
type engagement struct {
	UID      types.UID
	Session  types.UID
	User     string
	Workload workloadKey
	Ports    []control.Port
	Rules    []match.Rule // a request is taken that one of them takes; the zero rule takes all connections
	Preview  *v1alpha1.Preview
	Mode     v1alpha1.InterceptMode
	// Container is whose place a stand-in takes (Replace), until Ending: then it is to come back, and the session still has the traffic.
	Container string
	Ending    bool
	// Hosts are the names of the pods' hosts file, and OwnDNS says that the pods do not ask the cluster's DNS as others do.
	Hosts  []control.Host
	OwnDNS bool
	// Shown is the container whose environment and files the session sees, or "".
	Shown string
	ToPod []v1alpha1.PodPort // the agents connect for the session to these ports on their loopback
}

// egress says that the ports' traffic stays, and that the agents connect for the session.
func (g engagement) egress() bool { return g.Mode == v1alpha1.ModeEgress }

// replaces says that the container is not to run.
func (g engagement) replaces() bool { return g.Mode == v1alpha1.ModeReplace && !g.Ending }

// follows says whether another one is about the same container, or has one of the ports.
func (g engagement) follows(o engagement) bool {
	return g.Container == o.Container || slices.ContainsFunc(o.Ports, func(p control.Port) bool { return slices.Contains(g.Ports, p) })
}

// engagements is the set of intercepts in force; it is rebuilt from the Intercept objects after a restart.
type engagements struct {
	mu sync.Mutex
	// guarded by mu
	byUID   map[types.UID]engagement
	uids    map[workloadKey]map[types.UID]bool // of a workload
	changed uint64
	notify  []func(engagement)
	// onSession is called, without a lock held and before those of onChange, for each session that a change concerns.
	onSession func(types.UID)
}

func newEngagements() *engagements {
	return &engagements{byUID: map[types.UID]engagement{}, uids: map[workloadKey]map[types.UID]bool{}, onSession: func(types.UID) {}}
}

// onChange registers fn to be called, without a lock held, after an intercept came into force, changed or ended.
func (e *engagements) onChange(fn func(engagement)) { e.notify = append(e.notify, fn) }

// set enters an intercept, unless its preview is that of another user's.
func (e *engagements) set(g engagement) bool {
	e.mu.Lock()
	if g.Preview != nil {
		if o, ok := e.previewLocked(g.Preview.ID); ok && o.User != g.User {
			e.mu.Unlock()
			return false
		}
	}
	old, had := e.byUID[g.UID]
	if had {
		e.dropLocked(old)
	}
	e.byUID[g.UID] = g
	if e.uids[g.Workload] == nil {
		e.uids[g.Workload] = map[types.UID]bool{}
	}
	e.uids[g.Workload][g.UID] = true
	changed := !had || !reflect.DeepEqual(old, g)
	if changed {
		e.changed++
	}
	e.mu.Unlock()
	if had && old.Session != g.Session {
		e.onSession(old.Session)
	}
	if changed {
		e.tell(g)
	}
	return true
}

func (e *engagements) dropLocked(g engagement) {
	delete(e.byUID, g.UID)
	delete(e.uids[g.Workload], g.UID)
	if len(e.uids[g.Workload]) == 0 {
		delete(e.uids, g.Workload)
	}
}

// remove returns what was removed.
func (e *engagements) remove(uid types.UID) (engagement, bool) {
	e.mu.Lock()
	g, had := e.byUID[uid]
	if had {
		e.dropLocked(g)
		e.changed++
	}
	e.mu.Unlock()
	if had {
		e.tell(g)
	}
	return g, had
}

func (e *engagements) tell(g engagement) {
	e.onSession(g.Session)
	for _, fn := range e.notify {
		fn(g)
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
	for uid := range e.uids[w] {
		out = append(out, e.byUID[uid])
	}
	slices.SortFunc(out, func(a, b engagement) int { return cmp.Compare(a.UID, b.UID) })
	return out
}

// replaced are the containers of a workload that are not to run.
func (e *engagements) replaced(w workloadKey) []string {
	var out []string
	for _, g := range e.of(w) {
		if g.replaces() {
			out = append(out, g.Container)
		}
	}
	return out
}

// where lists the intercepts for which ok says so.
func (e *engagements) where(ok func(engagement) bool) []engagement {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []engagement
	for _, g := range e.byUID {
		if ok(g) {
			out = append(out, g)
		}
	}
	return out
}

// preview finds the intercept of a preview.
func (e *engagements) preview(id string) (engagement, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.previewLocked(id)
}

func (e *engagements) previewLocked(id string) (engagement, bool) {
	for _, g := range e.byUID {
		if g.Preview != nil && g.Preview.ID == id {
			return g, true
		}
	}
	return engagement{}, false
}

// inNamespace says whether any workload of the namespace is intercepted; the webhook asks it first.
func (e *engagements) inNamespace(ns string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for w := range e.uids {
		if w.Namespace == ns {
			return true
		}
	}
	return false
}

// maxTable is the longest table, in bytes, that agents are told: it comes in one message (mux.MaxHeader), and which laptops are away is in it, too.
const maxTable = 60_000

// fits says whether the agents could be told of an intercept besides the others of its workload.
func (e *engagements) fits(g engagement) (size int, ok bool) {
	all := []engagement{g}
	for _, o := range e.of(g.Workload) {
		if o.UID != g.UID {
			all = append(all, o)
		} else if reflect.DeepEqual(o, g) {
			return 0, true
		}
	}
	t := tableOf(all)
	for _, o := range all {
		t.Away = append(t.Away, string(o.UID))
	}
	b, err := json.Marshal(t)
	return len(b), err == nil && len(b) <= maxTable
}

// table is what the agents of a workload are told, and the intercepts that are in force with that.
func (e *engagements) table(w workloadKey) (control.Table, map[types.UID]engagement) {
	e.mu.Lock()
	gen := e.changed
	e.mu.Unlock()
	all := e.of(w)
	in := map[types.UID]engagement{}
	for _, g := range all {
		in[g.UID] = g
	}
	t := tableOf(all)
	t.Generation = gen
	return t, in
}

func tableOf(all []engagement) control.Table {
	t := control.Table{Items: []control.TableEntry{}}
	for _, g := range all {
		if g.egress() || len(g.ToPod) > 0 {
			t.Egress = append(t.Egress, string(g.UID))
		}
		if g.Shown != "" {
			t.Shown = append(t.Shown, control.Shown{Intercept: string(g.UID), Container: g.Shown})
		}
		if g.egress() {
			continue
		}
		for _, p := range g.Ports {
			for _, rule := range g.Rules {
				t.Items = append(t.Items, control.TableEntry{
					Intercept: string(g.UID), Protocol: p.Protocol, ContainerPort: p.Number, Match: rule, Wiretap: g.Mode == v1alpha1.ModeWiretap,
				})
			}
		}
	}
	return t
}
