package manager

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
)

// reach is what one session gets to. It comes from the Session object, whose reach the admission policy has checked against its
// user's rights, and checks again at each renewal.
type reach struct {
	all        bool
	outside    bool
	namespaces []string
	narrow     bool          // the manager sees some namespaces only: an address that it does not know may be anybody's
	questions  *rate.Limiter // about addresses of pods; nil: as many as there are
}

// reachOf reads a session's reach; where reach is not checked everybody gets to everything.
func (m *Manager) reachOf(s *v1alpha1.Session) reach {
	r := s.Spec.Reach
	if m.cfg.CheckReach && m.cfg.NoPolicy { // nobody has checked what the object says
		return reach{namespaces: m.allowed, narrow: true, questions: rate.NewLimiter(sessionRate, sessionBurst)}
	}
	return reach{
		questions: rate.NewLimiter(sessionRate, sessionBurst),

		all:     !m.cfg.CheckReach || slices.Equal(r.Namespaces, []string{v1alpha1.ReachAll}),
		outside: r.Outside, namespaces: r.Namespaces, narrow: m.narrow(),
	}
}

// namespace says whether the session gets to a namespace; "" is what belongs to none.
func (r reach) namespace(ns string) bool {
	if ns == "" {
		return r.all || r.outside
	}
	return r.all || slices.Contains(r.namespaces, ns)
}

// cluster is what the session's laptop is told: the names of namespaces out of reach are not among it.
func (r reach) cluster(c control.Cluster) control.Cluster {
	if r.all {
		return c
	}
	services := map[string][]control.Service{}
	for ns, list := range c.Services {
		if r.namespace(ns) {
			services[ns] = list
		}
	}
	c.Services = services
	if !r.namespace("") {
		c.Nodes = nil
	}
	return c
}

// ipIndex finds services, nodes and endpoint slices by their addresses.
const ipIndex = "doppel.dev/ip"

// handmade selects the endpoint slices that no selector of a service made; all others repeat what pods say.
const handmade = discoveryv1.LabelManagedBy + "!=endpointslice-controller.k8s.io"

// The addresses of each kind of object. What a user of a namespace can write is not believed: a service's external addresses
// (CVE-2020-8554), and endpoints of what is somebody else's (CVE-2021-25740, see owners).

func serviceIPs(o client.Object) []string { return o.(*corev1.Service).Spec.ClusterIPs }

func nodeIPs(o client.Object) []string {
	var out []string
	for _, a := range o.(*corev1.Node).Status.Addresses {
		if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
			out = append(out, a.Address)
		}
	}
	return out
}

// podIPs are those of a pod's own network, while it has it: after its end they go to another pod.
func podIPs(p *corev1.Pod) []string {
	if p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil
	}
	var out []string
	for _, ip := range p.Status.PodIPs {
		out = append(out, ip.IP)
	}
	return out
}

func sliceIPs(o client.Object) []string {
	var out []string
	for _, e := range o.(*discoveryv1.EndpointSlice).Endpoints {
		out = append(out, e.Addresses...)
	}
	return out
}

// ipIndexes are the kinds of objects that the cache knows by address, in the order in which they are believed; pods come before the last (see addresses).
var ipIndexes = []struct {
	object client.Object
	list   func() client.ObjectList
	ips    func(client.Object) []string
}{
	{&corev1.Service{}, func() client.ObjectList { return &corev1.ServiceList{} }, serviceIPs},
	{&corev1.Node{}, func() client.ObjectList { return &corev1.NodeList{} }, nodeIPs},
	{&discoveryv1.EndpointSlice{}, func() client.ObjectList { return &discoveryv1.EndpointSliceList{} }, sliceIPs},
}

// indexIPs has the cache find objects by address; a narrow manager may not see nodes.
func indexIPs(ctx context.Context, ix client.FieldIndexer, narrow bool) error {
	for _, k := range ipIndexes {
		if _, node := k.object.(*corev1.Node); node && narrow {
			continue
		}
		if err := ix.IndexField(ctx, k.object, ipIndex, k.ips); err != nil {
			return fmt.Errorf("index %T by address: %w", k.object, err)
		}
	}
	return nil
}

// addresses says whose an address is.
type addresses struct {
	cache client.Reader
	pods  *podOwners
}

// owners are the namespaces that an address belongs to; none: a node's, or one beyond the cluster. The first kind of object that
// knows the address decides, so that nobody claims a service, node or pod by writing endpoints.
func (a addresses) owners(ctx context.Context, ip netip.Addr, r reach) ([]string, error) {
	for _, k := range ipIndexes {
		if _, node := k.object.(*corev1.Node); node && r.narrow {
			continue
		}
		if _, last := k.object.(*discoveryv1.EndpointSlice); last {
			if found, err := a.pods.of(ctx, ip, r.questions); err != nil || len(found) > 0 {
				return found, err
			}
		}
		list := k.list()
		if err := a.cache.List(ctx, list, client.MatchingFields{ipIndex: ip.String()}); err != nil {
			return nil, fmt.Errorf("whose address is %s: %w", ip, err)
		}
		if found := namespacesOf(list); len(found) > 0 {
			if found[0] == "" { // a node
				return nil, nil
			}
			return found, nil
		}
	}
	return nil, nil
}

func namespacesOf(list client.ObjectList) []string {
	var out []string
	switch l := list.(type) {
	case *corev1.ServiceList:
		for i := range l.Items {
			out = append(out, l.Items[i].Namespace)
		}
	case *corev1.NodeList:
		for range l.Items {
			out = append(out, "")
		}
	case *discoveryv1.EndpointSliceList:
		for i := range l.Items {
			out = append(out, l.Items[i].Namespace)
		}
	}
	return out
}

// address says whether the session gets to an address. One that several namespaces have, such as a database in two
// handmade services, is reached by whoever gets to one of them: only endpoints can be in that case.
func (r reach) address(ctx context.Context, a addresses, ip netip.Addr) (bool, error) {
	if r.all {
		return true, nil
	}
	found, err := a.owners(ctx, ip.Unmap(), r)
	if err != nil {
		return false, err
	}
	if len(found) == 0 {
		return !r.narrow && r.namespace(""), nil
	}
	return slices.ContainsFunc(found, r.namespace), nil
}

// question says whether the session may ask a DNS message: every name in it must be of a namespace that it gets to. A zone transfer
// is of all namespaces.
func (r reach) question(ctx context.Context, a addresses, domain string, q *dns.Msg) (bool, error) {
	if r.all {
		return true, nil
	}
	for _, one := range q.Question {
		if one.Qtype == dns.TypeAXFR || one.Qtype == dns.TypeIXFR {
			return false, nil
		}
		ok, err := r.name(ctx, a, domain, one.Name)
		if !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}

// name decides by the schema of the cluster's DNS (github.com/kubernetes/dns, docs/specification.md): ….NAMESPACE.svc.DOMAIN and
// ….NAMESPACE.pod.DOMAIN; reverse names by their address. Whatever else there is in the domain is everybody's and nobody's (SOA, NS,
// dns-version, the names svc and pod themselves) and says nothing about a namespace.
func (r reach) name(ctx context.Context, a addresses, domain, name string) (bool, error) {
	labels := dns.SplitDomainName(strings.ToLower(name))
	if ip, ok := reverse(labels); ok {
		return r.address(ctx, a, ip)
	}
	zone := dns.SplitDomainName(strings.ToLower(domain))
	below := len(labels) - len(zone)
	if below < 0 || !slices.Equal(labels[below:], zone) {
		return r.namespace(""), nil
	}
	labels = labels[:below]
	if n := len(labels); n >= 2 && (labels[n-1] == "svc" || labels[n-1] == "pod") {
		return r.namespace(labels[n-2]), nil
	}
	return true, nil
}

// reverse reads the address of a complete reverse name (RFC 1035 section 3.5, RFC 3596 section 2.5).
func reverse(labels []string) (netip.Addr, bool) {
	n := len(labels)
	if n < 2 || labels[n-1] != "arpa" {
		return netip.Addr{}, false
	}
	rest := slices.Clone(labels[:n-2])
	slices.Reverse(rest)
	text := ""
	switch {
	case labels[n-2] == "in-addr" && len(rest) == 4:
		text = strings.Join(rest, ".")
	case labels[n-2] == "ip6" && len(rest) == 32:
		for i, nibble := range rest {
			if i > 0 && i%4 == 0 {
				text += ":"
			}
			text += nibble
		}
	}
	ip, err := netip.ParseAddr(text)
	return ip, err == nil
}

// unknown is the answer to a question that the session may not ask: there is no such name. Nothing tells it from one that does not exist.
func unknown(q *dns.Msg) ([]byte, error) {
	a := new(dns.Msg)
	a.SetRcode(q, dns.RcodeNameError)
	return a.Pack()
}
