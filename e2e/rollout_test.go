package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/kinds"
)

const (
	rolloutCRD = `apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: rollouts.argoproj.io}
spec:
  group: argoproj.io
  names: {kind: Rollout, plural: rollouts, singular: rollout, shortNames: [ro]}
  scope: Namespaced
  versions:
  - {name: v1alpha1, served: true, storage: true, subresources: {status: {}}, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
`
	crds     = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
	rollouts = "/apis/argoproj.io/v1alpha1/namespaces/%s/rollouts"
)

// TestRollouts intercepts Argo Rollouts, and gives them back.
func TestRollouts(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "rollouts")
	bin := c.probe(t)
	c.argo(t, ns)
	l := newLaptop(t, "argonaut")
	l.withManager(t)
	l.run(t, "doppel", "helm", "upgrade") // its rights on Rollouts come where the cluster has them
	l.run(t, "doppel", "connect", "-n", ns)
	service := &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromString("probe")}}}
	for i, r := range []taken{
		{name: "canary", kind: "Rollout", count: 2, service: service},
		{name: "lonely", kind: "Rollout", service: service, gap: "has one replica, which ends before the next one starts"},
	} {
		r.ports = []corev1.ContainerPort{{Name: "probe", ContainerPort: 7000}}
		c.workload(t, ns, r)
		eventually(t, time.Minute, func() error { return c.says(t, bin, ns, r, r.name) })
		local := 7100 + i
		l.start(t, bin, "name", "laptop", fmt.Sprintf("tcp://127.0.0.1:%d", local))
		args := []string{"doppel", "intercept", r.name, "-p", fmt.Sprint(local)}
		if r.gap != "" {
			if res := l.try(t, args...); res.code == 0 || !strings.Contains(res.stderr, r.gap) || !strings.Contains(res.stderr, "--recreate") {
				t.Errorf("without --recreate: %v", res)
			}
			args = append(args, "--recreate")
		}
		want(t, l.run(t, args...), "Using Rollout "+r.name, "ACTIVE")
		if err := c.says(t, bin, ns, r, "laptop"); err != nil {
			t.Error("when ACTIVE was said: ", err)
		}
		l.run(t, "doppel", "leave", r.name)
		eventually(t, 5*time.Second, func() error { return c.says(t, bin, ns, r, r.name) })
	}
	l.run(t, "doppel", "uninstall", "--all-agents")
	want(t, l.run(t, "doppel", "list"), "canary: ready to intercept (traffic-agent not yet installed)")
	l.run(t, "doppel", "quit", "-s")
}

// argo gives the cluster Rollouts, and keeps those of a namespace as Argo Rollouts does as long as the test runs: a ReplicaSet of the template, and
// after spec.restartAt one pod after the other evicted that is older (rollout/restart.go of version 1.8). Argo itself takes too long to build.
func (c *cluster) argo(t *testing.T, ns string) {
	t.Helper()
	rest := c.core.AppsV1().RESTClient()
	err := rest.Post().AbsPath(crds).SetHeader("Content-Type", "application/yaml").Body([]byte(rolloutCRD)).Do(t.Context()).Error()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rest.Delete().AbsPath(crds, "rollouts.argoproj.io").Do(context.Background()).Error(); err != nil {
			t.Error(err)
		}
	})
	path := fmt.Sprintf(rollouts, ns)
	eventually(t, 20*time.Second, func() error { return rest.Get().AbsPath(path).Do(t.Context()).Error() })
	go func() {
		for t.Context().Err() == nil {
			if err := c.reconcile(t.Context(), ns); err != nil && t.Context().Err() == nil {
				t.Logf("the controller of Rollouts: %v", err)
			}
			select {
			case <-t.Context().Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	}()
}

// reconcile is one look at a namespace's Rollouts.
func (c *cluster) reconcile(ctx context.Context, ns string) error {
	b, err := c.core.AppsV1().RESTClient().Get().AbsPath(fmt.Sprintf(rollouts, ns)).Do(ctx).Raw()
	if err != nil {
		return err
	}
	var list struct {
		Items []struct {
			metav1.ObjectMeta `json:"metadata"`
			Spec              struct {
				Replicas  int32
				Selector  *metav1.LabelSelector
				Template  corev1.PodTemplateSpec
				RestartAt metav1.Time
			}
			Status struct{ ObservedGeneration string }
		}
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return err
	}
	for i := range list.Items {
		r := &list.Items[i]
		set := &appsv1.ReplicaSet{
			ObjectMeta: metav1.ObjectMeta{Name: r.Name + "-1", Labels: r.Spec.Template.Labels, OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(r, kinds.RolloutVersion.WithKind(kinds.Rollout))}},
			Spec:       appsv1.ReplicaSetSpec{Replicas: &r.Spec.Replicas, Selector: r.Spec.Selector, Template: r.Spec.Template},
		}
		if _, err := c.core.AppsV1().ReplicaSets(ns).Create(ctx, set, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
		if observed := fmt.Sprint(r.Generation); r.Status.ObservedGeneration != observed {
			patch := fmt.Appendf(nil, `{"status":{"observedGeneration":%q}}`, observed)
			if err := c.core.AppsV1().RESTClient().Patch(types.MergePatchType).AbsPath(fmt.Sprintf(rollouts, ns), r.Name, "status").Body(patch).Do(ctx).Error(); err != nil {
				return err
			}
		}
		pods, err := c.core.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(r.Spec.Selector)})
		if err != nil {
			return err
		}
		var available int32
		old := ""
		for _, p := range pods.Items {
			if p.DeletionTimestamp != nil {
				continue
			}
			for _, cond := range p.Status.Conditions {
				if cond.Type == corev1.PodReady && cond.Status == corev1.ConditionTrue {
					available++
				}
			}
			if p.CreationTimestamp.Time.Before(r.Spec.RestartAt.Time) {
				old = p.Name
			}
		}
		if old != "" && time.Now().After(r.Spec.RestartAt.Time) && available >= r.Spec.Replicas {
			if err := c.core.CoreV1().Pods(ns).EvictV1(ctx, &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: old, Namespace: ns}}); err != nil {
				return err
			}
		}
	}
	return nil
}

// rollout is a Rollout with what a Deployment has.
func rollout(d *appsv1.Deployment) (*unstructured.Unstructured, error) {
	b, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	o := kinds.New(kinds.Rollout).(*unstructured.Unstructured)
	b = []byte(strings.Replace(string(b), "{", `{"apiVersion":"argoproj.io/v1alpha1","kind":"Rollout",`, 1))
	return o, o.UnmarshalJSON(b)
}
