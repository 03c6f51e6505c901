package manager

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
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
	holderIndex = "doppel.dev/holder" // intercepts by the session that they go to
	uidIndex    = "doppel.dev/uid"    // sessions
)

func holderOf(o client.Object) []string { return []string{o.(*v1alpha1.Intercept).Holder()} }

func uidOf(o client.Object) []string { return []string{string(o.GetUID())} }

// setupControllers registers the reconcilers.
func (m *Manager) setupControllers(ctx context.Context) error {
	ix := m.ctrl.GetFieldIndexer()
	if err := errors.Join(ix.IndexField(ctx, &v1alpha1.Intercept{}, holderIndex, holderOf), ix.IndexField(ctx, &v1alpha1.Session{}, uidIndex, uidOf)); err != nil {
		return fmt.Errorf("index sessions and intercepts: %w", err)
	}
	r := newInterceptReconciler(m)
	return builder.ControllerManagedBy(m.ctrl).
		Named("intercepts").
		For(&v1alpha1.Intercept{}).
		Watches(&v1alpha1.Session{}, handler.EnqueueRequestsFromMapFunc(m.interceptsOfSession)).
		WatchesRawSource(source.Channel(m.wakeups, handler.EnqueueRequestsFromMapFunc(m.interceptsOfWorkload))).
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}). // the order of intercepts decides conflicts
		Complete(r)
}

// wake has the intercepts of a workload looked at again.
func (m *Manager) wake(w workloadKey) {
	e := event.GenericEvent{Object: &v1alpha1.Intercept{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.Namespace},
		Spec:       v1alpha1.InterceptSpec{Workload: v1alpha1.WorkloadRef{Kind: w.Kind, Name: w.Name}},
	}}
	select {
	case m.wakeups <- e:
	default: // the queue is full of wake-ups; pending intercepts are polled anyway
	}
}

func (m *Manager) interceptsOfWorkload(ctx context.Context, o client.Object) []reconcile.Request {
	ref := o.(*v1alpha1.Intercept).Spec.Workload
	return m.interceptsWhere(ctx, o.GetNamespace(), func(in *v1alpha1.Intercept) bool { return in.Spec.Workload == ref })
}

func (m *Manager) interceptsOfSession(ctx context.Context, o client.Object) []reconcile.Request {
	user := o.(*v1alpha1.Session).Spec.User
	return m.interceptsWhere(ctx, "", func(in *v1alpha1.Intercept) bool {
		return in.Spec.Session == string(o.GetUID()) || in.Spec.Session == "" && in.Spec.User == user
	})
}

func (m *Manager) interceptsWhere(ctx context.Context, ns string, match func(*v1alpha1.Intercept) bool) []reconcile.Request {
	var list v1alpha1.InterceptList
	if err := m.ctrl.GetClient().List(ctx, &list, client.InNamespace(ns)); err != nil {
		m.cfg.Log.Warn("list intercepts", "err", err)
		return nil
	}
	var out []reconcile.Request
	for i := range list.Items {
		if match(&list.Items[i]) {
			out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
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
	// Those that are gone as objects, and whose traffic comes to the laptop until the app is back.
	for _, g := range m.engaged.where(func(g engagement) bool { return g.Mode == v1alpha1.ModeReplace && g.Session == session }) {
		if !slices.ContainsFunc(out, func(c control.Intercept) bool { return c.UID == string(g.UID) }) {
			out = append(out, control.Intercept{
				UID: string(g.UID), Namespace: g.Workload.Namespace, State: control.StateEnding, Kind: g.Workload.Kind, Workload: g.Workload.Name,
				Ports: g.Ports, Container: g.Container, Message: "bringing container " + g.Container + " back",
			})
		}
	}
	return out, nil
}
