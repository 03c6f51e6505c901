package manager

import (
	"context"
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
	subs map[chan struct{}]struct{}
}

func (w *watchers) add() chan struct{} {
	ch := make(chan struct{}, 1)
	ch <- struct{}{}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.subs == nil {
		w.subs = map[chan struct{}]struct{}{}
	}
	w.subs[ch] = struct{}{}
	return ch
}

func (w *watchers) remove(ch chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.subs, ch)
}

func (w *watchers) notify() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.subs {
		select {
		case ch <- struct{}{}:
		default: // one is due already
		}
	}
}

// setupControllers registers the reconcilers.
func (m *Manager) setupControllers(context.Context) error {
	r := &interceptReconciler{m: m, restarted: map[types.UID]restart{}, inForce: map[types.UID]record{}, names: map[types.NamespacedName]types.UID{}}
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
func (m *Manager) notifyIntercepts() { m.watchers.notify() }

// watchIntercepts sends a session's intercepts at the start and whenever they change.
func (m *Manager) watchIntercepts(ctx context.Context, session types.UID, send func(any) error) error {
	ch := m.watchers.add()
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
		now := control.Intercepts{Items: items}
		if p := m.policy.problem(); p != "" {
			now.Problems = append(now.Problems, p)
		}
		if m.noEcho != nil {
			now.Problems = append(now.Problems, "ping of cluster addresses gets no answer: the traffic-manager's pod may not send ICMP echo ("+m.noEcho.Error()+
				"); keep the chart's manager.podSecurityContext.sysctls, or allow its net.ipv4.ping_group_range")
		}
		if !first && slices.Equal(now.Items, last.Items) && slices.Equal(now.Problems, last.Problems) {
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
	if err := m.ctrl.GetClient().List(ctx, &list); err != nil {
		return nil, err
	}
	out := []control.Intercept{}
	for i := range list.Items {
		in := &list.Items[i]
		if in.Holder() != string(session) {
			continue
		}
		c := control.Intercept{
			UID: string(in.UID), Namespace: in.Namespace, Name: in.Name, State: string(in.Status.State), Reason: in.Status.Reason,
			Message: in.Status.Message, Declared: in.Spec.Session == "", Agents: in.Status.Agents, Kind: in.Spec.Workload.Kind, Workload: in.Spec.Workload.Name,
		}
		if len(in.Status.Ports) > 0 {
			c.Port, c.Protocol = uint16(in.Status.Ports[0].ContainerPort), in.Status.Ports[0].Protocol
		}
		if r := in.Status.Replace; r != nil {
			c.Replace, c.ReplaceUID = r.Name, r.UID
		}
		out = append(out, c)
	}
	return out, nil
}
