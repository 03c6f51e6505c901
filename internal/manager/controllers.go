package manager

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
)

// watchers are the open watches of laptops on their intercepts.
type watchers struct {
	mu sync.Mutex
	// guarded by mu
	subs map[chan struct{}]types.UID // whose
}

// everybody stands for all sessions.
const everybody types.UID = ""

// add begins a watch on what concerns a session, or on all.
func (w *watchers) add(session types.UID) chan struct{} {
	ch := make(chan struct{}, 1)
	ch <- struct{}{}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.subs == nil {
		w.subs = map[chan struct{}]types.UID{}
	}
	w.subs[ch] = session
	return ch
}

func (w *watchers) remove(ch chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.subs, ch)
}

// notify tells of a change that concerns a session.
func (w *watchers) notify(session types.UID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch, of := range w.subs {
		if session != everybody && of != everybody && of != session {
			continue
		}
		select {
		case ch <- struct{}{}:
		default: // one is due already
		}
	}
}

// Indexes of the cache: with a thousand sessions nobody looks through all of them for one, nor through everybody's intercepts.
const (
	holderIndex   = "doppel.dev/holder"   // intercepts by the session that they go to
	workloadIndex = "doppel.dev/workload" // intercepts by their workload
	declaredIndex = "doppel.dev/declared" // intercepts that name no session, by their user
	uidIndex      = "doppel.dev/uid"      // sessions
)

func holderOf(o client.Object) []string { return []string{o.(*v1alpha1.Intercept).Holder()} }

func workloadOfIntercept(o client.Object) []string { return []string{interceptKey(o).String()} }

func declaredOf(o client.Object) []string {
	if in := o.(*v1alpha1.Intercept); in.Spec.Session == "" {
		return []string{in.Spec.User}
	}
	return nil
}

func uidOf(o client.Object) []string { return []string{string(o.GetUID())} }

// interceptKey is the workload of an intercept.
func interceptKey(o client.Object) workloadKey {
	in := o.(*v1alpha1.Intercept)
	return workloadKey{in.Namespace, in.Spec.Workload.Kind, in.Spec.Workload.Name}
}

// manyWorkloads are looked at at once. The intercepts of one workload, whose order decides conflicts, are looked at one after the other.
const manyWorkloads = 8

// A look that failed is repeated after retryFirst, and then after twice as long up to retryMost: what one intercept cannot have must not hold up the others of
// its workload.
const (
	retryFirst = 5 * time.Millisecond
	retryMost  = 5 * time.Second
)

// setupControllers registers the reconciler.
func (m *Manager) setupControllers(ctx context.Context) error {
	ix := m.ctrl.GetFieldIndexer()
	in := &v1alpha1.Intercept{}
	if err := errors.Join(
		ix.IndexField(ctx, in, holderIndex, holderOf), ix.IndexField(ctx, in, workloadIndex, workloadOfIntercept), ix.IndexField(ctx, in, declaredIndex, declaredOf),
		ix.IndexField(ctx, &v1alpha1.Session{}, uidIndex, uidOf),
	); err != nil {
		return fmt.Errorf("index sessions and intercepts: %w", err)
	}
	wakeups := handler.TypedFuncs[workloadKey, workloadKey]{GenericFunc: func(_ context.Context, e event.TypedGenericEvent[workloadKey], q workqueue.TypedRateLimitingInterface[workloadKey]) {
		q.Add(e.Object)
	}}
	return builder.TypedControllerManagedBy[workloadKey](leaders{m.ctrl, m.election}).
		Named("intercepts").
		Watches(in, m.interceptEvents()).
		Watches(&v1alpha1.Session{}, handler.TypedEnqueueRequestsFromMapFunc(m.workloadsOfSession), builder.WithPredicates(predicate.Funcs{UpdateFunc: claimsOthers})).
		WatchesRawSource(source.TypedChannel(m.wakeups, wakeups)).
		WithOptions(controller.TypedOptions[workloadKey]{
			MaxConcurrentReconciles: manyWorkloads, RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[workloadKey](retryFirst, retryMost),
		}).
		Complete(newWorkloadReconciler(m))
}

// interceptEvents has laptops told what the cache knows now, and workloads looked at. What changes in an intercept's status is our own doing.
func (m *Manager) interceptEvents() handler.TypedEventHandler[client.Object, workloadKey] {
	type queue = workqueue.TypedRateLimitingInterface[workloadKey]
	tell := func(o client.Object) { m.watchers.notify(types.UID(o.(*v1alpha1.Intercept).Holder())) }
	return handler.WithLowPriorityWhenUnchanged(handler.TypedFuncs[client.Object, workloadKey]{
		CreateFunc: func(_ context.Context, e event.TypedCreateEvent[client.Object], q queue) {
			tell(e.Object)
			q.Add(interceptKey(e.Object))
		},
		UpdateFunc: func(_ context.Context, e event.TypedUpdateEvent[client.Object], q queue) {
			tell(e.ObjectOld)
			tell(e.ObjectNew)
			if e.ObjectOld.GetGeneration() == e.ObjectNew.GetGeneration() && e.ObjectOld.GetUID() == e.ObjectNew.GetUID() {
				return
			}
			q.Add(interceptKey(e.ObjectOld))
			q.Add(interceptKey(e.ObjectNew))
		},
		DeleteFunc: func(_ context.Context, e event.TypedDeleteEvent[client.Object], q queue) {
			tell(e.Object)
			q.Add(interceptKey(e.Object))
		},
	})
}

// claimsOthers says whether a session may have others' intercepts after a change, or lose them: renewals are of no concern to intercepts.
func claimsOthers(e event.UpdateEvent) bool {
	old, now := e.ObjectOld.(*v1alpha1.Session), e.ObjectNew.(*v1alpha1.Session)
	return old.Status.State != now.Status.State || old.Spec.AcceptIntercepts != now.Spec.AcceptIntercepts
}

// wake has the intercepts of a workload looked at again.
func (m *Manager) wake(w workloadKey) {
	select {
	case m.wakeups <- event.TypedGenericEvent[workloadKey]{Object: w}:
	default: // the queue is full of wake-ups; intercepts are polled anyway
	}
}

// workloadsOfSession are those with intercepts that a session has, or may claim.
func (m *Manager) workloadsOfSession(ctx context.Context, o client.Object) []workloadKey {
	var out []workloadKey
	for index, value := range map[string]string{holderIndex: string(o.GetUID()), declaredIndex: o.(*v1alpha1.Session).Spec.User} {
		var list v1alpha1.InterceptList
		if err := m.ctrl.GetClient().List(ctx, &list, client.MatchingFields{index: value}, client.UnsafeDisableDeepCopy); err != nil { // nothing is changed here
			m.cfg.Log.Warn("list intercepts", "err", err)
			continue
		}
		for i := range list.Items {
			out = append(out, interceptKey(&list.Items[i]))
		}
	}
	return out
}

// notifyIntercepts has every laptop's watch look at the intercepts again.
func (m *Manager) notifyIntercepts() { m.watchers.notify(everybody) }

// watchIntercepts sends a session's intercepts at the start and whenever they change.
func (m *Manager) watchIntercepts(ctx context.Context, session types.UID, send func(any) error) error {
	ch := m.watchers.add(session)
	defer m.watchers.remove(ch)
	var last control.Intercepts
	first := true
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ch:
		}
		items, err := m.interceptsFor(ctx, session)
		if err != nil {
			return err
		}
		now := control.Intercepts{Items: items, Problems: m.losses(), Relay: m.relay.state()}
		if p := m.policy.problem(); p != "" {
			now.Problems = append(now.Problems, p)
		}
		if m.noEcho != nil {
			now.Problems = append(now.Problems, "ping of cluster addresses gets no answer: the traffic-manager's pod may not send ICMP echo ("+m.noEcho.Error()+
				"); keep the chart's manager.podSecurityContext.sysctls, or allow its net.ipv4.ping_group_range")
		}
		if !first && reflect.DeepEqual(now.Items, last.Items) && slices.Equal(now.Problems, last.Problems) && reflect.DeepEqual(now.Relay, last.Relay) {
			continue
		}
		first, last = false, now
		if err := send(now); err != nil {
			return err
		}
	}
}

// exists says whether the cache has an intercept as an object.
func (m *Manager) exists(ctx context.Context, g engagement) (bool, error) {
	var list v1alpha1.InterceptList
	err := m.ctrl.GetClient().List(ctx, &list, client.MatchingFields{workloadIndex: g.Workload.String()}, client.UnsafeDisableDeepCopy)
	return slices.ContainsFunc(list.Items, func(in v1alpha1.Intercept) bool { return in.UID == g.UID }), err
}

func (m *Manager) interceptsFor(ctx context.Context, session types.UID) ([]control.Intercept, error) {
	var list v1alpha1.InterceptList
	if err := m.ctrl.GetClient().List(ctx, &list, client.MatchingFields{holderIndex: string(session)}); err != nil {
		return nil, err
	}
	out := []control.Intercept{}
	for i := range list.Items {
		in := &list.Items[i]
		c := control.Intercept{
			UID: string(in.UID), Namespace: in.Namespace, Name: in.Name, State: string(in.Status.State), Reason: in.Status.Reason,
			Message: in.Status.Message, Declared: in.Spec.Session == "", Agents: in.Status.Agents, Kind: in.Spec.Workload.Kind, Workload: in.Spec.Workload.Name,
			Container: in.Status.Container,
		}
		g, ok := m.engaged.get(in.UID)
		if ok && in.Status.State == v1alpha1.InterceptActive {
			c.Hosts, c.OwnDNS = g.Hosts, g.OwnDNS
		}
		for _, p := range in.Status.Ports {
			c.Ports = append(c.Ports, control.Port{Protocol: p.Protocol, Number: uint16(p.ContainerPort)})
		}
		if ok && len(c.Ports) == 0 { // the first flows come before the object says so
			c.Ports = g.Ports
		}
		if r := in.Status.Replace; r != nil {
			c.Replace, c.ReplaceUID = r.Name, r.UID
		}
		out = append(out, c)
	}
	// Those that are gone as objects, and whose traffic comes to the laptop until all agents know, or until the app that they replace is back.
	inForce := m.engaged.where(func(g engagement) bool { return g.Session == session })
	ending := m.agents.known(session) // after the engagements: what has just left those is here
	for _, g := range inForce {
		ending[g.UID] = g
	}
	for i := range list.Items {
		delete(ending, list.Items[i].UID)
	}
	for _, uid := range slices.Sorted(maps.Keys(ending)) {
		g := ending[uid]
		if exists, err := m.exists(ctx, g); err != nil {
			return nil, err
		} else if exists { // and is listed for the session that has it now, or here in a moment
			continue
		}
		c := control.Intercept{
			UID: string(g.UID), Namespace: g.Workload.Namespace, State: control.StateEnding, Kind: g.Workload.Kind, Workload: g.Workload.Name,
			Ports: g.Ports, Container: g.Container, Message: "its agents are being told",
		}
		if g.Ending {
			c.Message = "bringing container " + g.Container + " back"
		}
		out = append(out, c)
	}
	return out, nil
}
