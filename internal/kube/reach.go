package kube

import (
	"context"
	"net/netip"
	"slices"
	"sync"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// The virtual resources whose verb "connect" the admission policy asks for, in group doppel.dev.
const (
	networksResource = "networks" // of a namespace
	outsideResource  = "outside"  // what belongs to no namespace
	connectVerb      = "connect"
)

// reachParallel is how many questions about rights are on their way at once.
const reachParallel = 16

// Reach asks what the user may reach: everything; else, of the namespaces wanted (nil: all that the user may list), those in
// which they may connect. The connected namespace is always asked for, and first in the answer, which is cut off at MaxReach.
func (c *Cluster) Reach(ctx context.Context, wanted []string) (v1alpha1.Reach, error) {
	all, err := c.May(ctx, Right{Verb: connectVerb, Group: v1alpha1.GroupVersion.Group, Resource: networksResource})
	if err != nil {
		return v1alpha1.Reach{}, err
	}
	if all {
		return v1alpha1.Reach{Namespaces: []string{v1alpha1.ReachAll}}, nil
	}
	if wanted == nil {
		if wanted, err = c.Namespaces(ctx); err != nil && !apierrors.IsForbidden(err) {
			return v1alpha1.Reach{}, c.explain(err, "list the namespaces")
		}
	}
	candidates := slices.DeleteFunc(slices.Clone(wanted), func(ns string) bool { return ns == c.Namespace || ns == "" })
	slices.Sort(candidates)
	candidates = slices.Insert(slices.Compact(candidates), 0, c.Namespace)

	rights := []Right{{Verb: connectVerb, Group: v1alpha1.GroupVersion.Group, Resource: outsideResource}}
	for _, ns := range candidates {
		rights = append(rights, Right{Verb: connectVerb, Group: v1alpha1.GroupVersion.Group, Resource: networksResource, Namespace: ns})
	}
	may, err := c.mayAll(ctx, rights)
	if err != nil {
		return v1alpha1.Reach{}, err
	}
	out := v1alpha1.Reach{Outside: may[0]}
	for i, ns := range candidates {
		if may[i+1] && len(out.Namespaces) < v1alpha1.MaxReach {
			out.Namespaces = append(out.Namespaces, ns)
		}
	}
	return out, nil
}

// ReachThrough is what the user reaches through a manager.
func (c *Cluster) ReachThrough(ctx context.Context, m ManagerInfo) (v1alpha1.Reach, error) {
	switch {
	case m.ReachAll:
		return v1alpha1.Reach{Namespaces: []string{v1alpha1.ReachAll}}, nil
	case m.ReachNamespaces:
		return v1alpha1.Reach{Namespaces: m.Namespaces}, nil
	}
	return c.Reach(ctx, m.Namespaces)
}

// Namespaces lists the names of all namespaces; not everybody may.
func (c *Cluster) Namespaces(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list, err := namespaces.list(ctx, c, "", "")
	if err != nil {
		return nil, err
	}
	var out []string
	for i := range list.Items {
		out = append(out, list.Items[i].Name)
	}
	return out, nil
}

// Subnets are those of the cluster's services and pods, as far as the API says them; not everybody may see them.
func (c *Cluster) Subnets(ctx context.Context) (ofServices, ofPods []netip.Prefix, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cidrs, err := serviceCIDRs.list(ctx, c, "", "")
	if err != nil && !apierrors.IsNotFound(err) { // before Kubernetes 1.33 there are none
		return nil, nil, c.explain(err, "list the service subnets")
	}
	for i := range cidrs.Items {
		ofServices = append(ofServices, prefixes(cidrs.Items[i].Spec.CIDRs)...)
	}
	all, err := nodes.list(ctx, c, "", "")
	if err != nil {
		return nil, nil, c.explain(err, "list the nodes")
	}
	for i := range all.Items {
		ofPods = append(ofPods, prefixes(all.Items[i].Spec.PodCIDRs)...)
	}
	return ofServices, ofPods, nil
}

func prefixes(texts []string) []netip.Prefix {
	var out []netip.Prefix
	for _, t := range texts {
		if p, err := netip.ParsePrefix(t); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// Right is something that somebody may or may not do; without a namespace in the whole cluster.
type Right struct {
	Verb, Group, Resource, Subresource, Name, Namespace string
}

// May asks whether the user has a right (SelfSubjectAccessReview).
func (c *Cluster) May(ctx context.Context, r Right) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Verb: r.Verb, Group: r.Group, Resource: r.Resource, Subresource: r.Subresource, Name: r.Name, Namespace: r.Namespace,
		},
	}}
	out, err := accessReviews.create(ctx, c, "", review)
	if err != nil {
		return false, c.explain(err, "ask what you may do")
	}
	return out.Status.Allowed, nil
}

// mayAll asks for many rights, some at once.
func (c *Cluster) mayAll(ctx context.Context, rights []Right) ([]bool, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	may := make([]bool, len(rights))
	slots := make(chan struct{}, reachParallel)
	var wg sync.WaitGroup
	for i, r := range rights {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			var err error
			if may[i], err = c.May(ctx, r); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return may, nil
}

// String is the right in words.
func (r Right) String() string {
	s := r.Verb + " " + r.Resource
	if r.Subresource != "" {
		s += "/" + r.Subresource
	}
	if r.Group != "" {
		s += "." + r.Group
	}
	if r.Name != "" {
		s += " " + r.Name
	}
	if r.Namespace != "" {
		s += " in namespace " + r.Namespace
	}
	return s
}

// ConnectRights are what a connect needs.
func ConnectRights(managerNS string) []Right {
	group := v1alpha1.GroupVersion.Group
	out := []Right{
		{Verb: "get", Resource: "configmaps", Name: managerName, Namespace: managerNS},
		{Verb: "get", Resource: "services", Subresource: "proxy", Name: "http:" + managerName + ":api", Namespace: managerNS},
	}
	for _, verb := range []string{"create", "get", "patch", "delete"} {
		out = append(out, Right{Verb: verb, Group: group, Resource: "sessions", Namespace: managerNS})
	}
	return out
}

// InterceptRights are what an intercept in a namespace needs.
func InterceptRights(ns string) []Right {
	group := v1alpha1.GroupVersion.Group
	return []Right{
		{Verb: "create", Group: group, Resource: "intercepts", Namespace: ns},
		{Verb: "delete", Group: group, Resource: "intercepts", Namespace: ns},
		{Verb: "list", Group: group, Resource: "intercepts", Namespace: ns},
		{Verb: "list", Group: "apps", Resource: "deployments", Namespace: ns},
		{Verb: "list", Resource: "pods", Namespace: ns},
	}
}
