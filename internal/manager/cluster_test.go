package manager

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/internal/control"
)

func svc(ns, name, ip string) *corev1.Service {
	return &corev1.Service{ObjectMeta: meta(ns, name), Spec: corev1.ServiceSpec{ClusterIP: ip}}
}

func node(name string, cidrs ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: meta("", name), Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
}

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestClusterRead(t *testing.T) {
	cidrs := &networkingv1.ServiceCIDR{ObjectMeta: meta("", "kubernetes"), Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "fd00:96::/108"}}}
	more := &networkingv1.ServiceCIDR{ObjectMeta: meta("", "more"), Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.80.1.2/20", "10.96.0.0/16", "nonsense"}}}
	base := []client.Object{
		&corev1.Namespace{ObjectMeta: meta("", "default")}, &corev1.Namespace{ObjectMeta: meta("", "shop")}, &corev1.Namespace{ObjectMeta: meta("", "empty")},
		svc("default", "kubernetes", "10.43.7.1"), svc("shop", "web", "10.96.1.1"), svc("shop", "db", "None"), svc("shop", "api", "10.96.1.2"),
		node("b", "10.244.1.0/24", "fd00:244:1::/64"), node("a", "10.244.0.0/24"), node("new"),
	}
	services := map[string][]control.Service{
		"default": {{Name: "kubernetes"}}, "empty": {}, "shop": {{Name: "api"}, {Name: "db", Headless: true}, {Name: "web"}},
		"doppel": {{Name: "traffic-manager"}},
	}
	pods := prefixes("10.244.0.0/24", "10.244.1.0/24", "fd00:244:1::/64")
	same := cmp.Options{cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmpopts.EquateEmpty()}

	w := newWorld(t, append(base, cidrs, more)...)
	got, err := w.cluster.read(t.Context())
	self := netip.MustParseAddrPort("10.0.0.1:10250")
	want := control.Cluster{Domain: "cluster.test", ManagerPod: self, ManagerService: netip.MustParseAddrPort("10.96.0.99:80"), ServiceCIDRs: prefixes("10.80.0.0/20", "10.96.0.0/16", "fd00:96::/108"), PodCIDRs: pods, Services: services}
	if d := cmp.Diff(want, got, same); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	if got.Services["empty"] == nil {
		t.Error("a namespace without services is null")
	}

	// Before Kubernetes 1.33 there is no such API: what is around the services' own addresses. It is not asked for again and again.
	asked := 0
	w = newWorld(t, append(base, &corev1.Service{ObjectMeta: meta("shop", "v6"), Spec: corev1.ServiceSpec{ClusterIP: "10.43.9.9", ClusterIPs: []string{"10.43.9.9", "fd00:43::9"}}})...)
	w.fail = func(_ string, o runtime.Object) error {
		if _, ok := o.(*networkingv1.ServiceCIDRList); ok {
			asked++
			return &apimeta.NoKindMatchError{}
		}
		return nil
	}
	got, err = w.cluster.read(t.Context())
	want.ServiceCIDRs = prefixes("10.43.0.0/16", "10.96.0.0/16", "fd00:43::/112")
	want.Services = maps.Clone(services)
	want.Services["shop"] = append(slices.Clone(services["shop"][:2]), control.Service{Name: "v6"}, services["shop"][2])
	if d := cmp.Diff(want, got, same); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	if _, err := w.cluster.read(t.Context()); err != nil || asked != 1 {
		t.Errorf("asked %d times for what is not there, %v", asked, err)
	}

	// Nodes that say nothing of their pods: what is around the pods' own addresses.
	pod := func(name string, hostNetwork bool, ips ...string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: meta("shop", name), Spec: corev1.PodSpec{HostNetwork: hostNetwork}}
		for _, ip := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		}
		return p
	}
	w = newWorld(t, node("bare"))
	for _, p := range []*corev1.Pod{pod("a", false, "192.168.7.5", "fd00:7::5"), pod("b", false, "192.168.7.6"), pod("c", false, "192.168.9.1"), pod("host", true, "10.0.0.1"), pod("new", false)} {
		w.cluster.seePod(p)
	}
	if got, err = w.cluster.read(t.Context()); err != nil || fmt.Sprint(got.PodCIDRs) != "[192.168.7.0/24 192.168.9.0/24 fd00:7::/64]" {
		t.Errorf("by pods: %v, %v", got.PodCIDRs, err)
	}

	// Nodes' own addresses, but for those of nodes where the API server is, whoever is behind them.
	at := func(name string, ips ...string) *corev1.Node {
		n := node(name)
		for _, ip := range ips {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip})
		}
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: "203.0.113.7"}, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
		return n
	}
	api := &discoveryv1.EndpointSlice{ObjectMeta: meta("default", "kubernetes"), Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.1.1"}}}}
	w = newWorld(t, api, at("control", "10.0.1.1", "fd00:1::1"), at("b", "10.0.1.3", "fd00:1::3"), at("a", "10.0.1.2"))
	if got, err = w.cluster.read(t.Context()); err != nil || fmt.Sprint(got.Nodes) != "[10.0.1.2 10.0.1.3 fd00:1::3]" {
		t.Errorf("nodes: %v, %v", got.Nodes, err)
	}
	for want, r := range map[string]reach{
		"[10.0.1.2 10.0.1.3 fd00:1::3]":  {all: true},
		"[10.0.1.2 10.0.1.3 fd00:1::3] ": {outside: true},
		"[]":                             {namespaces: []string{"shop"}},
	} {
		if got := fmt.Sprint(r.cluster(got).Nodes); got != strings.TrimSpace(want) {
			t.Errorf("%+v is told of nodes %s", r, got)
		}
	}

	for _, kind := range []any{&corev1.NamespaceList{}, &corev1.ServiceList{}, &corev1.NodeList{}} {
		w.set(func() {
			w.fail = func(_ string, o runtime.Object) error {
				if reflect.TypeOf(o) == reflect.TypeOf(kind) {
					return errors.New("the API server is away")
				}
				return nil
			}
		})
		if err := w.cluster.refresh(t.Context()); err == nil {
			t.Errorf("%T cannot be listed, and nobody says so", kind)
		}
	}
}

// A watch gets the information once it is there. When it has changed those who ask for changes get these, and all others, such as older laptops, all of it.
func TestClusterWatch(t *testing.T) {
	w := newWorld(t, &corev1.Namespace{ObjectMeta: meta("", "shop")}, &corev1.Namespace{ObjectMeta: meta("", "data")})
	refresh := func() {
		if err := w.cluster.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	refresh()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 3)
	watch := func(to reach, ask control.AskCluster) <-chan control.Cluster {
		got := make(chan control.Cluster, 1)
		go func() {
			done <- w.cluster.watch(ctx, to, ask, func(v any) error { got <- v.(control.Cluster); return nil })
		}()
		return got
	}
	all, news := watch(reach{all: true}, control.AskCluster{}), watch(reach{all: true}, control.AskCluster{Changes: true})
	narrow := watch(reach{namespaces: []string{"data"}}, control.AskCluster{Changes: true})
	expect := func(got <-chan control.Cluster, partial bool, services map[string][]control.Service) {
		t.Helper()
		c := <-got
		if diff := cmp.Diff(services, c.Services); diff != "" || c.Partial != partial {
			t.Errorf("partial: %v; %s", c.Partial, diff)
		}
	}
	none, web, own := []control.Service{}, []control.Service{{Name: "web"}}, []control.Service{{Name: objectName}}
	expect(all, false, map[string][]control.Service{"doppel": own, "shop": none, "data": none})
	expect(news, false, map[string][]control.Service{"doppel": own, "shop": none, "data": none})
	expect(narrow, false, map[string][]control.Service{"data": none})
	refresh() // nothing changed: nothing is sent
	w.create(svc("shop", "web", "10.96.0.1"))
	refresh() // nothing within reach of the third changed
	expect(all, false, map[string][]control.Service{"doppel": own, "shop": web, "data": none})
	expect(news, true, map[string][]control.Service{"shop": web})
	w.delete(&corev1.Namespace{ObjectMeta: meta("", "data")})
	refresh()
	expect(all, false, map[string][]control.Service{"doppel": own, "shop": web})
	expect(news, true, map[string][]control.Service{"data": nil})
	expect(narrow, true, map[string][]control.Service{"data": nil})
	cancel()
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	gone := errors.New("the laptop is gone")
	if err := w.cluster.watch(t.Context(), reach{all: true}, control.AskCluster{}, func(any) error { return gone }); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}

func TestClusterDomain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	for text, want := range map[string]string{
		"search shop.svc.k8s.example. svc.k8s.example. k8s.example.\nnameserver 10.0.0.1\n":  "k8s.example",
		"nameserver 10.0.0.1\nsearch shop.svc.cluster.local svc.cluster.local cluster.local": "cluster.local",
		"search corp.example\n": "cluster.local",
		"":                      "cluster.local",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := clusterDomain(file); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
	if got := clusterDomain(file + "x"); got != "cluster.local" {
		t.Errorf("no file: %s", got)
	}
}
