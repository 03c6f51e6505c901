package manager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// leaseDuration is for how long a holder that says nothing is believed to lead, and leaseValid for how long one that could not renew believes it itself:
	// less, so that never two of them write.
	leaseDuration = 10 * time.Second
	leaseValid    = 7 * time.Second
	// leaseRenew is how often the holder renews, and leaseLook how often others look, besides events; leaseRetry is when either failed.
	leaseRenew = 2 * time.Second
	leaseLook  = time.Second
	leaseRetry = 200 * time.Millisecond
	// leaseTimeout bounds one look, with the writing that follows from it.
	leaseTimeout = 2 * time.Second
	// leaderNew is how long a leader is a new one: all intercepts are looked at, and laptops and agents find it.
	leaderNew = 10 * time.Second
)

// election decides which replica of the manager leads, which is to say works: the one that holds the Lease.
//
//	standing by ──nobody holds it, or its holder is dead or silent──▶ leading ──somebody else holds it──▶ the process ends
//
// client-go has one that waits until a Lease runs out. This one also looks whether its holder is there, so that after a death nobody waits, and it does
// not give up a Lease that nobody else has taken: while no API server answers, tunnels live on.
type election struct {
	kc    client.Client // unfenced, without a cache
	log   *slog.Logger
	lease client.ObjectKey // also the name of the ConfigMap with which it goes
	pod   string           // ours
	me    string           // our pod and this process: what is started again in the same pod is somebody else
	onWin func()           // before won is closed
	kick  chan struct{}    // the Lease or a pod has changed; capacity 1
	won   chan struct{}    // closed once we lead
	stood chan struct{}    // closed once we know that another leads

	mu sync.Mutex
	// guarded by mu
	until  time.Time     // when our leading ends unless we renew; zero: we do not lead
	again  chan struct{} // closed when we have renewed, or do not lead any more; nil: we do not
	writes sync.WaitGroup

	// of run's goroutine only
	renewed time.Time // when the last renewal was begun
	heard   string    // the Lease as it was when the holder said something last
	heardAt time.Time
	looked  time.Time // the last look that succeeded
}

func newElection(kc client.Client, namespace, pod string, log *slog.Logger) *election {
	return &election{
		kc: kc, log: log, lease: client.ObjectKey{Namespace: namespace, Name: objectName}, pod: pod, me: pod + "_" + string(uuid.NewUUID()), onWin: func() {},
		kick: make(chan struct{}, 1), won: make(chan struct{}), stood: make(chan struct{}),
	}
}

// errDeposed ends the process: its tables and tunnels are those of a leader, and a new process stands by with none.
var errDeposed = errors.New("another replica leads now")

// errNotLeading is what a write gets of one that does not lead.
var errNotLeading = errors.New("this replica of the traffic-manager does not lead")

// newLeader says whether we have only just begun to lead.
func (m *Manager) newLeader() bool { return time.Since(m.started) < leaderNew }

// run stands by and leads until ctx ends, and gives the Lease back then; errDeposed if another has it.
func (e *election) run(ctx context.Context) error {
	for ctx.Err() == nil {
		wait := leaseRenew
		switch err := e.step(ctx); {
		case errors.Is(err, errDeposed):
			return err
		case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err): // another wrote it meanwhile
			wait = leaseRetry
		case err != nil && ctx.Err() == nil:
			e.log.Warn("lease not looked at or not written", "err", err)
			wait = leaseRetry
		case !e.leads():
			wait = leaseLook
		}
		select {
		case <-ctx.Done():
		case <-e.kick:
		case <-time.After(wait):
		}
	}
	e.resign()
	return nil
}

// leading is fn, once we lead.
func (e *election) leading(fn func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-e.won:
			return fn(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// leads says whether we lead at this moment.
func (e *election) leads() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return time.Now().Before(e.until)
}

// step does what is due.
func (e *election) step(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	var l coordinationv1.Lease
	err := e.kc.Get(ctx, e.lease, &l)
	if apierrors.IsNotFound(err) {
		return e.create(ctx)
	}
	if err != nil {
		return err
	}
	holder := holderOfLease(&l)
	if holder == e.me {
		if time.Since(e.renewed) < leaseRenew-leaseRetry { // an event, ours mostly
			return nil
		}
		return e.write(ctx, &l)
	}
	if closed(e.won) {
		e.leadUntil(time.Time{})
		return fmt.Errorf("%w: %s", errDeposed, holder)
	}
	why, err := e.vacant(ctx, &l)
	if err != nil {
		return err
	}
	if why == "" {
		e.stand()
		return nil
	}
	e.log.Info("taking the lease", "holder", holder, "why", why)
	now := metav1.NowMicro()
	l.Spec.AcquireTime = &now
	transitions := int32(1)
	if n := l.Spec.LeaseTransitions; n != nil {
		transitions += *n
	}
	l.Spec.LeaseTransitions = &transitions
	return e.write(ctx, &l)
}

// stand notes that another leads.
func (e *election) stand() {
	if !closed(e.stood) {
		e.log.Info("standing by")
		close(e.stood)
	}
}

// create makes the Lease, which is ours then. It goes with the release: its owner is the chart's.
func (e *election) create(ctx context.Context) error {
	var c corev1.ConfigMap
	if err := e.kc.Get(ctx, e.lease, &c); err != nil {
		return err
	}
	now := metav1.NowMicro()
	l := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: e.lease.Namespace, Name: e.lease.Name,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: c.Name, UID: c.UID}},
		},
		Spec: coordinationv1.LeaseSpec{AcquireTime: &now},
	}
	return e.write(ctx, l)
}

// write says that we hold the Lease, if nobody has written it since it was read.
func (e *election) write(ctx context.Context, l *coordinationv1.Lease) error {
	began, now, seconds := time.Now(), metav1.NowMicro(), int32(leaseDuration/time.Second)
	l.Spec.HolderIdentity, l.Spec.RenewTime, l.Spec.LeaseDurationSeconds = &e.me, &now, &seconds
	var err error
	if l.ResourceVersion == "" {
		err = e.kc.Create(ctx, l)
	} else {
		err = e.kc.Update(ctx, l)
	}
	if err != nil {
		return err
	}
	e.renewed = began
	e.leadUntil(began.Add(leaseValid))
	if !closed(e.won) {
		e.log.Info("leading", "holder", e.me)
		e.onWin()
		close(e.won)
	}
	return nil
}

// leadUntil has us lead until then, or not any more; it says whether we did before.
func (e *election) leadUntil(until time.Time) (led bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	led = !e.until.IsZero()
	e.until = until
	if e.again != nil {
		close(e.again)
	}
	if e.again = nil; !until.IsZero() {
		e.again = make(chan struct{})
	}
	return led
}

// vacant says why the Lease may be taken, or "".
func (e *election) vacant(ctx context.Context, l *coordinationv1.Lease) (string, error) {
	holder, now := holderOfLease(l), time.Now()
	if holder == "" {
		return "nobody holds it", nil
	}
	// Clocks of nodes differ, so that what counts is when we saw it change; and whoever could not look, or nobody, cannot say that its holder is silent.
	if said := holder + " " + l.ResourceVersion; said != e.heard || now.Sub(e.looked) > leaseDuration/2 {
		e.heard, e.heardAt = said, now
	}
	e.looked = now
	if now.Sub(e.heardAt) >= leaseDuration {
		return "its holder is silent", nil
	}
	return e.dead(ctx, l)
}

// dead says how it is known that the process which holds the Lease is not there any more, or "".
func (e *election) dead(ctx context.Context, l *coordinationv1.Lease) (string, error) {
	name, _, _ := strings.Cut(holderOfLease(l), "_")
	if name == e.pod {
		return "its holder ran in this pod before us", nil // the kubelet starts a container again once it has ended
	}
	var p corev1.Pod
	err := e.kc.Get(ctx, client.ObjectKey{Namespace: e.lease.Namespace, Name: name}, &p)
	if apierrors.IsNotFound(err) {
		return "its holder's pod is gone", nil
	}
	if err != nil {
		return "", err
	}
	if p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded {
		return "its holder's pod has ended", nil
	}
	for _, c := range p.Status.ContainerStatuses {
		for _, s := range []corev1.ContainerState{c.State, c.LastTerminationState} {
			// Both times are by the clock of the pod's node, this one cut to seconds: so it is not the end of a process before the holder.
			if t := s.Terminated; c.Name == objectName && t != nil && l.Spec.AcquireTime != nil && !t.FinishedAt.Time.Before(l.Spec.AcquireTime.Time) {
				return "its holder's container has ended", nil
			}
		}
	}
	return "", nil
}

func holderOfLease(l *coordinationv1.Lease) string {
	if l.Spec.HolderIdentity == nil {
		return ""
	}
	return *l.Spec.HolderIdentity
}

// resign ends our leading, waits for writes that are under way, and tells the others.
func (e *election) resign() {
	if !e.leadUntil(time.Time{}) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaseTimeout)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); e.writes.Wait() }()
	select {
	case <-done:
	case <-ctx.Done():
	}
	var l coordinationv1.Lease
	err := e.kc.Get(ctx, e.lease, &l)
	if err == nil && holderOfLease(&l) == e.me {
		nobody := ""
		l.Spec.HolderIdentity = &nobody
		err = e.kc.Update(ctx, &l)
	}
	if err != nil {
		e.log.Warn("lease not given back", "err", err)
		return
	}
	e.log.Info("lease given back")
}

// fence lets requests that change something pass only while we lead.
func (e *election) fence(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		if r.Method == http.MethodGet || r.URL.Query().Get("dryRun") == metav1.DryRunAll {
			return next.RoundTrip(r)
		}
		if !e.beginWrite(r.Context()) {
			if r.Body != nil {
				_ = r.Body.Close()
			}
			return nil, errNotLeading
		}
		defer e.writes.Done()
		return next.RoundTrip(r)
	})
}

// beginWrite says whether we lead. If that is open since no API server has answered for a while, it waits until that is known: few who write try again.
func (e *election) beginWrite(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	for {
		e.mu.Lock()
		leads, again := time.Now().Before(e.until), e.again
		if leads {
			e.writes.Add(1)
		}
		e.mu.Unlock()
		if leads || again == nil {
			return leads
		}
		select {
		case <-again:
		case <-ctx.Done():
			return false
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
