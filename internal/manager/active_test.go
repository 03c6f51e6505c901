package manager

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

func placeOf(kc client.Client, pod string) *place {
	log := slog.New(slog.DiscardHandler)
	return newPlace(newElection(kc, "doppel", pod, log), kc, Config{Namespace: "doppel", PodName: pod, Log: log})
}

// parts are the labels of pods that the Services select by.
func parts(t *testing.T, kc client.Client) map[string]string {
	t.Helper()
	var list corev1.PodList
	if err := kc.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, p := range list.Items {
		out[p.Name] = p.Labels[labelPart]
	}
	return out
}

// The pod that leads is in the Services, alone among those that take part in elections, and never nobody.
func TestPlace(t *testing.T) {
	const on, off = partActive, partStandby
	older := func(p *corev1.Pod) { delete(p.Labels, labelReplica) }
	others := func(p *corev1.Pod) { p.Labels[labelRelease] = "another" }
	standing := func(p *corev1.Pod) { ready1(p); p.Labels[labelPart] = off }
	leads := func(p *place) { p.e.leadUntil(time.Now().Add(time.Hour)); close(p.e.won); close(p.open) }
	for name, tt := range map[string]struct {
		own, other func(*corev1.Pod)
		role       func(*place)
		a, b       string // afterwards
		taken      bool
	}{
		"nobody knows yet":                   {nil, ready1, func(*place) {}, on, on, false},
		"it stands by":                       {nil, ready1, func(p *place) { close(p.e.stood) }, off, on, true},
		"it has won and does not listen yet": {standing, ready1, func(p *place) { close(p.e.stood); close(p.e.won) }, off, on, false},
		"it leads and is not ready":          {nil, ready1, leads, on, on, true},
		"it leads and is ready":              {ready1, ready1, leads, on, off, true},
		"it stood by before":                 {standing, ready1, func(p *place) { close(p.e.stood); leads(p) }, on, off, true},
		"the other is of an older release":   {ready1, older, leads, on, on, true},
		"the other is of another release":    {ready1, others, leads, on, on, true},
		"it led":                             {ready1, ready1, func(p *place) { leads(p); p.e.leadUntil(time.Now()) }, on, on, false},
	} {
		t.Run(name, func(t *testing.T) {
			kc := replicas(replica("a", tt.own), replica("b", tt.other))
			p := placeOf(kc, "a")
			tt.role(p)
			if err := p.step(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := parts(t, kc); got["a"] != tt.a || got["b"] != tt.b || p.taken.Load() != tt.taken {
				t.Errorf("labels %v, taken %v; want a %s, b %s, %v", got, p.taken.Load(), tt.a, tt.b, tt.taken)
			}
		})
	}
}

// A leader that ends goes on until another is in the Services, if there is one to be.
func TestHandedOver(t *testing.T) {
	leaving := func(p *corev1.Pod) {
		now := metav1.Now()
		p.DeletionTimestamp, p.Finalizers = &now, []string{"test/keep"}
	}
	for name, tt := range map[string]struct {
		other *corev1.Pod
		after time.Duration // the other takes over; 0: it does not
		want  time.Duration
	}{
		"it is taken over from":       {replica("b", nil), 300 * time.Millisecond, 2 * placeRetry},
		"the other does not come up":  {replica("b", nil), 0, handOver},
		"all end":                     {replica("b", leaving), 0, 0},
		"there is only an older kind": {replica("b", func(p *corev1.Pod) { delete(p.Labels, labelReplica) }), 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kc := replicas(replica("a", ready1), tt.other)
				began := time.Now()
				if tt.after > 0 {
					time.AfterFunc(tt.after, func() {
						b := placeOf(kc, "b")
						if err := b.label(t.Context(), kc, replica("a", nil), partStandby); err != nil {
							t.Error(err)
						}
					})
				}
				placeOf(kc, "a").handedOver(t.Context())
				if took := time.Since(began); took != tt.want {
					t.Errorf("after %v, want %v", took, tt.want)
				}
			})
		})
	}
}
