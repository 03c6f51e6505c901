package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// The chart's Services lead to pods with labelPart: partActive. A pod is made with it and takes it off itself before it says that it is ready, if another
// leads: so it can be ready, as rollouts, disruption budgets and helm --wait want it, without being in the Services. Releases from before there were
// several replicas have the label too, which is why it is this one: an upgrade has never Services without a pod. They lack labelReplica, and nobody takes
// them out.
const (
	labelName    = "app.kubernetes.io/name"
	labelRelease = "app.kubernetes.io/instance"
	labelPart    = "app.kubernetes.io/part-of"
	labelReplica = "doppel.dev/replica"
	partActive   = "doppel"
	partStandby  = "doppel-standby"
)

const (
	// placeEvery is how often the labels are looked at, besides events; placeRetry is when that failed.
	placeEvery = 5 * time.Second
	placeRetry = 200 * time.Millisecond
	// handOver is how long a leader that is told to end goes on with its tunnels, until the next one is in the Services.
	handOver = 3 * time.Second
)

// place keeps the pod that leads in the Services, and others out of them.
type place struct {
	e      *election
	kc     client.Client // unfenced, without a cache
	fenced client.Client
	pod    client.ObjectKey
	log    *slog.Logger

	open  chan struct{} // closed when we lead and listen
	kick  chan struct{} // a pod has changed; capacity 1
	taken atomic.Bool   // in the Services, or out of them: we are what we have to be
}

func newPlace(e *election, fenced client.Client, cfg Config) *place {
	return &place{
		e: e, kc: e.kc, fenced: fenced, pod: client.ObjectKey{Namespace: cfg.Namespace, Name: cfg.PodName}, log: cfg.Log,
		open: make(chan struct{}), kick: make(chan struct{}, 1),
	}
}

func (p *place) run(ctx context.Context) error {
	opened, stood := p.open, p.e.stood
	for {
		wait := placeEvery
		if err := p.step(ctx); err != nil && ctx.Err() == nil {
			p.log.Warn("labels of the traffic-manager's pods not looked at or not written", "err", err)
			wait = placeRetry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-opened:
			opened = nil
		case <-stood:
			stood = nil
		case <-p.kick:
		case <-time.After(wait):
		}
	}
}

// step does what is due.
func (p *place) step(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	var own corev1.Pod
	if err := p.kc.Get(ctx, p.pod, &own); err != nil {
		return err
	}
	switch {
	case closed(p.open):
		if !p.e.leads() { // whoever leads now puts the labels right
			return nil
		}
		if err := p.label(ctx, p.fenced, &own, partActive); err != nil {
			return err
		}
		p.taken.Store(true)
		if ready(&own) { // before, Services without the others would have nobody
			return p.alone(ctx, &own)
		}
	case closed(p.e.stood) && !closed(p.e.won):
		if err := p.label(ctx, p.kc, &own, partStandby); err != nil {
			return err
		}
		p.taken.Store(true)
	}
	return nil
}

// alone takes the other pods of the release out of the Services: of those that are dead Kubernetes may not know it yet.
func (p *place) alone(ctx context.Context, own *corev1.Pod) error {
	others, err := p.others(ctx, own)
	for i := range others {
		err = errors.Join(err, p.label(ctx, p.fenced, &others[i], partStandby))
	}
	return err
}

// others are the pods of the other replicas.
func (p *place) others(ctx context.Context, own *corev1.Pod) ([]corev1.Pod, error) {
	var list corev1.PodList
	err := p.kc.List(ctx, &list, client.InNamespace(p.pod.Namespace), client.MatchingLabels{
		labelName: own.Labels[labelName], labelRelease: own.Labels[labelRelease], labelReplica: "true",
	})
	return slices.DeleteFunc(list.Items, func(o corev1.Pod) bool { return o.Name == own.Name }), err
}

func (p *place) label(ctx context.Context, by client.Client, pod *corev1.Pod, part string) error {
	if pod.Labels[labelPart] == part {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]string{labelPart: part}}})
	if err != nil {
		return err
	}
	if err := client.IgnoreNotFound(by.Patch(ctx, pod, client.RawPatch(types.MergePatchType, patch))); err != nil {
		return fmt.Errorf("label pod %s: %w", pod.Name, err)
	}
	p.log.Info("pod labelled", "pod", pod.Namespace+"/"+pod.Name, "part", part)
	return nil
}

// handedOver waits until another replica is in our place, if there is one that could be, for a while.
func (p *place) handedOver(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, handOver)
	defer cancel()
	for {
		var own corev1.Pod
		if err := p.kc.Get(ctx, p.pod, &own); err != nil || own.Labels[labelPart] != partActive {
			return
		}
		others, err := p.others(ctx, &own)
		if err != nil || !slices.ContainsFunc(others, func(o corev1.Pod) bool { return o.DeletionTimestamp == nil }) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-p.kick:
		case <-time.After(placeRetry):
		}
	}
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// hear has the Lease and the labels looked at when the Lease or one of the manager's pods changes.
func (p *place) hear(ctx context.Context, kube *rest.Config, scheme *runtime.Scheme) error {
	ours := labels.SelectorFromSet(labels.Set{labelName: objectName})
	c, err := cache.New(kube, cache.Options{
		Scheme: scheme, DefaultNamespaces: map[string]cache.Config{p.pod.Namespace: {}},
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}:           {Label: ours},
			&coordinationv1.Lease{}: {Field: fields.OneTermEqualSelector("metadata.name", objectName)},
		},
	})
	if err != nil {
		return err
	}
	for o, hear := range map[client.Object][]chan struct{}{&coordinationv1.Lease{}: {p.e.kick}, &corev1.Pod{}: {p.e.kick, p.kick}} {
		inf, err := c.GetInformer(ctx, o, cache.BlockUntilSynced(false))
		if err != nil {
			return err
		}
		kick := func(any) {
			for _, ch := range hear {
				select {
				case ch <- struct{}{}:
				default: // one is due
				}
			}
		}
		if _, err := inf.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
			AddFunc: kick, UpdateFunc: func(_, now any) { kick(now) }, DeleteFunc: kick,
		}); err != nil {
			return err
		}
	}
	return c.Start(ctx)
}
