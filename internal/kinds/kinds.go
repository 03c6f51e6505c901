// Package kinds owns what doppel knows of the kinds of workloads: where their pods' template is, and how these pods can be replaced.
package kinds

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// The kinds of workloads that doppel knows, each once.
const (
	Deployment  = "Deployment"
	StatefulSet = "StatefulSet"
	DaemonSet   = "DaemonSet"
	ReplicaSet  = "ReplicaSet"
	Pod         = "Pod"
	Job         = "Job"
	CronJob     = "CronJob"
	Rollout     = "Rollout" // of Argo Rollouts, where the cluster has it
)

// Names are the words by which people call a kind, as kubectl takes them.
var names = map[string]string{
	"deployment": Deployment, "deployments": Deployment, "deploy": Deployment,
	"statefulset": StatefulSet, "statefulsets": StatefulSet, "sts": StatefulSet,
	"daemonset": DaemonSet, "daemonsets": DaemonSet, "ds": DaemonSet,
	"replicaset": ReplicaSet, "replicasets": ReplicaSet, "rs": ReplicaSet,
	"pod": Pod, "pods": Pod, "po": Pod,
	"rollout": Rollout, "rollouts": Rollout, "ro": Rollout,
	"job": Job, "jobs": Job, "cronjob": CronJob, "cronjobs": CronJob, "cj": CronJob,
}

// Parse reads "NAME" or "KIND/NAME", the kind as kubectl takes it; kind is "" if none is given.
func Parse(s string) (kind, name string, err error) {
	word, name, found := strings.Cut(s, "/")
	if !found {
		return "", s, nil
	}
	kind, ok := names[strings.ToLower(word)]
	if !ok || name == "" {
		return "", "", fmt.Errorf("%q is no workload: want NAME or KIND/NAME, such as statefulset/db", s)
	}
	return kind, name, nil
}

// How is who has a workload's pods replaced by new ones, which are born with an agent.
type How int

// The ways.
const (
	ByController How = iota // RestartPatch is enough
	ByDeletion              // each pod has to be deleted, and its controller makes another
	ByCreation              // a pod alone: who deletes it has to make it again
	Never
)

// Info is one workload.
type Info struct {
	Kind     string
	Object   metav1.Object
	Selector *metav1.LabelSelector   // nil: a pod alone
	Template *corev1.PodTemplateSpec // without containers: it is elsewhere, see FromSets
	Replicas int32
	Observed bool   // its controller has acted on the template
	Failure  string // its controller's own word for pods that it cannot create
	Owner    string // "KIND NAME" of what it belongs to; that is to be intercepted instead

	restartAt time.Time // of a Rollout

	How How
	// Why says, after the workload's name, what stands against replacing its pods: never, or not without a gap. "": nothing.
	Why string
}

// Of describes a workload; ok is false if the object is none.
func Of(o any) (i Info, ok bool) {
	switch o := o.(type) {
	case *appsv1.Deployment:
		i = deployment(o)
	case *appsv1.StatefulSet:
		i = statefulSet(o)
	case *appsv1.DaemonSet:
		i = daemonSet(o)
	case *appsv1.ReplicaSet:
		i = Info{
			Kind: ReplicaSet, Object: o, Selector: o.Spec.Selector, Template: &o.Spec.Template, Replicas: number(o.Spec.Replicas), Observed: true,
			How: ByDeletion, Why: "has no Deployment",
		}
	case *corev1.Pod:
		i = Info{
			Kind: Pod, Object: o, Template: template(o), Replicas: 1, Observed: true,
			How: ByCreation, Why: "has no controller that would replace it",
		}
	case *batchv1.Job:
		i = Info{Kind: Job, Object: o, Selector: o.Spec.Selector, Template: &o.Spec.Template, Observed: true, How: Never, Why: "runs to completion"}
	case *batchv1.CronJob:
		i = Info{Kind: CronJob, Object: o, Template: &o.Spec.JobTemplate.Spec.Template, Observed: true, How: Never, Why: "runs to completion"}
	case *unstructured.Unstructured:
		if o.GroupVersionKind() != rolloutKind {
			return Info{}, false
		}
		i = rollout(o)
	default:
		return Info{}, false
	}
	if c := metav1.GetControllerOf(i.Object); c != nil {
		i.Owner = c.Kind + " " + c.Name
	}
	return i, true
}

// template is the pod as it was without an agent.
func template(p *corev1.Pod) *corev1.PodTemplateSpec {
	var original corev1.Pod
	if s, ok := p.Annotations[agentcfg.AnnotationOriginal]; ok && json.Unmarshal([]byte(s), &original) == nil {
		p = &original
	}
	return &corev1.PodTemplateSpec{ObjectMeta: p.ObjectMeta, Spec: p.Spec}
}

// New returns an empty object of a kind, or nil.
func New(kind string) metav1.Object {
	switch kind {
	case Deployment:
		return &appsv1.Deployment{}
	case StatefulSet:
		return &appsv1.StatefulSet{}
	case DaemonSet:
		return &appsv1.DaemonSet{}
	case ReplicaSet:
		return &appsv1.ReplicaSet{}
	case Pod:
		return &corev1.Pod{}
	case Job:
		return &batchv1.Job{}
	case CronJob:
		return &batchv1.CronJob{}
	case Rollout:
		u := &unstructured.Unstructured{}
		u.SetGroupVersionKind(rolloutKind)
		return u
	}
	return nil
}

// APIVersion is the group and version of the workload's kind.
func (i *Info) APIVersion() string {
	switch i.Kind {
	case Pod:
		return corev1.SchemeGroupVersion.String()
	case Job, CronJob:
		return batchv1.SchemeGroupVersion.String()
	case Rollout:
		return RolloutVersion.String()
	}
	return appsv1.SchemeGroupVersion.String()
}

// Name is the workload's kind and name.
func (i *Info) Name() string { return i.Kind + " " + i.Object.GetName() }

func number(n *int32) int32 {
	if n == nil {
		return 1 // the API server's default
	}
	return *n
}

func deployment(d *appsv1.Deployment) Info {
	i := Info{
		Kind: Deployment, Object: d, Selector: d.Spec.Selector, Template: &d.Spec.Template, Replicas: number(d.Spec.Replicas),
		Observed: d.Status.ObservedGeneration >= d.Generation,
	}
	for _, c := range d.Status.Conditions {
		if c.Type == appsv1.DeploymentReplicaFailure && c.Status == corev1.ConditionTrue {
			i.Failure = c.Message
		}
	}
	switch {
	case d.Spec.Paused:
		i.How, i.Why = ByDeletion, "is paused"
	case d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType:
		i.Why = "has strategy Recreate"
	case i.Replicas == 1 && d.Spec.Strategy.RollingUpdate != nil && zero(d.Spec.Strategy.RollingUpdate.MaxSurge):
		i.Why = "has one replica and maxSurge 0"
	}
	return i
}

// Claims are the names of the volume claims that all pods of a Deployment or ReplicaSet share.
func (i *Info) Claims() []string {
	var out []string
	if i.Kind == StatefulSet || i.Kind == DaemonSet || i.Kind == Rollout {
		return nil // each pod ends before the next one starts
	}
	for _, v := range i.Template.Spec.Volumes {
		if v.PersistentVolumeClaim != nil {
			out = append(out, v.PersistentVolumeClaim.ClaimName)
		}
	}
	return out
}

// Claim takes account of a volume claim: where only one node or pod may use it, a new pod may wait for ever for an old one to end.
func (i *Info) Claim(c *corev1.PersistentVolumeClaim) {
	for _, m := range c.Spec.AccessModes {
		if m == corev1.ReadWriteMany || m == corev1.ReadOnlyMany {
			return
		}
	}
	if i.Why == "" {
		i.How, i.Why = ByDeletion, "mounts volume claim "+c.Name+", which may be used in one place at a time"
	}
}

func zero(n *intstr.IntOrString) bool {
	return n != nil && (n.Type == intstr.Int && n.IntVal == 0 || n.Type == intstr.String && n.StrVal == "0%")
}

func statefulSet(s *appsv1.StatefulSet) Info {
	i := Info{
		Kind: StatefulSet, Object: s, Selector: s.Spec.Selector, Template: &s.Spec.Template, Replicas: number(s.Spec.Replicas),
		Observed: s.Status.ObservedGeneration >= s.Generation,
	}
	switch up := s.Spec.UpdateStrategy; {
	case up.Type == appsv1.OnDeleteStatefulSetStrategyType:
		i.How, i.Why = ByDeletion, "has strategy OnDelete"
	case up.RollingUpdate != nil && number(cmp.Or(up.RollingUpdate.Partition, new(int32))) > 0:
		i.How, i.Why = ByDeletion, "has an update partition"
	case i.Replicas == 1:
		i.Why = "has one replica, which ends before the next one starts"
	}
	return i
}

func daemonSet(d *appsv1.DaemonSet) Info {
	i := Info{
		Kind: DaemonSet, Object: d, Selector: d.Spec.Selector, Template: &d.Spec.Template, Replicas: d.Status.DesiredNumberScheduled,
		Observed: d.Status.ObservedGeneration >= d.Generation,
	}
	up := d.Spec.UpdateStrategy
	surges := up.RollingUpdate != nil && up.RollingUpdate.MaxSurge != nil && !zero(up.RollingUpdate.MaxSurge)
	switch {
	case up.Type == appsv1.OnDeleteDaemonSetStrategyType:
		i.How, i.Why = ByDeletion, "has strategy OnDelete"
	case i.Replicas == 1 && !surges:
		i.Why = "runs on one node, where its pod ends before the next one starts"
	}
	return i
}
