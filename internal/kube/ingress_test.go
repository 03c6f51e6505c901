package kube

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

func TestIngresses(t *testing.T) {
	service := func(ns, name string, kind corev1.ServiceType, ports ...corev1.ServicePort) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: corev1.ServiceSpec{Type: kind, Ports: ports}}
	}
	rule := func(host string, tls bool) *networkingv1.Ingress {
		in := &networkingv1.Ingress{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}, Spec: networkingv1.IngressSpec{Rules: []networkingv1.IngressRule{{Host: "*.example"}, {Host: host}}}}
		if tls {
			in.Spec.TLS = []networkingv1.IngressTLS{{}}
		}
		return in
	}
	entry := service("infra", "nginx", corev1.ServiceTypeLoadBalancer, corev1.ServicePort{Name: "metrics", Port: 9000}, corev1.ServicePort{Name: "https", Port: 443}, corev1.ServicePort{Name: "http", Port: 80})
	web := service("shop", "web", corev1.ServiceTypeClusterIP, corev1.ServicePort{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}, corev1.ServicePort{Port: 8080})
	for name, tt := range map[string]struct {
		objects []runtime.Object
		want    []v1alpha1.Ingress
	}{
		"nothing":             {nil, nil},
		"services":            {[]runtime.Object{web, service("shop", "out", corev1.ServiceTypeExternalName), service("other", "x", corev1.ServiceTypeClusterIP)}, []v1alpha1.Ingress{{Host: "web.shop", Port: 8080}}},
		"a load balancer":     {[]runtime.Object{web, entry}, []v1alpha1.Ingress{{Host: "nginx.infra", Port: 80}, {Host: "web.shop", Port: 8080}}},
		"and a rule":          {[]runtime.Object{entry, rule("shop.example", false)}, []v1alpha1.Ingress{{Host: "nginx.infra", Port: 80, L5Host: "shop.example"}}},
		"and a rule with TLS": {[]runtime.Object{entry, rule("shop.example", true)}, []v1alpha1.Ingress{{Host: "nginx.infra", Port: 443, TLS: true, L5Host: "shop.example"}}},
	} {
		if d := cmp.Diff(tt.want, guessed(t, tt.objects, "")); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	gate := service("infra", "gate", corev1.ServiceTypeLoadBalancer, corev1.ServicePort{Name: "https", Port: 443}, corev1.ServicePort{Name: "http", Port: 80})
	gate.Labels = map[string]string{"gateway.networking.k8s.io/gateway-name": "public"}
	for name, tt := range map[string]struct {
		routes string // of the Gateway API; the Gateway public of infra speaks TLS
		want   []v1alpha1.Ingress
	}{
		"a route": {
			`{"items":[{"spec":{"hostnames":["*.example","shop.example"],"parentRefs":[{"name":"public","namespace":"infra"}]}}]}`,
			[]v1alpha1.Ingress{{Host: "gate.infra", Port: 443, TLS: true, L5Host: "shop.example"}, {Host: "nginx.infra", Port: 80}, {Host: "web.shop", Port: 8080}},
		},
		"a route of another namespace's Gateway, and of a mesh": {
			`{"items":[{"spec":{"parentRefs":[{"name":"public"},{"name":"web","kind":"Service"}]}}]}`,
			[]v1alpha1.Ingress{{Host: "gate.infra", Port: 80}, {Host: "nginx.infra", Port: 80}, {Host: "web.shop", Port: 8080}},
		},
		"what is no list": {`[`, []v1alpha1.Ingress{{Host: "gate.infra", Port: 80}, {Host: "nginx.infra", Port: 80}, {Host: "web.shop", Port: 8080}}},
	} {
		if d := cmp.Diff(tt.want, guessed(t, []runtime.Object{gate, entry, web}, tt.routes)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// guessed is what is guessed in a cluster with these objects and, if they are said, HTTPRoutes.
func guessed(t *testing.T, objects []runtime.Object, routes string) []v1alpha1.Ingress {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		var own, all corev1.ServiceList
		var rules networkingv1.IngressList
		for _, o := range objects {
			switch o := o.(type) {
			case *networkingv1.Ingress:
				rules.Items = append(rules.Items, *o)
			case *corev1.Service:
				all.Items = append(all.Items, *o)
				if o.Namespace == "shop" {
					own.Items = append(own.Items, *o)
				}
			}
		}
		answer := map[string]any{
			"/api/v1/services":                                                    all,
			"/api/v1/namespaces/shop/services":                                    own,
			"/apis/networking.k8s.io/v1/namespaces/shop/ingresses":                rules,
			"/apis/gateway.networking.k8s.io/v1/namespaces/shop/httproutes":       json.RawMessage(routes),
			"/apis/gateway.networking.k8s.io/v1/namespaces/infra/gateways/public": json.RawMessage(`{"spec":{"listeners":[{"protocol":"HTTPS"}]}}`),
		}[r.URL.Path]
		if raw, ok := answer.(json.RawMessage); ok && routes != "" {
			_, _ = w.Write(raw)
		} else if ok || answer == nil {
			http.NotFound(w, r)
		} else if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	defer srv.Close()
	c, err := newCluster(&rest.Config{Host: srv.URL}, nil, "", "")
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Ingresses(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	return got
}
