package kube

import (
	"cmp"
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// Ingresses guesses where requests enter the cluster: services of the Gateways that HTTPRoutes of the namespace name; services of type LoadBalancer, with the
// host of an Ingress of the namespace as the name that they are asked for; then the services of the namespace itself. What the user may not list is left out. The likeliest comes first.
func (c *Cluster) Ingresses(ctx context.Context, ns string) ([]v1alpha1.Ingress, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	own, err := services.list(ctx, c, ns, "")
	if err != nil {
		return nil, c.explain(err, "list the services of namespace "+ns)
	}
	all, err := services.list(ctx, c, "", "")
	if err != nil { // may list one namespace only
		all = own
	}
	rules, _ := ingresses.list(ctx, c, ns, "") // empty if the user may not see them
	return guesses(all.Items, own.Items, rules.Items, c.gateways(ctx, ns)), nil
}

func guesses(all, own []corev1.Service, rules []networkingv1.Ingress, routes []routed) []v1alpha1.Ingress {
	host, secure := "", false
	for _, in := range rules {
		for _, r := range in.Spec.Rules {
			if host == "" && r.Host != "" && r.Host[0] != '*' {
				host, secure = r.Host, len(in.Spec.TLS) > 0
			}
		}
	}
	var out []v1alpha1.Ingress
	of := func(s corev1.Service, r routed) bool {
		return s.Namespace == r.namespace && s.Labels[gatewayLabel] == r.gateway
	}
	for _, r := range routes {
		for _, s := range all {
			if of(s, r) {
				out = append(out, entrance(s, r.host, r.secure)...)
			}
		}
	}
	for _, s := range all {
		known := slices.ContainsFunc(routes, func(r routed) bool { return of(s, r) })
		if s.Spec.Type == corev1.ServiceTypeLoadBalancer && !known {
			out = append(out, entrance(s, host, secure)...)
		}
	}
	for _, s := range own {
		known := slices.ContainsFunc(routes, func(r routed) bool { return of(s, r) })
		if !known && s.Spec.Type != corev1.ServiceTypeLoadBalancer && s.Spec.Type != corev1.ServiceTypeExternalName {
			out = append(out, entrance(s, "", false)...)
		}
	}
	return out
}

// entrance is a service as an ingress: by its port that looks most like it.
func entrance(s corev1.Service, host string, secure bool) []v1alpha1.Ingress {
	ports := slices.DeleteFunc(slices.Clone(s.Spec.Ports), func(p corev1.ServicePort) bool {
		return p.Protocol != corev1.ProtocolTCP && p.Protocol != ""
	})
	if len(ports) == 0 {
		return nil
	}
	https := func(p corev1.ServicePort) bool { return p.Port == 443 || p.Port == 8443 || p.Name == "https" }
	rank := func(p corev1.ServicePort) int {
		switch {
		case https(p) == secure && (p.Port == 80 || p.Port == 443):
			return 0
		case https(p) == secure:
			return 1
		}
		return 2
	}
	p := slices.MinFunc(ports, func(a, b corev1.ServicePort) int { return cmp.Compare(rank(a), rank(b)) })
	return []v1alpha1.Ingress{{Host: s.Name + "." + s.Namespace, Port: p.Port, TLS: https(p), L5Host: host}}
}
