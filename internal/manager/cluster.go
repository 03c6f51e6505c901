package manager

import (
	"bufio"
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/control"
)

// changeDelay gathers a burst of changes (a namespace with all its services) into one message.
const changeDelay = 100 * time.Millisecond

// clusterInfo knows the cluster's subnets and names, from informers, and tells them to laptops.
type clusterInfo struct {
	client client.Client
	cache  cache.Cache
	domain string
	log    *slog.Logger

	changed chan struct{} // capacity 1: something changed

	mu sync.Mutex
	// guarded by mu
	current control.Cluster
	next    chan struct{} // closed when current is replaced
}

func newClusterInfo(c client.Client, ca cache.Cache, domain string, log *slog.Logger) *clusterInfo {
	return &clusterInfo{client: c, cache: ca, domain: domain, log: log, changed: make(chan struct{}, 1), next: make(chan struct{})}
}

// run keeps the information current.
func (c *clusterInfo) run(ctx context.Context) error {
	handler := toolscache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { c.kick() }, UpdateFunc: func(_, _ any) { c.kick() }, DeleteFunc: func(any) { c.kick() },
	}
	for _, o := range []client.Object{&corev1.Service{}, &corev1.Namespace{}, &corev1.Node{}, &networkingv1.ServiceCIDR{}} {
		inf, err := c.cache.GetInformer(ctx, o)
		if err != nil {
			c.log.Warn("not watched", "object", reflect.TypeOf(o).Elem().Name(), "err", err) // e.g. no ServiceCIDR API before 1.33
			continue
		}
		if _, err := inf.AddEventHandler(handler); err != nil {
			return err
		}
	}
	c.kick()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.changed:
		}
		if err := c.refresh(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("cluster information not refreshed", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(changeDelay):
		}
	}
}

func (c *clusterInfo) kick() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

func (c *clusterInfo) refresh(ctx context.Context) error {
	now, err := c.read(ctx)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !reflect.DeepEqual(now, c.current) {
		c.current = now
		close(c.next)
		c.next = make(chan struct{})
	}
	return nil
}

func (c *clusterInfo) read(ctx context.Context) (control.Cluster, error) {
	out := control.Cluster{Domain: c.domain, Services: map[string][]control.Service{}}
	var nss corev1.NamespaceList
	if err := c.client.List(ctx, &nss); err != nil {
		return out, err
	}
	for i := range nss.Items {
		out.Services[nss.Items[i].Name] = []control.Service{}
	}
	var svcs corev1.ServiceList
	if err := c.client.List(ctx, &svcs); err != nil {
		return out, err
	}
	var apiServer netip.Addr
	for i := range svcs.Items {
		s := &svcs.Items[i]
		out.Services[s.Namespace] = append(out.Services[s.Namespace], control.Service{Name: s.Name, Headless: s.Spec.ClusterIP == corev1.ClusterIPNone})
		if s.Namespace == "default" && s.Name == "kubernetes" {
			apiServer, _ = netip.ParseAddr(s.Spec.ClusterIP)
		}
	}
	for _, list := range out.Services {
		slices.SortFunc(list, func(a, b control.Service) int { return cmp.Compare(a.Name, b.Name) })
	}
	out.ServiceCIDRs = c.serviceCIDRs(ctx, apiServer)
	var nodes corev1.NodeList
	if err := c.client.List(ctx, &nodes); err != nil {
		return out, err
	}
	for i := range nodes.Items {
		out.PodCIDRs = appendPrefixes(out.PodCIDRs, nodes.Items[i].Spec.PodCIDRs...)
	}
	sortPrefixes(out.PodCIDRs)
	return out, nil
}

// serviceCIDRs reads the ServiceCIDR API (KEP-1880, GA in 1.33); on older clusters the /16 around the API server's own service is assumed.
func (c *clusterInfo) serviceCIDRs(ctx context.Context, apiServer netip.Addr) []netip.Prefix {
	var list networkingv1.ServiceCIDRList
	var out []netip.Prefix
	if err := c.client.List(ctx, &list); err == nil {
		for i := range list.Items {
			out = appendPrefixes(out, list.Items[i].Spec.CIDRs...)
		}
	}
	if len(out) == 0 && apiServer.Is4() {
		out = append(out, netip.PrefixFrom(apiServer, 16).Masked())
	}
	sortPrefixes(out)
	return out
}

func appendPrefixes(to []netip.Prefix, texts ...string) []netip.Prefix {
	for _, t := range texts {
		if p, err := netip.ParsePrefix(t); err == nil && !slices.Contains(to, p.Masked()) {
			to = append(to, p.Masked())
		}
	}
	return to
}

func sortPrefixes(ps []netip.Prefix) {
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
}

// watch sends what is within reach at the start and whenever it changes.
func (c *clusterInfo) watch(ctx context.Context, to reach, send func(any) error) error {
	var last control.Cluster
	for {
		c.mu.Lock()
		cur, next := c.current, c.next
		c.mu.Unlock()
		if cur = to.cluster(cur); cur.Services != nil && !reflect.DeepEqual(cur, last) {
			if err := send(cur); err != nil {
				return err
			}
			last = cur
		}
		select {
		case <-ctx.Done():
			return nil
		case <-next:
		}
	}
}

// clusterDomain finds the cluster's domain in the search list that the kubelet writes ("NS.svc.DOMAIN svc.DOMAIN DOMAIN").
func clusterDomain(resolvConf string) string {
	f, err := os.Open(resolvConf)
	if err != nil {
		return "cluster.local"
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		if len(fields) == 0 || fields[0] != "search" {
			continue
		}
		for _, d := range fields[1:] {
			if rest, ok := strings.CutPrefix(d, "svc."); ok {
				return strings.TrimSuffix(rest, ".")
			}
		}
	}
	return "cluster.local"
}
