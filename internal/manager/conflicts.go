package manager

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/match"
)

// rival is an older intercept that is in the way of another one on a port, or as both would replace the same container.
type rival struct {
	*v1alpha1.Intercept
	port      control.Port
	container string // that both would replace
}

// what is it about.
func (o rival) what() string {
	if o.container != "" {
		return "container " + o.container
	}
	return fmt.Sprintf("port %d", o.port.Number)
}

// String says who holds what.
func (o rival) String() string {
	if o.Spec.Mode == v1alpha1.ModeReplace {
		return fmt.Sprintf("%s of %s is replaced by %s (intercept %s since %s)", o.what(), o.Spec.Workload.Name, o.Spec.User, o.Spec.Name, o.CreationTimestamp.Format(time.TimeOnly))
	}
	what := ""
	if requests := requestsOf(&o.Spec); requests != "" {
		what = " for " + requests + ","
	}
	return fmt.Sprintf("%s of %s is intercepted%s by %s (intercept %s since %s)", o.what(), o.Spec.Workload.Name, what, o.Spec.User, o.Spec.Name, o.CreationTimestamp.Format(time.TimeOnly))
}

// conflict refuses ports that older intercepts of the same workload hold, or requests of them that both would take; the answer names the
// holder. A laptop that is away blocks nobody: its own user takes its ports over at once, others wait for the end of its session. No intercept
// is ended unless all of the ports can be had, and as far as it is known before pods can have the agent for them.
func (r *interceptReconciler) conflict(ctx context.Context, in *v1alpha1.Intercept, g engagement, ms []*match.Matcher, w *workload, taken []inject.Taken) (wait string, err error) {
	rivals := r.rivals(in, g, ms)
	if len(rivals) == 0 {
		return "", nil
	}
	for _, o := range rivals {
		switch holder := types.UID(o.Holder()); {
		case in.Spec.Takeover:
		case r.m.laptops.tunnel(holder) != nil:
			return "", fail("PortHeld", "%s", o)
		case r.m.newLeader() && !r.m.laptops.wasHere(holder):
			wait = cmp.Or(wait, o.String()+", whose laptop may be about to come back")
		case o.Spec.User != in.Spec.User:
			wait = cmp.Or(wait, o.String()+", whose laptop is away: waiting for the end of its session")
		}
	}
	if wait != "" {
		return wait, nil
	}
	if wait, err := r.possible(ctx, in, g, w, taken, rivals); err != nil || wait != "" {
		return wait, err
	}
	for _, o := range rivals {
		if in.Spec.Takeover {
			err = r.takeOver(ctx, o, in)
		} else {
			err = r.makeWay(ctx, o)
		}
		if err != nil {
			return "", err
		}
	}
	return "", nil
}

// possible says what would keep pods from having what an intercept needs once its rivals are gone.
func (r *interceptReconciler) possible(ctx context.Context, in *v1alpha1.Intercept, g engagement, w *workload, taken []inject.Taken, rivals []rival) (wait string, err error) {
	f := r.fit(in, g)
	for _, o := range rivals {
		_, theirs := r.has(o.Intercept)
		f.replaced = slices.DeleteFunc(f.replaced, func(name string) bool { return name == theirs })
	}
	if g.replaces() {
		f.replaced = append(f.replaced, g.Container)
	}
	view, err := r.view(ctx, in, w, f)
	switch {
	case err != nil:
		return "", err
	case view.trouble != "":
		return "", fail("AgentNotStarted", "%s", view.trouble)
	case view.missing > 0:
		return r.mayRestart(ctx, in, g, w, taken, f)
	}
	return "", nil
}

// makeWay ends the intercept of a laptop that is away.
func (r *interceptReconciler) makeWay(ctx context.Context, o rival) error {
	r.m.cfg.Log.Info("intercept of a lost laptop makes way", "intercept", o.Namespace+"/"+o.Name, "user", o.Spec.User)
	if err := r.m.ctrl.GetClient().Delete(ctx, o.Intercept, client.Preconditions{UID: &o.UID}); client.IgnoreNotFound(err) != nil {
		return err
	}
	r.m.engaged.remove(o.UID)
	return nil
}

// takes says whether an intercept keeps traffic from others.
func takes(in *v1alpha1.Intercept) bool {
	switch in.Spec.Mode {
	case v1alpha1.ModeWiretap, v1alpha1.ModeIngest, v1alpha1.ModeEgress:
		return false
	case v1alpha1.ModeIntercept, v1alpha1.ModeReplace:
	}
	return true
}

// rivals are the older intercepts that leave it open who gets some connection or request. A replaced container's ports are
// wholly one's own: there is no app to which the rest of the requests could go.
func (r *interceptReconciler) rivals(in *v1alpha1.Intercept, g engagement, ms []*match.Matcher) []rival {
	var out []rival
	for i := range r.all {
		o := &r.all[i]
		if o.UID == in.UID || !takes(o) || r.hasFailed(o) || !r.first(o, in) {
			continue
		}
		theirs, container := r.has(o)
		replaces := in.Spec.Mode == v1alpha1.ModeReplace || o.Spec.Mode == v1alpha1.ModeReplace
		if in.Spec.Mode == o.Spec.Mode && replaces && container == g.Container {
			out = append(out, rival{o, control.Port{}, container})
			continue
		}
		both := slices.IndexFunc(g.Ports, func(p control.Port) bool { return slices.Contains(theirs, p) })
		if both < 0 {
			continue
		}
		if replaces {
			out = append(out, rival{o, g.Ports[both], ""})
			continue
		}
		if others, err := matchers(&o.Spec); err == nil && conflicting(ms, others) {
			out = append(out, rival{o, g.Ports[both], ""})
		}
	}
	return out
}

// conflicting says whether some rule of one intercept is in the way of one of another.
func conflicting(a, b []*match.Matcher) bool {
	return slices.ContainsFunc(a, func(x *match.Matcher) bool {
		return slices.ContainsFunc(b, func(y *match.Matcher) bool { return match.Conflict(x, y) })
	})
}

// takeOver ends an intercept for another one. It stays as an object, which tells its laptop why.
func (r *interceptReconciler) takeOver(ctx context.Context, o rival, by *v1alpha1.Intercept) error {
	r.m.cfg.Log.Info("intercept is taken over", "intercept", o.Namespace+"/"+o.Name, "user", o.Spec.User, "by", by.Spec.User)
	r.m.engaged.remove(o.UID)
	r.ended(ctx, o.UID)
	st := v1alpha1.InterceptStatus{
		State: v1alpha1.InterceptFailed, Reason: "TakenOver", Session: o.Status.Session,
		Ports: o.Status.Ports, Taken: o.Status.Taken, Requests: o.Status.Requests, Container: o.Status.Container,
		Message: fmt.Sprintf("%s of %s was taken over by %s at %s", o.what(), o.Spec.Workload.Name, by.Spec.User, time.Now().Format(time.TimeOnly)),
	}
	return r.writeStatus(ctx, o.Intercept, st)
}

// has says which ports an intercept has, and which container. What is engaged is known here before the cache has the status that says so.
func (r *interceptReconciler) has(o *v1alpha1.Intercept) (ports []control.Port, container string) {
	if g, ok := r.m.engaged.get(o.UID); ok {
		return g.Ports, g.Container
	}
	for _, p := range o.Status.Ports {
		ports = append(ports, control.Port{Protocol: p.Protocol, Number: uint16(p.ContainerPort)})
	}
	return ports, o.Status.Container
}

// first says which of two intercepts was there first. Their times are in whole seconds: of the same second the one is that is in force. So is it where one of
// them waited for a laptop: its time is not when it came into force.
func (r *interceptReconciler) first(a, b *v1alpha1.Intercept) bool {
	declared := a.Spec.Session == "" || b.Spec.Session == ""
	if ha, hb := r.inForceOrActive(a), r.inForceOrActive(b); ha != hb && (declared || a.CreationTimestamp.Equal(&b.CreationTimestamp)) {
		return ha
	}
	return older(a, b)
}

func (r *interceptReconciler) inForceOrActive(in *v1alpha1.Intercept) bool {
	_, engaged := r.m.engaged.get(in.UID)
	return engaged || in.Status.State == v1alpha1.InterceptActive
}

// older orders two intercepts the same way for every replica.
func older(a, b *v1alpha1.Intercept) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.UID < b.UID
}
