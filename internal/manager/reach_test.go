package manager

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"unsafe"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// reachCluster is a cluster with namespaces shop, data and web, and everything that has an address.
func reachCluster() []client.Object {
	service := func(ns, name string, ips ...string) client.Object {
		return &corev1.Service{ObjectMeta: meta(ns, name), Spec: corev1.ServiceSpec{ClusterIP: ips[0], ClusterIPs: ips}}
	}
	pod := func(ns, name string, change func(*corev1.Pod), ips ...string) client.Object {
		p := &corev1.Pod{ObjectMeta: meta(ns, name), Status: corev1.PodStatus{Phase: corev1.PodRunning}}
		for _, ip := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		}
		if change != nil {
			change(p)
		}
		return p
	}
	endpoints := func(ns, name string, ips ...string) client.Object {
		return &discoveryv1.EndpointSlice{ObjectMeta: meta(ns, name), Endpoints: []discoveryv1.Endpoint{{Addresses: ips}}}
	}
	claim := service("web", "claim", "10.96.0.7")
	claim.(*corev1.Service).Spec.ExternalIPs = []string{"10.244.0.2", "203.0.113.8"}
	return []client.Object{
		service("shop", "cart", "10.96.0.5", "fd00::5"), service("data", "db", "10.96.0.6"), service("data", "headless", "None"), claim,
		&corev1.Node{ObjectMeta: meta("", "node"), Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeHostName, Address: "192.0.2.9"},
		}}},
		pod("shop", "cart-1", nil, "10.244.0.1", "fd01::1"), pod("data", "db-1", nil, "10.244.0.2"),
		pod("shop", "proxy", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, "192.0.2.1"),
		pod("shop", "done", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, "10.244.0.2"),
		pod("web", "pending", func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }),
		endpoints("shop", "outside-db", "203.0.113.7"), endpoints("shop", "shared-db", "203.0.113.9"), endpoints("web", "shared-db", "203.0.113.9"),
		endpoints("shop", "steal", "10.244.0.2", "10.96.0.6", "192.0.2.1"), // of others
	}
}

func TestReachAddress(t *testing.T) {
	w := newWorld(t, reachCluster()...)
	for ip, want := range map[string]string{ // which of shop, data, web, outside gets there
		"10.96.0.5": "shop", "fd00::5": "shop", "10.244.0.1": "shop", "fd01::1": "shop", "::ffff:10.244.0.1": "shop",
		"10.96.0.6": "data", "10.244.0.2": "data",
		"192.0.2.1": "outside", "192.0.2.9": "outside", "198.51.100.1": "outside", "10.244.9.9": "outside",
		"203.0.113.7": "shop", "203.0.113.9": "shop web", "203.0.113.8": "outside",
	} {
		var got []string
		for _, who := range []string{"shop", "data", "web", "outside"} {
			r := reach{namespaces: []string{who}}
			if who == "outside" {
				r = reach{outside: true}
			}
			ok, err := r.address(t.Context(), w.addresses, netip.MustParseAddr(ip))
			if err != nil {
				t.Fatal(err)
			}
			if ok {
				got = append(got, who)
			}
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%s is reached by %q, want %q", ip, g, want)
		}
		if ok, err := (reach{all: true}).address(t.Context(), w.addresses, netip.MustParseAddr(ip)); !ok || err != nil {
			t.Errorf("%s is out of reach of the whole cluster: %v", ip, err)
		}
	}
}

func TestReachName(t *testing.T) {
	w := newWorld(t, reachCluster()...)
	for name, want := range map[string]string{
		"cart.shop.svc.cluster.test.": "shop", "CART.Shop.SVC.Cluster.Test.": "shop", "shop.svc.cluster.test.": "shop",
		"pod.headless.data.svc.cluster.test.": "data", "_pg._tcp.db.data.svc.cluster.test.": "data", "*.data.svc.cluster.test.": "data",
		"10-244-0-2.data.pod.cluster.test.": "data", `x\.shop.data.svc.cluster.test.`: "data",
		"5.0.96.10.in-addr.arpa.": "shop", "2.0.244.10.in-addr.arpa.": "data", "1.2.0.192.in-addr.arpa.": "outside",
		"5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.": "shop",
		"svc.cluster.test.":     "shop data outside",
		"cluster.test.":         "shop data outside",
		"db.data.":              "outside",
		"example.com.":          "outside",
		"in-addr.arpa.":         "outside",
		"9.96.10.in-addr.arpa.": "outside",
		".":                     "outside",
	} {
		var got []string
		for _, who := range []string{"shop", "data", "outside"} {
			r := reach{namespaces: []string{who}}
			if who == "outside" {
				r = reach{outside: true}
			}
			q := new(dns.Msg).SetQuestion(name, dns.TypeA)
			ok, err := r.question(t.Context(), w.addresses, "cluster.test", q)
			if err != nil {
				t.Fatal(err)
			}
			if ok {
				got = append(got, who)
			}
			q.Question = append(q.Question, dns.Question{Name: "other.namespace.svc.cluster.test.", Qtype: dns.TypeA, Qclass: dns.ClassINET})
			if ok, _ := r.question(t.Context(), w.addresses, "cluster.test", q); ok {
				t.Errorf("%s: a second question was not looked at", name)
			}
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%s may be asked by %q, want %q", name, g, want)
		}
	}
	q := new(dns.Msg).SetAxfr("cluster.test.")
	if ok, _ := (reach{namespaces: []string{"shop"}, outside: true}).question(t.Context(), w.addresses, "cluster.test", q); ok {
		t.Error("a zone transfer is a way to all names")
	}
}

// A session's tunnel as its laptop sees it: names, DNS and flows end at its borders.
func TestReachOfSession(t *testing.T) {
	l := newLaptop(t)
	s := session("mine", "ada", l.id.Fingerprint())
	s.Spec.Reach.Namespaces = []string{"shop"}
	w := newWorld(t, append(reachCluster(), s)...)
	w.cfg.CheckReach = true
	server := newDNSServer(t)
	w.dns.servers = []string{server.addr}
	w.cluster.current = control.Cluster{Domain: "cluster.test", Services: map[string][]control.Service{"shop": {{Name: "cart"}}, "data": {{Name: "db"}}}}
	m, err := l.attach(w, wire.Hello{Role: wire.RoleLaptop, Session: "mine"})
	if err != nil {
		t.Fatal(err)
	}

	watch, err := tunnel.Watch(t.Context(), m, control.LaptopCluster, nil)
	if err != nil {
		t.Fatal(err)
	}
	var info control.Cluster
	if err := watch.Next(t.Context(), &info); err != nil {
		t.Fatal(err)
	}
	if len(info.Services) != 1 || len(info.Services["shop"]) != 1 {
		t.Errorf("the laptop is told of %v", info.Services)
	}

	rcode := func(name string) int {
		q := new(dns.Msg).SetQuestion(name, dns.TypeA)
		b, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		out, err := tunnel.Query(t.Context(), m, b)
		if err != nil {
			t.Fatal(err)
		}
		a := new(dns.Msg)
		if err := a.Unpack(out); err != nil || a.Id != q.Id {
			t.Fatal(a, err)
		}
		return a.Rcode
	}
	if got := rcode("cart.shop.svc.cluster.test."); got != dns.RcodeSuccess {
		t.Errorf("within reach: %s", dns.RcodeToString[got])
	}
	if got := rcode("db.data.svc.cluster.test."); got != dns.RcodeNameError || server.udp.Load() != 1 {
		t.Errorf("out of reach: %s, %d questions asked", dns.RcodeToString[got], server.udp.Load())
	}

	for _, dst := range []string{"10.96.0.6:5432", "10.244.0.2:5432", "192.0.2.1:10250", "198.51.100.1:443"} {
		_, err := tunnel.DialTCP(t.Context(), m, netip.MustParseAddrPort("198.18.0.1:1"), netip.MustParseAddrPort(dst))
		if wire.CodeOf(err) != wire.CodeUnreachable || !strings.Contains(fmt.Sprint(err), "reach") {
			t.Errorf("TCP to %s: %v", dst, err)
		}
		if _, err = tunnel.DialUDP(t.Context(), m, netip.MustParseAddrPort("198.18.0.1:1"), netip.MustParseAddrPort(dst)); wire.CodeOf(err) != wire.CodeUnreachable {
			t.Errorf("UDP to %s: %v", dst, err)
		}
		if _, err = tunnel.DialEcho(t.Context(), m, netip.MustParseAddr("198.18.0.1"), netip.MustParseAddrPort(dst).Addr()); wire.CodeOf(err) != wire.CodeUnreachable {
			t.Errorf("ping to %s: %v", dst, err)
		}
	}
}

func TestReachOf(t *testing.T) {
	w := newWorld(t)
	s := session("s", "ada", "k")
	for _, tt := range []struct {
		check      bool
		namespaces []string
		all        bool
	}{
		{false, nil, true},
		{true, nil, false},
		{true, []string{"shop"}, false},
		{true, []string{v1alpha1.ReachAll}, true},
		{true, []string{"shop", v1alpha1.ReachAll}, false},
	} {
		w.cfg.CheckReach, s.Spec.Reach.Namespaces = tt.check, tt.namespaces
		if got := w.reachOf(s); got.all != tt.all {
			t.Errorf("%+v: %+v", tt, got)
		}
	}
}

// What the cache keeps of a pod is what presence needs, and not much memory.
func TestPrunePod(t *testing.T) {
	p := &corev1.Pod{
		ObjectMeta: owned(meta("shop", "cart-1"), "ReplicaSet", "cart"),
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Env: []corev1.EnvVar{{Name: "SECRET", Value: "x"}}}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.244.0.1"}}, Conditions: []corev1.PodCondition{{}}},
	}
	p.Annotations = map[string]string{agentcfg.Annotation: strings.Repeat("long", 1000), agentcfg.AnnotationInject: agentcfg.InjectEnabled, "other": "x"}
	o, err := prunePod(p)
	got := o.(*corev1.Pod)
	if err != nil || got.Namespace != "shop" || got.Status.Phase != corev1.PodRunning || got.CreationTimestamp.IsZero() || len(got.OwnerReferences) != 1 ||
		!agentcfg.Keeps(got.Annotations) || got.Annotations[agentcfg.Annotation] == "" {
		t.Errorf("%+v, %v", got, err)
	}
	if len(got.Annotations) != 2 || len(got.Annotations[agentcfg.Annotation]) > 10 || len(got.Spec.Containers) != 0 || len(got.Status.Conditions) != 0 || len(got.Status.PodIPs) != 0 {
		t.Errorf("more is kept than is read: %+v", got)
	}
	if size := unsafe.Sizeof(*got); size > 2048 {
		t.Errorf("an empty pod has %d bytes", size)
	}
}
