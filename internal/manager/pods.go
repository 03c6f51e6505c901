package manager

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// A large cluster has tens of thousands of pods. The cache holds those with an annotation of ours; all others are seen by its informer, a page at a time
// when it begins and then one by one as they change, and are not kept. Whose address one is, is asked of the API server when somebody wants to know.

// podPage is how many pods are read at once.
const podPage = 500

// ourAnnotations are on pods that concern us.
var ourAnnotations = []string{agentcfg.Annotation, agentcfg.AnnotationInject, agentcfg.AnnotationOriginal}

func ours(p *corev1.Pod) bool {
	return slices.ContainsFunc(ourAnnotations, func(key string) bool { return p.Annotations[key] != "" })
}

// newInformer is client-go's, but for pods: of those it gets ours only. see is shown all that there are and that come.
func newInformer(see func(*corev1.Pod)) func(toolscache.ListerWatcher, runtime.Object, time.Duration, toolscache.Indexers) toolscache.SharedIndexInformer {
	return func(lw toolscache.ListerWatcher, o runtime.Object, resync time.Duration, ix toolscache.Indexers) toolscache.SharedIndexInformer {
		if _, pod := o.(*corev1.Pod); pod {
			lw = ourPods(lw, see)
		}
		return toolscache.NewSharedIndexInformer(lw, o, resync, ix)
	}
}

// ourPods lists and watches ours among pods.
func ourPods(all toolscache.ListerWatcher, see func(*corev1.Pod)) toolscache.ListerWatcher {
	from := toolscache.ToListerWatcherWithContext(all)
	var mu sync.Mutex
	kept := map[types.UID]bool{} // guarded by mu: an annotation can be taken away
	keep := func(p *corev1.Pod) bool {
		see(p)
		mu.Lock()
		defer mu.Unlock()
		had := kept[p.UID]
		if ours(p) {
			kept[p.UID] = true
			return true
		}
		delete(kept, p.UID)
		return had
	}
	return &toolscache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			mu.Lock()
			clear(kept)
			mu.Unlock()
			opts.ResourceVersion, opts.ResourceVersionMatch, opts.Limit = "", "", podPage // the API server's cache knows no pages
			out := &corev1.PodList{}
			for {
				page, err := from.ListWithContext(ctx, opts)
				if err != nil {
					return nil, err
				}
				list, ok := page.(*corev1.PodList)
				if !ok {
					return nil, fmt.Errorf("a list of pods is a %T", page)
				}
				for i := range list.Items {
					if p := &list.Items[i]; keep(p) {
						out.Items = append(out.Items, *p)
					}
				}
				out.ListMeta = metav1.ListMeta{ResourceVersion: list.ResourceVersion}
				if opts.Continue = list.Continue; opts.Continue == "" {
					return out, nil
				}
			}
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			w, err := from.WatchWithContext(ctx, opts)
			if err != nil {
				return nil, err
			}
			return watch.Filter(w, func(e watch.Event) (watch.Event, bool) {
				p, ok := e.Object.(*corev1.Pod)
				if !ok || e.Type == watch.Bookmark {
					return e, true
				}
				if e.Type == watch.Deleted {
					mu.Lock()
					defer mu.Unlock()
					had := kept[p.UID]
					delete(kept, p.UID)
					return e, had
				}
				if !keep(p) {
					return e, false
				}
				if !ours(p) {
					e.Type = watch.Deleted
				}
				return e, true
			}), nil
		},
	}
}

// An answer about an address counts for ownerAge: it may be another pod's soon after the end of one. Questions of a session, and of all, are so many in a second
// at most.
const (
	ownerAge      = time.Second
	lookupTimeout = 5 * time.Second
	sessionRate   = 50
	sessionBurst  = 200
	allRate       = 200
)

// podIP is by what the API server finds pods: by the first of their addresses.
const podIP = "status.podIP"

// podOwners finds the namespace of a pod by its address.
type podOwners struct {
	live  client.Reader
	nodes client.Reader // nil: they may not be seen
	// only are the namespaces to look in; none: all
	only []string
	// first is an address of the family that pods' first address is of; invalid: not known
	first netip.Addr
	limit *rate.Limiter

	mu sync.Mutex
	// guarded by mu
	known map[netip.Addr]*podOwner
	swept time.Time
}

// podOwner is the answer about an address, once done is closed.
type podOwner struct {
	done       chan struct{}
	at         time.Time // of the question
	namespaces []string
	err        error
}

func newPodOwners(m *Manager) *podOwners {
	p := &podOwners{live: m.ctrl.GetAPIReader(), nodes: m.ctrl.GetClient(), limit: rate.NewLimiter(allRate, allRate), known: map[netip.Addr]*podOwner{}}
	if m.narrow() {
		p.nodes, p.only = nil, append([]string{m.cfg.Namespace}, m.allowed...)
	}
	p.first, _ = netip.ParseAddr(m.cfg.PodIP)
	return p
}

// of returns the namespaces of pods with an address, which is one or none. Questions that have to be asked wait for the asker's limit.
func (p *podOwners) of(ctx context.Context, ip netip.Addr, asker *rate.Limiter) ([]string, error) {
	o := p.fresh(ip)
	if o == nil {
		if asker != nil {
			if err := asker.Wait(ctx); err != nil {
				return nil, err
			}
		}
		o = p.ask(ip)
	}
	select {
	case <-o.done:
		return o.namespaces, o.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fresh returns an answer that still counts, or is awaited.
func (p *podOwners) fresh(ip netip.Addr) *podOwner {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.freshLocked(ip)
}

func (p *podOwners) freshLocked(ip netip.Addr) *podOwner {
	now := time.Now()
	old := func(o *podOwner) bool { return now.Sub(o.at) > ownerAge }
	if now.Sub(p.swept) > ownerAge {
		maps.DeleteFunc(p.known, func(_ netip.Addr, o *podOwner) bool { return old(o) })
		p.swept = now
	}
	if o := p.known[ip]; o != nil && !old(o) {
		return o
	}
	return nil
}

// ask begins to find the owner of an address, if nobody else has meanwhile. Whoever asked first may go away, and others wait for the same answer.
func (p *podOwners) ask(ip netip.Addr) *podOwner {
	p.mu.Lock()
	defer p.mu.Unlock()
	if o := p.freshLocked(ip); o != nil {
		return o
	}
	o := &podOwner{done: make(chan struct{}), at: time.Now()}
	p.known[ip] = o
	go func() {
		defer close(o.done)
		ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
		defer cancel()
		if o.err = p.limit.Wait(ctx); o.err == nil {
			o.namespaces, o.err = p.find(ctx, ip)
		}
	}()
	return o
}

func (p *podOwners) find(ctx context.Context, ip netip.Addr) ([]string, error) {
	if p.first.IsValid() && p.first.Is4() != ip.Is4() {
		return p.findSecond(ctx, ip)
	}
	// As an informer would know it: the API server's own cache answers.
	return p.among(ctx, ip, client.MatchingFields{podIP: ip.String()}, &client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: "0"}})
}

// findSecond finds a pod by an address that is not its first (dual stack), which the API server cannot be asked for: on the node whose subnet it is in, and else
// among all.
func (p *podOwners) findSecond(ctx context.Context, ip netip.Addr) ([]string, error) {
	var nodes corev1.NodeList
	if p.nodes != nil {
		if err := p.nodes.List(ctx, &nodes, client.UnsafeDisableDeepCopy); err != nil { // nothing is changed here
			return nil, err
		}
	}
	for i := range nodes.Items {
		if slices.ContainsFunc(nodes.Items[i].Spec.PodCIDRs, func(s string) bool {
			subnet, err := netip.ParsePrefix(s)
			return err == nil && subnet.Contains(ip)
		}) {
			found, err := p.among(ctx, ip, client.MatchingFields{"spec.nodeName": nodes.Items[i].Name})
			if err != nil || len(found) > 0 {
				return found, err
			}
		}
	}
	return p.among(ctx, ip)
}

// among looks for the address among pods, a page at a time.
func (p *podOwners) among(ctx context.Context, ip netip.Addr, opts ...client.ListOption) ([]string, error) {
	where := p.only
	if len(where) == 0 {
		where = []string{metav1.NamespaceAll}
	}
	for _, ns := range where {
		next := ""
		for {
			var list corev1.PodList
			if err := p.live.List(ctx, &list, append(slices.Clone(opts), client.InNamespace(ns), client.Limit(podPage), client.Continue(next))...); err != nil {
				return nil, fmt.Errorf("pods with address %s: %w", ip, err)
			}
			for i := range list.Items {
				if slices.Contains(podIPs(&list.Items[i]), ip.String()) {
					return []string{list.Items[i].Namespace}, nil
				}
			}
			if next = list.Continue; next == "" {
				break
			}
		}
	}
	return nil, nil
}
