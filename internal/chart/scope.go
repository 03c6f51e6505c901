package chart

import (
	"context"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	authz "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// scope is what part of the cluster a release is for, and what of Kubernetes' admission it uses.
type scope struct {
	namespaces      []string // none: the whole cluster
	policy, webhook bool
}

// scopeOf reads it from values that the chart's schema accepts, or will refuse.
func scopeOf(vals map[string]any) scope {
	sc := scope{policy: true, webhook: true}
	if list, ok := vals["namespaces"].([]any); ok {
		for _, ns := range list {
			sc.namespaces = append(sc.namespaces, fmt.Sprint(ns))
		}
	}
	adm, ok := vals["admission"].(map[string]any)
	if !ok {
		return sc
	}
	if on, ok := adm["policy"].(bool); ok {
		sc.policy = on
	}
	if on, ok := adm["webhook"].(bool); ok {
		sc.webhook = on
	}
	return sc
}

func anys(list []string) []any {
	out := make([]any, 0, len(list))
	for _, s := range list {
		out = append(out, s)
	}
	return out
}

// rights are to what an install creates first of all or cannot do without; whoever may create these may as a rule create the rest.
func (sc scope) rights(namespace string) []authz.ResourceAttributes {
	out := []authz.ResourceAttributes{
		{Verb: "create", Resource: "secrets", Namespace: namespace},
		{Verb: "create", Group: "apps", Resource: "deployments", Namespace: namespace},
	}
	for _, ns := range append([]string{namespace}, sc.namespaces...) {
		out = append(out,
			authz.ResourceAttributes{Verb: "create", Group: rbacv1.GroupName, Resource: "roles", Namespace: ns},
			authz.ResourceAttributes{Verb: "create", Group: rbacv1.GroupName, Resource: "rolebindings", Namespace: ns})
	}
	if len(sc.namespaces) == 0 || sc.webhook {
		out = append(out,
			authz.ResourceAttributes{Verb: "create", Group: rbacv1.GroupName, Resource: "clusterroles"},
			authz.ResourceAttributes{Verb: "create", Group: rbacv1.GroupName, Resource: "clusterrolebindings"})
	}
	if sc.policy {
		out = append(out, authz.ResourceAttributes{Verb: "create", Group: "admissionregistration.k8s.io", Resource: "validatingadmissionpolicies"})
	}
	if sc.webhook {
		out = append(out, authz.ResourceAttributes{Verb: "create", Group: "admissionregistration.k8s.io", Resource: "mutatingwebhookconfigurations"})
	}
	return out
}

// where names a right's resource, and its namespace for those that an install needs in several.
func where(a authz.ResourceAttributes) string {
	if a.Group == rbacv1.GroupName && a.Namespace != "" {
		return a.Resource + " in namespace " + a.Namespace
	}
	return a.Resource
}

// managerRole is the name of the manager's rights: of its ClusterRole, or of its Role in each namespace of a list; and of their bindings. Other releases
// use the same name in the same places, so that Helm itself refuses to install two for one namespace.
const managerRole = "doppel-traffic-manager"

// releaseOf is the namespace of the release that an object belongs to, or "".
func releaseOf(m metav1.Object) string {
	a := m.GetAnnotations()
	if a["meta.helm.sh/release-name"] != ReleaseName {
		return ""
	}
	return a["meta.helm.sh/release-namespace"]
}

// ownerOf is the namespace of the manager that a binding gives its rights, or "". It says so whoever installed the manager: doppel, Helm, Argo CD, kubectl.
func ownerOf(subjects []rbacv1.Subject) string {
	for _, s := range subjects {
		if s.Kind == rbacv1.ServiceAccountKind && s.Name == ReleaseName {
			return s.Namespace
		}
	}
	return ""
}

// managers are the namespaces that managers are for, by the managers' own, as far as the caller may see: by the bindings, and by what a removal
// that was cut off has left of a release.
func (c *client) managers(ctx context.Context) (map[string][]string, error) {
	out := map[string][]string{}
	add := func(name, ns, by string) {
		if name == managerRole && by != "" && !slices.Contains(out[by], ns) {
			out[by] = append(out[by], ns)
		}
	}
	bindings, err := c.core.RbacV1().RoleBindings("").List(ctx, metav1.ListOptions{LabelSelector: managerSelector})
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, err
	}
	for _, b := range bindings.Items {
		add(b.Name, b.Namespace, ownerOf(b.Subjects))
	}
	roles, err := c.core.RbacV1().Roles("").List(ctx, metav1.ListOptions{LabelSelector: managerSelector})
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, err
	}
	for i := range roles.Items {
		add(roles.Items[i].Name, roles.Items[i].Namespace, releaseOf(&roles.Items[i]))
	}
	return out, nil
}

// refuseOverlap refuses a namespace that another traffic-manager is for. Helm would too, but for the whole cluster against a list.
func (c *client) refuseOverlap(ctx context.Context, op string, sc scope) error {
	whole, err := c.core.RbacV1().ClusterRoleBindings().Get(ctx, managerRole, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err) {
		return c.explain(ctx, err, op)
	}
	if err == nil {
		if by := ownerOf(whole.Subjects); by != "" && by != c.namespace {
			if len(sc.namespaces) == 0 {
				return uerr.New(uerr.Conflict, "a cluster has one for all of it; use it with --manager-namespace "+by+", or uninstall it first",
					"%s: it is already installed in namespace %s", op, by)
			}
			return uerr.New(uerr.Conflict, "use it with --manager-namespace "+by+", or give it namespaces of its own first (chart value namespaces)",
				"%s: the one in namespace %s is for the whole cluster", op, by)
		}
	}
	managers, err := c.managers(ctx)
	if err != nil {
		return c.explain(ctx, err, op)
	}
	for by, theirs := range managers {
		if len(sc.namespaces) > 0 {
			theirs = slices.DeleteFunc(theirs, func(ns string) bool { return !slices.Contains(sc.namespaces, ns) })
		}
		if by != c.namespace && len(theirs) > 0 {
			return uerr.New(uerr.Conflict, "use that one with --manager-namespace "+by+", or list other namespaces (chart value namespaces)",
				"%s: the one in namespace %s is for %s already", op, by, strings.Join(slices.Sorted(slices.Values(theirs)), ", "))
		}
	}
	return nil
}

// absent is the error of a namespace without a release, also of one with a manager that something else installed.
func (c *client) absent(ctx context.Context, op string) error {
	if err := c.refuseForeign(ctx, op); err != nil {
		return err
	}
	return notInstalled(c.namespace)
}

// refuseForeign refuses a namespace with a manager that is no release of ours.
func (c *client) refuseForeign(ctx context.Context, op string) error {
	list, err := c.core.AppsV1().Deployments(c.namespace).List(ctx, metav1.ListOptions{LabelSelector: managerSelector})
	if apierrors.IsForbidden(err) {
		return nil
	}
	if err != nil {
		return c.explain(ctx, err, op)
	}
	if !slices.ContainsFunc(list.Items, func(d appsv1.Deployment) bool { return d.Name == ReleaseName && releaseOf(&d) == "" }) {
		return nil
	}
	return uerr.Wrap(ErrInstalled, uerr.Conflict, "change or remove it where it is declared", "%s: namespace %s, by something else than doppel (Argo CD, kubectl)", op, c.namespace)
}
