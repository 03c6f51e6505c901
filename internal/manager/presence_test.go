package manager

import (
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// situation is a manager and Deployment web, whose one pod may be older than the manager.
type situation struct {
	injection  string        // chart value agent.injection
	idle       time.Duration // agent.idleTimeout
	annotation string
	agent      bool          // the pod has one
	age        time.Duration // of the pod, when the manager started
	change     func(*appsv1.Deployment)
	pod        func(*corev1.Pod)
	engaged    bool
	wait       time.Duration // from the manager's start to the look; a minute at least
}

type presenceWorld struct {
	*world
	clock time.Time
}

func (s situation) world(t *testing.T) *presenceWorld {
	t.Helper()
	rs := &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "rs-1"), "Deployment", "web")}
	rs.Labels = map[string]string{"app": "web"}
	d := webDeployment()
	opts := []podOption{ready1}
	if s.agent {
		opts = append(opts, withAgent(8080))
	}
	p := webPod("web-1", "rs-1", opts...)
	p.CreationTimestamp = metav1.NewTime(time.Now().Add(-s.age))
	if s.annotation != "" {
		metav1.SetMetaDataAnnotation(&p.ObjectMeta, agentcfg.AnnotationInject, s.annotation)
		metav1.SetMetaDataAnnotation(&d.Spec.Template.ObjectMeta, agentcfg.AnnotationInject, s.annotation)
	}
	if s.change != nil {
		s.change(d)
	}
	if s.pod != nil {
		s.pod(&p)
	}
	w := &presenceWorld{world: newWorld(t, rs, d, &p, webService()), clock: time.Now()}
	if s.injection != "" {
		w.cfg.Injection = s.injection
	}
	w.cfg.IdleTimeout = s.idle
	w.presence.now = func() time.Time { return w.clock }
	if s.engaged {
		w.engaged.set(engagement{UID: "in-1", Workload: web, Ports: tcp(8080)})
	}
	w.presence.webhookReady()
	w.clock = w.clock.Add(max(s.wait, time.Minute))
	return w
}

// check is one look, and how many restarts there have been.
func (w *presenceWorld) check() int {
	w.t.Helper()
	if err := w.presence.check(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return w.restarts()
}

func TestPresence(t *testing.T) {
	const old = time.Hour
	recreate := func(d *appsv1.Deployment) { d.Spec.Strategy.Type = appsv1.RecreateDeploymentStrategyType }
	restarted := func(ago time.Duration) func(*appsv1.Deployment) {
		return func(d *appsv1.Deployment) {
			metav1.SetMetaDataAnnotation(&d.Spec.Template.ObjectMeta, restartedAt, time.Now().Add(time.Minute-ago).Format(time.RFC3339))
		}
	}
	for name, tt := range map[string]struct {
		situation
		want int
	}{
		"nothing said":                                   {situation{age: old}, 0},
		"nothing said, an agent":                         {situation{age: old, agent: true}, 0},
		"enabled, no agent":                              {situation{age: old, annotation: "enabled"}, 1},
		"enabled, an agent":                              {situation{age: old, annotation: "enabled", agent: true}, 0},
		"enabled, created when we were asked":            {situation{age: -time.Minute, annotation: "enabled"}, 0},
		"enabled, a gap":                                 {situation{age: old, annotation: "enabled", change: recreate}, 0},
		"enabled, on the node's network":                 {situation{age: old, annotation: "enabled", change: func(d *appsv1.Deployment) { d.Spec.Template.Spec.HostNetwork = true }}, 0},
		"enabled, restarted just now":                    {situation{age: old, annotation: "enabled", change: restarted(time.Minute)}, 0},
		"enabled, restarted long ago":                    {situation{age: old, annotation: "enabled", change: restarted(time.Hour)}, 1},
		"enabled, not ready":                             {situation{age: old, annotation: "enabled", pod: func(p *corev1.Pod) { p.Status.Conditions = nil }}, 0},
		"enabled, made again by doppel":                  {situation{age: old, annotation: "enabled", pod: func(p *corev1.Pod) { p.Annotations[agentcfg.AnnotationOriginal] = "{}" }}, 0},
		"enabled, intercepted":                           {situation{age: old, annotation: "enabled", engaged: true}, 0},
		"disabled, an agent":                             {situation{age: old, annotation: "disabled", agent: true}, 1},
		"enabledOnly, an agent":                          {situation{age: old, agent: true, injection: InjectEnabledOnly}, 1},
		"enabledOnly, an agent, intercepted":             {situation{age: old, agent: true, injection: InjectEnabledOnly, engaged: true}, 0},
		"enabledOnly, enabled":                           {situation{age: old, annotation: "enabled", agent: true, injection: InjectEnabledOnly}, 0},
		"idle, for long":                                 {situation{agent: true, idle: 24 * time.Hour, wait: 25 * time.Hour}, 1},
		"idle, not for long":                             {situation{agent: true, idle: 24 * time.Hour, wait: 23 * time.Hour}, 0},
		"idle, before the manager started":               {situation{agent: true, age: 48 * time.Hour, idle: 24 * time.Hour, wait: time.Hour}, 0},
		"idle, and enabled":                              {situation{agent: true, annotation: "enabled", idle: 24 * time.Hour, wait: 25 * time.Hour}, 0},
		"idle, a gap":                                    {situation{agent: true, idle: 24 * time.Hour, wait: 25 * time.Hour, change: recreate}, 0},
		"idle, and nobody wants to know":                 {situation{agent: true, wait: 1000 * time.Hour}, 0},
		"idle, and intercepted":                          {situation{agent: true, idle: 24 * time.Hour, wait: 25 * time.Hour, engaged: true}, 0},
		"a namespace whose pods are not looked at":       {situation{age: old, annotation: "enabled", pod: func(p *corev1.Pod) { p.Namespace = "kube-system" }}, 0},
		"enabled, under way to its end":                  {situation{age: old, annotation: "enabled", pod: func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }}, 0},
		"enabled, no port to take":                       {situation{age: old, annotation: "enabled", change: func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Ports = nil }}, 0},
		"enabled, a deployment that wants no pod at all": {situation{age: old, annotation: "enabled", change: func(d *appsv1.Deployment) { d.Spec.Replicas = new(int32) }}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := tt.world(t)
			if got := w.check(); got != tt.want {
				t.Errorf("restarted %d times, want %d", got, tt.want)
			}
			// A restart that did not help is not repeated, however long ago.
			w.clock = w.clock.Add(rollPause + time.Minute)
			if got := w.check(); tt.want == 1 && got != 1 {
				t.Errorf("restarted %d times after another look", got)
			}
		})
	}
}

// Nothing is restarted before new pods would get an agent.
func TestPresenceWaits(t *testing.T) {
	w := situation{age: time.Hour, annotation: "enabled"}.world(t)
	w.presence.ready = time.Time{}
	if got := w.check(); got != 0 {
		t.Error("restarted without a webhook")
	}
	w.presence.webhookReady()
	if got := w.check(); got != 0 {
		t.Error("restarted before the API server can know of the webhook")
	}
	w.clock = w.clock.Add(webhookLag + time.Second)
	if got := w.check(); got != 1 {
		t.Errorf("restarted %d times", got)
	}
}

// The time of an intercept's end counts, not that of its pod.
func TestPresenceIdleSince(t *testing.T) {
	w := situation{agent: true, idle: 24 * time.Hour, wait: 20 * time.Hour, engaged: true}.world(t)
	w.engaged.remove("in-1")
	w.clock = w.clock.Add(10 * time.Hour)
	if got := w.check(); got != 0 {
		t.Error("restarted 10 hours after the end of an intercept")
	}
	w.clock = w.clock.Add(15 * time.Hour)
	if got := w.check(); got != 1 {
		t.Errorf("restarted %d times 25 hours after the end of an intercept", got)
	}
}

// Where only what is enabled may be intercepted, others fail with that reason, also those that are active when it changes.
func TestEnabledOnly(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	r.m.cfg.Injection = InjectEnabledOnly
	st, _ := r.look("in-1")
	if st.State != v1alpha1.InterceptFailed || st.Reason != "NotEnabled" {
		t.Errorf("%+v", st)
	}
	if r.restarts() != 0 {
		t.Error("restarted for nothing")
	}
}

// An intercept ends when its workload forbids it, also while old pods still have an agent.
func TestDisabledWhileActive(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	d := &appsv1.Deployment{ObjectMeta: meta("shop", "web")}
	r.world.get(d)
	metav1.SetMetaDataAnnotation(&d.Spec.Template.ObjectMeta, agentcfg.AnnotationInject, agentcfg.InjectDisabled)
	r.must(r.kc.Update(t.Context(), d))
	r.addPod("web-1", "rs-1", withAgent(8080), ready1)
	st, _ := r.look("in-1")
	if st.State != v1alpha1.InterceptFailed || st.Reason != "CannotInject" || !strings.Contains(st.Message, "doppel.dev/inject: disabled") {
		t.Errorf("%+v", st)
	}
}
