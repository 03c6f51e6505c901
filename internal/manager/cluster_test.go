package manager

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
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
	same := cmp.Options{cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.EquateEmpty()}

	w := newWorld(t, append(base, cidrs, more)...)
	got, err := w.cluster.read(t.Context())
	want := control.Cluster{Domain: "cluster.test", ServiceCIDRs: prefixes("10.80.0.0/20", "10.96.0.0/16", "fd00:96::/108"), PodCIDRs: pods, Services: services}
	if d := cmp.Diff(want, got, same); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	if got.Services["empty"] == nil {
		t.Error("a namespace without services is null")
	}

	// Before Kubernetes 1.33 there is no such API: the /16 around the API server's own service.
	w = newWorld(t, base...)
	w.fail = func(_ string, o runtime.Object) error {
		if _, ok := o.(*networkingv1.ServiceCIDRList); ok {
			return errors.New("no kind")
		}
		return nil
	}
	got, err = w.cluster.read(t.Context())
	want.ServiceCIDRs = prefixes("10.43.0.0/16")
	if d := cmp.Diff(want, got, same); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
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

// A watch gets the information once it is there, and again when it has changed.
func TestClusterWatch(t *testing.T) {
	w := newWorld(t, &corev1.Namespace{ObjectMeta: meta("", "shop")})
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan control.Cluster)
	done := make(chan error, 1)
	go func() {
		done <- w.cluster.watch(ctx, reach{all: true}, func(v any) error { got <- v.(control.Cluster); return nil })
	}()
	refresh := func() {
		if err := w.cluster.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	refresh()
	if c := <-got; len(c.Services["shop"]) != 0 {
		t.Errorf("first: %v", c)
	}
	refresh() // nothing changed: nothing is sent
	w.create(svc("shop", "web", "10.96.0.1"))
	refresh()
	if c := <-got; len(c.Services["shop"]) != 1 {
		t.Errorf("second: %v", c)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	gone := errors.New("the laptop is gone")
	if err := w.cluster.watch(t.Context(), reach{all: true}, func(any) error { return gone }); !errors.Is(err, gone) {
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
