package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// Workload is one thing that can be intercepted, as `doppel list` shows it.
type Workload struct {
	Kind      string
	Name      string
	Namespace string
	Agent     bool   // some pod has a traffic-agent
	NotReady  string // why it cannot be intercepted; empty if it can
}

// Workloads lists the Deployments of a namespace.
func (c *Cluster) Workloads(ctx context.Context, ns string) ([]Workload, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	ds, err := c.core.AppsV1().Deployments(ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, c.explain(err, "list the workloads of namespace "+ns)
	}
	pods, err := c.core.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, c.explain(err, "list the pods of namespace "+ns)
	}
	out := make([]Workload, 0, len(ds.Items))
	for i := range ds.Items {
		d := &ds.Items[i]
		w := Workload{Kind: "Deployment", Name: d.Name, Namespace: d.Namespace, NotReady: notReady(d)}
		for j := range pods.Items {
			w.Agent = w.Agent || hasAgent(&pods.Items[j]) && owns(d, &pods.Items[j])
		}
		out = append(out, w)
	}
	return out, nil
}

func notReady(d *appsv1.Deployment) string {
	switch {
	case d.Spec.Template.Annotations[agentcfg.AnnotationInject] == "false":
		return "its annotation " + agentcfg.AnnotationInject + "=false forbids it"
	case d.Spec.Template.Spec.HostNetwork:
		return "it uses the node's network"
	}
	return ""
}

func hasAgent(p *corev1.Pod) bool {
	return p.Annotations[agentcfg.Annotation] != "" && p.DeletionTimestamp == nil
}

func owns(d *appsv1.Deployment, p *corev1.Pod) bool {
	sel, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	return err == nil && p.Namespace == d.Namespace && sel.Matches(labels.Set(p.Labels))
}

// RemoveAgents restarts the Deployments of a namespace ("" for all) whose pods have an agent, and waits until no such pod is left.
// It does not look at intercepts: whoever calls it has ended them.
func (c *Cluster) RemoveAgents(ctx context.Context, ns string, only func(Workload) bool, progress func(string)) error {
	list, err := c.Workloads(ctx, ns)
	if err != nil {
		return err
	}
	for _, w := range list {
		if !w.Agent || only != nil && !only(w) {
			continue
		}
		progress(fmt.Sprintf("Removing the traffic-agent of Deployment %s in namespace %s", w.Name, w.Namespace))
		patch := fmt.Sprintf(`{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":%q}}}}}`, time.Now().Format(time.RFC3339Nano))
		_, err := c.core.AppsV1().Deployments(w.Namespace).Patch(ctx, w.Name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{})
		if err != nil {
			return c.explain(err, "restart Deployment "+w.Name)
		}
	}
	return c.waitNoAgents(ctx, ns, only)
}

func (c *Cluster) waitNoAgents(ctx context.Context, ns string, only func(Workload) bool) error {
	for {
		list, err := c.Workloads(ctx, ns)
		if err != nil {
			return err
		}
		left := ""
		for _, w := range list {
			if w.Agent && (only == nil || only(w)) {
				left = w.Name
			}
		}
		if left == "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return uerr.New(uerr.Cluster, "look at it with: kubectl get pods", "Deployment %s still has pods with a traffic-agent", left)
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// RefuseIntercepted is an error if the workload (all of them for "") is intercepted: its agent is in use.
func (c *Cluster) RefuseIntercepted(ctx context.Context, ns, workload string) error {
	list, err := c.Intercepts(ctx, ns)
	if err != nil {
		return err
	}
	for i := range list {
		if in := &list[i]; workload == "" || in.Spec.Workload.Name == workload {
			return uerr.New(uerr.Conflict, "end it with: doppel leave "+in.Spec.Name+"; an administrator can delete the Intercept object", "%s in namespace %s is intercepted by %s", in.Spec.Workload.Name, in.Namespace, in.Spec.User)
		}
	}
	return nil
}

// EndAll deletes every intercept in the cluster and every session in the manager's namespace.
func (c *Cluster) EndAll(ctx context.Context, managerNS string) error {
	ins, err := c.Intercepts(ctx, "")
	if apierrors.IsNotFound(errors.Unwrap(err)) {
		return nil // nothing of ours is installed
	}
	if err != nil {
		return err
	}
	for i := range ins {
		if err := c.DeleteIntercept(ctx, &ins[i]); err != nil {
			return err
		}
	}
	sessions, err := c.Sessions(ctx, managerNS)
	if err != nil {
		return err
	}
	for i := range sessions {
		if err := c.DeleteSession(ctx, &sessions[i]); err != nil {
			return err
		}
	}
	return nil
}
