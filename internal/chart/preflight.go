package chart

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	authz "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// createdBy marks a namespace that Install created, so that Uninstall may remove it.
const createdBy = "doppel.dev/created-by"

// minMinor is the first Kubernetes 1.x that has what the chart needs; the chart's kubeVersion says the same to plain Helm.
const minMinor = 30

// checkServer says whether the cluster answers and is new enough.
func (c *client) checkServer() error {
	v, err := c.core.Discovery().ServerVersion()
	if err != nil {
		return uerr.Wrap(err, uerr.Cluster, "check the context and that the cluster is up: kubectl version", "the cluster does not answer")
	}
	minor, err := strconv.Atoi(strings.TrimRight(v.Minor, "+"))
	if err == nil && v.Major == "1" && minor < minMinor {
		return uerr.New(uerr.Cluster, "", "this cluster runs Kubernetes %s; doppel needs 1.%d or later", v.GitVersion, minMinor)
	}
	return nil
}

// mayInstall asks the cluster, before anything is touched, whether the caller may install.
func (c *client) mayInstall(ctx context.Context, op string, createNamespace bool, sc scope) error {
	want := sc.rights(c.namespace)
	missing, err := c.lacksCRDs()
	if err != nil {
		return c.explain(ctx, err, op)
	}
	if missing {
		want = append(want, authz.ResourceAttributes{Verb: "create", Group: crdGVR.Group, Resource: crdGVR.Resource})
	}
	return c.mayAll(ctx, op, createNamespace, want)
}

func (c *client) mayAll(ctx context.Context, op string, createNamespace bool, want []authz.ResourceAttributes) error {
	if createNamespace {
		want = append(want, authz.ResourceAttributes{Verb: "create", Resource: "namespaces"})
	}
	var (
		mu      sync.Mutex
		missing []string
		failed  error
		wg      sync.WaitGroup
	)
	for _, w := range want {
		wg.Go(func() {
			r, err := c.core.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx,
				&authz.SelfSubjectAccessReview{Spec: authz.SelfSubjectAccessReviewSpec{ResourceAttributes: &w}}, metav1.CreateOptions{})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				failed = err
			case !r.Status.Allowed:
				missing = append(missing, where(w))
			}
		})
	}
	wg.Wait()
	if failed != nil {
		return c.explain(ctx, fmt.Errorf("ask for the rights to install: %w", failed), op)
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return uerr.New(uerr.Denied, c.adminHint(op), "%s: you may not create %s in this cluster", op, strings.Join(slices.Compact(missing), ", "))
	}
	return nil
}

// ensureNamespace makes sure that the namespace exists and says whether it created it. One that is on its way out is waited for.
func (c *client) ensureNamespace(ctx context.Context, o Options) (created bool, err error) {
	for told := false; ; {
		ns, err := c.core.CoreV1().Namespaces().Get(ctx, c.namespace, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			if !o.CreateNamespace {
				return false, uerr.New(uerr.NotFound, "create it, or let doppel create it", "namespace %s does not exist", c.namespace)
			}
			_, err = c.core.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
				Name:   c.namespace,
				Labels: map[string]string{createdBy: "doppel"},
			}}, metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) {
				continue
			}
			return err == nil, err
		case apierrors.IsForbidden(err):
			return false, nil // may well exist; what comes next says so if not
		case err != nil:
			return false, err
		case ns.Status.Phase != corev1.NamespaceTerminating:
			return false, nil
		}
		if !told {
			o.Progress("waiting for the old namespace " + c.namespace + " to go away")
			told = true
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return false, fmt.Errorf("namespace %s is still being deleted", c.namespace)
		}
	}
}

// namespaceExists is false only if the namespace is known not to exist.
func (c *client) namespaceExists(ctx context.Context) bool {
	_, err := c.core.CoreV1().Namespaces().Get(ctx, c.namespace, metav1.GetOptions{})
	return !apierrors.IsNotFound(err)
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
