package chart

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/kube"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/cli-runtime/pkg/resource"
	"k8s.io/client-go/discovery"
)

// remove uninstalls the release, then whatever else of the chart is there under the release's name (a lost release record, as after
// kubectl delete namespace, leaves the cluster-wide objects), and waits until it is gone.
func (c *client) remove(ctx context.Context) error {
	un := action.NewUninstall(c.helm)
	un.WaitStrategy = kube.HookOnlyStrategy
	un.IgnoreNotFound = true
	if _, err := un.Run(ReleaseName); err != nil {
		if cause := c.last.last(); cause != "" && !strings.Contains(err.Error(), cause) {
			err = fmt.Errorf("%w: %s", err, cause)
		}
		return err
	}
	for {
		left, err := c.leftovers(ctx)
		if err != nil {
			return err
		}
		for _, info := range left {
			if err := deleteInfo(info); err != nil {
				return err
			}
		}
		pods, err := c.core.CoreV1().Pods(c.namespace).List(ctx, metav1.ListOptions{LabelSelector: podSelector})
		if err != nil && !apierrors.IsForbidden(err) {
			return err
		}
		if len(left) == 0 && (pods == nil || len(pods.Items) == 0) {
			return nil
		}
		if err := sleep(ctx, pollInterval); err != nil {
			names := make([]string, 0, len(left))
			for _, info := range left {
				names = append(names, info.Mapping.GroupVersionKind.Kind+" "+info.Name)
			}
			if pods != nil {
				for _, p := range pods.Items {
					names = append(names, "Pod "+p.Name)
				}
			}
			return fmt.Errorf("still there: %s", strings.Join(names, ", "))
		}
	}
}

// leftovers are the chart's objects that exist and carry the release's name.
func (c *client) leftovers(ctx context.Context) ([]*resource.Info, error) {
	managers, err := c.managers(ctx)
	if err != nil {
		return nil, err
	}
	var left []*resource.Info
	for _, list := range [][]string{nil, append(managers[c.namespace], unlisted)} { // names differ with a list, also an empty one
		found, err := c.leftoversFor(list)
		if err != nil {
			return nil, err
		}
		left = append(left, found...)
	}
	return left, nil
}

// unlisted is a namespace that nobody has (RFC 1123 ends a label with a letter or digit; the API server knows none so long).
const unlisted = "doppel-no-such-namespace-0123456789abcdef0123456789abcdef"

// everything has the chart make all that is optional, so that it is looked for.
func everything(namespace string, namespaces []string) Options {
	return Options{
		Namespace: namespace,
		Values: map[string]any{
			"manager":       map[string]any{"replicas": 2},
			"networkPolicy": map[string]any{"enabled": true},
			"direct":        map[string]any{"service": "NodePort", "addresses": []any{"anywhere.example:1"}}, // a list of namespaces wants one
			"clientRbac":    map[string]any{"create": true, "subjects": []any{map[string]any{"kind": "User", "name": "x"}}},
			"namespaces":    anys(namespaces),
		},
	}
}

func (c *client) leftoversFor(namespaces []string) ([]*resource.Info, error) {
	manifest, err := Manifest(everything(c.namespace, namespaces))
	if err != nil {
		return nil, err
	}
	infos, err := c.helm.KubeClient.Build(strings.NewReader(manifest), false)
	if err != nil {
		return nil, err
	}
	var left []*resource.Info
	for _, info := range infos {
		obj, err := resource.NewHelper(info.Client, info.Mapping).Get(info.Namespace, info.Name)
		switch {
		case apierrors.IsNotFound(err):
			continue
		case apierrors.IsForbidden(err) && (info.Namespace != c.namespace || info.Mapping.GroupVersionKind.Kind == "NetworkPolicy"): // whoever may not see it has not made it
			continue
		case err != nil:
			return nil, err
		}
		m, err := meta.Accessor(obj)
		if err != nil {
			return nil, err
		}
		if releaseOf(m) == c.namespace {
			left = append(left, info)
		}
	}
	return left, nil
}

// deleteInfo asks for the deletion of one object, which may be gone already.
func deleteInfo(info *resource.Info) error {
	policy := metav1.DeletePropagationBackground
	_, err := resource.NewHelper(info.Client, info.Mapping).DeleteWithOptions(info.Namespace, info.Name, &metav1.DeleteOptions{PropagationPolicy: &policy})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// deleteNamespaceIfOurs removes the namespace if Install created it and nobody else uses it.
func (c *client) deleteNamespaceIfOurs(ctx context.Context, progress func(string)) error {
	ns, err := c.core.CoreV1().Namespaces().Get(ctx, c.namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if ns.Labels[createdBy] == "" {
		return nil
	}
	found, unknown, err := c.namespaceUsed(ctx)
	if err != nil {
		return err
	}
	if used := cmp.Or(found, unknown); used != "" {
		progress(fmt.Sprintf("namespace %s stays: %s", c.namespace, used))
		return nil
	}
	return c.deleteNamespace(ctx)
}

// namespaceUsed looks for anything of others, of whatever type, and says what there is; what Kubernetes itself puts into each namespace, and what ends with what was
// removed already, does not count. What cannot be looked for may be there: unknown says why.
func (c *client) namespaceUsed(ctx context.Context) (found, unknown string, err error) {
	lists, err := discovery.ServerPreferredNamespacedResources(c.core.Discovery())
	if err != nil {
		return "", "not all types of the cluster can be looked for: " + oneLine(err.Error()), nil
	}
	for _, l := range discovery.FilteredBy(discovery.SupportsAllVerbs{Verbs: []string{"list", "create"}}, lists) {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil {
			return "", "", err
		}
		for _, r := range l.APIResources {
			if passing[r.Name+"."+gv.Group] || gv.Group == "doppel.dev" {
				continue
			}
			objects, err := c.dynamic.Resource(gv.WithResource(r.Name)).Namespace(c.namespace).List(ctx, metav1.ListOptions{})
			switch {
			case apierrors.IsNotFound(err) || apierrors.IsMethodNotSupported(err): // the type is gone, or was never kept
				continue
			case apierrors.IsForbidden(err):
				unknown = "you may not list its " + r.Name
				continue
			case err != nil:
				return "", "", err
			}
			for _, o := range objects.Items {
				if o.GetDeletionTimestamp() == nil && !everywhere(r.Name, o.GetName()) && !forUs(&o) {
					return fmt.Sprintf("%s %s is in it", r.Kind, o.GetName()), "", nil
				}
			}
		}
	}
	return "", unknown, nil
}

// passing are types whose objects come and go with others.
var passing = map[string]bool{
	"events.": true, "events.events.k8s.io": true, "endpoints.": true, "endpointslices.discovery.k8s.io": true,
	"leases.coordination.k8s.io": true, "replicasets.apps": true, "controllerrevisions.apps": true,
}

// everywhere says whether an object is one that every namespace has, of Kubernetes, OpenShift or Istio.
func everywhere(resource, name string) bool {
	switch resource {
	case "configmaps":
		return name == "kube-root-ca.crt" || name == "openshift-service-ca.crt" || name == "istio-ca-root-cert"
	case "serviceaccounts":
		return name == "default" || name == "builder" || name == "deployer"
	case "rolebindings":
		return strings.HasPrefix(name, "system:")
	}
	return false
}

// forUs says whether an object of somebody's is for doppel alone, and of no use once that is gone: a binding to one of the chart's roles, or the token with which
// the manager joins a relay (docs/relay.md).
func forUs(o *unstructured.Unstructured) bool {
	role, _, _ := unstructured.NestedString(o.Object, "roleRef", "name")
	return o.GetKind() == "RoleBinding" && strings.HasPrefix(role, "doppel-") || o.GetKind() == "Secret" && o.GetName() == "doppel-relay"
}

// deleteNamespace deletes the namespace and waits until it is gone.
func (c *client) deleteNamespace(ctx context.Context) error {
	for {
		err := c.core.CoreV1().Namespaces().Delete(ctx, c.namespace, metav1.DeleteOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil && !apierrors.IsConflict(err) {
			return err
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return fmt.Errorf("namespace %s is still being deleted", c.namespace)
		}
	}
}
