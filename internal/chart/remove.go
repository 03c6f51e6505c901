package chart

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/kube"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/resource"
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
	namespaces, err := c.listed(ctx)
	if err != nil {
		return nil, err
	}
	var left []*resource.Info
	for _, list := range [][]string{nil, append(namespaces, unlisted)} { // names differ with a list, also an empty one
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

func (c *client) leftoversFor(namespaces []string) ([]*resource.Info, error) {
	manifest, err := Manifest(Options{
		Namespace: c.namespace,
		// Everything optional, so that it is looked for.
		Values: map[string]any{
			"manager":    map[string]any{"replicas": 2},
			"clientRbac": map[string]any{"create": true, "subjects": []any{map[string]any{"kind": "User", "name": "x"}}},
			"namespaces": anys(namespaces),
		},
	})
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
		case apierrors.IsForbidden(err) && info.Namespace != c.namespace: // whoever may not see it has not made it
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
func (c *client) deleteNamespaceIfOurs(ctx context.Context) error {
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
	empty, err := c.namespaceEmpty(ctx)
	if err != nil || !empty {
		return err
	}
	return c.deleteNamespace(ctx)
}

// namespaceEmpty looks for the usual things of others; what Kubernetes itself puts into each namespace does not count.
func (c *client) namespaceEmpty(ctx context.Context) (bool, error) {
	core, apps, ns, opts := c.core.CoreV1(), c.core.AppsV1(), c.namespace, metav1.ListOptions{}
	for _, kind := range []struct {
		list   func() (runtime.Object, error)
		theirs func(name string) bool
	}{
		{func() (runtime.Object, error) { return core.Pods(ns).List(ctx, opts) }, every},
		{func() (runtime.Object, error) { return core.Services(ns).List(ctx, opts) }, every},
		{func() (runtime.Object, error) { return core.PersistentVolumeClaims(ns).List(ctx, opts) }, every},
		{func() (runtime.Object, error) { return core.Secrets(ns).List(ctx, opts) }, every},
		{func() (runtime.Object, error) { return core.ConfigMaps(ns).List(ctx, opts) }, not("kube-root-ca.crt", "openshift-service-ca.crt")},
		{func() (runtime.Object, error) { return core.ServiceAccounts(ns).List(ctx, opts) }, not("default", "builder", "deployer")},
		{func() (runtime.Object, error) { return apps.Deployments(ns).List(ctx, opts) }, every},
		{func() (runtime.Object, error) { return apps.StatefulSets(ns).List(ctx, opts) }, every},
		{func() (runtime.Object, error) { return apps.DaemonSets(ns).List(ctx, opts) }, every},
	} {
		l, err := kind.list()
		if err != nil {
			return false, err
		}
		theirs := false
		err = meta.EachListItem(l, func(o runtime.Object) error {
			m, err := meta.Accessor(o)
			theirs = theirs || (err == nil && kind.theirs(m.GetName()))
			return err
		})
		if err != nil || theirs {
			return false, err
		}
	}
	return true, nil
}

// every and not tell which names count as somebody's.
func every(string) bool { return true }

func not(names ...string) func(string) bool {
	return func(name string) bool { return !slices.Contains(names, name) }
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
