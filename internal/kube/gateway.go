package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
)

// gatewayPath is where the Gateway API is, if the cluster has it; what one may not see is not there.
const gatewayPath = "/apis/gateway.networking.k8s.io/v1"

// gatewayLabel is on the Services that belong to a Gateway: implementations that make them set it (GEP-1762).
const gatewayLabel = "gateway.networking.k8s.io/gateway-name"

// routed is a host that an HTTPRoute leads through a Gateway.
type routed struct {
	host               string // "": any
	namespace, gateway string
	secure             bool // the Gateway speaks TLS
}

// httpRoute is what is read of an HTTPRoute.
type httpRoute struct {
	Spec struct {
		ParentRefs []struct{ Kind, Namespace, Name string } `json:"parentRefs"`
		Hostnames  []string                                 `json:"hostnames"`
	} `json:"spec"`
}

// gateway is what is read of a Gateway.
type gateway struct {
	Spec struct {
		Listeners []struct{ Protocol string } `json:"listeners"`
	} `json:"spec"`
}

// gateways are the ways by which HTTPRoutes of a namespace are entered. That there are none, or that they cannot be read, is not worth an error.
func (c *Cluster) gateways(ctx context.Context, ns string) []routed {
	var routes struct{ Items []httpRoute }
	if !c.read(ctx, ns, "httproutes", "", &routes) {
		return nil
	}
	out := throughGateways(ns, routes.Items)
	for i, r := range out {
		var g gateway
		if c.read(ctx, r.namespace, "gateways", r.gateway, &g) {
			out[i].secure = len(g.Spec.Listeners) > 0
			for _, l := range g.Spec.Listeners {
				out[i].secure = out[i].secure && l.Protocol == "HTTPS"
			}
		}
	}
	return out
}

func (c *Cluster) read(ctx context.Context, ns, resource, name string, into any) bool {
	req := c.api.Get().AbsPath(gatewayPath).Namespace(ns).Resource(resource)
	if name != "" {
		req = req.Name(name)
	}
	b, err := req.Do(ctx).Raw()
	return err == nil && json.Unmarshal(b, into) == nil
}

// throughGateways are the Gateways that routes name, each once, with the first host that is one name.
func throughGateways(ns string, routes []httpRoute) (out []routed) {
	for _, r := range routes {
		host := ""
		for _, h := range r.Spec.Hostnames {
			if host == "" && h != "" && h[0] != '*' {
				host = h
			}
		}
		for _, p := range r.Spec.ParentRefs {
			to := routed{host: host, namespace: cmp.Or(p.Namespace, ns), gateway: p.Name}
			same := func(o routed) bool { return o.namespace == to.namespace && o.gateway == to.gateway }
			if cmp.Or(p.Kind, "Gateway") == "Gateway" && !slices.ContainsFunc(out, same) {
				out = append(out, to)
			}
		}
	}
	return out
}
