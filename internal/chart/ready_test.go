package chart

import (
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/internal/uerr"
)

func deployment(f func(*appsv1.DeploymentStatus)) *appsv1.Deployment {
	one := int32(1)
	d := &appsv1.Deployment{Spec: appsv1.DeploymentSpec{Replicas: &one}}
	d.Generation, d.Status.ObservedGeneration = 2, 2
	if f != nil {
		f(&d.Status)
	}
	return d
}

func pod(waiting, msg string, last *corev1.ContainerStateTerminated) corev1.Pod {
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", UID: "u"}}
	p.Spec.Containers = []corev1.Container{{Name: "traffic-manager", Image: "example/tm:1"}}
	cs := corev1.ContainerStatus{Name: "traffic-manager"}
	if waiting != "" {
		cs.State.Waiting = &corev1.ContainerStateWaiting{Reason: waiting, Message: msg}
	}
	cs.LastTerminationState.Terminated = last
	p.Status.ContainerStatuses = []corev1.ContainerStatus{cs}
	return p
}

func upToDate(s *appsv1.DeploymentStatus) {
	s.Replicas, s.UpdatedReplicas, s.AvailableReplicas = 1, 1, 1
}

func standing(part string) corev1.Pod {
	p := pod("", "", nil)
	p.Labels = map[string]string{"app.kubernetes.io/part-of": part}
	return p
}

func unschedulable() corev1.Pod {
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", UID: "u"}}
	p.Status.Conditions = []corev1.PodCondition{{
		Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable, Message: "0/3 nodes are available",
	}}
	return p
}

func event(reason, typ, msg string) corev1.Event {
	return corev1.Event{InvolvedObject: corev1.ObjectReference{UID: types.UID("u")}, Reason: reason, Type: typ, Message: msg}
}

func refusedWith(msg string) *appsv1.Deployment {
	return deployment(func(s *appsv1.DeploymentStatus) {
		s.Conditions = []appsv1.DeploymentCondition{{Type: appsv1.DeploymentReplicaFailure, Status: corev1.ConditionTrue, Message: msg}}
	})
}

// TestJudge shows the same sight twice, `after` apart, and looks at the second verdict.
func TestJudge(t *testing.T) {
	for _, c := range []struct {
		name  string
		s     sight
		after time.Duration
		ready bool
		kind  uerr.Kind // empty: no error
		want  string    // in the text or the error
	}{
		{name: "nothing yet", s: sight{deployment: deployment(nil)}, want: "to be created"},
		{name: "ready", s: sight{deployment: deployment(upToDate), pods: []corev1.Pod{standing("doppel-standby"), standing("doppel")}}, ready: true},
		{name: "nobody works yet", s: sight{deployment: deployment(upToDate), pods: []corev1.Pod{standing("doppel-standby")}}, want: "to take over"},
		{
			name: "an old pod is left", want: "to be created",
			s: sight{deployment: deployment(func(s *appsv1.DeploymentStatus) { s.Replicas, s.UpdatedReplicas, s.AvailableReplicas = 2, 1, 2 })},
		},
		{
			name: "the controller has not looked yet", want: "to be created",
			s: sight{deployment: deployment(func(s *appsv1.DeploymentStatus) {
				s.ObservedGeneration, s.Replicas, s.UpdatedReplicas, s.AvailableReplicas = 1, 1, 1, 1
			})},
		},
		{name: "quota at first", s: sight{deployment: refusedWith("exceeded quota: q")}, after: time.Second, want: "exceeded quota"},
		{name: "quota", s: sight{deployment: refusedWith("pods \"x\" is forbidden: exceeded quota: q, requested: pods=1")}, after: graceRefused, kind: uerr.Cluster, want: "exceeded quota"},
		{name: "pod security", s: sight{deployment: refusedWith("violates PodSecurity \"restricted:latest\"")}, after: graceRefused, kind: uerr.Denied, want: "PodSecurity"},
		{name: "limit range", s: sight{deployment: refusedWith("maximum memory usage per Container is 64Mi")}, after: graceRefused, kind: uerr.Cluster, want: "maximum memory"},
		{name: "pull fails once", s: sight{deployment: deployment(nil), pods: []corev1.Pod{pod("ErrImagePull", "not found", nil)}}, after: time.Second, want: "trying again"},
		{
			name: "pull fails", after: gracePull, kind: uerr.Cluster, want: "the image example/tm:1 cannot be pulled: example/tm:1: not found",
			s: sight{deployment: deployment(nil), pods: []corev1.Pod{pod("ErrImagePull",
				`rpc error: code = NotFound desc = failed to pull and unpack image "example/tm:1": failed to resolve reference "example/tm:1": example/tm:1: not found`, nil)}},
		},
		{name: "never pull", s: sight{deployment: deployment(nil), pods: []corev1.Pod{pod("ErrImageNeverPull", "not present with pull policy of Never", nil)}}, kind: uerr.Cluster, want: "Never"},
		{name: "bad image name", s: sight{deployment: deployment(nil), pods: []corev1.Pod{pod("InvalidImageName", "", nil)}}, kind: uerr.Cluster, want: "InvalidImageName"},
		{
			name: "crash", kind: uerr.Cluster, want: "exit code 3: traffic-manager: error: no policy",
			s: sight{deployment: deployment(nil), pods: []corev1.Pod{pod("CrashLoopBackOff", "back-off 10s", &corev1.ContainerStateTerminated{
				ExitCode: 3, Reason: "Error", Message: "\ntraffic-manager: error: no policy\n",
			})}},
		},
		{
			name: "out of memory", kind: uerr.Cluster, want: "exit code 137 (OOMKilled)",
			s: sight{deployment: deployment(nil), pods: []corev1.Pod{pod("CrashLoopBackOff", "", &corev1.ContainerStateTerminated{ExitCode: 137, Reason: "OOMKilled"})}},
		},
		{name: "missing config", s: sight{deployment: deployment(nil), pods: []corev1.Pod{pod("CreateContainerConfigError", "secret \"x\" not found", nil)}}, kind: uerr.Cluster, want: "secret"},
		{name: "no node at first", s: sight{deployment: deployment(nil), pods: []corev1.Pod{unschedulable()}}, after: 5 * time.Second, want: "waiting for a node: 0/3"},
		{name: "no node", s: sight{deployment: deployment(nil), pods: []corev1.Pod{unschedulable()}}, after: graceNoNode, kind: uerr.Cluster, want: "0/3 nodes"},
		{
			name: "a node is coming", after: time.Hour, want: "waiting for a node",
			s: sight{deployment: deployment(nil), pods: []corev1.Pod{unschedulable()}, events: []corev1.Event{event("TriggeredScaleUp", "Normal", "")}},
		},
		{
			name: "not ready", after: time.Hour, want: "Readiness probe failed",
			s: sight{deployment: deployment(nil), pods: []corev1.Pod{pod("", "", nil)}, events: []corev1.Event{event("Unhealthy", "Warning", "Readiness probe failed: 503")}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := watcher{namespace: "doppel"}
			start := time.Unix(1e9, 0)
			v := w.judge(c.s, start)
			if c.after > 0 {
				v = w.judge(c.s, start.Add(c.after))
			}
			if v.ready != c.ready || (v.err != nil) != (c.kind != "") {
				t.Fatalf("verdict %+v", v)
			}
			got := v.text
			if v.err != nil {
				got = v.err.Error()
				if e := uerr.From(v.err); e.Kind != c.kind || e.Hint == "" {
					t.Errorf("kind %s, hint %q; want %s and a hint", e.Kind, e.Hint, c.kind)
				}
			}
			if !strings.Contains(got, c.want) {
				t.Errorf("%q does not say %q", got, c.want)
			}
		})
	}
}

// TestJudgeForgets checks that a reason that went away starts anew.
func TestJudgeForgets(t *testing.T) {
	w := watcher{}
	start := time.Unix(1e9, 0)
	bad, good := sight{deployment: refusedWith("exceeded quota")}, sight{deployment: deployment(nil)}
	w.judge(bad, start)
	w.judge(good, start.Add(2*time.Second))
	if v := w.judge(bad, start.Add(4*time.Second)); v.err != nil {
		t.Errorf("counted time in which the reason was gone: %v", v.err)
	}
}
