package kinds

import (
	"cmp"
	"slices"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// RolloutVersion is the API of Argo Rollouts.
var RolloutVersion = schema.GroupVersion{Group: "argoproj.io", Version: "v1alpha1"}

var rolloutKind = RolloutVersion.WithKind(Rollout)

// rollout reads what is needed of one; its own module would bring that of its whole controller.
func rollout(u *unstructured.Unstructured) Info {
	i := Info{Kind: Rollout, Object: u}
	var r struct {
		Spec struct {
			Replicas  *int32                 `json:"replicas"`
			Selector  *metav1.LabelSelector  `json:"selector"`
			Template  corev1.PodTemplateSpec `json:"template"`
			RestartAt metav1.Time            `json:"restartAt"`
		} `json:"spec"`
		Status struct {
			ObservedGeneration string `json:"observedGeneration"`
			Conditions         []struct {
				Type    string                 `json:"type"`
				Status  corev1.ConditionStatus `json:"status"`
				Message string                 `json:"message"`
			} `json:"conditions"`
		} `json:"status"`
	}
	i.Template = &r.Spec.Template
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &r); err != nil {
		i.How, i.Why = Never, "cannot be read: "+err.Error()
		return i
	}
	i.Selector, i.Replicas, i.restartAt = r.Spec.Selector, number(r.Spec.Replicas), r.Spec.RestartAt.Time
	i.Observed = r.Status.ObservedGeneration == strconv.FormatInt(u.GetGeneration(), 10)
	for _, c := range r.Status.Conditions {
		if c.Type == string(appsv1.DeploymentReplicaFailure) && c.Status == corev1.ConditionTrue {
			i.Failure = c.Message
		}
	}
	if i.Replicas == 1 { // whatever its strategy: a restart evicts first
		i.Why = "has one replica, which ends before the next one starts"
	}
	return i
}

// OwnsSets says whether the workload's pods belong to ReplicaSets that belong to it.
func (i *Info) OwnsSets() bool { return i.Kind == Deployment || i.Kind == Rollout }

// FromSets takes a template that is elsewhere (spec.workloadRef of a Rollout) from the newest of the workload's ReplicaSets.
func (i *Info) FromSets(sets []appsv1.ReplicaSet) {
	if i.Kind != Rollout || len(i.Template.Spec.Containers) > 0 || len(sets) == 0 {
		return
	}
	newest := slices.MaxFunc(sets, func(a, b appsv1.ReplicaSet) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	i.Template = &newest.Spec.Template
}
