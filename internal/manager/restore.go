package manager

import (
	"context"
	"errors"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/kinds"
)

// restorePoll is how often pods are looked for in which a stand-in is that nobody wants, besides when an intercept ends; restoringPoll is the
// same while there are some.
const (
	restorePoll   = 10 * time.Second
	restoringPoll = 300 * time.Millisecond
)

// restorer brings containers back that were replaced. All it needs to know is in the cluster: a pod says by label and annotation that
// a stand-in is in it, and an intercept that wants it is there or not. So it does not matter who ended the intercept, or whether this
// manager ran at the time.
type restorer struct {
	m    *Manager
	kick chan struct{}
}

func newRestorer(m *Manager) *restorer {
	r := &restorer{m: m, kick: make(chan struct{}, 1)}
	m.engaged.onChange(func(g engagement) {
		if g.Mode == v1alpha1.ModeReplace { // others leave no stand-in
			r.wake()
		}
	})
	return r
}

func (r *restorer) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

func (r *restorer) run(ctx context.Context) error {
	for again := restoringPoll; ; {
		pause := restorePoll
		under, err := r.look(ctx)
		switch {
		case err != nil: // later and later
			if ctx.Err() == nil {
				r.m.cfg.Log.Warn("replaced containers not restored", "err", err)
			}
			pause, again = again, min(2*again, restorePoll)
		case under:
			pause, again = restoringPoll, restoringPoll
		default:
			again = restoringPoll
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.kick:
		case <-time.After(pause):
		}
	}
}

// look restarts the workloads of pods with a stand-in that nobody wants, and ends the traffic of intercepts whose app is back. It says whether
// there is more to do soon.
func (r *restorer) look(ctx context.Context) (under bool, err error) {
	with, err := r.standIns(ctx)
	if err != nil {
		return false, err
	}
	pods := map[workloadKey][]*corev1.Pod{}
	var unknown error
	for i := range with {
		w, e := r.m.workloadOf(ctx, &with[i])
		if apierrors.IsNotFound(e) { // its ReplicaSet is gone, and the pod is about to be; its agent has said whose it is
			w, e = r.m.agents.workloadOf(with[i].UID)
		}
		if unknown = errors.Join(unknown, client.IgnoreNotFound(e)); e == nil {
			pods[w] = append(pods[w], &with[i])
		}
	}
	for w, of := range pods {
		more, e := r.restore(ctx, w, of)
		under, err = under || more, errors.Join(err, e)
	}
	if unknown != nil { // laptops answer on while it is not known whose pods these are
		return true, errors.Join(err, unknown)
	}
	for _, g := range r.m.engaged.where(func(g engagement) bool { return g.Ending }) {
		if reached := slices.ContainsFunc(pods[g.Workload], func(p *corev1.Pod) bool {
			c := agentOf(p)
			return c != nil && c.StandsIn(g.Container) && (p.DeletionTimestamp == nil || r.m.clock.within(agentcfg.StandInDrain, deletedAt(p)))
		}); reached && r.m.laptops.tunnel(g.Session) != nil {
			under = true
			continue
		}
		r.m.engaged.remove(g.UID)
		r.m.notifyIntercepts()
	}
	return under, err
}

// standIns are the pods with a stand-in, of the namespaces that the manager may look at.
func (r *restorer) standIns(ctx context.Context) (pods []corev1.Pod, err error) {
	namespaces := r.m.allowed
	if !r.m.narrow() {
		namespaces = []string{corev1.NamespaceAll}
	}
	for _, ns := range namespaces {
		var list corev1.PodList
		if err := r.m.ctrl.GetAPIReader().List(ctx, &list, client.InNamespace(ns), client.HasLabels{agentcfg.LabelStandIn}); err != nil {
			return nil, err
		}
		pods = append(pods, list.Items...)
	}
	return pods, nil
}

// restore restarts a workload if a stand-in is in one of its pods that nobody wants. A pod of an older template is about to be
// replaced already.
func (r *restorer) restore(ctx context.Context, key workloadKey, pods []*corev1.Pod) (under bool, err error) {
	wanted, known, err := r.wanted(ctx, key)
	if err != nil || !known {
		return true, err
	}
	vain := slices.DeleteFunc(slices.Clone(pods), func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil || !inVain(p, wanted) })
	if len(vain) == 0 {
		return false, nil
	}
	w, err := r.m.loadWorkload(ctx, key.Namespace, v1alpha1.WorkloadRef{Kind: key.Kind, Name: key.Name})
	var p *problem
	if errors.As(err, &p) || err == nil && w.How != kinds.ByController {
		return false, nil // it is gone, and its pods are about to be
	}
	if err != nil {
		return true, err
	}
	if !slices.ContainsFunc(vain, func(p *corev1.Pod) bool { return !w.Outdated(p) }) {
		return true, nil
	}
	r.m.cfg.Log.Info("restarting a workload to bring its container back", "workload", key.Namespace+"/"+key.Name)
	return true, w.restart(ctx, r.m)
}

// wanted are the containers of a workload that are to be replaced. That is not known while there are intercepts which have not been looked at
// since this manager leads.
func (r *restorer) wanted(ctx context.Context, key workloadKey) (containers []string, known bool, err error) {
	var list v1alpha1.InterceptList
	if err := r.m.ctrl.GetClient().List(ctx, &list, client.InNamespace(key.Namespace)); err != nil {
		return nil, false, err
	}
	for i := range list.Items {
		in := &list.Items[i]
		if in.Spec.Mode != v1alpha1.ModeReplace || in.Spec.Workload.Kind != key.Kind || in.Spec.Workload.Name != key.Name || in.Status.State == v1alpha1.InterceptFailed {
			continue
		}
		if _, looked := r.m.looked.Load(in.UID); !looked {
			return nil, false, nil
		}
	}
	return r.m.engaged.replaced(key), true, nil
}
