package manager

import (
	"context"
	"errors"
	"sync"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// workloadReconciler looks at workloads that are intercepted. What it costs is to read a workload: that is done once for all of its intercepts.
type workloadReconciler struct {
	m *Manager

	mu sync.Mutex
	// guarded by mu; each is used by whoever looks at its workload, which is one at a time
	of map[workloadKey]*interceptReconciler
}

func newWorkloadReconciler(m *Manager) *workloadReconciler {
	return &workloadReconciler{m: m, of: map[workloadKey]*interceptReconciler{}}
}

// whenIdle is the priority of a check: whoever changes something comes first.
var whenIdle = handler.LowPriority

// Reconcile takes the next step for each intercept of a workload.
func (w *workloadReconciler) Reconcile(ctx context.Context, key workloadKey) (reconcile.Result, error) {
	w.mu.Lock()
	r := w.of[key]
	if r == nil {
		r = newInterceptReconciler(w.m)
		w.of[key] = r
	}
	many := len(w.of)
	w.mu.Unlock()
	errs := []error{r.begin(ctx, key)}
	var again time.Duration
	for i := range r.all {
		res, err := r.look(ctx, &r.all[i])
		errs = append(errs, err)
		if next := res.RequeueAfter; next > 0 && (again == 0 || next < again) {
			again = next
		}
	}
	if len(r.seen) == 0 {
		w.mu.Lock()
		delete(w.of, key)
		w.mu.Unlock()
		w.m.proofs.forget(key)
	}
	r.all, r.reading = nil, nil
	if err := errors.Join(errs...); err != nil {
		return reconcile.Result{}, err
	}
	if again == activePoll {
		return reconcile.Result{RequeueAfter: max(activePoll, time.Duration(many)*activeEach), Priority: &whenIdle}, nil
	}
	return reconcile.Result{RequeueAfter: again}, nil
}
