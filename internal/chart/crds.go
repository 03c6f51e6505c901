package chart

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	chartv2 "helm.sh/helm/v4/pkg/chart/v2"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"
)

// The resource types belong to no release: several managers of one cluster share them, and to delete them deletes everybody's sessions and
// intercepts. Helm's directory crds/ says so to plain Helm, which makes them if they are missing and never touches them again. We bring
// them up to date as well, and remove them with the last manager.

var (
	crdGVR       = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
	sessionGVR   = schema.GroupVersionResource{Group: "doppel.dev", Version: "v1alpha1", Resource: "sessions"}
	interceptGVR = schema.GroupVersionResource{Group: "doppel.dev", Version: "v1alpha1", Resource: "intercepts"}
)

// managerSelector selects the Deployments of all managers.
const managerSelector = "app.kubernetes.io/name=traffic-manager,app.kubernetes.io/part-of=doppel"

// crds are the chart's resource types.
func crds(ch *chartv2.Chart) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	for _, f := range ch.CRDObjects() {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(f.File.Data, &o.Object); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name, err)
		}
		out = append(out, o)
	}
	return out, nil
}

// schemaKey is the annotation that numbers what a resource type says (api/v1alpha1): it only grows, so that a program knows what is newer than its own.
const schemaKey = "doppel.dev/schema"

// applyCRDs makes the resource types what the chart says, and says whether it made any. Those of a newer doppel stay; whoever may not, uses those that are there.
func (c *client) applyCRDs(ctx context.Context, ch *chartv2.Chart, progress func(string)) (made bool, err error) {
	list, err := crds(ch)
	if err != nil {
		return false, err
	}
	for _, o := range list {
		missing, err := c.lacksCRD(o.GetName())
		if err != nil {
			return made, err
		}
		newer, err := c.newerCRD(ctx, o)
		if err != nil {
			return made, err
		}
		if newer {
			progress("the resource type " + o.GetName() + " is used as it is: it is of a newer doppel")
			continue
		}
		_, err = c.dynamic.Resource(crdGVR).Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "helm", Force: true})
		switch {
		case apierrors.IsForbidden(err) && !missing:
			progress("the resource type " + o.GetName() + " is used as it is: you may not change it")
		case err != nil:
			return made, err
		}
		made = made || missing
	}
	return made, nil
}

// newerCRD says whether the cluster's resource type is of a newer doppel than ours.
func (c *client) newerCRD(ctx context.Context, ours *unstructured.Unstructured) (bool, error) {
	there, err := c.dynamic.Resource(crdGVR).Get(ctx, ours.GetName(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return schemaOf(there) > schemaOf(ours), nil
}

// schemaOf is the number of a resource type; one without is older than all that have one.
func schemaOf(crd *unstructured.Unstructured) int {
	n, err := strconv.Atoi(crd.GetAnnotations()[schemaKey])
	if err != nil {
		return 0
	}
	return n
}

// lacksCRDs says whether a resource type is missing.
func (c *client) lacksCRDs() (bool, error) {
	for _, gvr := range []schema.GroupVersionResource{sessionGVR, interceptGVR} {
		if missing, err := c.lacksCRD(gvr.GroupResource().String()); missing || err != nil {
			return missing, err
		}
	}
	return false, nil
}

// lacksCRD asks what everybody may ask: which resources there are.
func (c *client) lacksCRD(name string) (bool, error) {
	list, err := c.core.Discovery().ServerResourcesForGroupVersion(sessionGVR.GroupVersion().String())
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	for _, r := range list.APIResources {
		if r.Name+"."+sessionGVR.Group == name {
			return false, nil
		}
	}
	return true, nil
}

// removeCRDs removes the resource types, if no other manager needs them. Where they stay, the sessions of this manager and the intercepts in its
// namespaces are removed instead.
func (c *client) removeCRDs(ctx context.Context, namespaces []string, progress func(string)) error {
	ch, err := Load()
	if err != nil {
		return err
	}
	list, err := crds(ch)
	if err != nil {
		return err
	}
	why, err := c.needed(ctx)
	if err != nil {
		return err
	}
	for _, o := range list {
		if why != "" {
			break
		}
		c.waitListed(ctx, o)
		err := c.dynamic.Resource(crdGVR).Delete(ctx, o.GetName(), metav1.DeleteOptions{})
		switch {
		case apierrors.IsForbidden(err):
			why = "you may not remove them"
		case err != nil && !apierrors.IsNotFound(err):
			return err
		}
	}
	if why == "" {
		return c.waitGone(ctx, list)
	}
	progress("the resource types of doppel stay: " + why)
	if err := c.removeAll(ctx, sessionGVR, c.namespace); err != nil {
		return err
	}
	for _, ns := range namespaces {
		if err := c.removeAll(ctx, interceptGVR, ns); err != nil {
			return err
		}
	}
	return nil
}

// servedTimeout is how long waitListed waits.
const servedTimeout = 5 * time.Second

// waitListed waits until the API server can list what there is of a resource type. It does so itself before it lets one go, and what was made only just
// now it may not be able to list yet: it would try again after pauses that double, and the type was there for three quarters of a minute.
func (c *client) waitListed(ctx context.Context, crd *unstructured.Unstructured) {
	ctx, cancel := context.WithTimeout(ctx, servedTimeout)
	defer cancel()
	plural, _, _ := strings.Cut(crd.GetName(), ".")
	for {
		if _, err := c.dynamic.Resource(crdGVR).Get(ctx, crd.GetName(), metav1.GetOptions{}); apierrors.IsNotFound(err) {
			return
		}
		_, err := c.dynamic.Resource(sessionGVR.GroupVersion().WithResource(plural)).List(ctx, metav1.ListOptions{Limit: 1})
		if err == nil || apierrors.IsForbidden(err) || sleep(ctx, pollInterval) != nil {
			return
		}
	}
}

// needed says who else may need the resource types, or "".
func (c *client) needed(ctx context.Context) (string, error) {
	list, err := c.core.AppsV1().Deployments("").List(ctx, metav1.ListOptions{LabelSelector: managerSelector})
	if apierrors.IsForbidden(err) {
		return "you may not see whether there is another traffic-manager in this cluster", nil
	}
	if err != nil {
		return "", err
	}
	var others []string
	for i := range list.Items {
		if ns := list.Items[i].Namespace; ns != c.namespace {
			others = append(others, ns)
		}
	}
	if len(others) == 0 {
		return "", nil
	}
	return "there is another traffic-manager in namespace " + strings.Join(others, ", "), nil
}

// removeAll deletes the objects of a kind in a namespace, as far as the caller may.
func (c *client) removeAll(ctx context.Context, gvr schema.GroupVersionResource, ns string) error {
	all := c.dynamic.Resource(gvr).Namespace(ns)
	list, err := all.List(ctx, metav1.ListOptions{})
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for i := range list.Items {
		if err := all.Delete(ctx, list.Items[i].GetName(), metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// waitGone waits until the resource types are deleted, with all objects of theirs.
func (c *client) waitGone(ctx context.Context, list []*unstructured.Unstructured) error {
	for _, o := range list {
		for {
			_, err := c.dynamic.Resource(crdGVR).Get(ctx, o.GetName(), metav1.GetOptions{})
			if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
				break
			}
			if err != nil {
				return err
			}
			if err := sleep(ctx, pollInterval); err != nil {
				return fmt.Errorf("resource type %s is still being deleted", o.GetName())
			}
		}
	}
	return nil
}
