package manager

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

// replicas is an API server with what an election reads.
func replicas(objs ...client.Object) client.WithWatch {
	objs = append(objs, &corev1.ConfigMap{ObjectMeta: meta("doppel", objectName)})
	return fake.NewClientBuilder().WithScheme(scheme()).WithRESTMapper(mapper()).WithObjects(objs...).Build()
}

func replica(name string, change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: meta("doppel", name), Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	p.Labels = map[string]string{labelName: objectName, labelRelease: "r", labelPart: partActive, labelReplica: "true"}
	if change != nil {
		change(p)
	}
	return p
}

// candidate is one replica's part in an election.
type candidate struct {
	*election
	cut    atomic.Bool // its way to the API server is
	cancel context.CancelFunc
	done   chan error
}

var errCut = errors.New("cut")

func stand(t *testing.T, kc client.WithWatch, pod string) *candidate {
	t.Helper()
	c := &candidate{done: make(chan error, 1)}
	way := func() error {
		if c.cut.Load() {
			return errCut
		}
		return nil
	}
	c.election = newElection(interceptor.NewClient(kc, interceptor.Funcs{
		Get: func(ctx context.Context, k client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			return errors.Join(way(), k.Get(ctx, key, o, opts...))
		},
		Update: func(ctx context.Context, k client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
			if err := way(); err != nil {
				return err
			}
			return k.Update(ctx, o, opts...)
		},
	}), "doppel", pod, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	c.cancel = cancel
	go func() { c.done <- c.run(ctx) }()
	return c
}

// Whoever holds the Lease leads; when it ends in order the next one leads with its next look.
func TestElection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kc := replicas(replica("a", nil), replica("b", nil))
		a := stand(t, kc, "a")
		synctest.Wait()
		b := stand(t, kc, "b")
		synctest.Wait()
		if !a.leads() || b.leads() || !closed(b.stood) || closed(a.stood) {
			t.Fatalf("a leads: %v, b leads: %v", a.leads(), b.leads())
		}
		time.Sleep(time.Hour)
		if !a.leads() || b.leads() {
			t.Fatalf("an hour later a leads: %v, b leads: %v", a.leads(), b.leads())
		}
		a.cancel()
		if err := <-a.done; err != nil || a.leads() {
			t.Fatalf("a ended with %v, leads: %v", err, a.leads())
		}
		time.Sleep(leaseLook)
		synctest.Wait()
		if !b.leads() {
			t.Error("b does not lead")
		}
		var l coordinationv1.Lease
		if err := kc.Get(t.Context(), client.ObjectKey{Namespace: "doppel", Name: objectName}, &l); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(holderOfLease(&l), "b_") || *l.Spec.LeaseTransitions != 1 || len(l.OwnerReferences) != 1 || l.OwnerReferences[0].UID != objectName {
			t.Errorf("%+v", l)
		}
		b.cancel()
		<-b.done
	})
}

// An event is enough: nobody waits for the next look.
func TestElectionKick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kc := replicas(replica("a", nil), replica("b", nil))
		a := stand(t, kc, "a")
		synctest.Wait()
		b := stand(t, kc, "b")
		synctest.Wait()
		a.cancel()
		<-a.done
		began := time.Now()
		b.kick <- struct{}{}
		<-b.won
		if took := time.Since(began); took != 0 {
			t.Errorf("b leads %v after the event", took)
		}
		b.cancel()
		<-b.done
	})
}

// A leader that does not reach the API server ceases to lead before another begins, and ends when it hears of that.
func TestElectionCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kc := replicas(replica("a", nil), replica("b", nil))
		a := stand(t, kc, "a")
		synctest.Wait()
		b := stand(t, kc, "b")
		time.Sleep(time.Minute)
		a.cut.Store(true)
		began, ceased := time.Now(), time.Duration(0)
		for !b.leads() {
			if !a.leads() && ceased == 0 {
				ceased = time.Since(began)
			}
			if time.Since(began) > time.Minute {
				t.Fatal("b never leads")
			}
			time.Sleep(10 * time.Millisecond)
		}
		if ceased == 0 || a.leads() {
			t.Error("both led")
		}
		if took := time.Since(began); took < leaseDuration-leaseRenew || took > leaseDuration+2*leaseLook {
			t.Errorf("b leads after %v", took)
		}
		a.cut.Store(false)
		if err := <-a.done; !errors.Is(err, errDeposed) || a.leads() {
			t.Errorf("a ended with %v", err)
		}
		b.cancel()
		<-b.done
	})
}

// While no API server answers anybody, nobody is silent: the one that led goes on.
func TestElectionNoServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kc := replicas(replica("a", nil), replica("b", nil))
		a := stand(t, kc, "a")
		synctest.Wait()
		b := stand(t, kc, "b")
		time.Sleep(time.Minute)
		a.cut.Store(true)
		b.cut.Store(true)
		time.Sleep(5 * time.Minute)
		if a.leads() {
			t.Error("a writes although it cannot know who leads")
		}
		b.cut.Store(false) // the one that stands by is the first to reach it
		time.Sleep(leaseDuration / 2)
		if b.leads() {
			t.Fatal("b took over from one that could not say anything")
		}
		a.cut.Store(false)
		time.Sleep(time.Minute)
		if !a.leads() || b.leads() {
			t.Errorf("a leads: %v, b leads: %v", a.leads(), b.leads())
		}
		a.cancel()
		b.cancel()
		<-a.done
		<-b.done
	})
}

// When an API server answers again, what is to be written waits until it is known who leads, and is not lost.
func TestFenceWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := stand(t, replicas(replica("a", nil)), "a")
		time.Sleep(time.Minute)
		if a.cut.Store(true); !a.beginWrite(t.Context()) {
			t.Error("one that has just renewed may not write")
		}
		a.writes.Done()
		time.Sleep(time.Minute)
		if a.beginWrite(t.Context()) {
			t.Error("one that could not renew for a minute writes")
		}
		began := make(chan bool)
		go func() { began <- a.beginWrite(t.Context()) }()
		synctest.Wait()
		a.cut.Store(false)
		if !<-began {
			t.Error("the write was refused although nobody else leads")
		}
		a.writes.Done()
		a.cancel()
		<-a.done
	})
}

// Who is known to be dead is not waited for, and nobody else counts as dead.
func TestElectionDead(t *testing.T) {
	acquired := time.Now().Truncate(time.Second).Add(300 * time.Millisecond) // the kubelet's times are cut to seconds
	container := func(name string, last bool, finished time.Time) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			s := corev1.ContainerStatus{Name: name}
			ended := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: metav1.NewTime(finished.Truncate(time.Second))}}
			if s.State = ended; last {
				s.State, s.LastTerminationState = corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}, ended
			}
			p.Status.ContainerStatuses = []corev1.ContainerStatus{s}
		}
	}
	for name, tt := range map[string]struct {
		holder string
		pod    *corev1.Pod
		want   string
	}{
		"it runs":                               {"a_1", replica("a", nil), ""},
		"its first container is not reported":   {"a_1", replica("a", func(p *corev1.Pod) { p.Status = corev1.PodStatus{Phase: corev1.PodPending} }), ""},
		"nobody":                                {"", replica("a", nil), "nobody holds it"},
		"its pod is gone":                       {"a_1", nil, "its holder's pod is gone"},
		"its pod has failed":                    {"a_1", replica("a", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), "its holder's pod has ended"},
		"its pod has ended":                     {"a_1", replica("a", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }), "its holder's pod has ended"},
		"its container has ended":               {"a_1", replica("a", container(objectName, false, acquired.Add(time.Second))), "its holder's container has ended"},
		"its container was started again":       {"a_1", replica("a", container(objectName, true, acquired.Add(time.Minute))), "its holder's container has ended"},
		"a container before it had ended":       {"a_1", replica("a", container(objectName, true, acquired.Add(-time.Second))), ""},
		"one before it had, in the same second": {"a_1", replica("a", container(objectName, true, acquired)), ""},
		"a container of somebody else's":        {"a_1", replica("a", container("sidecar", true, acquired.Add(time.Minute))), ""},
		"an earlier process of this pod":        {"b_1", replica("a", nil), "its holder ran in this pod before us"},
	} {
		t.Run(name, func(t *testing.T) {
			var objs []client.Object
			if tt.pod != nil {
				objs = append(objs, tt.pod)
			}
			e := newElection(replicas(objs...), "doppel", "b", slog.New(slog.DiscardHandler))
			at := metav1.NewMicroTime(acquired)
			got, err := e.vacant(t.Context(), &coordinationv1.Lease{Spec: coordinationv1.LeaseSpec{HolderIdentity: &tt.holder, AcquireTime: &at}})
			if err != nil || got != tt.want {
				t.Errorf("%q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

// Of several that find the Lease free, one leads.
func TestElectionRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kc := replicas()
		var all []*candidate
		for _, pod := range []string{"a", "b", "c"} {
			if err := kc.Create(t.Context(), replica(pod, nil)); err != nil {
				t.Fatal(err)
			}
			all = append(all, stand(t, kc, pod))
		}
		time.Sleep(time.Minute)
		n := 0
		for _, c := range all {
			if c.leads() {
				n++
			} else if closed(c.won) {
				t.Error("one has won and does not lead")
			}
		}
		if n != 1 {
			t.Errorf("%d lead", n)
		}
		for _, c := range all {
			c.cancel()
			<-c.done
		}
	})
}

// Nothing is changed by one that does not lead, and the Lease is not given back while a write is under way.
func TestFence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kc := replicas(replica("a", nil))
		e := stand(t, kc, "a")
		slow := make(chan struct{})
		rt := e.fence(roundTripper(func(r *http.Request) (*http.Response, error) {
			if r.Method == http.MethodPut {
				<-slow
			}
			return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
		}))
		ask := func(method, url string) error {
			req, err := http.NewRequestWithContext(t.Context(), method, url, io.NopCloser(strings.NewReader("{}")))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := rt.RoundTrip(req)
			if err == nil {
				_ = resp.Body.Close()
			}
			return err
		}
		synctest.Wait()
		for _, m := range []string{http.MethodGet, http.MethodPost, http.MethodPatch, http.MethodDelete} {
			if err := ask(m, "http://api/x"); err != nil {
				t.Errorf("%s of the leader: %v", m, err)
			}
		}
		written := make(chan error)
		go func() { written <- ask(http.MethodPut, "http://api/x") }()
		synctest.Wait()
		e.cancel()
		synctest.Wait()
		var l coordinationv1.Lease
		if err := kc.Get(t.Context(), e.lease, &l); err != nil || holderOfLease(&l) == "" {
			t.Errorf("given back with a write under way: %v", err)
		}
		for _, m := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
			if err := ask(m, "http://api/x"); !errors.Is(err, errNotLeading) {
				t.Errorf("%s of one that does not lead: %v", m, err)
			}
		}
		for _, err := range []error{ask(http.MethodGet, "http://api/x"), ask(http.MethodPost, "http://api/x?dryRun=All")} {
			if err != nil {
				t.Errorf("what changes nothing: %v", err)
			}
		}
		close(slow)
		if err := <-written; err != nil {
			t.Error(err)
		}
		<-e.done
		if err := kc.Get(t.Context(), e.lease, &l); err != nil || holderOfLease(&l) != "" {
			t.Errorf("not given back: %v", err)
		}
	})
}
