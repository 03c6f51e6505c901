package resolver

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// DefaultClusterDomain is the cluster domain of nearly all clusters.
const DefaultClusterDomain = "cluster.local"

// Names is the synced set that decides which names are the cluster's. The zero value makes no name the cluster's.
type Names struct {
	// Session tells the clusters apart where there are several; Ask is whom this one's names are asked, default Config.Cluster.
	Session string
	Ask     Ask
	// Asked says who it is behind Ask that answers, where that changes: answers of another are not kept.
	Asked string

	ClusterDomain string              // default "cluster.local"
	Namespace     string              // the connected namespace, whose services are single labels
	Services      map[string][]string // namespace → names of its services
	Headless      map[string][]string // namespace → names of its headless services, a subset of Services

	// PodCIDRs and ServiceCIDRs: reverse lookups (PTR) of their addresses are the cluster's.
	PodCIDRs     []netip.Prefix
	ServiceCIDRs []netip.Prefix

	// IncludeSuffixes are further domains that the cluster's DNS answers, ExcludeSuffixes domains it never does, whatever else
	// says it would. A suffix covers the name itself and everything below.
	// The longest one decides, and of two equal ones the included.
	IncludeSuffixes []string
	ExcludeSuffixes []string

	// MappedNamespaces are those whose services and pods have names here, beside Namespace; empty means all.
	MappedNamespaces []string

	// Mappings are names that stand for others.
	Mappings []Mapping
}

// Mapping has Name answered as Target is, or with Addr if that is valid.
type Mapping struct {
	Name   string
	Target string
	Addr   netip.Addr
}

// SearchDomain stands for the connected namespace where a resolver of the laptop insists on a domain behind single labels: "web" is
// looked up as "web" and this. Only the connected namespace's services have names in it, and nothing in it is ever asked of the cluster, so
// that names which do not exist outside are not looked up there either. The domain .internal is for private use (ICANN, 2024).
const SearchDomain = "search.doppel.internal"

// table is Names made ready for lookups; it is never changed.
type table struct {
	session   string
	ask       Ask
	asked     string
	domain    string // without dots around
	namespace string
	services  map[string]map[string]bool // namespace → service → is headless
	prefixes  []netip.Prefix
	include   []string
	exclude   []string
	mapped    []string // sorted; empty: all
	mappings  map[string]Mapping

	suffix1, suffix2 string // what a name of one label lacks, and one of two ("svc.ns")
}

// compile returns the table of n; nil for the zero value.
func compile(n Names) *table {
	if n.ClusterDomain == "" && n.Namespace == "" && len(n.Services)+len(n.Headless)+len(n.PodCIDRs)+len(n.ServiceCIDRs)+
		len(n.IncludeSuffixes)+len(n.ExcludeSuffixes)+len(n.MappedNamespaces)+len(n.Mappings) == 0 {
		return nil
	}
	t := &table{
		session:   n.Session,
		ask:       n.Ask,
		asked:     n.Asked,
		domain:    trimDots(n.ClusterDomain),
		namespace: trimDots(n.Namespace),
		services:  make(map[string]map[string]bool, len(n.Services)),
		include:   trimAll(n.IncludeSuffixes),
		exclude:   trimAll(n.ExcludeSuffixes),
		mapped:    trimAll(n.MappedNamespaces),
		mappings:  make(map[string]Mapping, len(n.Mappings)),
	}
	if len(t.mapped) > 0 && t.namespace != "" {
		t.mapped = append(t.mapped, t.namespace)
	}
	for _, m := range n.Mappings {
		m.Name, m.Target = trimDots(m.Name), trimDots(m.Target)
		t.mappings[m.Name] = m
	}
	if t.domain == "" {
		t.domain = DefaultClusterDomain
	}
	t.suffix2 = "svc." + t.domain
	t.suffix1 = t.namespace + "." + t.suffix2
	t.add(n.Services, false)
	t.add(n.Headless, true)
	for _, p := range slices.Concat(n.PodCIDRs, n.ServiceCIDRs) {
		if p.IsValid() {
			t.prefixes = append(t.prefixes, p.Masked())
		}
	}
	// In one order: the same set again is no change, and keeps the cache.
	slices.SortFunc(t.prefixes, netip.Prefix.Compare)
	slices.Sort(t.include)
	slices.Sort(t.exclude)
	slices.Sort(t.mapped)
	return t
}

func (t *table) add(set map[string][]string, headless bool) {
	for ns, names := range set {
		ns = strings.ToLower(ns)
		if !t.isMapped(ns) {
			continue
		}
		if t.services[ns] == nil {
			t.services[ns] = make(map[string]bool, len(names))
		}
		for _, name := range names {
			t.services[ns][strings.ToLower(name)] = headless
		}
	}
}

// decide tells whether name (lower case, no final dot) is the cluster's, and what has to be appended to it ("" or a domain
// without dots around) to get the name the cluster's DNS knows. It is a pure function of the table, so that no lookup outside
// ever has to ask the cluster. A nil table owns no names.
//
//	name                                          the cluster's if
//	x.cluster.local and below                     always
//	1.0.0.10.in-addr.arpa, ….ip6.arpa             the address is in a pod or service CIDR
//	svc.ns.svc, and more labels before            always: .svc is no top-level domain
//	svc.ns                                        that service exists: a namespace "dev" must not swallow .dev
//	pod.svc.ns                                    that service exists and is headless
//	svc                                           that service exists in the connected namespace
//	_port._proto. before one of the last three    as without it (SRV)
func (t *table) decide(name string) (suffix string, cluster bool) {
	if t == nil || name == "" {
		return "", false
	}
	switch in, out := longest(name, t.include), longest(name, t.exclude); {
	case out > in:
		return "", false
	case in > 0, under(name, t.domain):
		return "", true
	}
	if addr, ok := reverseAddr(name); ok {
		return "", slices.ContainsFunc(t.prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
	}
	if strings.HasSuffix(name, ".svc") && strings.Count(name, ".") >= 2 {
		return t.domain, true
	}
	labels := strings.SplitN(trimSRV(name), ".", 4)
	switch len(labels) {
	case 1:
		if _, ok := t.services[t.namespace][labels[0]]; ok {
			return t.suffix1, true
		}
	case 2:
		if _, ok := t.services[labels[1]][labels[0]]; ok {
			return t.suffix2, true
		}
	case 3:
		if t.services[labels[2]][labels[1]] {
			return t.suffix2, true
		}
	}
	return "", false
}

// way is what becomes of a question.
type way int

const (
	toUpstream way = iota // asked of the laptop's own resolvers
	toCluster             // asked of the cluster
	toNowhere             // there is no such name
	toMapping             // answered as another name is, or with an address
)

// find tells what becomes of questions about name; the suffix belongs to toCluster, the mapping to toMapping. It is a pure function as decide.
func (t *table) find(name string) (way, string, Mapping) {
	if t == nil {
		return toUpstream, "", Mapping{}
	}
	if m, ok := t.mappings[name]; ok {
		return toMapping, "", m
	}
	if under(name, SearchDomain) {
		host := strings.TrimSuffix(strings.TrimSuffix(name, SearchDomain), ".")
		if _, ok := t.services[t.namespace][trimSRV(host)]; ok {
			return toMapping, "", Mapping{Name: name, Target: host + "." + t.suffix1}
		}
		if m, ok := t.mappings[host]; ok && !strings.Contains(host, ".") {
			return toMapping, "", m
		}
		return toNowhere, "", Mapping{}
	}
	suffix, cluster := t.decide(name)
	if !cluster {
		return toUpstream, "", Mapping{}
	}
	fqdn := name
	if suffix != "" {
		fqdn += "." + suffix
	}
	if ns := t.namespaceOf(fqdn); ns != "" && !t.isMapped(ns) {
		return toNowhere, "", Mapping{}
	}
	return toCluster, suffix, Mapping{}
}

// directory is the tables of the clusters that this laptop is connected to, in the order in which they were connected.
type directory []*table

// compileAll leaves out those that own no names.
func compileAll(all []Names) directory {
	var d directory
	for _, n := range all {
		if t := compile(n); t != nil {
			d = append(d, t)
		}
	}
	return d
}

// find asks the clusters in their order. A name that exists in one, as far as the synced sets say, is that one's; a name that is a cluster's
// by its form alone is the first one's. So "api.shop.svc" is found wherever there is such a service.
func (d directory) find(name string) (t *table, to way, suffix string, m Mapping) {
	for _, c := range d {
		w, s, cm := c.find(name)
		switch {
		case w == toUpstream:
		case len(d) == 1 || c.knows(name, w, s):
			return c, w, s, cm
		case t == nil:
			t, to, suffix, m = c, w, s, cm
		}
	}
	return t, to, suffix, m
}

// knows says whether a name that is the cluster's (find) is there: its service, or its namespace where it is no service's.
func (t *table) knows(name string, to way, suffix string) bool {
	if to != toCluster {
		return to == toMapping
	}
	fqdn := name
	if suffix != "" {
		fqdn += "." + suffix
	}
	if svc, ns, ok := strings.Cut(t.serviceOf(fqdn), "."); ok {
		_, ok := t.services[ns][svc]
		return ok
	}
	if ns := t.namespaceOf(fqdn); ns != "" {
		_, ok := t.services[ns]
		return ok
	}
	return !under(fqdn, t.domain) // a reverse name of its subnets, an included domain
}

func (t *table) isMapped(namespace string) bool {
	return len(t.mapped) == 0 || slices.Contains(t.mapped, namespace)
}

// namespaceOf returns the namespace of a service's or pod's absolute name, "" for any other.
func (t *table) namespaceOf(fqdn string) string {
	for _, kind := range []string{".svc.", ".pod."} {
		if rest, ok := strings.CutSuffix(fqdn, kind+t.domain); ok {
			return rest[strings.LastIndexByte(rest, '.')+1:]
		}
	}
	return ""
}

// serviceOf returns "svc.ns" for an absolute name of the cluster domain that belongs to a service, "" for any other.
func (t *table) serviceOf(fqdn string) string {
	rest, ok := strings.CutSuffix(fqdn, "."+t.suffix2)
	if !ok {
		return ""
	}
	dot := strings.LastIndexByte(rest, '.')
	if dot < 0 {
		return ""
	}
	return rest[strings.LastIndexByte(rest[:dot], '.')+1:]
}

// changes returns the services ("svc.ns") that differ between two tables; all is true when more than services differ.
func changes(a, b *table) (services map[string]bool, all bool) {
	if a.session != b.session || a.asked != b.asked || a.domain != b.domain || a.namespace != b.namespace ||
		!slices.Equal(a.prefixes, b.prefixes) || !slices.Equal(a.include, b.include) || !slices.Equal(a.exclude, b.exclude) ||
		!slices.Equal(a.mapped, b.mapped) {
		return nil, true
	}
	services = make(map[string]bool)
	diff := func(ns string, a, b map[string]bool) {
		for name, headless := range a {
			if other, ok := b[name]; !ok || other != headless {
				services[name+"."+ns] = true
			}
		}
	}
	for ns, set := range a.services {
		if other := b.services[ns]; !maps.Equal(set, other) {
			diff(ns, set, other)
			diff(ns, other, set)
		}
	}
	for ns, set := range b.services {
		if _, ok := a.services[ns]; !ok {
			diff(ns, set, nil)
		}
	}
	return services, false
}

// trimSRV removes a leading "_port._proto." (RFC 2782).
func trimSRV(name string) string {
	port, rest, ok := strings.Cut(name, ".")
	if !ok || !strings.HasPrefix(port, "_") || !strings.HasPrefix(rest, "_") {
		return name
	}
	_, host, ok := strings.Cut(rest, ".")
	if !ok {
		return name
	}
	return host
}

// reverseAddr reads the address in a complete reverse name (RFC 1035 section 3.5, RFC 3596 section 2.5).
func reverseAddr(name string) (netip.Addr, bool) {
	if v4, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(v4, ".")
		slices.Reverse(parts)
		addr, err := netip.ParseAddr(strings.Join(parts, "."))
		return addr, err == nil && addr.Is4()
	}
	v6, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(v6) != 63 {
		return netip.Addr{}, false
	}
	var b [16]byte
	for i := range 32 {
		nibble := strings.IndexByte("0123456789abcdef", v6[62-2*i])
		if nibble < 0 || (i < 31 && v6[61-2*i] != '.') {
			return netip.Addr{}, false
		}
		b[i/2] = b[i/2]<<4 | byte(nibble)
	}
	return netip.AddrFrom16(b), true
}

// under tells whether name is domain or below it.
func under(name, domain string) bool {
	rest, ok := strings.CutSuffix(name, domain)
	return ok && domain != "" && (rest == "" || rest[len(rest)-1] == '.')
}

// longest returns the length of the longest of the domains that name is under, 0 for none.
func longest(name string, domains []string) int {
	n := 0
	for _, d := range domains {
		if len(d) > n && under(name, d) {
			n = len(d)
		}
	}
	return n
}

func trimDots(s string) string { return strings.ToLower(strings.Trim(s, ".")) }

func trimAll(list []string) []string {
	out := make([]string, 0, len(list))
	for _, s := range list {
		if s = trimDots(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}
