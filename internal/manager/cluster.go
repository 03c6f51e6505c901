package manager

import (
	"bufio"
	"cmp"
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
	self   self
	only   []string // the namespaces that it may see besides its own; none: all, and nodes and the service subnets
	log    *slog.Logger

	handler toolscache.ResourceEventHandler
	changed chan struct{} // capacity 1: something changed

	mu sync.Mutex
	// guarded by mu
	current control.Cluster
	news    control.Cluster       // what current has that the one before had not
	version int                   // of current
	next    chan struct{}         // closed when current is replaced
	podNets map[netip.Prefix]bool // around the pods that were seen

	// of run's goroutine only
	noServiceCIDRs bool // this cluster has no such API
	watchesPods    bool
}

// self is where this manager answers /attach inside the cluster.
type self struct {
	namespace string
	pod       netip.AddrPort
}

func newClusterInfo(c client.Client, ca cache.Cache, domain string, s self, only []string, log *slog.Logger) *clusterInfo {
	ci := &clusterInfo{client: c, cache: ca, domain: domain, self: s, only: only, log: log, changed: make(chan struct{}, 1), next: make(chan struct{}), podNets: map[netip.Prefix]bool{}}
	ci.handler = toolscache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { ci.kick() }, UpdateFunc: func(_, _ any) { ci.kick() }, DeleteFunc: func(any) { ci.kick() },
	}
	return ci
}

// run keeps the information current.
func (c *clusterInfo) run(ctx context.Context) error {
	watched := []client.Object{&corev1.Service{}}
	if len(c.only) == 0 {
		watched = append(watched, &corev1.Namespace{}, &corev1.Node{}, &networkingv1.ServiceCIDR{})
	}
	for _, o := range watched {
		inf, err := c.cache.GetInformer(ctx, o)
		if err != nil {
			c.log.Warn("not watched", "object", reflect.TypeOf(o).Elem().Name(), "err", err) // e.g. no ServiceCIDR API before 1.33
			continue
		}
		if _, err := inf.AddEventHandler(c.handler); err != nil {
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
	if news, changed := now.Since(c.current); changed || c.current.Services == nil {
		c.current, c.news, c.version = now, news, c.version+1
		close(c.next)
		c.next = make(chan struct{})
	}
	return nil
}

func (c *clusterInfo) read(ctx context.Context) (control.Cluster, error) {
	out := control.Cluster{Domain: c.domain, Services: map[string][]control.Service{}}
	nss, err := c.namespaces(ctx)
	if err != nil {
		return out, err
	}
	for _, ns := range nss {
		out.Services[ns] = []control.Service{}
	}
	var svcs corev1.ServiceList
	if err := c.client.List(ctx, &svcs, client.UnsafeDisableDeepCopy); err != nil { // nothing is changed here, and there may be thousands
		return out, err
	}
	for i := range svcs.Items {
		s := &svcs.Items[i]
		out.Services[s.Namespace] = append(out.Services[s.Namespace], control.Service{Name: s.Name, Headless: s.Spec.ClusterIP == corev1.ClusterIPNone})
		if s.Namespace == c.self.namespace && s.Name == objectName {
			out.ManagerService = attachPort(s)
		}
	}
	for _, list := range out.Services {
		slices.SortFunc(list, func(a, b control.Service) int { return cmp.Compare(a.Name, b.Name) })
	}
	out.ServiceCIDRs = c.serviceCIDRs(ctx, svcs.Items)
	out.ManagerPod = c.self.pod
	var nodes corev1.NodeList
	if len(c.only) == 0 {
		if err := c.client.List(ctx, &nodes, client.UnsafeDisableDeepCopy); err != nil {
			return out, err
		}
	}
	for i := range nodes.Items {
		out.PodCIDRs = appendPrefixes(out.PodCIDRs, nodes.Items[i].Spec.PodCIDRs...)
	}
	if out.Nodes, err = c.nodes(ctx, nodes.Items); err != nil {
		return out, err
	}
	if len(out.PodCIDRs) == 0 {
		if out.PodCIDRs, err = c.podCIDRs(ctx); err != nil {
			return out, err
		}
	}
	sortPrefixes(out.PodCIDRs)
	return out, nil
}

// namespaces are the names of those that the manager may see.
func (c *clusterInfo) namespaces(ctx context.Context) ([]string, error) {
	if len(c.only) > 0 {
		return append([]string{c.self.namespace}, c.only...), nil
	}
	var list corev1.NamespaceList
	if err := c.client.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	var out []string
	for i := range list.Items {
		out = append(out, list.Items[i].Name)
	}
	return out, nil
}

// nodes are the addresses of the nodes. Those where the API server is are left out: it may be what carries the tunnel, under another address
// that the laptop knows it by (a proxy's, a load balancer's).
func (c *clusterInfo) nodes(ctx context.Context, nodes []corev1.Node) ([]netip.Addr, error) {
	if len(nodes) == 0 {
		return nil, nil
	}
	var api discoveryv1.EndpointSlice
	if err := c.client.Get(ctx, client.ObjectKey{Namespace: metav1.NamespaceDefault, Name: apiServerEndpoints}, &api); client.IgnoreNotFound(err) != nil {
		return nil, err
	}
	servers := sliceIPs(&api)
	var out []netip.Addr
	for i := range nodes {
		ips := nodes[i].Status.Addresses
		if slices.ContainsFunc(ips, func(a corev1.NodeAddress) bool { return slices.Contains(servers, a.Address) }) {
			continue
		}
		for _, ip := range ips {
			if a, err := netip.ParseAddr(ip.Address); err == nil && ip.Type == corev1.NodeInternalIP {
				out = append(out, a)
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out, nil
}

// apiServerEndpoints is the name of the endpoints that API servers write of themselves, in namespace default.
const apiServerEndpoints = "kubernetes"

// attachPort is where a service of the manager's leads to /attach.
func attachPort(s *corev1.Service) netip.AddrPort {
	a, err := netip.ParseAddr(s.Spec.ClusterIP)
	for _, p := range s.Spec.Ports {
		if err == nil && p.Name == "api" {
			return netip.AddrPortFrom(a, uint16(p.Port))
		}
	}
	return netip.AddrPort{}
}

// Subnets around addresses that are known without their subnet: what a node of most networks gets for its pods, and a part of any service
// subnet that holds the services made one after another.
const (
	podBits4, podBits6         = 24, 64
	serviceBits4, serviceBits6 = 16, 112
)

// podCIDRs covers the pods' addresses, for clusters whose nodes say nothing: networks with an address management of their own.
func (c *clusterInfo) podCIDRs(ctx context.Context) ([]netip.Prefix, error) {
	if !c.watchesPods && c.cache != nil {
		if _, err := c.cache.GetInformer(ctx, &corev1.Pod{}); err != nil { // it has seen them all when this returns
			return nil, err
		}
		c.watchesPods = true
		c.log.Info("no pod subnets of nodes, watching pods")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.podNets)), nil
}

// seePod notes the subnets around a pod's addresses. They stay when it goes: others come.
func (c *clusterInfo) seePod(p *corev1.Pod) {
	if p.Spec.HostNetwork {
		return // the node's address
	}
	var nets []netip.Prefix
	for _, ip := range p.Status.PodIPs {
		nets = appendAround(nets, ip.IP, podBits4, podBits6)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range nets {
		if !c.podNets[n] {
			c.podNets[n] = true
			c.kick()
		}
	}
}

// appendAround adds the subnet of so many bits around an address.
func appendAround(to []netip.Prefix, ip string, bits4, bits6 int) []netip.Prefix {
	a, err := netip.ParseAddr(ip)
	if err != nil {
		return to
	}
	bits := bits4
	if a.Is6() {
		bits = bits6
	}
	return appendPrefixes(to, netip.PrefixFrom(a, bits).String())
}

// serviceCIDRs reads the ServiceCIDR API (KEP-1880, GA in 1.33). On older clusters nothing says what the subnets are, so the services' own
// addresses are covered.
func (c *clusterInfo) serviceCIDRs(ctx context.Context, svcs []corev1.Service) []netip.Prefix {
	var out []netip.Prefix
	if !c.noServiceCIDRs && len(c.only) == 0 {
		var list networkingv1.ServiceCIDRList
		err := c.client.List(ctx, &list)
		c.noServiceCIDRs = apimeta.IsNoMatchError(err)
		for i := range list.Items {
			out = appendPrefixes(out, list.Items[i].Spec.CIDRs...)
		}
	}
	if len(out) == 0 {
		for i := range svcs {
			for _, ip := range append([]string{svcs[i].Spec.ClusterIP}, svcs[i].Spec.ClusterIPs...) { // "", "None": no addresses
				out = appendAround(out, ip, serviceBits4, serviceBits6)
			}
		}
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

// watch sends what is within reach at the start, and at each change all of it or what has changed, as is asked for.
func (c *clusterInfo) watch(ctx context.Context, to reach, ask control.AskCluster, send func(any) error) error {
	var last control.Cluster
	for seen := 0; ; {
		c.mu.Lock()
		cur, news, version, next := c.current, c.news, c.version, c.next
		c.mu.Unlock()
		first, changed := last.Services == nil, true
		if cur = to.cluster(cur); !to.all || version != seen+1 { // else it is the same for all
			news, changed = cur.Since(last)
		}
		if cur.Services != nil && (changed || first) {
			if first || !ask.Changes {
				news = cur
			}
			if err := send(news); err != nil {
				return err
			}
			last = cur
		}
		seen = version
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
