package manager

import (
	"errors"
	"reflect"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
)

// withStandIn is a pod as the webhook makes it while container app is replaced; of a template that was restarted then.
func withStandIn(restarted string) podOption {
	return func(p *corev1.Pod) {
		c := agentcfg.Config{
			Managers: []string{"m:1"}, ManagerKey: "k", HealthPort: 9900, StandIns: []string{"app"},
			Ports: []agentcfg.Port{{Protocol: "TCP", ContainerPort: 8080, Container: "app", AgentPort: 9901, Way: agentcfg.ByName}},
		}
		p.Annotations = map[string]string{agentcfg.Annotation: c.String()}
		if restarted != "" {
			p.Annotations[restartedAt] = restarted
		}
		p.Labels[agentcfg.LabelStandIn] = "true"
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: agentcfg.Container})
	}
}

func replacing(name, user, session string) *v1alpha1.Intercept {
	in := intercept(name, user, session)
	in.Spec.Mode = v1alpha1.ModeReplace
	return in
}

// templateRestarted is when the template says that it was restarted.
func (r *reconciler) templateRestarted() string {
	d := webDeployment()
	r.world.get(d)
	return d.Spec.Template.Annotations[restartedAt]
}

// look2 is a look of the restorer.
func (r *reconciler) look2() bool {
	r.t.Helper()
	under, err := r.restorer.look(r.t.Context())
	r.must(err)
	return under
}

func (r *reconciler) injected() *corev1.Pod {
	r.t.Helper()
	p := webPod("fresh", "rs-1")
	out, err := r.injectPod(r.t.Context(), &p)
	r.must(err)
	return out
}

// A manager that is for some namespaces may list the pods of these only.
func TestReplaceNarrow(t *testing.T) {
	r := newReconciler(t)
	r.allowed, r.world.narrow = []string{"data", "shop"}, true
	r.rollout("2")
	r.addPod("new-1", "rs-2", ready1, withStandIn(r.templateRestarted()))
	if !r.look2() || r.restarts() != 1 {
		t.Errorf("%d restarts", r.restarts())
	}
}

// The way of a replaced container: away with new pods, the traffic to the laptop until the app is back, and back.
func TestReplace(t *testing.T) {
	r := newReconciler(t, replacing("in-1", "ada", "mine"))
	r.addPod("old-1", "rs-1", ready1, withAgent(8080)) // an agent alone is not enough
	st, _ := r.look("in-1")
	wantStatus(t, "first look", st, v1alpha1.InterceptPending, "", "restarting the workload")
	if p := r.injected(); p == nil || p.Labels[agentcfg.LabelStandIn] == "" || st.Container != "app" || len(st.Ports) != 1 {
		t.Fatalf("new pods are %+v, status %+v", p, st)
	}
	if r.look2() || r.restarts() != 1 {
		t.Error("restored before anything was replaced")
	}
	r.rollout("2")
	r.addPod("new-1", "rs-2", ready1, withStandIn(r.templateRestarted()))
	r.acknowledge("new-1", "in-1")
	st, _ = r.look("in-1")
	wantStatus(t, "the old one runs", st, v1alpha1.InterceptPending, "", "waiting for 1 old pods")
	old := webPod("old-1", "rs-1")
	r.delete(&old)
	st, _ = r.look("in-1")
	wantStatus(t, "all there", st, v1alpha1.InterceptActive, "", "")
	if r.look2() || r.restarts() != 1 {
		t.Error("restored while it is wanted")
	}

	r.delete(replacing("in-1", "", ""))
	r.look("in-1")
	if g, ok := r.engaged.get("in-1"); !ok || !g.Ending || r.injected() != nil {
		t.Errorf("after leave: %+v %v", g, ok)
	}
	if got, err := r.interceptsFor(t.Context(), "mine"); err != nil || len(got) != 1 || got[0].State != control.StateEnding || !slices.Equal(got[0].Ports, tcp(8080)) {
		t.Errorf("the laptop is told %+v, %v", got, err)
	}
	if table, _ := r.engaged.table(web); len(table.Items) != 1 {
		t.Error("the traffic does not come to the laptop any more")
	}
	if !r.look2() || r.restarts() != 2 {
		t.Errorf("%d restarts", r.restarts())
	}
	if !r.look2() || r.restarts() != 2 { // the pod is of the template before
		t.Errorf("%d restarts, of which one was superfluous", r.restarts())
	}
	// Another intercept waits until the app is back, and leaves the restart to the restorer.
	r.create(intercept("in-2", "ada", "mine"))
	r.acknowledge("new-1", "in-1", "in-2")
	st, _ = r.look("in-2")
	wantStatus(t, "another one", st, v1alpha1.InterceptPending, "", "waiting for")
	if _, ok := r.engaged.get("in-1"); ok || r.restarts() != 2 {
		t.Errorf("what was left belongs to somebody still; %d restarts", r.restarts())
	}
	gone := webPod("new-1", "rs-2")
	r.delete(&gone)
	if r.look2() {
		t.Error("there is more to do without a pod")
	}
}

// The laptop's part passes to whoever takes the same port or container, and to nobody else.
func TestReplaceFollowed(t *testing.T) {
	wiretap := intercept("in-2", "eve", "hers")
	wiretap.Spec.Mode = v1alpha1.ModeWiretap
	for name, tt := range map[string]struct {
		next  *v1alpha1.Intercept
		port  string
		stays bool
	}{
		"another container's port":  {intercept("in-2", "eve", "hers"), "grpc", true},
		"another container":         {replacing("in-2", "eve", "hers"), "grpc", true},
		"the same port":             {intercept("in-2", "eve", "hers"), "http", false},
		"the same container":        {replacing("in-2", "eve", "hers"), "http", false},
		"one that leaves all there": {wiretap, "http", true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReconciler(t, replacing("in-1", "ada", "mine"), session("hers", "eve", "k2"))
			r.update(func(d *appsv1.Deployment) {
				more := corev1.Container{Name: "more", Ports: []corev1.ContainerPort{{Name: "grpc", ContainerPort: 9090}}}
				d.Spec.Template.Spec.Containers = append(d.Spec.Template.Spec.Containers, more)
			})
			r.laptops.tunnels["hers"] = &mux.Session{}
			in := &v1alpha1.Intercept{ObjectMeta: meta("shop", "in-1")}
			r.world.get(in)
			in.Spec.Ports = []v1alpha1.WantedPort{{Port: "http"}}
			r.must(r.kc.Update(t.Context(), in))
			r.addPod("a", "rs-1", ready1, withStandIn(""))
			r.acknowledge("a", "in-1")
			st, _ := r.look("in-1")
			wantStatus(t, "replaced", st, v1alpha1.InterceptActive, "", "")
			r.delete(replacing("in-1", "", ""))
			r.look("in-1")

			tt.next.Spec.Ports = []v1alpha1.WantedPort{{Port: tt.port}}
			r.create(tt.next)
			st, _ = r.look("in-2")
			wantStatus(t, "the next one", st, v1alpha1.InterceptPending, "", "")
			if g, there := r.engaged.get("in-1"); there != tt.stays || there && (!g.Ending || !slices.Equal(g.Ports, tcp(8080))) {
				t.Errorf("what was left: %v %+v", there, g)
			}
		})
	}
}

// The laptop's part ends with the last pod that needs it, or with the laptop.
func TestReplaceEnding(t *testing.T) {
	for name, end := range map[string]func(*reconciler){
		"the pod is gone":    func(r *reconciler) { p := webPod("a", "rs-1"); r.delete(&p) },
		"the laptop is gone": func(r *reconciler) { delete(r.laptops.tunnels, "mine") },
	} {
		r := newReconciler(t, replacing("in-1", "ada", "mine"))
		r.addPod("a", "rs-1", ready1, withStandIn(""))
		r.acknowledge("a", "in-1")
		st, _ := r.look("in-1")
		wantStatus(t, name, st, v1alpha1.InterceptActive, "", "")
		r.delete(replacing("in-1", "", ""))
		r.look("in-1")
		r.look2()
		if _, ok := r.engaged.get("in-1"); !ok {
			t.Errorf("%s: ended too early", name)
		}
		end(r)
		r.look2()
		if _, ok := r.engaged.get("in-1"); ok {
			t.Errorf("%s: it does not end", name)
		}
	}
}

// A manager that has just started finds what is to be restored in the cluster alone, and leaves what is wanted.
func TestRestoreAfterRestart(t *testing.T) {
	failed := replacing("in-1", "ada", "mine")
	failed.Status.State = v1alpha1.InterceptFailed
	declared := replacing("in-1", "ada", "")
	declared.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Session: "mine"}
	for name, tt := range map[string]struct {
		in       *v1alpha1.Intercept
		away     bool
		restarts int
	}{
		"nobody wants it":                 {restarts: 1},
		"wanted":                          {in: replacing("in-1", "ada", "mine")},
		"its session has ended":           {in: replacing("in-1", "ada", "ended"), restarts: 1},
		"it had failed":                   {in: failed, restarts: 1},
		"another mode":                    {in: intercept("in-1", "ada", "mine"), restarts: 1},
		"declared, its laptop comes back": {in: declared, away: true},
	} {
		t.Run(name, func(t *testing.T) {
			var objs []client.Object
			var st v1alpha1.InterceptStatus
			if tt.in != nil {
				st = tt.in.Status
				objs = append(objs, tt.in)
			}
			r := newReconciler(t, objs...)
			if tt.in != nil {
				now := tt.in.DeepCopy()
				r.world.get(now)
				now.Status = st
				r.must(r.kc.Status().Update(t.Context(), now))
			}
			if tt.away {
				delete(r.laptops.tunnels, "mine")
				s := &v1alpha1.Session{ObjectMeta: meta("doppel", "mine")}
				r.world.get(s)
				s.Spec.AcceptIntercepts = true
				r.must(r.kc.Update(t.Context(), s))
			}
			r.addPod("a", "rs-1", ready1, withStandIn(""))
			known := tt.in == nil || tt.in.Spec.Mode != v1alpha1.ModeReplace || st.State == v1alpha1.InterceptFailed
			if r.look2(); !known && r.restarts() != 0 {
				t.Error("restarted before the intercept was looked at")
			}
			if tt.in != nil {
				r.look("in-1")
				r.look("in-1")
			}
			r.look2()
			r.look2()
			if r.restarts() != tt.restarts {
				t.Errorf("%d restarts, want %d", r.restarts(), tt.restarts)
			}
		})
	}
}

// Trouble with the API server is tried again.
func TestRestoreAPIServerAway(t *testing.T) {
	r := newReconciler(t)
	r.addPod("a", "rs-1", ready1, withStandIn(""))
	for _, kind := range []runtime.Object{&corev1.PodList{}, &v1alpha1.InterceptList{}, &appsv1.Deployment{}} {
		r.set(func() {
			r.fail = func(_ string, o runtime.Object) error {
				if reflect.TypeOf(o) == reflect.TypeOf(kind) {
					return errors.New("etcd is away")
				}
				return nil
			}
		})
		if _, err := r.restorer.look(t.Context()); err == nil || r.restarts() != 0 {
			t.Errorf("%T: %v, %d restarts", kind, err, r.restarts())
		}
	}
	r.set(func() { r.fail = nil })
	if r.look2(); r.restarts() != 1 {
		t.Errorf("%d restarts", r.restarts())
	}
}

// While it is not known whose pods these are, the laptop goes on; and so it does until a pod has ended whose ReplicaSet is gone.
func TestReplaceEndingOfUnknown(t *testing.T) {
	r := newReconciler(t, replacing("in-1", "ada", "mine"))
	r.addPod("a", "rs-1", ready1, withStandIn(""))
	r.acknowledge("a", "in-1")
	st, _ := r.look("in-1")
	wantStatus(t, "replaced", st, v1alpha1.InterceptActive, "", "")
	r.delete(replacing("in-1", "", ""))
	r.look("in-1")
	r.set(func() {
		r.fail = func(_ string, o runtime.Object) error {
			if _, set := o.(*appsv1.ReplicaSet); set {
				return errors.New("etcd is away")
			}
			return nil
		}
	})
	if _, err := r.restorer.look(t.Context()); err == nil {
		t.Error("no error")
	}
	if _, ok := r.engaged.get("in-1"); !ok {
		t.Error("ended while nothing is known")
	}
	r.set(func() { r.fail = nil })
	r.delete(&appsv1.ReplicaSet{ObjectMeta: meta("shop", "rs-1")})
	r.look2()
	if _, ok := r.engaged.get("in-1"); !ok {
		t.Error("ended before the pod")
	}
	p := webPod("a", "rs-1")
	r.delete(&p)
	r.look2()
	if _, ok := r.engaged.get("in-1"); ok {
		t.Error("it does not end")
	}
}

func TestReplaceConflict(t *testing.T) {
	replace := func(in *v1alpha1.Intercept) { in.Spec.Mode = v1alpha1.ModeReplace }
	for name, tt := range map[string]struct {
		theirs, mine func(*v1alpha1.Intercept)
		reason, msg  string
	}{
		"both the same container":      {replace, replace, "PortHeld", "container app of web is replaced by eve (intercept web since"},
		"hers intercepts":              {func(*v1alpha1.Intercept) {}, replace, "PortHeld", "port 8080 of web is intercepted by eve"},
		"hers takes some requests":     {func(in *v1alpha1.Intercept) { in.Spec.HTTP = byUser("eve") }, replace, "PortHeld", "port 8080 of web is intercepted for requests with"},
		"mine intercepts":              {replace, func(*v1alpha1.Intercept) {}, "PortHeld", "port 8080 of web is replaced by eve"},
		"mine takes some requests":     {replace, func(in *v1alpha1.Intercept) { in.Spec.HTTP = byUser("ada") }, "PortHeld", "port 8080 of web is replaced by eve"},
		"mine is a wiretap":            {replace, func(in *v1alpha1.Intercept) { in.Spec.Mode = v1alpha1.ModeWiretap }, "", ""},
		"mine is an ingest":            {replace, func(in *v1alpha1.Intercept) { in.Spec.Mode = v1alpha1.ModeIngest }, "", ""},
		"hers is a wiretap":            {func(in *v1alpha1.Intercept) { in.Spec.Mode = v1alpha1.ModeWiretap }, replace, "", ""},
		"mine takes over":              {replace, func(in *v1alpha1.Intercept) { replace(in); in.Spec.Takeover = true }, "", ""},
		"a match for what is replaced": {func(in *v1alpha1.Intercept) { in.Spec.Workload.Name = "db" }, func(in *v1alpha1.Intercept) { replace(in); in.Spec.HTTP = byUser("ada") }, "BadMatch", "nobody left to answer the others"},
	} {
		t.Run(name, func(t *testing.T) {
			theirs, mine := intercept("theirs", "eve", "hers"), intercept("in-1", "ada", "mine")
			theirs.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
			tt.theirs(theirs)
			tt.mine(mine)
			status := v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Container: "app", Ports: []v1alpha1.InterceptedPort{{Protocol: "TCP", ContainerPort: 8080}}}
			r := newReconciler(t, theirs, mine, session("hers", "eve", "k2"))
			theirs.Status = status
			r.must(r.kc.Status().Update(t.Context(), theirs))
			r.laptops.tunnels["hers"] = &mux.Session{}
			r.addPod("a", "rs-1", ready1)
			st, _ := r.look("in-1")
			if tt.reason == "" {
				wantStatus(t, name, st, v1alpha1.InterceptPending, "", "")
			} else {
				wantStatus(t, name, st, v1alpha1.InterceptFailed, tt.reason, tt.msg)
			}
		})
	}
}

// What only a laptop could bring back is not taken away.
func TestReplaceCannotRoll(t *testing.T) {
	in := replacing("in-1", "ada", "mine")
	in.Spec.Recreate = true
	r := newReconciler(t, in)
	r.update(func(d *appsv1.Deployment) { d.Spec.Paused = true })
	st, _ := r.look("in-1")
	wantStatus(t, "paused", st, v1alpha1.InterceptFailed, "CannotReplace", "nothing would bring the app back")
}
