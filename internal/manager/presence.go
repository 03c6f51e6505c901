package manager

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/kinds"
)

// What Config.Injection may say.
const (
	InjectOnDemand    = "onDemand"    // whatever is not annotated otherwise, when it is intercepted
	InjectEnabledOnly = "enabledOnly" // only what is annotated doppel.dev/inject: enabled
)

const (
	// presenceInterval is how often pods are compared with what they should be; of workloads that differ one is restarted.
	presenceInterval = 5 * time.Second
	// webhookLag is how long an API server may not know of the webhook's certificate yet.
	webhookLag = 5 * time.Second
	// rollTimeout is how long one workload's restart holds up the next.
	rollTimeout = 2 * time.Minute
	// rollPause is how long a workload is left alone after a restart, whoever asked for it: what did not help will not help at once.
	rollPause = 10 * time.Minute
)

// presence has agents in pods that should have one, and out of those that should not, also where the pods are older than the annotation's
// meaning: the chart's policy has changed, or pods were created while no manager ran. It restarts workloads where nothing is lost by it, one after
// the other, and each once.
type presence struct {
	m   *Manager
	now func() time.Time

	mu sync.Mutex
	// guarded by mu
	ready    time.Time                 // since when the API server can ask the webhook; zero: it cannot
	released map[workloadKey]time.Time // when the last intercept of a workload ended

	// of run's goroutine only
	rolled map[workloadKey]int64 // generation of a workload's object that our restart made
	last   workloadKey           // the one that was restarted last
	lastAt time.Time
}

func newPresence(m *Manager) *presence {
	p := &presence{m: m, now: time.Now, released: map[workloadKey]time.Time{}, rolled: map[workloadKey]int64{}}
	m.engaged.onChange(func(g engagement) { // an intercept begins or ends
		p.mu.Lock()
		defer p.mu.Unlock()
		p.released[g.Workload] = p.now()
	})
	return p
}

// webhookReady notes that the webhook's configuration is as it has to be.
func (p *presence) webhookReady() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ready.IsZero() {
		p.ready = p.now()
	}
}

func (p *presence) run(ctx context.Context) error {
	if p.m.cfg.NoWebhook {
		return nil
	}
	tick := time.NewTicker(presenceInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := p.check(ctx); err != nil && ctx.Err() == nil {
			p.m.cfg.Log.Warn("agents' presence not checked", "err", err)
		}
	}
}

// discord is why a pod is not as it should be.
type discord string

const (
	lacksAgent discord = "its pods are to have a traffic-agent (doppel.dev/inject: enabled) and were created without"
	disabled   discord = "its pods are to have no traffic-agent (doppel.dev/inject: disabled)"
	notEnabled discord = "its pods have a traffic-agent that agent.injection: enabledOnly does not allow"
	idle       discord = "it was not intercepted for longer than agent.idleTimeout"
)

// judge compares a pod with what it should be, as far as the pod itself tells.
func (p *presence) judge(pod *corev1.Pod) discord {
	has := pod.Annotations[agentcfg.Annotation] != ""
	keeps := agentcfg.Keeps(pod.Annotations)
	switch {
	case pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return ""
	case keeps && !has && pod.CreationTimestamp.Time.Before(p.m.started): // later ones we were asked about, or cannot be
		return lacksAgent
	case has && agentcfg.Forbids(pod.Annotations):
		return disabled
	case has && !keeps && p.m.cfg.Injection == InjectEnabledOnly:
		return notEnabled
	case has && !keeps && p.m.cfg.IdleTimeout > 0 && p.now().Sub(pod.CreationTimestamp.Time) > p.m.cfg.IdleTimeout && p.now().Sub(p.m.started) > p.m.cfg.IdleTimeout:
		return idle
	}
	return ""
}

// check restarts the first workload that is not as it should be.
func (p *presence) check(ctx context.Context) error {
	p.mu.Lock()
	ready := !p.ready.IsZero() && p.now().Sub(p.ready) > webhookLag
	p.mu.Unlock()
	if !ready || !p.settled(ctx) {
		return nil
	}
	var pods corev1.PodList
	if err := p.m.ctrl.GetClient().List(ctx, &pods, client.UnsafeDisableDeepCopy); err != nil { // nothing is changed here
		return err
	}
	// One pod of each owner: the others say the same.
	found := map[types.UID]*corev1.Pod{}
	for i := range pods.Items {
		pod := &pods.Items[i]
		if o := metav1.GetControllerOf(pod); o != nil && p.m.injects(pod.Namespace) && p.judge(pod) != "" {
			found[o.UID] = pod
		}
	}
	var errs error // of one workload that cannot be restarted: the others are none the worse
	for _, pod := range slices.SortedFunc(maps.Values(found), func(a, b *corev1.Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	}) {
		done, err := p.roll(ctx, pod, p.judge(pod))
		if errs = errors.Join(errs, err); done {
			break
		}
	}
	return errs
}

// injects says whether pods of a namespace may have agents at all; the webhook's configuration says the same.
func (m *Manager) injects(ns string) bool {
	return ns != metav1.NamespaceSystem && ns != m.cfg.Namespace && m.responsible(ns)
}

// settled says whether the workload that was restarted last is up again, or has had its time.
func (p *presence) settled(ctx context.Context) bool {
	if p.last == (workloadKey{}) || p.now().Sub(p.lastAt) > rollTimeout {
		return true
	}
	w, err := p.load(ctx, p.last)
	return w == nil && err == nil || w != nil && w.settled()
}

// settled says whether the pods are all there and ready, and no others.
func (w *workload) settled() bool {
	return w.Observed && len(w.pods) == int(w.Replicas) && !slices.ContainsFunc(w.pods, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil || !ready(&p) })
}

// load reads a workload; nil is one that is gone or cannot be intercepted.
func (p *presence) load(ctx context.Context, key workloadKey) (*workload, error) {
	w, err := p.m.loadWorkload(ctx, key.Namespace, v1alpha1.WorkloadRef{Kind: key.Kind, Name: key.Name})
	var no *problem
	if errors.As(err, &no) {
		return nil, nil
	}
	return w, err
}

// roll restarts the workload of a pod, if that is lossless and of use.
func (p *presence) roll(ctx context.Context, pod *corev1.Pod, why discord) (bool, error) {
	key, err := p.m.workloadOf(ctx, pod)
	if err != nil {
		return false, client.IgnoreNotFound(errors.Unwrap(err)) // its ReplicaSet is gone, and the pod goes after it
	}
	if len(p.m.engaged.of(key)) > 0 || why == idle && p.now().Sub(p.releasedAt(key)) <= p.m.cfg.IdleTimeout {
		return false, nil
	}
	w, err := p.load(ctx, key)
	if err != nil || w == nil {
		return false, err
	}
	generation, before := p.rolled[key]
	if w.How != kinds.ByController || w.Why != "" || !w.settled() || before && generation == w.Object.GetGeneration() {
		return false, nil
	}
	if why != idle && p.now().Sub(w.RestartedAt()) < rollPause { // what is idle has been left alone for long enough
		return false, nil
	}
	if why == lacksAgent {
		if ok, err := p.m.injectable(ctx, w); !ok || err != nil {
			return false, err
		}
		if ok, err := p.m.reached(ctx); !ok || err != nil {
			return false, err
		}
	}
	if err := w.restart(ctx, p.m); err != nil {
		return false, err
	}
	p.m.cfg.Log.Info("restarting a workload", "namespace", key.Namespace, "workload", key.Name, "why", string(why))
	p.rolled[key], p.last, p.lastAt = w.Object.GetGeneration(), key, p.now()
	p.m.tell(ctx, types.UID(strconv.FormatInt(p.now().Unix(), 10)), record{workload: w.reference(), text: "restarted once by doppel: " + string(why)}, eventRestarted)
	return true, nil
}

func (p *presence) releasedAt(key workloadKey) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.released[key]
}

// injectable says whether new pods of a workload would get an agent.
func (m *Manager) injectable(ctx context.Context, w *workload) (bool, error) {
	pod := &corev1.Pod{ObjectMeta: *w.Template.ObjectMeta.DeepCopy(), Spec: w.Template.Spec}
	pod.Namespace = w.key.Namespace
	take, _, err := m.ports(ctx, pod, nil)
	if err != nil || len(take) == 0 {
		return false, err
	}
	_, err = inject.Pod(pod, inject.Config{Ports: take})
	return err == nil, nil
}
