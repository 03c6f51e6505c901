package manager

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/kinds"
)

var update = flag.Bool("update", false, "write docs/support-table.md")

// agentFor is the annotation of a pod whose agent takes the port.
func agentFor(port uint16) string {
	c := agentcfg.Config{Managers: []string{"m:1"}, ManagerKey: "k", HealthPort: 9900, Ports: []agentcfg.Port{{Protocol: "TCP", ContainerPort: port, AgentPort: 9901, Way: agentcfg.ByName}}}
	return c.String()
}

type podOption func(*corev1.Pod)

// webPod is a running pod of Deployment web; of is its ReplicaSet.
func webPod(name, of string, opts ...podOption) corev1.Pod {
	p := corev1.Pod{ObjectMeta: owned(meta("shop", name), "ReplicaSet", of)}
	p.Labels = map[string]string{"app": "web"}
	p.Status.Phase = corev1.PodRunning
	p.Spec.Containers = []corev1.Container{{Name: "app", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}
	for _, o := range opts {
		o(&p)
	}
	return p
}

func ready1(p *corev1.Pod) {
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue})
}

func withAgent(port uint16) podOption {
	return func(p *corev1.Pod) {
		p.Annotations = map[string]string{agentcfg.Annotation: agentFor(port)}
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: agentcfg.Container})
	}
}

// deleted is a pod whose deletion was asked for some time ago; its timestamp is when the grace period ends (metav1.ObjectMeta).
func deleted(ago time.Duration) podOption {
	return func(p *corev1.Pod) {
		grace := int64(30)
		end := metav1.NewTime(time.Now().Add(-ago + 30*time.Second))
		p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &end, &grace
	}
}

func waiting(container, reason, msg string) podOption {
	return func(p *corev1.Pod) {
		st := corev1.ContainerStatus{Name: container, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: msg}}}
		if container == agentcfg.InitContainer {
			p.Status.InitContainerStatuses = append(p.Status.InitContainerStatuses, st)
			return
		}
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, st)
	}
}

func said(container, msg string) podOption {
	return ended(container, corev1.ContainerStateTerminated{Message: msg})
}

func ended(container string, how corev1.ContainerStateTerminated) podOption {
	return func(p *corev1.Pod) {
		for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
			for i := range list {
				if list[i].Name == container {
					list[i].LastTerminationState.Terminated = &how
				}
			}
		}
	}
}

func unscheduled(msg string) podOption {
	return func(p *corev1.Pod) {
		p.Status.Phase = corev1.PodPending
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: msg})
	}
}

// TestView is the table of what a workload's pods mean for an intercept of port 8080. The agents of pods called served-* have
// acknowledged it.
func TestView(t *testing.T) {
	agent := withAgent(8080)
	for name, tt := range map[string]struct {
		pods []corev1.Pod
		fail string // the controller's word
		want podsView
	}{
		"no pods":                                  {},
		"before: none has an agent":                {pods: []corev1.Pod{webPod("a", "new", ready1), webPod("b", "new", ready1)}, want: podsView{missing: 2, missingPod: "b"}},
		"an agent for another port":                {pods: []corev1.Pod{webPod("a", "new", ready1, withAgent(9090))}, want: podsView{missing: 1, missingPod: "a"}},
		"another product's agent":                  {pods: []corev1.Pod{webPod("a", "new", ready1, func(p *corev1.Pod) { agent(p); p.Annotations = nil })}, want: podsView{missing: 1, missingPod: "a"}},
		"an annotation alone":                      {pods: []corev1.Pod{webPod("a", "new", ready1, func(p *corev1.Pod) { p.Annotations = map[string]string{agentcfg.Annotation: agentFor(8080)} })}, want: podsView{missing: 1, missingPod: "a"}},
		"an annotation that cannot be read":        {pods: []corev1.Pod{webPod("a", "new", ready1, func(p *corev1.Pod) { agent(p); p.Annotations[agentcfg.Annotation] = "{" })}, want: podsView{missing: 1, missingPod: "a"}},
		"the new one starts":                       {pods: []corev1.Pod{webPod("old", "old", ready1), webPod("a", "new", agent)}, want: podsView{waiting: 1, draining: 1}},
		"the new one's agent has not acknowledged": {pods: []corev1.Pod{webPod("a", "new", agent, ready1)}, want: podsView{waiting: 1}},
		"the new one is not ready":                 {pods: []corev1.Pod{webPod("served-a", "new", agent)}, want: podsView{waiting: 1}},
		"the new one serves, the old one runs":     {pods: []corev1.Pod{webPod("old", "old", ready1), webPod("served-a", "new", agent, ready1)}, want: podsView{serving: 1, draining: 1}},
		"the old one is told to end":               {pods: []corev1.Pod{webPod("old", "old", ready1, deleted(time.Second)), webPod("served-a", "new", agent, ready1)}, want: podsView{serving: 1, draining: 1}},
		"the old one is out of the service":        {pods: []corev1.Pod{webPod("old", "old", ready1, deleted(3*time.Second)), webPod("served-a", "new", agent, ready1)}, want: podsView{serving: 1}},
		"the old one ends and has an agent":        {pods: []corev1.Pod{webPod("served-old", "old", agent, ready1, deleted(time.Second)), webPod("served-a", "new", agent, ready1)}, want: podsView{serving: 1}},
		"an old one with an agent still serves":    {pods: []corev1.Pod{webPod("served-old", "old", agent, ready1), webPod("served-a", "new", agent, ready1)}, want: podsView{serving: 2}},
		"a missed injection among good pods":       {pods: []corev1.Pod{webPod("served-a", "new", agent, ready1), webPod("b", "new", ready1)}, want: podsView{serving: 1, missing: 1, missingPod: "b"}},
		"the agent's image cannot be pulled": {
			pods: []corev1.Pod{webPod("old", "old", ready1), webPod("a", "new", agent, waiting(agentcfg.Container, "ErrImagePull", "not found"))},
			want: podsView{waiting: 1, draining: 1, trouble: "the traffic-agent of pod a does not start: ErrImagePull: not found", unready: "container traffic-agent of pod a does not start: ErrImagePull: not found"},
		},
		"the redirect fails, and said why": {
			pods: []corev1.Pod{webPod("a", "new", agent, waiting(agentcfg.InitContainer, "CrashLoopBackOff", "back-off"), said(agentcfg.InitContainer, "no\nnftables\n"))},
			want: podsView{waiting: 1, trouble: "the doppel-redirect of pod a does not start: CrashLoopBackOff: no nftables", unready: "container doppel-redirect of pod a does not start: CrashLoopBackOff: back-off"},
		},
		"the agent was killed": {
			pods: []corev1.Pod{webPod("a", "new", agent, waiting(agentcfg.Container, "CrashLoopBackOff", "back-off"), ended(agentcfg.Container, corev1.ContainerStateTerminated{ExitCode: 137, Reason: "Error", Message: "listening"}))},
			want: podsView{waiting: 1, trouble: "the traffic-agent of pod a does not start: CrashLoopBackOff: it was ended by signal 9", ran: true, unready: "container traffic-agent of pod a does not start: CrashLoopBackOff: back-off"},
		},
		"the agent was killed for want of memory": {
			pods: []corev1.Pod{webPod("a", "new", agent, waiting(agentcfg.Container, "CrashLoopBackOff", "back-off"), ended(agentcfg.Container, corev1.ContainerStateTerminated{ExitCode: 137, Reason: "OOMKilled", Message: "listening"}))},
			want: podsView{waiting: 1, trouble: "the traffic-agent of pod a does not start: CrashLoopBackOff: it needed more memory than its limit (OOMKilled)", ran: true, unready: "container traffic-agent of pod a does not start: CrashLoopBackOff: back-off"},
		},
		"one agent was killed, another has no image": {
			pods: []corev1.Pod{
				webPod("a", "new", agent, waiting(agentcfg.Container, "CrashLoopBackOff", "back-off")), webPod("b", "new", agent, waiting(agentcfg.Container, "ErrImagePull", "not found")),
				webPod("c", "new", agent, waiting(agentcfg.Container, "CrashLoopBackOff", "back-off")),
			},
			want: podsView{waiting: 3, trouble: "the traffic-agent of pod c does not start: CrashLoopBackOff: back-off", unready: "container traffic-agent of pod c does not start: CrashLoopBackOff: back-off"},
		},
		"the agent is being created": {pods: []corev1.Pod{webPod("a", "new", agent, waiting(agentcfg.Container, "ContainerCreating", ""))}, want: podsView{waiting: 1}},
		"the app does not start": {
			pods: []corev1.Pod{webPod("a", "new", agent, waiting("app", "CrashLoopBackOff", "back-off 10s"))},
			want: podsView{waiting: 1, unready: "container app of pod a does not start: CrashLoopBackOff: back-off 10s"},
		},
		"no room on any node": {
			pods: []corev1.Pod{webPod("a", "new", agent, unscheduled("0/3 nodes are available: 3 Insufficient cpu."))},
			want: podsView{waiting: 1, unready: "pod a is not scheduled: 0/3 nodes are available: 3 Insufficient cpu."},
		},
		"quota": {
			pods: []corev1.Pod{webPod("old", "old", ready1)},
			fail: "exceeded quota: pods=1",
			want: podsView{draining: 1, trouble: "Deployment web cannot create pods: exceeded quota: pods=1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			info, _ := kinds.Of(&appsv1.Deployment{ObjectMeta: meta("shop", "web")})
			info.Failure = tt.fail
			w := &workload{Info: info, key: web, pods: tt.pods}
			old := map[types.UID]bool{} // what a restart was to replace
			for _, p := range tt.pods {
				old[p.UID] = metav1.GetControllerOf(&p).UID == "old"
			}
			got := w.view(new(clock), fit{ports: tcp(8080)}, old, func(pod types.UID) bool { return strings.HasPrefix(string(pod), "served-") })
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(podsView{})); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if _, got := w.broken(); got != (tt.want.trouble != "") {
				t.Errorf("broken: %v", got)
			}
		})
	}
}

// loadWorkload takes the pods of the Deployment's own ReplicaSets, whoever else has the same labels.
func TestLoadWorkload(t *testing.T) {
	labels := map[string]string{"app": "web"}
	d := &appsv1.Deployment{ObjectMeta: meta("shop", "web"), Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}}}
	d.Generation, d.Status.ObservedGeneration = 3, 2
	rs := func(name, owner string) *appsv1.ReplicaSet {
		s := &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", name), "Deployment", owner)}
		s.Labels = labels
		return s
	}
	bare := webPod("bare", "", func(p *corev1.Pod) { p.OwnerReferences = nil })
	objs := []client.Object{d, rs("old", "web"), rs("new", "web"), rs("foreign", "other"), &bare}
	for _, p := range []corev1.Pod{
		webPod("p-old", "old"), webPod("p-new", "new"), webPod("p-foreign", "foreign"),
		webPod("p-done", "new", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }),
		webPod("p-evicted", "new", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }),
		webPod("p-elsewhere", "new", func(p *corev1.Pod) { p.Namespace = "other" }),
		webPod("p-db", "new", func(p *corev1.Pod) { p.Labels = nil }),
	} {
		objs = append(objs, &p)
	}
	w := newWorld(t, objs...)
	got, err := w.loadWorkload(t.Context(), "shop", v1alpha1.WorkloadRef{Kind: "Deployment", Name: "web"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range got.pods {
		names = append(names, p.Name)
	}
	if d := cmp.Diff([]string{"p-new", "p-old"}, names); d != "" {
		t.Errorf("pods:\n%s", d)
	}
	if got.Observed || got.Replicas != 1 || got.key != web {
		t.Errorf("observed %v, wanted %d", got.Observed, got.Replicas)
	}
	zero := int32(0)
	d.Spec.Replicas = &zero
	if err := w.kc.Update(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	d.Status.ObservedGeneration = d.Generation
	if err := w.kc.Status().Update(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	got, err = w.loadWorkload(t.Context(), "shop", v1alpha1.WorkloadRef{Kind: "Deployment", Name: "web"})
	if err != nil || !got.Observed || got.Replicas != 0 {
		t.Errorf("scaled to zero: observed %v, wanted %d, %v", got.Observed, got.Replicas, err)
	}

	for _, tt := range []struct{ kind, name, reason string }{{"Deployment", "nope", "NoWorkload"}, {"Rocket", "web", "UnsupportedKind"}, {"ReplicaSet", "new", "Owned"}} {
		_, err := w.loadWorkload(t.Context(), "shop", v1alpha1.WorkloadRef{Kind: tt.kind, Name: tt.name})
		var p *problem
		if !errors.As(err, &p) || p.reason != tt.reason {
			t.Errorf("%s %s: %v", tt.kind, tt.name, err)
		}
	}
	w.fail = func(string, runtime.Object) error { return errors.New("etcd is away") }
	_, err = w.loadWorkload(t.Context(), "shop", v1alpha1.WorkloadRef{Kind: "Deployment", Name: "web"})
	var p *problem
	if err == nil || errors.As(err, &p) {
		t.Errorf("an API server that is away is no reason to give up: %v", err)
	}
}

// workloadTable is the part of the support table about workloads; docs/support-table.md is written from it.
var workloadTable = []struct {
	workload string // for people
	object   client.Object
	never    string // why it can never be intercepted
	gap      string // why it can be only with --recreate
	who      string // replaces its pods
}{
	{"Deployment", webDeployment(), "", "", "a rolling restart"},
	{"Deployment scaled to zero", deploymentWith(func(d *appsv1.Deployment) { d.Spec.Replicas = new(int32) }), "", "", "a rolling restart"},
	{"Deployment, paused", deploymentWith(func(d *appsv1.Deployment) { d.Spec.Paused = true }), "", "is paused", "doppel, one pod after the other"},
	{"Deployment with strategy Recreate", deploymentWith(func(d *appsv1.Deployment) { d.Spec.Strategy.Type = appsv1.RecreateDeploymentStrategyType }), "", "has strategy Recreate", "a rolling restart"},
	{"Deployment with one replica and maxSurge 0", deploymentWith(func(d *appsv1.Deployment) {
		d.Spec.Strategy.RollingUpdate = &appsv1.RollingUpdateDeployment{MaxSurge: new(intstr.IntOrString)}
	}), "", "has one replica and maxSurge 0", "a rolling restart"},
	{"Deployment that mounts a claim for one node or pod at a time", deploymentWith(func(d *appsv1.Deployment) {
		d.Spec.Template.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "alone"}}}}
	}), "", "mounts volume claim alone, which may be used in one place at a time", "doppel, one pod after the other"},
	{"Deployment that mounts a claim for many", deploymentWith(func(d *appsv1.Deployment) {
		d.Spec.Template.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "shared"}}}}
	}), "", "", "a rolling restart"},
	{"Deployment whose pods forbid it", deploymentWith(func(d *appsv1.Deployment) {
		d.Spec.Template.Annotations = map[string]string{agentcfg.AnnotationInject: agentcfg.InjectDisabled}
	}), `cannot have a traffic-agent: the annotation doppel.dev/inject: disabled forbids it`, "", ""},
	{"Deployment in the node's network", deploymentWith(func(d *appsv1.Deployment) { d.Spec.Template.Spec.HostNetwork = true }), "cannot have a traffic-agent: the pod uses the node's network (hostNetwork)", "", ""},
	{"StatefulSet of several replicas", statefulSetWith(3, func(*appsv1.StatefulSet) {}), "", "", "a rolling restart"},
	{"StatefulSet of one replica", statefulSetWith(1, func(*appsv1.StatefulSet) {}), "", "has one replica, which ends before the next one starts", "a rolling restart"},
	{"StatefulSet with strategy OnDelete", statefulSetWith(3, func(s *appsv1.StatefulSet) { s.Spec.UpdateStrategy.Type = appsv1.OnDeleteStatefulSetStrategyType }), "", "has strategy OnDelete", "doppel, one pod after the other"},
	{"StatefulSet with an update partition", statefulSetWith(3, func(s *appsv1.StatefulSet) {
		two := int32(2)
		s.Spec.UpdateStrategy.RollingUpdate = &appsv1.RollingUpdateStatefulSetStrategy{Partition: &two}
	}), "", "has an update partition", "doppel, one pod after the other"},
	{"DaemonSet on several nodes", daemonSetWith(3, func(*appsv1.DaemonSet) {}), "", "", "a rolling restart"},
	{"DaemonSet on one node", daemonSetWith(1, func(*appsv1.DaemonSet) {}), "", "runs on one node, where its pod ends before the next one starts", "a rolling restart"},
	{"DaemonSet with maxSurge", daemonSetWith(1, func(d *appsv1.DaemonSet) {
		one := intstr.FromInt32(1)
		d.Spec.UpdateStrategy.RollingUpdate = &appsv1.RollingUpdateDaemonSet{MaxSurge: &one}
	}), "", "", "a rolling restart"},
	{"DaemonSet with strategy OnDelete", daemonSetWith(3, func(d *appsv1.DaemonSet) { d.Spec.UpdateStrategy.Type = appsv1.OnDeleteDaemonSetStrategyType }), "", "has strategy OnDelete", "doppel, one pod after the other"},
	{"ReplicaSet", &appsv1.ReplicaSet{ObjectMeta: meta("shop", "web"), Spec: appsv1.ReplicaSetSpec{Selector: webDeployment().Spec.Selector, Template: webDeployment().Spec.Template}}, "", "has no Deployment", "doppel, one pod after the other"},
	{"ReplicaSet of a Deployment", &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "web"), "Deployment", "shop")}, "belongs to Deployment shop", "", ""},
	{"Rollout (Argo) of several replicas", rolloutWith(3, nil), "", "", "a rolling restart"},
	{"Rollout (Argo) of one replica", rolloutWith(1, nil), "", "has one replica, which ends before the next one starts", "a rolling restart"},
	{"ReplicaSet of a Rollout", &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "web"), "Rollout", "shop")}, "belongs to Rollout shop", "", ""},
	{"Pod", &corev1.Pod{ObjectMeta: meta("shop", "web"), Spec: webDeployment().Spec.Template.Spec}, "", "has no controller that would replace it", "doppel, which makes it again"},
	{"Pod of a StatefulSet", &corev1.Pod{ObjectMeta: owned(meta("shop", "web"), "StatefulSet", "db")}, "belongs to StatefulSet db", "", ""},
	{"Job", &batchv1.Job{ObjectMeta: meta("shop", "web")}, "runs to completion", "", ""},
	{"CronJob", &batchv1.CronJob{ObjectMeta: meta("shop", "web")}, "runs to completion", "", ""},
}

func deploymentWith(fn func(*appsv1.Deployment)) *appsv1.Deployment {
	d := webDeployment()
	fn(d)
	return d
}

func statefulSetWith(replicas int32, fn func(*appsv1.StatefulSet)) *appsv1.StatefulSet {
	s := &appsv1.StatefulSet{ObjectMeta: meta("shop", "web"), Spec: appsv1.StatefulSetSpec{Replicas: &replicas, Selector: webDeployment().Spec.Selector, Template: webDeployment().Spec.Template}}
	fn(s)
	return s
}

// rolloutWith is a Rollout with the template of webDeployment, if no other spec is given.
func rolloutWith(replicas int64, spec map[string]any) *unstructured.Unstructured {
	o := kinds.New(kinds.Rollout).(*unstructured.Unstructured)
	d := webDeployment()
	o.SetNamespace("shop")
	o.SetName("web")
	o.SetUID("web")
	o.SetGeneration(7)
	if spec == nil {
		template, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&d.Spec.Template)
		if err != nil {
			panic(err)
		}
		spec = map[string]any{"template": template}
	}
	spec["replicas"], spec["selector"] = replicas, map[string]any{"matchLabels": map[string]any{"app": "web"}}
	o.Object["spec"], o.Object["status"] = spec, map[string]any{"observedGeneration": "7"}
	return o
}

func daemonSetWith(nodes int32, fn func(*appsv1.DaemonSet)) *appsv1.DaemonSet {
	d := &appsv1.DaemonSet{ObjectMeta: meta("shop", "web"), Spec: appsv1.DaemonSetSpec{Selector: webDeployment().Spec.Selector, Template: webDeployment().Spec.Template}}
	d.Status.DesiredNumberScheduled = nodes
	fn(d)
	return d
}

func TestWorkloadTable(t *testing.T) {
	var doc strings.Builder
	doc.WriteString("| Workload | Can be intercepted | Because it | Its pods are replaced by |\n|---|---|---|---|\n")
	claims := []client.Object{
		&corev1.PersistentVolumeClaim{ObjectMeta: meta("shop", "alone"), Spec: corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}}},
		&corev1.PersistentVolumeClaim{ObjectMeta: meta("shop", "shared"), Spec: corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce, corev1.ReadWriteMany}}},
	}
	port := []inject.Taken{{Container: "app", ContainerPort: 8080, Protocol: "TCP", Name: "http", Way: agentcfg.ByName}}
	for _, row := range workloadTable {
		t.Run(row.workload, func(t *testing.T) {
			w := newWorld(t, append(claims, row.object)...)
			info, _ := kinds.Of(row.object)
			never, gap, who := "", "", ""
			wl, err := w.loadWorkload(t.Context(), "shop", v1alpha1.WorkloadRef{Kind: info.Kind, Name: "web"})
			if err != nil {
				never = err.Error()
			} else if _, never = wl.cannotReplace(port, nil, "", true); never == "" {
				_, gap = wl.cannotReplace(port, nil, "", false)
				who = map[kinds.How]string{kinds.ByController: "a rolling restart", kinds.ByDeletion: "doppel, one pod after the other", kinds.ByCreation: "doppel, which makes it again"}[wl.How]
			}
			for what, p := range map[string][2]string{"never": {never, row.never}, "gap": {gap, row.gap}, "who": {who, row.who}} {
				if got, want := p[0], p[1]; (got == "") != (want == "") || !strings.Contains(got, want) {
					t.Errorf("%s: %q, want %q", what, got, want)
				}
			}
			can, why := "yes", row.gap
			switch {
			case row.never != "":
				can, why = "**no**", row.never
			case row.gap != "":
				can = "with `--recreate`"
			}
			fmt.Fprintf(&doc, "| %s | %s | %s | %s |\n", row.workload, can, strings.TrimPrefix(why, "cannot have a traffic-agent: "), row.who)
		})
	}
	checkDoc(t, "workloads", doc.String())
}

// checkDoc compares the part of docs/support-table.md between two markers with what the table says, or writes it.
func checkDoc(t *testing.T, part, want string) {
	t.Helper()
	const file = "../../docs/support-table.md"
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "<!-- "+part+" -->\n", "<!-- /"+part+" -->"
	head, rest, ok1 := strings.Cut(string(raw), begin)
	got, tail, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no part %q", file, part)
	}
	if *update {
		if err := os.WriteFile(file, []byte(head+begin+want+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (go test ./internal/manager -update writes it) -want +got:\n%s", file, d)
	}
}

// webDeployment is Deployment web as its controller sees it after a rollout.
func webDeployment() *appsv1.Deployment {
	labels := map[string]string{"app": "web"}
	d := &appsv1.Deployment{ObjectMeta: meta("shop", "web")}
	d.Spec.Selector = &metav1.LabelSelector{MatchLabels: labels}
	d.Spec.Template.Labels = labels
	d.Spec.Template.Spec.Containers = []corev1.Container{{Name: "app", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}
	return d
}

// A restart touches one annotation of the template and nothing else.
func TestRestart(t *testing.T) {
	d := webDeployment()
	w := newWorld(t, d)
	wl, err := w.loadWorkload(t.Context(), "shop", v1alpha1.WorkloadRef{Kind: "Deployment", Name: "web"})
	if err != nil {
		t.Fatal(err)
	}
	if err := wl.restart(t.Context(), w.Manager); err != nil {
		t.Fatal(err)
	}
	after := &appsv1.Deployment{ObjectMeta: meta("shop", "web")}
	w.get(after)
	if after.Spec.Template.Annotations[restartedAt] == "" {
		t.Fatal("no annotation")
	}
	after.Spec.Template.Annotations = nil
	if d := cmp.Diff(d.Spec, after.Spec); d != "" {
		t.Errorf("changed:\n%s", d)
	}
}

// A Rollout is restarted by its own controller's means, which tell pods of before by their time; its template may be elsewhere.
func TestRollout(t *testing.T) {
	set := func(name string, age time.Duration) *appsv1.ReplicaSet {
		s := &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", name), "Rollout", "web"), Spec: appsv1.ReplicaSetSpec{Selector: webDeployment().Spec.Selector, Template: webDeployment().Spec.Template}}
		s.Labels, s.CreationTimestamp = map[string]string{"app": "web"}, metav1.NewTime(time.Now().Add(-age))
		s.Spec.Template.Spec.Containers = []corev1.Container{{Name: name}}
		return s
	}
	w := newWorld(t, rolloutWith(3, map[string]any{"workloadRef": map[string]any{"kind": "Deployment", "name": "elsewhere"}}), set("old", time.Hour), set("new", time.Minute))
	for name, of := range map[string]string{"a": "new", "b": "old", "c": "others"} {
		p := webPod(name, of, ready1)
		w.create(&p)
	}
	load := func() *workload {
		t.Helper()
		wl, err := w.loadWorkload(t.Context(), "shop", v1alpha1.WorkloadRef{Kind: kinds.Rollout, Name: "web"})
		if err != nil {
			t.Fatal(err)
		}
		return wl
	}
	wl := load()
	if len(wl.pods) != 2 || wl.Template.Spec.Containers[0].Name != "new" || !wl.Observed || wl.Replicas != 3 || !wl.RestartedAt().IsZero() || wl.Outdated(&wl.pods[0]) {
		t.Fatalf("%+v", wl)
	}
	before := time.Now()
	if err := wl.restart(t.Context(), w.Manager); err != nil {
		t.Fatal(err)
	}
	wl = load()
	if at := wl.RestartedAt(); !at.After(before) || at.Sub(before) > 2*time.Second {
		t.Errorf("to be restarted at %v, at %v", at, before)
	}
	young := corev1.Pod{ObjectMeta: metav1.ObjectMeta{CreationTimestamp: metav1.NewTime(wl.RestartedAt())}}
	if !wl.Outdated(&wl.pods[0]) || wl.Outdated(&young) {
		t.Errorf("outdated: %v, %v", wl.pods[0].CreationTimestamp, young.CreationTimestamp)
	}
	spec := wl.Object.(*unstructured.Unstructured).Object["spec"].(map[string]any)
	delete(spec, "restartAt")
	if len(spec) != 3 {
		t.Errorf("more was changed: %v", spec)
	}
	if key, err := w.workloadOf(t.Context(), &wl.pods[0]); err != nil || key != wl.key {
		t.Errorf("its pod belongs to %v, %v", key, err)
	}

	// Rollouts that came to the cluster after doppel.
	w.set(func() {
		w.fail = func(string, runtime.Object) error {
			return apierrors.NewForbidden(schema.GroupResource{Resource: "rollouts"}, "web", nil)
		}
	})
	if _, err := w.loadWorkload(t.Context(), "shop", v1alpha1.WorkloadRef{Kind: kinds.Rollout, Name: "web"}); err == nil || !strings.Contains(err.Error(), "doppel helm upgrade") {
		t.Errorf("without rights: %v", err)
	}
}
