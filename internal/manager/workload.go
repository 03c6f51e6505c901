package manager

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/inject"
)

// restartedAt is the annotation that kubectl rollout restart sets; it is the only thing of a template that we ever touch (D8).
const restartedAt = "kubectl.kubernetes.io/restartedAt"

// endpointLag is how long after a pod's deletion clients may still be sent to it: kube-proxy writes its rules at most
// once a second by default (--nftables-min-sync-period, --iptables-min-sync-period).
const endpointLag = 1500 * time.Millisecond

// workload is a Deployment with its pods as they are now.
type workload struct {
	key      workloadKey
	object   *appsv1.Deployment
	template *corev1.PodTemplateSpec
	pods     []corev1.Pod
	newest   types.UID // the ReplicaSet of the current template
	observed bool      // the controller has acted on the current template
	wanted   int32
}

// loadWorkload reads the workload, its newest ReplicaSet and its pods from the API server.
func (m *Manager) loadWorkload(ctx context.Context, ns string, ref v1alpha1.WorkloadRef) (*workload, error) {
	if ref.Kind != "Deployment" {
		return nil, fail("UnsupportedKind", "%s cannot be intercepted yet: only Deployments can", ref.Kind)
	}
	r := m.ctrl.GetAPIReader()
	var d appsv1.Deployment
	err := r.Get(ctx, client.ObjectKey{Namespace: ns, Name: ref.Name}, &d)
	if apierrors.IsNotFound(err) {
		return nil, fail("NoWorkload", "no Deployment %q in namespace %s", ref.Name, ns)
	}
	if err != nil {
		return nil, err
	}
	sel, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	if err != nil {
		return nil, err
	}
	var sets appsv1.ReplicaSetList
	if err := r.List(ctx, &sets, client.InNamespace(ns), client.MatchingLabelsSelector{Selector: sel}); err != nil {
		return nil, err
	}
	var pods corev1.PodList
	if err := r.List(ctx, &pods, client.InNamespace(ns), client.MatchingLabelsSelector{Selector: sel}); err != nil {
		return nil, err
	}
	w := &workload{
		key: workloadKey{ns, "Deployment", d.Name}, object: &d, template: &d.Spec.Template, wanted: 1,
		observed: d.Status.ObservedGeneration >= d.Generation,
	}
	if d.Spec.Replicas != nil {
		w.wanted = *d.Spec.Replicas
	}
	owned := map[types.UID]bool{}
	for i := range sets.Items {
		rs := &sets.Items[i]
		if !metav1.IsControlledBy(rs, &d) {
			continue
		}
		owned[rs.UID] = true
		if rs.Annotations[revision] == d.Annotations[revision] {
			w.newest = rs.UID
		}
	}
	w.pods = slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool {
		o := metav1.GetControllerOf(&p)
		return o == nil || !owned[o.UID] || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
	})
	return w, nil
}

// revision ties a Deployment to its current ReplicaSet.
const revision = "deployment.kubernetes.io/revision"

// cannotRoll says why the workload's pods cannot be replaced, without a gap (D8), by pods with an agent for the port, or "".
func (w *workload) cannotRoll(port inject.Taken) string {
	switch {
	case w.object.Spec.Paused:
		return fmt.Sprintf("Deployment %s is paused: its pods cannot be replaced", w.key.Name)
	case w.object.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType:
		return fmt.Sprintf("Deployment %s has strategy Recreate: its pods cannot be replaced without a gap", w.key.Name)
	}
	pod := &corev1.Pod{ObjectMeta: w.template.ObjectMeta, Spec: w.template.Spec}
	if _, err := inject.Pod(pod, inject.Config{Ports: []inject.Taken{port}}); err != nil {
		return fmt.Sprintf("the pods of Deployment %s cannot have a traffic-agent: %v", w.key.Name, err)
	}
	return ""
}

// restart is kubectl rollout restart.
func (w *workload) restart(ctx context.Context, c client.Client) error {
	base := w.object.DeepCopy()
	if w.object.Spec.Template.Annotations == nil {
		w.object.Spec.Template.Annotations = map[string]string{}
	}
	w.object.Spec.Template.Annotations[restartedAt] = time.Now().Format(time.RFC3339Nano)
	return c.Patch(ctx, w.object, client.MergeFrom(base))
}

// podsView is what the pods of a workload mean for one intercepted port.
type podsView struct {
	serving    int    // have an agent that knows the intercept
	waiting    int    // have an agent that does not know it yet
	missing    int    // pods of the newest ReplicaSet without an agent for the port
	missingPod string // one of them
	draining   int    // old pods that clients may still reach
	trouble    string // why an agent will not come up
	unready    string // why one of the waiting pods does not get ready, if it says so
}

// because is the reason of a wait, behind a colon, or "".
func (v podsView) because() string {
	if v.unready == "" {
		return ""
	}
	return ": " + v.unready
}

func (w *workload) view(protocol string, port uint16, serves func(types.UID) bool) podsView {
	var v podsView
	for i := range w.pods {
		p := &w.pods[i]
		switch {
		case p.DeletionTimestamp != nil:
			if !covers(p, protocol, port) && stillReached(p) {
				v.draining++
			}
		case covers(p, protocol, port) && serves(p.UID) && ready(p):
			v.serving++
		case covers(p, protocol, port):
			v.waiting++
			v.trouble = cmp.Or(agentTrouble(p), v.trouble)
			v.unready = cmp.Or(notReady(p), v.unready)
		case metav1.GetControllerOf(p).UID == w.newest:
			v.missing++
			v.missingPod = p.Name
		default:
			v.draining++ // an old pod that the rollout has not come to yet
		}
	}
	if c := w.replicaFailure(); c != "" {
		v.trouble = c
	}
	return v
}

// broken says whether an agent keeps a pod of the workload from coming up.
func (w *workload) broken() bool {
	return slices.ContainsFunc(w.pods, func(p corev1.Pod) bool {
		return p.DeletionTimestamp == nil && inject.Injected(&p) && agentTrouble(&p) != ""
	}) || w.replicaFailure() != ""
}

func covers(p *corev1.Pod, protocol string, port uint16) bool {
	c := agentOf(p)
	return c != nil && c.Covers(protocol, port)
}

// agentOf is the configuration of the pod's agent, or nil.
func agentOf(p *corev1.Pod) *agentcfg.Config {
	if !inject.Injected(p) {
		return nil
	}
	c, err := agentcfg.Parse(p.Annotations[agentcfg.Annotation])
	if err != nil {
		return nil
	}
	return c
}

// agentStarted is when the pod's agent began to run; the far future if it does not.
func agentStarted(p *corev1.Pod) time.Time {
	for _, cs := range p.Status.ContainerStatuses {
		if cs.Name == agentcfg.Container && cs.State.Running != nil {
			return cs.State.Running.StartedAt.Time
		}
	}
	return time.Now().Add(time.Hour)
}

func stillReached(p *corev1.Pod) bool {
	deleted := p.DeletionTimestamp.Time
	if p.DeletionGracePeriodSeconds != nil {
		deleted = deleted.Add(-time.Duration(*p.DeletionGracePeriodSeconds) * time.Second)
	}
	return time.Since(deleted) < endpointLag
}

func ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// hopeless are the waiting reasons of a container that do not mend themselves within seconds.
var hopeless = []string{"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff"}

// agentTrouble says why the pod's agent or init container will not start, with the kubelet's words, or "".
func agentTrouble(p *corev1.Pod) string {
	for _, cs := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if cs.Name != agentcfg.Container && cs.Name != agentcfg.InitContainer {
			continue
		}
		if w := cs.State.Waiting; w != nil && slices.Contains(hopeless, w.Reason) {
			msg := w.Message
			if t := cs.LastTerminationState.Terminated; t != nil && t.Message != "" {
				msg = strings.TrimSpace(t.Message)
			}
			return fmt.Sprintf("the %s of pod %s does not start: %s: %s", cs.Name, p.Name, w.Reason, msg)
		}
	}
	return ""
}

// notReady says why a pod is not ready where waiting may still help: the scheduler's words, or those about the app's containers.
func notReady(p *corev1.Pod) string {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse && c.Message != "" {
			return fmt.Sprintf("pod %s is not scheduled: %s", p.Name, c.Message)
		}
	}
	for _, cs := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if w := cs.State.Waiting; w != nil && slices.Contains(hopeless, w.Reason) {
			return fmt.Sprintf("container %s of pod %s does not start: %s: %s", cs.Name, p.Name, w.Reason, w.Message)
		}
	}
	return ""
}

// replicaFailure is the Deployment's own word for pods that could not be created: quota, pod security, another webhook.
func (w *workload) replicaFailure() string {
	for _, c := range w.object.Status.Conditions {
		if c.Type == appsv1.DeploymentReplicaFailure && c.Status == corev1.ConditionTrue {
			return fmt.Sprintf("Deployment %s cannot create pods: %s", w.key.Name, c.Message)
		}
	}
	return ""
}

// workloadOf finds the workload that a pod belongs to through its owners.
func (m *Manager) workloadOf(ctx context.Context, pod *corev1.Pod) (workloadKey, error) {
	o := metav1.GetControllerOf(pod)
	if o == nil {
		return workloadKey{pod.Namespace, "Pod", pod.Name}, nil
	}
	if o.Kind != "ReplicaSet" || !strings.HasPrefix(o.APIVersion, "apps/") {
		return workloadKey{pod.Namespace, o.Kind, o.Name}, nil
	}
	var rs appsv1.ReplicaSet
	if err := m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: o.Name}, &rs); err != nil {
		return workloadKey{}, fmt.Errorf("owner of pod %s: %w", pod.Name, err)
	}
	if ro := metav1.GetControllerOf(&rs); ro != nil {
		return workloadKey{pod.Namespace, ro.Kind, ro.Name}, nil
	}
	return workloadKey{pod.Namespace, "ReplicaSet", rs.Name}, nil
}
