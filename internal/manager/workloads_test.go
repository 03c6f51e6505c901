package manager

import (
	"errors"
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/mux"
)

// crowd is a workload with intercepts by request, all known to its agent, and counts what is read of it.
func crowd(t *testing.T, n int) (r *reconciler, w *workloadReconciler, reads map[string]int) {
	t.Helper()
	var objs []client.Object
	for i := range n {
		in := intercept(fmt.Sprint("in-", i), "ada", "mine")
		in.Spec.HTTP = byUser(fmt.Sprint("user-", i))
		objs = append(objs, in)
	}
	r = newReconciler(t, objs...)
	r.addPod("p", "rs-1", withAgent(8080), ready1)
	reads = map[string]int{}
	r.fail = func(verb string, o runtime.Object) error { // under the world's lock
		switch o.(type) {
		case *appsv1.Deployment, *networkingv1.NetworkPolicyList:
			reads[fmt.Sprintf("%s %T", verb, o)]++
		}
		return nil
	}
	return r, newWorkloadReconciler(r.Manager), reads
}

func (r *reconciler) states() map[v1alpha1.InterceptState]int {
	r.t.Helper()
	var list v1alpha1.InterceptList
	r.must(r.kc.List(r.t.Context(), &list))
	out := map[v1alpha1.InterceptState]int{}
	for _, in := range list.Items {
		out[in.Status.State]++
	}
	return out
}

// However many intercepts a workload has, it is read once in a look, and each intercept's object is written once until it is active.
func TestWorkloadReadOnce(t *testing.T) {
	const n = 20
	r, w, reads := crowd(t, n)
	again, err := w.Reconcile(t.Context(), web)
	if err != nil || again.RequeueAfter != pendingPoll || r.states()[""] != n {
		t.Errorf("not acknowledged: %+v, %v, %v", again, err, r.states())
	}
	if got := len(r.engaged.of(web)); got != n {
		t.Errorf("%d of %d in force", got, n)
	}
	var all []types.UID
	for i := range n {
		all = append(all, types.UID(fmt.Sprint("in-", i)))
	}
	r.acknowledge("p", all...)
	again, err = w.Reconcile(t.Context(), web)
	if err != nil || again.RequeueAfter != activePoll || again.Priority == nil || *again.Priority >= 0 || r.states()[v1alpha1.InterceptActive] != n {
		t.Errorf("acknowledged: %+v, %v, %v", again, err, r.states())
	}
	if _, err = w.Reconcile(t.Context(), web); err != nil {
		t.Error(err)
	}
	for what, want := range map[string]int{"get *v1.Deployment": 3, "list *v1.NetworkPolicyList": 3} {
		if reads[what] != want {
			t.Errorf("%s: %d times, want %d", what, reads[what], want)
		}
	}
	if len(r.patched) != n {
		t.Errorf("%d statuses written for %d intercepts", len(r.patched), n)
	}
}

// With many workloads each is looked at less often, and nothing is kept of one without intercepts.
func TestWorkloadsMany(t *testing.T) {
	r, w, _ := crowd(t, 1)
	r.acknowledge("p", "in-0")
	for i := range 299 {
		key := web
		key.Name = fmt.Sprint("other-", i)
		w.of[key] = newInterceptReconciler(r.Manager)
	}
	again, err := w.Reconcile(t.Context(), web)
	if err != nil || again.RequeueAfter != 300*activeEach {
		t.Errorf("%+v, %v", again, err)
	}
	r.delete(intercept("in-0", "", ""))
	again, err = w.Reconcile(t.Context(), web)
	if err != nil || !again.IsZero() || w.of[web] != nil || len(r.engaged.of(web)) != 0 {
		t.Errorf("gone: %+v, %v, %v, %v", again, err, w.of[web], r.engaged.of(web))
	}
}

// The trouble of one intercept is not that of the others.
func TestWorkloadTrouble(t *testing.T) {
	r, w, _ := crowd(t, 3)
	r.acknowledge("p", "in-0", "in-1", "in-2")
	r.set(func() {
		r.fail = func(verb string, o runtime.Object) error {
			if in, ok := o.(*v1alpha1.Intercept); ok && verb == "patch status" && in.Name == "in-1" {
				return errors.New("etcd is away")
			}
			return nil
		}
	})
	if again, err := w.Reconcile(t.Context(), web); err == nil || !again.IsZero() {
		t.Errorf("%+v, %v", again, err)
	}
	if got := r.states(); got[v1alpha1.InterceptActive] != 2 {
		t.Errorf("%v", got)
	}
}

// What has failed stays so, also while the cache does not know it yet.
func TestFailedBehindTheCache(t *testing.T) {
	older, mine := intercept("theirs", "eve", "hers"), intercept("in-1", "ada", "mine")
	older.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
	mine.Spec.Takeover = true
	r := newReconciler(t, older, mine, session("hers", "eve", "k2"))
	r.laptops.tunnels["hers"] = &mux.Session{}
	r.addPod("p", "rs-1", withAgent(8080), ready1)
	r.acknowledge("p", "theirs", "in-1")
	w := newWorkloadReconciler(r.Manager)
	if _, err := w.Reconcile(t.Context(), web); err != nil {
		t.Fatal(err)
	}
	r.world.get(older)
	wantStatus(t, "taken over", older.Status, v1alpha1.InterceptFailed, "TakenOver", "by ada")
	older.Status = v1alpha1.InterceptStatus{State: v1alpha1.InterceptActive, Ports: older.Status.Ports}
	r.must(r.kc.Status().Update(t.Context(), older))
	if _, err := w.Reconcile(t.Context(), web); err != nil {
		t.Fatal(err)
	}
	if got := r.engaged.of(web); len(got) != 1 || got[0].UID != "in-1" {
		t.Errorf("in force: %v", got)
	}
}
