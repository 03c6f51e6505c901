package manager

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/mux"
)

// reconciler is the intercept reconciler of a world with Deployment web, its service and a connected session of ada.
type reconciler struct {
	*world
	*interceptReconciler
	key workloadKey // of the intercept that was looked at last
}

func newReconciler(t *testing.T, objs ...client.Object) *reconciler {
	t.Helper()
	rs := &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "rs-1"), "Deployment", "web")}
	rs.Labels = map[string]string{"app": "web"}
	objs = append(objs, rs, webDeployment(), webService(), session("mine", "ada", "k"))
	w := newWorld(t, objs...)
	w.laptops.tunnels["mine"] = &mux.Session{}
	r := newInterceptReconciler(w.Manager)
	r.quiet, w.started = 0, time.Now().Add(-leaderNew)
	return &reconciler{w, r, web}
}

// step looks at an intercept alone.
func (r *reconciler) step(name string) (time.Duration, error) {
	in := &v1alpha1.Intercept{ObjectMeta: meta("shop", name)}
	if r.world.get(in) {
		r.key = interceptKey(in)
	}
	if err := r.begin(r.t.Context(), r.key); err != nil {
		return 0, err
	}
	for i := range r.all {
		if r.all[i].Name == name {
			res, err := r.interceptReconciler.look(r.t.Context(), &r.all[i])
			return res.RequeueAfter, err
		}
	}
	return 0, nil
}

// look looks at an intercept alone and returns its status, and when it is looked at again.
func (r *reconciler) look(name string) (v1alpha1.InterceptStatus, time.Duration) {
	r.t.Helper()
	again, err := r.step(name)
	if err != nil {
		r.t.Fatal(err)
	}
	in := &v1alpha1.Intercept{ObjectMeta: meta("shop", name)}
	if !r.world.get(in) {
		return v1alpha1.InterceptStatus{State: "gone"}, 0
	}
	return in.Status, again
}

func (r *reconciler) addPod(name, rs string, opts ...podOption) {
	r.t.Helper()
	p := webPod(name, rs, opts...)
	if rs != "rs-1" { // of a template that was restarted
		metav1.SetMetaDataAnnotation(&p.ObjectMeta, restartedAt, r.templateRestarted())
	}
	r.create(&p)
	r.must(r.kc.Status().Update(r.t.Context(), &p))
}

func (r *reconciler) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// rollout is what the deployment controller does after a restart: a new ReplicaSet.
func (r *reconciler) rollout(revisionN string) {
	r.t.Helper()
	rs := &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "rs-"+revisionN), "Deployment", "web")}
	rs.Labels = map[string]string{"app": "web"}
	r.create(rs)
	d := &appsv1.Deployment{ObjectMeta: meta("shop", "web")}
	r.world.get(d)
	r.must(r.kc.Update(r.t.Context(), d))
}

// acknowledge has the pod's agent know the intercepts.
func (r *reconciler) acknowledge(pod string, intercepts ...types.UID) {
	c := &agentConn{pod: types.UID(pod), workload: web, acked: map[types.UID]engagement{}}
	for _, i := range intercepts {
		c.acked[i] = engagement{}
	}
	r.agents.mu.Lock()
	r.agents.byPod[c.pod] = c
	r.agents.mu.Unlock()
}

func wantStatus(t *testing.T, step string, got v1alpha1.InterceptStatus, state v1alpha1.InterceptState, reason, msg string) {
	t.Helper()
	if got.State != state || got.Reason != reason || !strings.Contains(got.Message, msg) {
		t.Errorf("%s: %s %s %q, want %s %s %q", step, got.State, got.Reason, got.Message, state, reason, msg)
	}
}

// The way of an intercept from its creation to its end, on a workload without an agent.
func TestIntercept(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	r.addPod("old-1", "rs-1", ready1)

	st, again := r.look("in-1")
	wantStatus(t, "first look", st, v1alpha1.InterceptPending, "", "restarting the workload to install the traffic-agent")
	if again != pendingPoll || r.restarts() != 1 {
		t.Errorf("looked at again after %s, %d restarts", again, r.restarts())
	}
	want := []v1alpha1.InterceptedPort{{Protocol: "TCP", ContainerPort: 8080, Service: "web", ServicePort: 80, Way: "name"}}
	if d := cmp.Diff(want, st.Ports); d != "" || st.Container != "app" {
		t.Errorf("container %s, ports:\n%s", st.Container, d)
	}
	if got := r.engaged.of(web); len(got) != 1 || got[0].Session != "mine" || !slices.Equal(got[0].Ports, tcp(8080)) {
		t.Errorf("the webhook does not know of it: %v", got)
	}

	r.rollout("2")
	r.addPod("new-1", "rs-2", withAgent(8080))
	st, _ = r.look("in-1")
	wantStatus(t, "new pod starts", st, v1alpha1.InterceptPending, "", "waiting for the traffic-agents of 1 pods (0 ready)")
	p := webPod("new-1", "rs-2", withAgent(8080), ready1)
	r.must(r.kc.Status().Update(t.Context(), &p))
	r.acknowledge("new-1", "in-1")
	st, _ = r.look("in-1")
	wantStatus(t, "old pod runs", st, v1alpha1.InterceptPending, "", "waiting for 1 old pods to leave the service")
	old := webPod("old-1", "rs-1")
	r.delete(&old)
	st, again = r.look("in-1")
	wantStatus(t, "all there", st, v1alpha1.InterceptActive, "", "")
	if st.Agents != 1 || again != activePoll || r.restarts() != 1 {
		t.Errorf("%d agents, looked at again after %s, %d restarts", st.Agents, again, r.restarts())
	}

	events := func(reason string) string {
		var list corev1.EventList
		r.must(r.kc.List(t.Context(), &list))
		for _, e := range list.Items {
			if e.Reason == reason && e.InvolvedObject.Kind == "Deployment" && e.InvolvedObject.Name == "web" && e.InvolvedObject.APIVersion == "apps/v1" {
				return e.Message
			}
		}
		return ""
	}
	if got := events(eventBegan); got != "port 8080 (TCP) by ada, from doppel on ada's laptop, intercept web" || events(eventEnded) != "" {
		t.Errorf("events say %q, %q", got, events(eventEnded))
	}

	// A pod that comes up without an agent much later is worth another restart, but only one.
	r.addPod("late-1", "rs-2", ready1)
	st, _ = r.look("in-1")
	wantStatus(t, "missed injection later", st, v1alpha1.InterceptPending, reasonInterrupted, "restarting")
	if r.restarts() != 2 {
		t.Errorf("%d restarts", r.restarts())
	}
	r.addPod("late-2", "rs-2", ready1)
	st, _ = r.look("in-1")
	wantStatus(t, "missed injection again", st, v1alpha1.InterceptFailed, "NotInjected", "pod late-2 came up without a traffic-agent")
	if len(r.engaged.of(web)) != 0 {
		t.Error("a failed intercept is in force")
	}

	if got := events(eventEnded); !strings.HasPrefix(got, "port 8080 (TCP) by ada") {
		t.Errorf("the end's event says %q", got)
	}
	in := intercept("in-1", "", "")
	r.delete(in)
	if st, _ := r.look("in-1"); st.State != "gone" || len(r.seen)+len(r.restarted)+len(r.missed) != 0 {
		t.Errorf("%v, remembered %v %v", st, r.seen, r.restarted)
	}
}

// Nothing is restarted for agents that no pod would get.
func TestUnreachedWebhook(t *testing.T) {
	other := intercept("in-2", "ada", "mine")
	other.Spec.Name = "other"
	r := newReconciler(t, intercept("in-1", "ada", "mine"), other)
	hears := func(yes bool) {
		r.world.mu.Lock()
		defer r.world.mu.Unlock()
		r.deaf = !yes
	}
	r.addPod("old-1", "rs-1", ready1)
	hears(false)
	const waits = "waiting until the API server reaches the agent-injector webhook"
	long := time.Now().Add(-webhookPatience)
	for _, row := range []struct {
		what, name  string
		leads       time.Time
		missed      time.Time // zero: just now
		active      bool
		state       v1alpha1.InterceptState
		reason, msg string
	}{
		{"at first", "in-1", time.Now().Add(-leaderNew), time.Time{}, false, v1alpha1.InterceptPending, "", waits},
		{"a new leader", "in-1", time.Now(), long, false, v1alpha1.InterceptPending, "", waits},
		{"for long", "in-1", time.Now().Add(-leaderNew), long, false, v1alpha1.InterceptFailed, "NotInjected", "nothing was restarted: the API server does not reach the agent-injector webhook"},
		{"it was active", "in-2", time.Now().Add(-leaderNew), long, true, v1alpha1.InterceptPending, reasonInterrupted, waits},
	} {
		r.started = row.leads
		if !row.missed.IsZero() {
			r.missed[types.UID(row.name)] = row.missed
		}
		if row.active {
			r.inForce[types.UID(row.name)] = record{}
		}
		st, _ := r.look(row.name)
		wantStatus(t, row.what, st, row.state, row.reason, row.msg)
		if r.restarts() != 0 {
			t.Fatalf("%s: restarted", row.what)
		}
	}
	hears(true)
	st, _ := r.look("in-2")
	wantStatus(t, "not asked again yet", st, v1alpha1.InterceptPending, reasonInterrupted, waits)
	r.questions.missed = time.Time{}
	st, _ = r.look("in-2")
	wantStatus(t, "reached", st, v1alpha1.InterceptPending, reasonInterrupted, "restarting the workload")
	if r.restarts() != 1 || !r.missed["in-2"].IsZero() {
		t.Errorf("%d restarts, missed %v", r.restarts(), r.missed)
	}
	broken := errors.New("no API server")
	r.world.mu.Lock()
	r.fail = func(string, runtime.Object) error { return broken }
	r.world.mu.Unlock()
	if reached, err := r.reached(t.Context()); reached || !errors.Is(err, broken) {
		t.Errorf("%v %v", reached, err)
	}
}

// Just after another leader has ended the API server may ask its webhook, in vain: what is restarted then without an agent is restarted once more.
func TestMissedInjectionOfANewLeader(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	r.started = time.Now()
	r.addPod("old-1", "rs-1", ready1)
	for i, pod := range []string{"missed-1", "missed-2"} {
		st, _ := r.look("in-1")
		wantStatus(t, "restart", st, v1alpha1.InterceptPending, "", "restarting the workload")
		if r.restarts() != i+1 {
			t.Errorf("%d restarts, want %d", r.restarts(), i+1)
		}
		r.rollout(strconv.Itoa(i + 2))
		r.addPod(pod, fmt.Sprint("rs-", i+2), ready1)
	}
	st, _ := r.look("in-1")
	wantStatus(t, "missed twice", st, v1alpha1.InterceptFailed, "NotInjected", "came up without a traffic-agent")
	if r.restarts() != 2 {
		t.Errorf("%d restarts", r.restarts())
	}
}

// A pod that was let in just before the webhook knew of the intercept is one of those that are to be replaced.
func TestAdmittedBefore(t *testing.T) {
	set := &appsv1.ReplicaSet{ObjectMeta: meta("shop", "bare"), Spec: appsv1.ReplicaSetSpec{Selector: webDeployment().Spec.Selector, Template: webDeployment().Spec.Template}}
	for kind, of := range map[string]string{"Deployment": "rs-1", "ReplicaSet": "bare"} {
		t.Run(kind, func(t *testing.T) {
			in := intercept("in-1", "ada", "mine")
			if kind == "ReplicaSet" {
				in.Spec.Workload, in.Spec.Recreate = v1alpha1.WorkloadRef{Kind: "ReplicaSet", Name: "bare"}, true
			}
			r := newReconciler(t, set.DeepCopy(), in)
			pod := func(name string) {
				r.addPod(name, of, ready1, func(p *corev1.Pod) { p.OwnerReferences = owned(p.ObjectMeta, "ReplicaSet", of).OwnerReferences })
			}
			pod("old-1")
			r.engaged.onChange(func(engagement) {
				if p := webPod("late-1", of); !r.world.get(&p) {
					pod("late-1")
				}
			})
			st, _ := r.look("in-1")
			wantStatus(t, "first look", st, v1alpha1.InterceptPending, "", "restarting")
			st, _ = r.look("in-1")
			wantStatus(t, "both are to be replaced", st, v1alpha1.InterceptPending, "", "2")
		})
	}
}

// An agent that does not start keeps an intercept from becoming active, but does not end one that was: the others serve it, and it may come back.
func TestInterceptOutlivesItsAgents(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	r.addPod("a", "rs-1", withAgent(8080), ready1)
	r.acknowledge("a", "in-1")
	st, _ := r.look("in-1")
	wantStatus(t, "all there", st, v1alpha1.InterceptActive, "", "")

	set := func(opts ...podOption) {
		p := webPod("a", "rs-1", append([]podOption{withAgent(8080)}, opts...)...)
		r.must(r.kc.Status().Update(t.Context(), &p))
	}
	set()
	st, _ = r.look("in-1")
	wantStatus(t, "killed", st, v1alpha1.InterceptPending, reasonInterrupted, "waiting for the traffic-agents of 1 pods (0 ready)")
	set(waiting(agentcfg.Container, "CrashLoopBackOff", "back-off 10s"))
	st, again := r.look("in-1")
	wantStatus(t, "killed again", st, v1alpha1.InterceptPending, reasonInterrupted, "the traffic-agent of pod a does not start: CrashLoopBackOff")
	if again != pendingPoll || len(r.engaged.of(web)) != 1 {
		t.Errorf("looked at again after %s, in force: %v", again, r.engaged.of(web))
	}
	clear(r.inForce) // as another leader
	st, _ = r.look("in-1")
	wantStatus(t, "another leader", st, v1alpha1.InterceptPending, reasonInterrupted, "the traffic-agent of pod a does not start")
	set(ready1)
	st, _ = r.look("in-1")
	wantStatus(t, "back", st, v1alpha1.InterceptActive, "", "")

	// An agent that has never run in its pod may keep the others' rollout from going on.
	set(waiting(agentcfg.Container, "ImagePullBackOff", "not found"))
	st, _ = r.look("in-1")
	wantStatus(t, "never ran", st, v1alpha1.InterceptFailed, "AgentNotStarted", "ImagePullBackOff")
}

// That a workload cannot get more pods, as it was scaled beyond its quota, is of no concern to intercepts whose agents are there.
func TestInterceptWithoutMorePods(t *testing.T) {
	second := intercept("in-2", "ada", "mine")
	second.Spec.HTTP = byUser("ada")
	r := newReconciler(t, intercept("in-1", "ada", "mine"), second)
	r.addPod("a", "rs-1", withAgent(8080), ready1)
	r.acknowledge("a", "in-1", "in-2")
	st, _ := r.look("in-1")
	wantStatus(t, "all there", st, v1alpha1.InterceptActive, "", "")
	r.failing("exceeded quota")
	for _, name := range []string{"in-1", "in-2"} {
		st, _ = r.look(name)
		wantStatus(t, name, st, v1alpha1.InterceptActive, "", "")
	}
	r.addPod("b", "rs-1", ready1)
	st, again := r.look("in-1")
	wantStatus(t, "a restart would be in vain", st, v1alpha1.InterceptPending, reasonInterrupted, "Deployment web cannot create pods: exceeded quota")
	if again != pendingPoll || r.restarts() != 0 {
		t.Errorf("looked at again after %v, %d restarts", again, r.restarts())
	}
	r.failing("")
	st, _ = r.look("in-1")
	wantStatus(t, "room again", st, v1alpha1.InterceptPending, reasonInterrupted, "restarting")
}

// Quota is short for a while when pods are replaced: those that end give theirs back late.
func TestQuotaPasses(t *testing.T) {
	const short = `pods "web-2" is forbidden: exceeded quota: tight`
	for name, tt := range map[string]struct {
		why    string
		since  time.Duration
		ending bool
		state  v1alpha1.InterceptState
		reason string
	}{
		"at first":         {short, 0, false, v1alpha1.InterceptPending, ""},
		"for a while":      {short, quotaPatience / 2, false, v1alpha1.InterceptPending, ""},
		"for long":         {short, quotaPatience, false, v1alpha1.InterceptFailed, "AgentNotStarted"},
		"while a pod ends": {short, quotaPatience, true, v1alpha1.InterceptPending, ""},
		"of another kind":  {`pods "web-2" is forbidden: failed quota: tight: must specify limits.cpu`, 0, false, v1alpha1.InterceptFailed, "AgentNotStarted"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReconciler(t, intercept("in-1", "ada", "mine"))
			r.addPod("old-1", "rs-1", ready1)
			if tt.ending {
				r.addPod("old-2", "rs-1", func(p *corev1.Pod) { p.Finalizers = []string{"example.com/held"} })
			}
			r.look("in-1")
			r.failing(tt.why)
			if tt.ending {
				p := webPod("old-2", "rs-1")
				r.delete(&p)
			}
			if tt.since > 0 {
				re := r.restarted["in-1"]
				re.blocked = time.Now().Add(-tt.since)
				r.restarted["in-1"] = re
			}
			st, _ := r.look("in-1")
			wantStatus(t, name, st, tt.state, tt.reason, "Deployment web cannot create pods: "+tt.why)
			if r.failing(""); st.State == v1alpha1.InterceptPending {
				r.look("in-1")
				if re := r.restarted["in-1"]; !re.blocked.IsZero() {
					t.Error("it is over, and counted on")
				}
			}
		})
	}
}

// A StatefulSet says by an event alone that it cannot create a pod, and not when it can again.
func TestQuotaPassesOfStatefulSet(t *testing.T) {
	in := intercept("in-1", "ada", "mine")
	in.Spec.Workload = v1alpha1.WorkloadRef{Kind: "StatefulSet", Name: "web"}
	r := newReconciler(t, in, statefulSetWith(2, func(*appsv1.StatefulSet) {}))
	set := workloadKey{"shop", "StatefulSet", "web"}
	owner := func(p *corev1.Pod) { p.OwnerReferences = owned(p.ObjectMeta, "StatefulSet", "web").OwnerReferences }
	restarted := func() string {
		s := statefulSetWith(2, func(*appsv1.StatefulSet) {})
		r.world.get(s)
		return s.Spec.Template.Annotations[restartedAt]
	}
	again := func(name string) {
		old := webPod(name, "")
		r.delete(&old)
		r.addPod(name, "rs-1", withAgent(8080), ready1, owner, func(p *corev1.Pod) { metav1.SetMetaDataAnnotation(&p.ObjectMeta, restartedAt, restarted()) })
		r.agents.mu.Lock()
		r.agents.byPod[types.UID(name)] = &agentConn{pod: types.UID(name), workload: set, acked: map[types.UID]engagement{"in-1": {}}}
		r.agents.mu.Unlock()
	}
	r.addPod("web-0", "rs-1", ready1, owner)
	r.addPod("web-1", "rs-1", ready1, owner)
	st, _ := r.look("in-1")
	wantStatus(t, "first look", st, v1alpha1.InterceptPending, "", "restarting")
	at := restarted()

	gone := webPod("web-1", "")
	r.delete(&gone)
	r.create(&corev1.Event{
		ObjectMeta: meta("shop", "web.1"), InvolvedObject: corev1.ObjectReference{Kind: "StatefulSet", Name: "web", UID: "web"},
		Reason: "FailedCreate", Message: "exceeded quota: tight", LastTimestamp: metav1.Now(),
	})
	st, _ = r.look("in-1")
	wantStatus(t, "short of quota", st, v1alpha1.InterceptPending, "", "StatefulSet web cannot create pods: exceeded quota: tight")
	r.addPod("web-1", "rs-1", owner)
	again("web-1")
	st, _ = r.look("in-1")
	wantStatus(t, "it is over", st, v1alpha1.InterceptPending, "", "waiting for 1 old pods to leave the service")
	again("web-0")
	st, _ = r.look("in-1")
	wantStatus(t, "all there", st, v1alpha1.InterceptActive, "", "")

	r.key = set
	r.delete(intercept("in-1", "", ""))
	r.look("in-1")
	if got := restarted(); got != at || len(r.restarted) != 0 {
		t.Errorf("healed of what was over: restarted at %s, was at %s", got, at)
	}
}

// With agents in place nothing is restarted; with no pods wanted it is active at once.
func TestInterceptWithoutRestart(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	r.addPod("a", "rs-1", withAgent(8080), ready1)
	st, _ := r.look("in-1")
	wantStatus(t, "not acknowledged", st, v1alpha1.InterceptPending, "", "waiting for the traffic-agents")
	r.acknowledge("a", "in-1")
	st, _ = r.look("in-1")
	wantStatus(t, "acknowledged", st, v1alpha1.InterceptActive, "", "")
	if r.restarts() != 0 {
		t.Error("restarted without need")
	}

	zero := newReconciler(t, intercept("in-1", "ada", "mine"))
	d := webDeployment()
	zero.world.get(d)
	d.Spec.Replicas = new(int32)
	zero.must(zero.kc.Update(t.Context(), d))
	st, _ = zero.look("in-1")
	wantStatus(t, "scaled to zero", st, v1alpha1.InterceptActive, "", "")
}

// Pods that nothing replaces are deleted by the laptop, one after the other, if its user wants that.
func TestInterceptByDeletion(t *testing.T) {
	set := &appsv1.ReplicaSet{ObjectMeta: meta("shop", "bare"), Spec: appsv1.ReplicaSetSpec{Selector: webDeployment().Spec.Selector, Template: webDeployment().Spec.Template}}
	two := int32(2)
	set.Spec.Replicas = &two
	on := func(name string, recreate bool) *v1alpha1.Intercept {
		in := intercept(name, "ada", "mine")
		in.Spec.Workload, in.Spec.Recreate = v1alpha1.WorkloadRef{Kind: "ReplicaSet", Name: "bare"}, recreate
		return in
	}
	r := newReconciler(t, set, on("in-1", false), on("in-2", true))
	pod := func(name string, opts ...podOption) {
		r.addPod(name, "bare", append(opts, func(p *corev1.Pod) { p.OwnerReferences = owned(p.ObjectMeta, "ReplicaSet", "bare").OwnerReferences })...)
	}
	bare := workloadKey{"shop", "ReplicaSet", "bare"}
	pod("old-1", ready1)
	pod("old-2", ready1)
	st, _ := r.look("in-1")
	wantStatus(t, "unasked", st, v1alpha1.InterceptFailed, "Gap", "ReplicaSet bare has no Deployment: it cannot be restarted without a gap")

	st, _ = r.look("in-2")
	wantStatus(t, "asked", st, v1alpha1.InterceptPending, "", "restarting")
	for i, left := range []string{"2", "1"} {
		st, _ = r.look("in-2")
		wantStatus(t, "next", st, v1alpha1.InterceptPending, "", "("+left+" to go)")
		if st.Replace == nil {
			t.Fatal("no pod to replace")
		}
		old := webPod(st.Replace.Name, "bare")
		if st.Replace.UID != string(old.UID) {
			t.Errorf("%+v", st.Replace)
		}
		r.delete(&old)
		st, _ = r.look("in-2")
		if st.Replace != nil {
			t.Errorf("the next one is to go before the last one has been replaced: %+v", st)
		}
		name := fmt.Sprintf("new-%d", i)
		pod(name, withAgent(8080))
		st, _ = r.look("in-2")
		wantStatus(t, "starts", st, v1alpha1.InterceptPending, "", "waiting for the traffic-agents")
		p := webPod(name, "bare", withAgent(8080), ready1)
		r.must(r.kc.Status().Update(t.Context(), &p))
		r.agents.mu.Lock()
		r.agents.byPod[types.UID(name)] = &agentConn{pod: types.UID(name), workload: bare, acked: map[types.UID]engagement{"in-2": {}}}
		r.agents.mu.Unlock()
	}
	st, _ = r.look("in-2")
	wantStatus(t, "all replaced", st, v1alpha1.InterceptActive, "", "")
	if r.restarts() != 0 {
		t.Error("something was restarted")
	}
}

// An intercept that names no session is claimed by one of the same user's that accepts such, and waits otherwise.
func TestInterceptClaimed(t *testing.T) {
	declared := intercept("in-1", "ada", "")
	declared.Spec.Ports = []v1alpha1.WantedPort{{Target: "127.0.0.1:3000"}}
	bad := intercept("in-2", "ada", "")
	bad.Spec.Ports = []v1alpha1.WantedPort{{Target: "10.0.0.7:22"}}
	r := newReconciler(t, declared, bad, session("theirs", "eve", "k2"))
	r.addPod("a", "rs-1", withAgent(8080), ready1)
	r.acknowledge("a", "in-1")
	r.laptops.tunnels["theirs"] = &mux.Session{}
	accept := func(name string, yes bool) {
		s := &v1alpha1.Session{ObjectMeta: meta("doppel", name)}
		r.world.get(s)
		s.Spec.AcceptIntercepts = yes
		r.must(r.kc.Update(t.Context(), s))
	}
	accept("theirs", true)
	st, _ := r.look("in-1")
	wantStatus(t, "nobody accepts", st, v1alpha1.InterceptPending, "", "waiting for ada to connect with --accept-intercepts")
	accept("mine", true)
	st, _ = r.look("in-1")
	wantStatus(t, "claimed", st, v1alpha1.InterceptActive, "", "")
	if g, _ := r.engaged.get("in-1"); st.Session != "mine" || g.Session != "mine" {
		t.Errorf("claimed by %q, engaged for %q", st.Session, g.Session)
	}
	if got, err := r.interceptsFor(t.Context(), "mine"); err != nil || len(got) != 1 || !got[0].Declared {
		t.Errorf("the laptop is told %+v, %v", got, err)
	}
	st, _ = r.look("in-2")
	wantStatus(t, "beyond the loopback", st, v1alpha1.InterceptFailed, "BadTarget", `a target in spec.ports is "10.0.0.7:22"`)
	delete(r.laptops.tunnels, "mine")
	st, _ = r.look("in-1")
	wantStatus(t, "the laptop has gone", st, v1alpha1.InterceptPending, "", "waiting for ada")
	if len(r.engaged.of(web)) != 0 || st.Session != "" {
		t.Errorf("still in force for %q", st.Session)
	}
}

// To a new leader laptops come later than intercepts are looked at: one that is declared stays active for a while, and is looked at when its laptop comes.
func TestClaimedUnderAnotherLeader(t *testing.T) {
	declared := intercept("in-1", "ada", "")
	r := newReconciler(t, declared)
	r.addPod("a", "rs-1", withAgent(8080), ready1)
	r.acknowledge("a", "in-1")
	declared.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Session: "mine"}
	r.must(r.kc.Status().Update(t.Context(), declared))
	s := &v1alpha1.Session{ObjectMeta: meta("doppel", "mine")}
	r.world.get(s)
	s.Spec.AcceptIntercepts = true
	r.must(r.kc.Update(t.Context(), s))
	delete(r.laptops.tunnels, "mine")

	r.started = time.Now()
	if st, again := r.look("in-1"); st.State != v1alpha1.InterceptActive || again != pendingPoll {
		t.Errorf("a new leader: %s %q, looked at again after %v", st.State, st.Message, again)
	}
	r.started = time.Now().Add(-leaderNew)
	st, again := r.look("in-1")
	wantStatus(t, "its laptop does not come", st, v1alpha1.InterceptPending, "", "waiting for ada to connect")
	if again != activePoll {
		t.Errorf("looked at again after %v", again)
	}
	r.laptops.up(t.Context(), s, &mux.Session{}, func() {})
	select {
	case e := <-r.wakeups:
		if e.Object != web {
			t.Errorf("looked at is %v", e.Object)
		}
	default:
		t.Error("nobody looks at it when its laptop comes")
	}
	st, _ = r.look("in-1")
	wantStatus(t, "its laptop came", st, v1alpha1.InterceptActive, "", "")
}

func TestInterceptFails(t *testing.T) {
	for name, tt := range map[string]struct {
		spec        func(*v1alpha1.InterceptSpec)
		change      func(*reconciler)
		reason, msg string
	}{
		"foreign session": {spec: func(s *v1alpha1.InterceptSpec) { s.User = "eve" }, reason: "ForeignSession", msg: "belongs to another user"},
		"namespace":       {change: func(r *reconciler) { r.allowed = []string{"data"} }, reason: "NamespaceNotAllowed", msg: "namespace shop"},
		"kind":            {spec: func(s *v1alpha1.InterceptSpec) { s.Workload.Kind = "Rocket" }, reason: "UnsupportedKind", msg: "Rocket is no kind of workload that doppel knows"},
		"workload":        {spec: func(s *v1alpha1.InterceptSpec) { s.Workload.Name = "nope" }, reason: "NoWorkload", msg: `no Deployment "nope" in namespace shop`},
		"port":            {spec: func(s *v1alpha1.InterceptSpec) { s.Ports = []v1alpha1.WantedPort{{Port: "grpc"}} }, reason: "NoSuchPort", msg: `Deployment web has no port "grpc"; there is 8080 (http) [service web:80]`},
		"service":         {spec: func(s *v1alpha1.InterceptSpec) { s.Service = "api" }, reason: "NoSuchService", msg: `Deployment web has no service "api"`},
		"container":       {spec: func(s *v1alpha1.InterceptSpec) { s.Container = "db" }, reason: "NoSuchContainer", msg: `Deployment web has no container "db"`},
		"paused": {change: func(r *reconciler) {
			r.update(func(d *appsv1.Deployment) { d.Spec.Paused = true })
		}, reason: "Gap", msg: "Deployment web is paused: it cannot be restarted without a gap"},
		"Windows": {change: func(r *reconciler) {
			r.update(func(d *appsv1.Deployment) {
				d.Spec.Template.Spec.NodeSelector = map[string]string{"kubernetes.io/os": "windows"}
			})
		}, reason: "CannotInject", msg: "the pods of Deployment web cannot have a traffic-agent: the pod runs on Windows"},
		"no right to restart": {change: func(r *reconciler) {
			r.fail = func(verb string, o runtime.Object) error {
				if _, ok := o.(*appsv1.Deployment); ok && verb == "patch" {
					return errors.New("admission webhook denied it")
				}
				return nil
			}
		}, reason: "RestartRefused", msg: "admission webhook denied it"},
		"agent's image": {change: func(r *reconciler) {
			r.addPod("new-1", "rs-1", withAgent(8080), waiting(agentcfg.Container, "ImagePullBackOff", "no such image"))
		}, reason: "AgentNotStarted", msg: "ImagePullBackOff: no such image"},
		"quota": {change: func(r *reconciler) { r.failing("exceeded quota") }, reason: "AgentNotStarted", msg: "exceeded quota"},
	} {
		t.Run(name, func(t *testing.T) {
			in := intercept("in-1", "ada", "mine")
			if tt.spec != nil {
				tt.spec(&in.Spec)
			}
			r := newReconciler(t, in)
			r.addPod("old-1", "rs-1", ready1)
			if tt.change != nil {
				tt.change(r)
			}
			st, again := r.look("in-1")
			wantStatus(t, name, st, v1alpha1.InterceptFailed, tt.reason, tt.msg)
			if again != 0 || len(r.engaged.of(web)) != 0 {
				t.Errorf("looked at again after %s, engaged %v", again, r.engaged.of(web))
			}
			after, _ := r.look("in-1") // final
			wantStatus(t, "again", after, v1alpha1.InterceptFailed, tt.reason, tt.msg)
		})
	}
}

// failing has the deployment controller not create pods; "": it does.
func (r *reconciler) failing(why string) {
	r.t.Helper()
	d := webDeployment()
	r.world.get(d)
	d.Status.Conditions = nil
	if why != "" {
		d.Status.Conditions = []appsv1.DeploymentCondition{{Type: appsv1.DeploymentReplicaFailure, Status: corev1.ConditionTrue, Message: why}}
	}
	r.must(r.kc.Status().Update(r.t.Context(), d))
}

func (r *reconciler) update(fn func(*appsv1.Deployment)) {
	r.t.Helper()
	d := webDeployment()
	r.world.get(d)
	fn(d)
	r.must(r.kc.Update(r.t.Context(), d))
}

// Trouble with the API server is no verdict: it is tried again.
func TestInterceptAPIServerAway(t *testing.T) {
	for _, kind := range []client.ObjectList{&v1alpha1.SessionList{}, &corev1.PodList{}, &corev1.ServiceList{}, &networkingv1.NetworkPolicyList{}, &v1alpha1.InterceptList{}} {
		r := newReconciler(t, intercept("in-1", "ada", "mine"))
		r.fail = func(_ string, o runtime.Object) error {
			if reflect.TypeOf(o) == reflect.TypeOf(kind) {
				return errors.New("etcd is away")
			}
			return nil
		}
		_, err := r.step("in-1")
		if err == nil {
			t.Errorf("%T: no error", kind)
		}
		in := intercept("in-1", "", "")
		if r.world.get(in); in.Status.State == v1alpha1.InterceptFailed {
			t.Errorf("%T: failed for good: %s", kind, in.Status.Message)
		}
	}
}

// A restart is tried again, unless it would be refused again.
func TestRestartRefused(t *testing.T) {
	deployments := schema.GroupResource{Group: "apps", Resource: "deployments"}
	for name, tt := range map[string]struct {
		err   error
		final bool
	}{
		"EOF":              {io.ErrUnexpectedEOF, false},
		"too many":         {apierrors.NewTooManyRequests("slow down", 1), false},
		"time-out":         {apierrors.NewServerTimeout(deployments, "patch", 1), false},
		"webhook away":     {apierrors.NewInternalError(errors.New(`failed calling webhook "w.example.com"`)), false},
		"no right":         {apierrors.NewForbidden(deployments, "web", errors.New("no")), true},
		"invalid":          {apierrors.NewInvalid(schema.GroupKind{Group: "apps", Kind: "Deployment"}, "web", nil), true},
		"bad request":      {apierrors.NewBadRequest("no"), true},
		"webhook said 500": {apierrors.NewInternalError(errors.New(`admission webhook "w.example.com" denied the request: frozen`)), true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReconciler(t, intercept("in-1", "ada", "mine"))
			r.addPod("old-1", "rs-1", ready1)
			r.fail = func(verb string, o runtime.Object) error {
				if _, ok := o.(*appsv1.Deployment); ok && verb == "patch" {
					return tt.err
				}
				return nil
			}
			st, again := r.look("in-1")
			if tt.final {
				wantStatus(t, "refused", st, v1alpha1.InterceptFailed, "RestartRefused", tt.err.Error())
				return
			}
			wantStatus(t, "trouble", st, v1alpha1.InterceptPending, "", tt.err.Error())
			r.set(func() { r.fail = nil })
			st, _ = r.look("in-1")
			wantStatus(t, "over", st, v1alpha1.InterceptPending, "", "restarting the workload")
			if again != pendingPoll || r.restarts() != 1 {
				t.Errorf("looked at again after %v, %d restarts", again, r.restarts())
			}
		})
	}
}

// An intercept ends with its session, whatever state it is in.
func TestInterceptEndsWithSession(t *testing.T) {
	failed := intercept("failed", "ada", "gone")
	r := newReconciler(t, intercept("in-1", "ada", "gone"), failed)
	failed.Status.State = v1alpha1.InterceptFailed
	r.must(r.kc.Status().Update(t.Context(), failed))
	for _, name := range []string{"in-1", "failed"} {
		if st, _ := r.look(name); st.State != "gone" {
			t.Errorf("%s is %s", name, st.State)
		}
	}
}

// The cache may lack our own last write: what it says must not decide what is written.
func TestWriteStatusBehindTheCache(t *testing.T) {
	in := intercept("in-1", "ada", "mine")
	r := newReconciler(t, in)
	stale := &v1alpha1.Intercept{ObjectMeta: meta("shop", "in-1")}
	r.world.get(stale)
	now := stale.DeepCopy()
	ports := []v1alpha1.InterceptedPort{{Protocol: "TCP", ContainerPort: 8080}}
	r.must(r.writeStatus(t.Context(), now, v1alpha1.InterceptStatus{State: v1alpha1.InterceptPending, Reason: "R", Message: "waiting", Container: "app", Agents: 1, Ports: ports}))
	want := v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive}
	r.must(r.writeStatus(t.Context(), stale, want))
	r.world.get(now)
	if d := cmp.Diff(want, now.Status); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// A workload that agents kept from coming up is restarted without them when the last intercept is gone.
func TestHeal(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	r.addPod("old-1", "rs-1", ready1)
	r.look("in-1")
	r.rollout("2")
	r.addPod("new-1", "rs-2", withAgent(8080), waiting(agentcfg.Container, "ErrImagePull", ""))
	st, _ := r.look("in-1")
	wantStatus(t, "image", st, v1alpha1.InterceptFailed, "AgentNotStarted", "ErrImagePull")
	r.delete(intercept("in-1", "", ""))

	r.set(func() { r.fail = func(string, runtime.Object) error { return errors.New("etcd is away") } })
	if _, err := r.step("in-1"); err == nil {
		t.Fatal("no error")
	}
	r.set(func() { r.fail = nil })
	r.look("in-1")
	if r.restarts() != 2 {
		t.Errorf("%d restarts, want one more", r.restarts())
	}
	r.look("in-1")
	if r.restarts() != 2 {
		t.Errorf("restarted again: %d", r.restarts())
	}

	// A workload that is fine, or gone, or is about to be, is left alone.
	for name, change := range map[string]func(*reconciler){
		"fine": func(*reconciler) {},
		"short of quota long after the restart": func(r *reconciler) {
			r.activated("in-1", v1alpha1.InterceptStatus{})
			r.failing("exceeded quota")
		},
		"restarted by somebody": func(r *reconciler) {
			r.rollout("2")
			r.addPod("new-1", "rs-2", withAgent(8080), waiting(agentcfg.Container, "ErrImagePull", ""))
			r.update(func(d *appsv1.Deployment) {
				metav1.SetMetaDataAnnotation(&d.Spec.Template.ObjectMeta, restartedAt, "later")
			})
		},
		"gone": func(r *reconciler) { r.delete(webDeployment()) },
	} {
		r := newReconciler(t, intercept("in-1", "ada", "mine"))
		r.addPod("old-1", "rs-1", ready1)
		r.look("in-1")
		change(r)
		r.delete(intercept("in-1", "", ""))
		r.look("in-1")
		if r.restarts() != 1 {
			t.Errorf("%s: %d restarts", name, r.restarts())
		}
	}
}

// The leader that restarted the workload may have been another one.
func TestHealOfAnotherLeader(t *testing.T) {
	for name, tt := range map[string]struct {
		status   v1alpha1.InterceptState
		opts     []podOption
		restarts int
	}{
		"it had failed":    {v1alpha1.InterceptFailed, []podOption{waiting(agentcfg.Container, "ImagePullBackOff", "")}, 1},
		"it fails with us": {v1alpha1.InterceptPending, []podOption{waiting(agentcfg.Container, "ImagePullBackOff", "")}, 1},
		"fine":             {v1alpha1.InterceptActive, []podOption{ready1}, 0},
	} {
		in := intercept("in-1", "ada", "mine")
		r := newReconciler(t, in)
		in.Status.State = tt.status
		r.must(r.kc.Status().Update(t.Context(), in))
		r.started = time.Now()
		r.rollout("2")
		r.addPod("old-1", "rs-1", ready1, withAgent(8080))
		r.addPod("new-1", "rs-2", append(tt.opts, withAgent(8080))...)
		r.look("in-1")
		r.delete(intercept("in-1", "", ""))
		r.look("in-1")
		if r.restarts() != tt.restarts {
			t.Errorf("%s: %d restarts", name, r.restarts())
		}
	}
}

// An intercept that was deleted and created again under the same name is another.
func TestInterceptSameName(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	r.addPod("a", "rs-1", withAgent(8080), ready1)
	r.look("in-1")
	r.delete(intercept("in-1", "", ""))
	in := intercept("in-1", "ada", "mine")
	in.UID = "second"
	r.create(in)
	r.look("in-1")
	if got := r.engaged.of(web); len(got) != 1 || got[0].UID != "second" {
		t.Errorf("in force: %v", got)
	}
}

func TestConflict(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*v1alpha1.Intercept) // of the older one, which is eve's
		away   bool                      // eve's laptop
		mine   *v1alpha1.HTTPMatch
		mode   v1alpha1.InterceptMode
		take   bool // mine is to take over
		taken  bool // and has
		state  v1alpha1.InterceptState
		reason string
		msg    string
		evicts bool
	}{
		"held":                 {state: v1alpha1.InterceptFailed, reason: "PortHeld", msg: "port 8080 of web is intercepted by eve (intercept web since"},
		"another port":         {change: func(in *v1alpha1.Intercept) { in.Status.Ports[0].ContainerPort = 9090 }, state: v1alpha1.InterceptActive},
		"UDP of the number":    {change: func(in *v1alpha1.Intercept) { in.Status.Ports[0].Protocol = "UDP" }, state: v1alpha1.InterceptActive},
		"another workload":     {change: func(in *v1alpha1.Intercept) { in.Spec.Workload.Name = "db" }, state: v1alpha1.InterceptActive},
		"failed":               {change: func(in *v1alpha1.Intercept) { in.Status.State = v1alpha1.InterceptFailed }, state: v1alpha1.InterceptActive},
		"younger":              {change: func(in *v1alpha1.Intercept) { in.CreationTimestamp = metav1.NewTime(time.Now().Add(time.Hour)) }, state: v1alpha1.InterceptActive},
		"another namespace":    {change: func(in *v1alpha1.Intercept) { in.Namespace = "other" }, state: v1alpha1.InterceptActive},
		"taken over":           {take: true, state: v1alpha1.InterceptActive, taken: true},
		"no need to take over": {take: true, change: func(in *v1alpha1.Intercept) { in.Spec.HTTP = byUser("eve") }, mine: byUser("ada"), state: v1alpha1.InterceptActive},
		"her laptop is away":   {away: true, state: v1alpha1.InterceptPending, msg: "waiting for the end of its session"},
		"my other laptop away": {away: true, change: func(in *v1alpha1.Intercept) { in.Spec.User = "ada" }, state: v1alpha1.InterceptActive, evicts: true},
		"other requests":       {change: func(in *v1alpha1.Intercept) { in.Spec.HTTP = byUser("eve") }, mine: byUser("ada"), state: v1alpha1.InterceptActive},
		"all that is left":     {change: func(in *v1alpha1.Intercept) { in.Spec.HTTP = byUser("eve") }, state: v1alpha1.InterceptActive},
		"some of hers":         {mine: byUser("ada"), state: v1alpha1.InterceptActive},
		"the same requests":    {change: func(in *v1alpha1.Intercept) { in.Spec.HTTP = byUser("ada") }, mine: byUser("ada"), state: v1alpha1.InterceptFailed, reason: "PortHeld", msg: `is intercepted for requests with header("x-user") == "ada", by eve`},
		"overlapping requests": {change: func(in *v1alpha1.Intercept) { in.Spec.HTTP = &v1alpha1.HTTPMatch{Methods: []string{"GET"}} }, mine: byUser("ada"), state: v1alpha1.InterceptFailed, reason: "PortHeld", msg: "method in (GET)"},
		"no match":             {mine: &v1alpha1.HTTPMatch{Methods: []string{"G T"}}, state: v1alpha1.InterceptFailed, reason: "BadMatch", msg: "not a method"},
		"hers is a wiretap":    {change: func(in *v1alpha1.Intercept) { in.Spec.Mode = v1alpha1.ModeWiretap }, state: v1alpha1.InterceptActive},
		"mine is a wiretap":    {mode: v1alpha1.ModeWiretap, state: v1alpha1.InterceptActive},
		"hers is an ingest":    {change: func(in *v1alpha1.Intercept) { in.Spec.Mode = v1alpha1.ModeIngest }, state: v1alpha1.InterceptActive},
		"a wiretap of some":    {mode: v1alpha1.ModeWiretap, mine: byUser("ada"), take: true, state: v1alpha1.InterceptActive},
		"a preview of all":     {change: func(in *v1alpha1.Intercept) { in.Spec.Preview = previewOf("theirs") }, mine: nil, state: v1alpha1.InterceptActive},
		"a preview of some":    {change: func(in *v1alpha1.Intercept) { in.Spec.HTTP, in.Spec.Preview = byUser("ada"), previewOf("theirs") }, mine: byUser("ada"), state: v1alpha1.InterceptFailed, reason: "PortHeld", msg: `for requests of a preview and requests with header("x-user") == "ada", by eve`},
		"my other laptop":      {change: func(in *v1alpha1.Intercept) { in.Spec.User = "ada" }, state: v1alpha1.InterceptFailed, reason: "PortHeld", msg: "by ada"},
	} {
		t.Run(name, func(t *testing.T) {
			older := intercept("theirs", "eve", "hers")
			older.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
			older.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Ports: []v1alpha1.InterceptedPort{{Protocol: "TCP", ContainerPort: 8080}}}
			if tt.change != nil {
				tt.change(older)
			}
			st := older.Status
			mine := intercept("in-1", "ada", "mine")
			mine.Spec.HTTP, mine.Spec.Takeover, mine.Spec.Mode = tt.mine, tt.take, tt.mode
			r := newReconciler(t, older, mine, session("hers", "eve", "k2"))
			older.Status = st
			r.must(r.kc.Status().Update(t.Context(), older))
			if !tt.away {
				r.laptops.tunnels["hers"] = &mux.Session{}
			}
			r.addPod("a", "rs-1", withAgent(8080), ready1)
			r.acknowledge("a", "in-1")
			got, _ := r.look("in-1")
			wantStatus(t, name, got, tt.state, tt.reason, tt.msg)
			if gone := !r.world.get(older); gone != tt.evicts {
				t.Errorf("the older one is gone: %v", gone)
			}
			if got := older.Status; (got.Reason == "TakenOver") != tt.taken || tt.taken && !strings.Contains(got.Message, "port 8080 of web was taken over by ada at ") {
				t.Errorf("the older one was told %+v", got)
			}
		})
	}
}

// Nobody is put out for an intercept of which it is known beforehand that it cannot be had.
func TestTakeoverInVain(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*reconciler)
		state  v1alpha1.InterceptState
		reason string
	}{
		"no agent on Windows": {func(r *reconciler) {
			r.update(func(d *appsv1.Deployment) {
				d.Spec.Template.Spec.NodeSelector = map[string]string{"kubernetes.io/os": "windows"}
			})
		}, v1alpha1.InterceptFailed, "CannotInject"},
		"a gap":                    {func(r *reconciler) { r.update(func(d *appsv1.Deployment) { d.Spec.Paused = true }) }, v1alpha1.InterceptFailed, "Gap"},
		"the webhook is unreached": {func(r *reconciler) { r.deaf = true }, v1alpha1.InterceptPending, ""},
		"unreached for long":       {func(r *reconciler) { r.deaf, r.missed["in-1"] = true, time.Now().Add(-webhookPatience) }, v1alpha1.InterceptFailed, "NotInjected"},
		"pods cannot be created":   {func(r *reconciler) { r.failing("exceeded quota") }, v1alpha1.InterceptFailed, "AgentNotStarted"},
		"an agent that never comes": {func(r *reconciler) {
			r.addPod("new-1", "rs-1", withAgent(8080), waiting(agentcfg.Container, "ImagePullBackOff", "no such image"))
		}, v1alpha1.InterceptFailed, "AgentNotStarted"},
	} {
		for _, away := range []bool{false, true} { // an own one of a laptop that is away makes way without being asked
			t.Run(fmt.Sprintf("%s, away %v", name, away), func(t *testing.T) {
				theirs, mine := intercept("theirs", "ada", "hers"), intercept("in-1", "ada", "mine")
				theirs.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
				mine.Spec.Takeover = !away
				r := newReconciler(t, theirs, mine, session("hers", "ada", "k2"))
				theirs.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Ports: []v1alpha1.InterceptedPort{{Protocol: "TCP", ContainerPort: 8080}}}
				r.must(r.kc.Status().Update(t.Context(), theirs))
				if !away {
					r.laptops.tunnels["hers"] = &mux.Session{}
				}
				r.addPod("old-1", "rs-1", ready1)
				tt.change(r)
				st, _ := r.look("in-1")
				wantStatus(t, name, st, tt.state, tt.reason, "")
				if !r.world.get(theirs) || theirs.Status.State != v1alpha1.InterceptActive {
					t.Errorf("the older one is %+v", theirs.Status)
				}
			})
		}
	}
}

// Several ports are taken together or not at all, and nobody is put out for an intercept that does not come about.
func TestSeveralPorts(t *testing.T) {
	several := func(name string, ports ...string) *v1alpha1.Intercept {
		in := intercept(name, "ada", "mine")
		for _, p := range ports {
			in.Spec.Ports = append(in.Spec.Ports, v1alpha1.WantedPort{Port: p})
		}
		return in
	}
	holding := func(name, user, session string, port int32) *v1alpha1.Intercept {
		in := intercept(name, user, session)
		in.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
		in.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Ports: []v1alpha1.InterceptedPort{{Protocol: "TCP", ContainerPort: port}}}
		return in
	}
	grpc := func(d *appsv1.Deployment) {
		d.Spec.Template.Spec.Containers[0].Ports = append(d.Spec.Template.Spec.Containers[0].Ports,
			corev1.ContainerPort{Name: "grpc", ContainerPort: 9090}, corev1.ContainerPort{Name: "dns", ContainerPort: 53, Protocol: "UDP"})
	}
	matched := several("in-1", "http", "dns")
	matched.Spec.HTTP = byUser("ada")
	for name, tt := range map[string]struct {
		in     *v1alpha1.Intercept
		held   []*v1alpha1.Intercept
		state  v1alpha1.InterceptState
		reason string
		msg    string
		ports  string
	}{
		"all free":         {in: several("in-1", "grpc", "http", "dns"), state: v1alpha1.InterceptPending, msg: "restarting", ports: "9090/TCP 8080/TCP 53/UDP"},
		"a match, and UDP": {in: matched, state: v1alpha1.InterceptFailed, reason: "BadMatch", msg: "port 53 of web is a UDP port: HTTP requests come over TCP"},
		"named twice":      {in: several("in-1", "http", "8080"), state: v1alpha1.InterceptFailed, reason: "SamePort", msg: "Deployment web has one port 8080"},
		"one is held": {
			in: several("in-1", "http", "grpc"), held: []*v1alpha1.Intercept{holding("own", "ada", "away", 8080), holding("theirs", "eve", "hers", 9090)},
			state: v1alpha1.InterceptFailed, reason: "PortHeld", msg: "port 9090 of web is intercepted by eve",
		},
		"one waits": {
			in: several("in-1", "http", "grpc"), held: []*v1alpha1.Intercept{holding("own", "ada", "away", 8080), holding("theirs", "eve", "away", 9090)},
			state: v1alpha1.InterceptPending, msg: "port 9090 of web is intercepted by eve",
		},
	} {
		t.Run(name, func(t *testing.T) {
			objs := []client.Object{tt.in, session("hers", "eve", "k2")}
			for _, o := range tt.held {
				objs = append(objs, o.DeepCopy())
			}
			r := newReconciler(t, objs...)
			r.update(grpc)
			for _, o := range tt.held {
				now := o.DeepCopy()
				r.world.get(now)
				now.Status = o.Status
				r.must(r.kc.Status().Update(t.Context(), now))
			}
			r.laptops.tunnels["hers"] = &mux.Session{}
			r.addPod("old-1", "rs-1", ready1, withAgent(8080)) // an agent that takes one of them is not enough
			r.acknowledge("old-1", "in-1")
			st, _ := r.look("in-1")
			wantStatus(t, name, st, tt.state, tt.reason, tt.msg)
			if got := strings.ReplaceAll(st.Taken, ",", ""); tt.ports != "" && got != tt.ports {
				t.Errorf("ports %s", got)
			}
			if tt.ports == "" && len(r.engaged.of(web)) != 0 {
				t.Errorf("some are taken: %v", r.engaged.of(web))
			}
			for _, o := range tt.held {
				if !r.world.get(o) {
					t.Errorf("%s is gone", o.Name)
				}
			}
		})
	}
}

func byUser(name string) *v1alpha1.HTTPMatch {
	return &v1alpha1.HTTPMatch{Headers: []v1alpha1.HeaderMatch{{Name: "x-user", TextMatch: v1alpha1.TextMatch{Op: "equal", Value: name}}}}
}

// Two at once: the second is refused although the cache does not know yet what the first has.
func TestConflictBehindTheCache(t *testing.T) {
	first := intercept("a", "eve", "hers")
	second := intercept("b", "ada", "mine")
	second.CreationTimestamp = first.CreationTimestamp
	r := newReconciler(t, first, second, session("hers", "eve", "k2"))
	r.laptops.tunnels["hers"] = &mux.Session{}
	r.addPod("p", "rs-1", withAgent(8080), ready1)
	r.acknowledge("p", "a", "b")
	st, _ := r.look("a")
	wantStatus(t, "first", st, v1alpha1.InterceptActive, "", "")
	r.world.get(first)
	first.Status = v1alpha1.InterceptStatus{}
	r.must(r.kc.Status().Update(t.Context(), first))
	st, _ = r.look("b")
	wantStatus(t, "second", st, v1alpha1.InterceptFailed, "PortHeld", "by eve")
}

// What was declared long ago and waited for its laptop does not push out who came into force meanwhile.
func TestConflictWithDeclared(t *testing.T) {
	declared, active := intercept("a", "eve", ""), intercept("b", "ada", "mine")
	declared.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
	hers := session("hers", "eve", "k2")
	hers.Spec.AcceptIntercepts = true
	r := newReconciler(t, declared, active, hers)
	r.addPod("p", "rs-1", withAgent(8080), ready1)
	r.acknowledge("p", "a", "b")
	st, _ := r.look("a")
	wantStatus(t, "declared", st, v1alpha1.InterceptPending, "", "waiting for eve to connect")
	st, _ = r.look("b")
	wantStatus(t, "active", st, v1alpha1.InterceptActive, "", "")
	r.laptops.tunnels["hers"] = &mux.Session{}
	st, _ = r.look("a")
	wantStatus(t, "declared, its laptop has come", st, v1alpha1.InterceptFailed, "PortHeld", "by ada")
	st, _ = r.look("b")
	wantStatus(t, "active, again", st, v1alpha1.InterceptActive, "", "")
}

// A new leader does not know yet whose laptops are there: nobody makes way for another one of the same user, and what was declared stays with its laptop.
func TestConflictUnderNewLeader(t *testing.T) {
	older, mine := intercept("a", "ada", "other"), intercept("b", "ada", "mine")
	older.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
	r := newReconciler(t, older, mine, session("other", "ada", "k2"))
	older.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Ports: []v1alpha1.InterceptedPort{{Protocol: "TCP", ContainerPort: 8080}}}
	r.must(r.kc.Status().Update(t.Context(), older))
	r.addPod("p", "rs-1", withAgent(8080), ready1)
	r.acknowledge("p", "a", "b")
	r.started = time.Now()
	st, _ := r.look("b")
	wantStatus(t, "new", st, v1alpha1.InterceptPending, "", "whose laptop may be about to come back")
	r.laptops.lost["other"] = lostTunnel{since: time.Now()}
	st, _ = r.look("b")
	wantStatus(t, "it was here, and is away", st, v1alpha1.InterceptActive, "", "")
	if r.world.get(older) {
		t.Error("the older one has not made way")
	}

	declared := intercept("c", "ada", "")
	r = newReconciler(t, declared, session("other", "ada", "k2"))
	declared.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Session: "other"}
	r.must(r.kc.Status().Update(t.Context(), declared))
	for _, name := range []string{"mine", "other"} {
		s := &v1alpha1.Session{ObjectMeta: meta("doppel", name)}
		r.world.get(s)
		s.Spec.AcceptIntercepts = true
		r.must(r.kc.Update(t.Context(), s))
	}
	r.started = time.Now()
	if s, err := r.session(t.Context(), declared); err != nil || s != nil {
		t.Errorf("%v has it, %v", s, err)
	}
	r.started = time.Now().Add(-leaderNew)
	if s, err := r.session(t.Context(), declared); err != nil || s == nil || s.UID != "mine" {
		t.Errorf("the one that is there has not got it: %v, %v", s, err)
	}
}

// A second intercept that comes while the pods are replaced for a first one waits for the same pods.
func TestOneRestartForTwo(t *testing.T) {
	first, second := intercept("a", "ada", "mine"), intercept("b", "eve", "hers")
	first.Spec.HTTP, second.Spec.HTTP = byUser("ada"), byUser("eve")
	r := newReconciler(t, first, second, session("hers", "eve", "k2"))
	r.laptops.tunnels["hers"] = &mux.Session{}
	r.addPod("old-1", "rs-1", ready1)
	st, _ := r.look("a")
	wantStatus(t, "first", st, v1alpha1.InterceptPending, "", "restarting")
	r.rollout("2")
	r.addPod("new-1", "rs-2", withAgent(8080), ready1)
	r.acknowledge("new-1", "a", "b")
	st, _ = r.look("b")
	wantStatus(t, "second", st, v1alpha1.InterceptPending, "", "waiting for 1 old pods to leave")
	old := webPod("old-1", "rs-1")
	r.delete(&old)
	for _, name := range []string{"a", "b"} {
		st, _ = r.look(name)
		wantStatus(t, name, st, v1alpha1.InterceptActive, "", "")
	}
	if r.restarts() != 1 {
		t.Errorf("%d restarts", r.restarts())
	}

	// One that came too late for the agents of the new pods has them replaced again.
	third := intercept("c", "eve", "hers")
	third.Spec.Ports = []v1alpha1.WantedPort{{Port: "9090"}}
	r.create(third)
	r.update(func(d *appsv1.Deployment) {
		d.Spec.Template.Spec.Containers[0].Ports = append(d.Spec.Template.Spec.Containers[0].Ports, corev1.ContainerPort{Name: "grpc", ContainerPort: 9090})
	})
	st, _ = r.look("c")
	wantStatus(t, "third", st, v1alpha1.InterceptPending, "", "restarting")
}

// A leader that comes while pods are replaced goes on with that, and has nothing replaced twice.
func TestRestartOfTheLeaderBefore(t *testing.T) {
	in := intercept("in-1", "ada", "mine")
	in.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Minute))
	r := newReconciler(t, in)
	r.addPod("old-1", "rs-1", ready1)
	st, _ := r.look("in-1")
	wantStatus(t, "restart", st, v1alpha1.InterceptPending, "", "restarting the workload")
	r.rollout("2")
	r.addPod("new-1", "rs-2", withAgent(8080), ready1)

	r.interceptReconciler = newInterceptReconciler(r.Manager)
	r.started = time.Now()
	r.acknowledge("new-1", "in-1")
	st, _ = r.look("in-1")
	wantStatus(t, "another leader", st, v1alpha1.InterceptPending, "", "waiting for 1 old pods to leave")
	old := webPod("old-1", "rs-1")
	r.delete(&old)
	st, _ = r.look("in-1")
	wantStatus(t, "replaced", st, v1alpha1.InterceptActive, "", "")
	if r.restarts() != 1 {
		t.Errorf("%d restarts", r.restarts())
	}
}

// What agents cannot be told is refused, and costs the others nothing.
func TestTooMuchForAgents(t *testing.T) {
	mine, huge := intercept("a", "ada", "mine"), intercept("b", "ada", "mine")
	mine.Spec.HTTP, huge.Spec.HTTP = byUser("ada"), &v1alpha1.HTTPMatch{}
	huge.Spec.Mode = v1alpha1.ModeWiretap // which is in nobody's way
	for i := range 16 {
		huge.Spec.HTTP.Headers = append(huge.Spec.HTTP.Headers, v1alpha1.HeaderMatch{
			Name: fmt.Sprintf("x-%d", i), TextMatch: v1alpha1.TextMatch{Op: "equal", Value: strings.Repeat("<", 1024)},
		})
	}
	r := newReconciler(t, mine, huge)
	r.addPod("p", "rs-1", withAgent(8080), ready1)
	r.acknowledge("p", "a", "b")
	for _, again := range []bool{false, true} {
		st, _ := r.look("a")
		wantStatus(t, "mine", st, v1alpha1.InterceptActive, "", "")
		st, _ = r.look("b")
		wantStatus(t, "huge", st, v1alpha1.InterceptFailed, "TooMuch", "would be too much for its traffic-agents")
		if got := r.engaged.of(web); len(got) != 1 || got[0].UID != "a" {
			t.Errorf("again %v: %d are in force", again, len(got))
		}
	}
}

// One that is in force is not pushed out by another one of the same second, whatever their UIDs.
func TestConflictOfTheSameSecond(t *testing.T) {
	first, second := intercept("b", "eve", "hers"), intercept("a", "ada", "mine")
	second.CreationTimestamp = first.CreationTimestamp
	r := newReconciler(t, first, second, session("hers", "eve", "k2"))
	r.laptops.tunnels["hers"], r.laptops.tunnels["mine"] = &mux.Session{}, &mux.Session{}
	r.addPod("p", "rs-1", withAgent(8080), ready1)
	r.acknowledge("p", "a", "b")
	st, _ := r.look("b")
	wantStatus(t, "first", st, v1alpha1.InterceptActive, "", "")
	st, _ = r.look("a")
	wantStatus(t, "second", st, v1alpha1.InterceptFailed, "PortHeld", "by eve")
	st, _ = r.look("b")
	wantStatus(t, "first, again", st, v1alpha1.InterceptActive, "", "")
}

func TestOlder(t *testing.T) {
	a, b := intercept("a", "", ""), intercept("b", "", "")
	b.CreationTimestamp = a.CreationTimestamp
	if !older(a, b) || older(b, a) {
		t.Error("of the same second, the UID decides")
	}
	b.CreationTimestamp = metav1.NewTime(a.CreationTimestamp.Add(-time.Second))
	if older(a, b) || !older(b, a) {
		t.Error("time decides")
	}
}

// Who is woken by what.
func TestWakeups(t *testing.T) {
	db, declared := intercept("db", "ada", "mine"), intercept("declared", "ada", "")
	db.Spec.Workload.Name, declared.Spec.Workload.Name = "db", "cart"
	r := newReconciler(t, intercept("a", "ada", "mine"), intercept("b", "eve", "hers"), db, declared)
	r.wake(web)
	if e := <-r.wakeups; e.Object != web {
		t.Errorf("%v", e.Object)
	}
	for range cap(r.wakeups) + 1 {
		r.wake(web) // must never block an agent's connection
	}
	var got []string
	for _, w := range r.workloadsOfSession(t.Context(), session("mine", "ada", "")) {
		got = append(got, w.Name)
	}
	if slices.Sort(got); !slices.Equal(got, []string{"cart", "db", "web"}) {
		t.Errorf("session: %v", got)
	}

	renewed := session("mine", "ada", "")
	renewed.Spec.RenewTime = metav1.NewMicroTime(time.Now().Add(time.Minute))
	lost := session("mine", "ada", "")
	lost.Status.State = v1alpha1.SessionLost
	for _, tt := range []struct {
		now  *v1alpha1.Session
		want bool
	}{{renewed, false}, {lost, true}} {
		if got := claimsOthers(event.UpdateEvent{ObjectOld: session("mine", "ada", ""), ObjectNew: tt.now}); got != tt.want {
			t.Errorf("%+v: %v", tt.now, got)
		}
	}
}

// Where the agents are there already nothing is written but that the intercept is active, and the laptop knows its ports before.
func TestInterceptAtOnce(t *testing.T) {
	r := newReconciler(t, intercept("in-1", "ada", "mine"))
	r.quiet = time.Hour
	r.addPod("web-1", "rs-1", withAgent(8080), ready1)
	r.acknowledge("web-1")
	st, again := r.look("in-1")
	if st.State != "" || again != pendingPoll {
		t.Errorf("said %q %q, looked at again after %v", st.State, st.Message, again)
	}
	items, err := r.interceptsFor(t.Context(), "mine")
	if err != nil || len(items) != 1 || !slices.Equal(items[0].Ports, tcp(8080)) {
		t.Errorf("%+v, %v", items, err)
	}
	r.acknowledge("web-1", "in-1")
	st, _ = r.look("in-1")
	wantStatus(t, "known to its agent", st, v1alpha1.InterceptActive, "", "")

	// What takes longer is said.
	r = newReconciler(t, intercept("in-1", "ada", "mine"))
	r.quiet = time.Hour
	r.addPod("web-1", "rs-1", ready1)
	st, _ = r.look("in-1")
	wantStatus(t, "restarted", st, v1alpha1.InterceptPending, "", "restarting")
}

// An intercept that was active under another leader is not said to be pending while its agents come to us.
func TestInterceptOfAnotherLeader(t *testing.T) {
	in := intercept("in-1", "ada", "mine")
	in.Status.State = v1alpha1.InterceptActive
	r := newReconciler(t, in)
	r.addPod("web-1", "rs-1", withAgent(8080), ready1)
	r.started = time.Now()
	st, again := r.look("in-1")
	if st.State != v1alpha1.InterceptActive || again != pendingPoll {
		t.Errorf("said %q %q, looked at again after %v", st.State, st.Message, again)
	}
	r.started = time.Now().Add(-leaderNew)
	st, _ = r.look("in-1")
	wantStatus(t, "its agent does not come", st, v1alpha1.InterceptPending, reasonInterrupted, "waiting for the traffic-agents")
}

// A status says no more what was true once.
func TestStatusIsCleared(t *testing.T) {
	in := intercept("in-1", "ada", "mine")
	in.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Taken: "8080", Requests: "all"}
	r := newReconciler(t, in)
	r.must(r.writeStatus(t.Context(), in.DeepCopy(), v1alpha1.InterceptStatus{State: v1alpha1.InterceptPending}))
	r.world.get(in)
	if in.Status.Taken != "" || in.Status.Requests != "" {
		t.Errorf("%+v", in.Status)
	}
}
