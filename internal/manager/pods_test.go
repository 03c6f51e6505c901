package manager

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// Of all pods the informer gets those with an annotation of ours, and never holds more than a page of the others.
func TestOurPods(t *testing.T) {
	pod := func(name string, annotation string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: meta("shop", name)}
		if annotation != "" {
			metav1.SetMetaDataAnnotation(&p.ObjectMeta, annotation, "x")
		}
		return p
	}
	pages := [][]*corev1.Pod{
		{pod("a", ""), pod("agent", agentcfg.Annotation)}, {pod("b", ""), pod("c", "")}, {pod("enabled", agentcfg.AnnotationInject), pod("made-again", agentcfg.AnnotationOriginal)},
	}
	events := watch.NewFake()
	var seen []string
	lw := ourPods(&toolscache.ListWatch{
		ListWithContextFunc: func(_ context.Context, o metav1.ListOptions) (runtime.Object, error) {
			if o.Limit != podPage || o.ResourceVersion != "" {
				t.Errorf("asked for %+v", o)
			}
			n := 0
			if o.Continue != "" {
				_, _ = fmt.Sscan(o.Continue, &n)
			}
			list := &corev1.PodList{ListMeta: metav1.ListMeta{ResourceVersion: "7"}}
			if n+1 < len(pages) {
				list.Continue = fmt.Sprint(n + 1)
			}
			for _, p := range pages[n] {
				list.Items = append(list.Items, *p)
			}
			return list, nil
		},
		WatchFuncWithContext: func(context.Context, metav1.ListOptions) (watch.Interface, error) { return events, nil },
	}, func(p *corev1.Pod) { seen = append(seen, p.Name) })
	got, err := toolscache.ToListerWatcherWithContext(lw).ListWithContext(t.Context(), metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		t.Fatal(err)
	}
	list := got.(*corev1.PodList)
	var names []string
	for _, p := range list.Items {
		names = append(names, p.Name)
	}
	if !slices.Equal(names, []string{"agent", "enabled", "made-again"}) || list.ResourceVersion != "7" || list.Continue != "" || len(seen) != 6 {
		t.Errorf("%v of %v, %+v", names, seen, list.ListMeta)
	}

	w, err := toolscache.ToListerWatcherWithContext(lw).WatchWithContext(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	go func() {
		events.Add(pod("d", ""))
		events.Modify(pod("a", ""))
		events.Delete(pod("b", ""))
		events.Add(pod("late", agentcfg.Annotation))
		events.Modify(pod("enabled", ""))
		events.Modify(pod("enabled", ""))
		events.Delete(pod("agent", agentcfg.Annotation))
		events.Action(watch.Bookmark, pod("", ""))
	}()
	for _, want := range []string{"ADDED late", "DELETED enabled", "DELETED agent", "BOOKMARK "} {
		e := <-w.ResultChan()
		if got := fmt.Sprintf("%s %s", e.Type, e.Object.(*corev1.Pod).Name); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if len(seen) != 11 { // what goes away is not looked at
		t.Errorf("seen %v", seen)
	}
}

// asked counts questions about pods.
type asked struct {
	client.Reader
	mu sync.Mutex
	n  int
}

func (a *asked) List(ctx context.Context, l client.ObjectList, opts ...client.ListOption) error {
	a.mu.Lock()
	a.n++
	a.mu.Unlock()
	return a.Reader.List(ctx, l, opts...)
}

func (a *asked) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.n
}

func TestPodOwners(t *testing.T) {
	w := newWorld(t, reachCluster()...)
	api := &asked{Reader: w.kc}
	w.addresses.pods.live = api
	mine, unknown := netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("10.244.9.9")
	synctest.Test(t, func(t *testing.T) {
		of := func(ip netip.Addr, asker *rate.Limiter) string {
			ctx, cancel := context.WithTimeout(t.Context(), ownerAge/2)
			defer cancel()
			found, err := w.addresses.pods.of(ctx, ip, asker)
			return fmt.Sprint(found, err)
		}
		var all sync.WaitGroup
		for range 10 {
			all.Go(func() {
				if got := of(mine, nil); got != "[shop] <nil>" {
					t.Error(got)
				}
			})
		}
		all.Wait()
		for range 2 {
			if got := of(unknown, nil); got != "[] <nil>" || api.count() != 2 {
				t.Errorf("%s, asked %d times", got, api.count())
			}
		}
		// An address may be another pod's soon.
		p := &corev1.Pod{ObjectMeta: meta("shop", "cart-1")}
		w.delete(p)
		p = &corev1.Pod{ObjectMeta: meta("data", "db-2"), Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: mine.String()}}}}
		w.create(p)
		if err := w.kc.Status().Update(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * ownerAge) // of the bubble
		if got := of(mine, nil); got != "[data] <nil>" || api.count() != 3 {
			t.Errorf("%s, asked %d times", got, api.count())
		}
		if n := len(w.addresses.pods.known); n != 1 {
			t.Errorf("%d answers are kept", n)
		}
		// What is known costs nobody a question.
		few := rate.NewLimiter(0, 1)
		if of(mine, few) != "[data] <nil>" || of(unknown, few) != "[] <nil>" || of(netip.MustParseAddr("10.244.9.10"), few) == "[] <nil>" || api.count() != 4 {
			t.Errorf("asked %d times", api.count())
		}
	})
}

// The second address of a pod is looked for on its node first.
func TestPodOwnersSecondAddress(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: meta("shop", "web-1"), Spec: corev1.PodSpec{NodeName: "a"}, Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.244.0.7"}, {IP: "fd00:244:1::7"}}}}
	other := &corev1.Pod{ObjectMeta: meta("data", "db-1"), Spec: corev1.PodSpec{NodeName: "b"}, Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.244.0.8"}, {IP: "fd00:9::8"}}}}
	w := newWorld(t, pod, other, node("a", "10.244.0.0/24", "fd00:244:1::/64"))
	api := &asked{Reader: w.kc}
	w.addresses.pods.live = api
	for _, tt := range []struct {
		ip, ns string
		asked  int
	}{{"fd00:244:1::7", "[shop]", 1}, {"fd00:9::8", "[data]", 1}, {"fd00:244:1::9", "[]", 2}} {
		before := api.count()
		got, err := w.addresses.pods.of(t.Context(), netip.MustParseAddr(tt.ip), nil)
		if fmt.Sprint(got) != tt.ns || err != nil || api.count()-before != tt.asked {
			t.Errorf("%s: %v, %v, asked %d times", tt.ip, got, err, api.count()-before)
		}
	}
}
