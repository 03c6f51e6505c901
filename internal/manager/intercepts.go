package manager

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/kinds"
	"github.com/doppel-dev/doppel/internal/match"
)

// pendingPoll is how often an intercept that waits for pods is looked at again; events of agents wake it earlier.
const pendingPoll = 300 * time.Millisecond

// activePoll is how often an active intercept is checked against its pods.
const activePoll = 10 * time.Second

// interceptReconciler brings intercepts into force.
//
//	Pending ──every pod has an agent that knows it──▶ Active
//	   └──cannot be taken, or the cluster refuses the agent──▶ Failed (final: the laptop deletes it)
type interceptReconciler struct {
	m *Manager
	// restarted remembers for which intercepts a restart was asked for, so that a missed injection is noticed and not repeated for ever.
	restarted map[types.UID]restart
	// inForce remembers what has to be said when an intercept ends.
	inForce map[types.UID]record
	// names finds the UID of an intercept that is gone.
	names map[types.NamespacedName]types.UID
}

// restart is a restart of a workload that an intercept asked for.
type restart struct {
	workload workloadKey
	old      map[types.UID]bool // the pods that it is to replace
	at       time.Time
	done     bool // the intercept has been active since: pods that come up without an agent later are worth another
}

// problem is a reason for which an intercept can never become active.
type problem struct{ reason, msg string }

func (p *problem) Error() string { return p.msg }

func isNoWorkload(err error) bool {
	var p *problem
	return errors.As(err, &p) && p.reason == "NoWorkload"
}

func fail(reason, format string, args ...any) error {
	return &problem{reason, fmt.Sprintf(format, args...)}
}

func (r *interceptReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	defer r.m.notifyIntercepts() // what we were woken for is in the cache by now, and laptops want to know
	var in v1alpha1.Intercept
	err := r.m.ctrl.GetClient().Get(ctx, req.NamespacedName, &in)
	if apierrors.IsNotFound(err) {
		return reconcile.Result{}, r.gone(ctx, req.NamespacedName)
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	if uid, ok := r.names[req.NamespacedName]; ok && uid != in.UID { // deleted and created again under the same name
		if err := r.gone(ctx, req.NamespacedName); err != nil {
			return reconcile.Result{}, err
		}
	}
	r.names[req.NamespacedName] = in.UID
	sess, err := r.session(ctx, &in)
	if err != nil {
		return reconcile.Result{}, err
	}
	if sess == nil && in.Spec.Session == "" && in.Status.State != v1alpha1.InterceptFailed {
		r.m.engaged.remove(in.UID)
		r.ended(ctx, in.UID)
		return reconcile.Result{}, r.writeStatus(ctx, &in, v1alpha1.InterceptStatus{
			State: v1alpha1.InterceptPending, Message: "waiting for " + in.Spec.User + " to connect with --accept-intercepts",
		})
	}
	if sess == nil && in.Spec.Session != "" {
		r.m.cfg.Log.Info("intercept ended with its session", "intercept", req.NamespacedName.String())
		return reconcile.Result{}, client.IgnoreNotFound(r.m.ctrl.GetClient().Delete(ctx, &in, client.Preconditions{UID: &in.UID}))
	}
	if in.Status.State == v1alpha1.InterceptFailed {
		return reconcile.Result{}, nil
	}
	st, err := r.engage(ctx, &in, sess)
	var p *problem
	if errors.As(err, &p) {
		st = v1alpha1.InterceptStatus{State: v1alpha1.InterceptFailed, Reason: p.reason, Message: p.msg, Ports: st.Ports, Container: st.Container, Replace: st.Replace}
		r.m.engaged.remove(in.UID)
		r.ended(ctx, in.UID)
	} else if err != nil {
		return reconcile.Result{}, err
	}
	if in.Spec.Session == "" {
		st.Session = string(sess.UID)
	}
	if err := r.writeStatus(ctx, &in, st); err != nil {
		return reconcile.Result{}, err
	}
	switch st.State {
	case v1alpha1.InterceptPending:
		return reconcile.Result{RequeueAfter: pendingPoll}, nil
	case v1alpha1.InterceptActive:
		return reconcile.Result{RequeueAfter: activePoll}, nil
	case v1alpha1.InterceptFailed:
	}
	return reconcile.Result{}, nil
}

// session is the one that the intercept names or, if it names none, one that claims it: the one that has it already, or else the newest.
func (r *interceptReconciler) session(ctx context.Context, in *v1alpha1.Intercept) (*v1alpha1.Session, error) {
	if in.Spec.Session != "" {
		return r.m.sessionByUID(ctx, types.UID(in.Spec.Session))
	}
	var list v1alpha1.SessionList
	if err := r.m.ctrl.GetClient().List(ctx, &list, client.InNamespace(r.m.cfg.Namespace)); err != nil {
		return nil, err
	}
	var best *v1alpha1.Session
	for i := range list.Items {
		s := &list.Items[i]
		if s.Spec.User != in.Spec.User || !s.Spec.AcceptIntercepts || r.m.laptops.tunnel(s.UID) == nil {
			continue
		}
		if string(s.UID) == in.Status.Session {
			return s, nil
		}
		if best == nil || best.CreationTimestamp.Before(&s.CreationTimestamp) {
			best = s
		}
	}
	return best, nil
}

// engage does the next step for an intercept and says where it stands.
func (r *interceptReconciler) engage(ctx context.Context, in *v1alpha1.Intercept, sess *v1alpha1.Session) (v1alpha1.InterceptStatus, error) {
	st := v1alpha1.InterceptStatus{State: v1alpha1.InterceptPending}
	if sess.Spec.User != in.Spec.User {
		return st, fail("ForeignSession", "the session belongs to another user")
	}
	if target, err := netip.ParseAddrPort(in.Spec.Target); in.Spec.Session == "" && (err != nil || !target.Addr().IsLoopback()) {
		return st, fail("BadTarget", "spec.target is %q and has to be an address of the laptop's loopback with a port, such as 127.0.0.1:3000", in.Spec.Target)
	}
	if len(r.m.allowed) > 0 && !slices.Contains(r.m.allowed, in.Namespace) {
		return st, fail("NamespaceNotAllowed", "the administrator does not allow intercepts in namespace %s", in.Namespace)
	}
	w, err := r.m.loadWorkload(ctx, in.Namespace, in.Spec.Workload)
	if _, replaced := r.restarted[in.UID]; replaced && in.Spec.Workload.Kind == kinds.Pod && isNoWorkload(err) {
		st.Message = "waiting until pod " + in.Spec.Workload.Name + " is made again"
		return st, nil
	}
	if err != nil {
		return st, err
	}
	facts, err := r.m.facts(ctx, in.Namespace)
	if err != nil {
		return st, err
	}
	ports := inject.Ports(&w.Template.Spec, w.Template.Labels, facts)
	egress := in.Spec.Mode == v1alpha1.ModeEgress
	var port inject.Taken
	if egress {
		port, err = inject.Any(ports)
	} else {
		port, err = inject.Find(ports, in.Spec.Port, in.Spec.Service, in.Spec.Container)
	}
	var pe *inject.PortError
	if errors.As(err, &pe) {
		return st, fail(pe.Reason, "%s %s has %s", in.Spec.Workload.Kind, in.Spec.Workload.Name, pe.Msg)
	}
	st.Container = port.Container
	st.Ports = []v1alpha1.InterceptedPort{{
		Protocol: string(port.Protocol), ContainerPort: int32(port.ContainerPort), Service: port.Via().Service, ServicePort: port.Via().Port, Way: string(port.Way),
	}}
	m, err := match.Compile(in.Spec.HTTP.Rule())
	if err != nil {
		return st, fail("BadMatch", "the match cannot be used: %v", err)
	}
	if port.Protocol != corev1.ProtocolTCP && !m.Rule().IsZero() {
		return st, fail("BadMatch", "port %d of %s is a %s port: HTTP requests come over TCP", port.ContainerPort, in.Spec.Workload.Name, port.Protocol)
	}
	if !egress {
		if st.Message, err = r.conflict(ctx, in, port, m); err != nil || st.Message != "" {
			return st, err
		}
	}
	r.m.engaged.set(engagement{
		UID: in.UID, Session: sess.UID, Workload: w.key, Protocol: string(port.Protocol), Port: port.ContainerPort, Match: m.Rule(), Egress: egress, ToPod: in.Spec.ToPod,
	})
	st, err = r.progress(ctx, in, w, port, st)
	if _, told := r.inForce[in.UID]; err == nil && st.State == v1alpha1.InterceptActive && !told {
		r.inForce[in.UID] = newRecord(in, sess, w, port)
		r.m.tell(ctx, in.UID, r.inForce[in.UID], eventBegan)
	}
	return st, err
}

// progress has the workload's pods replaced if they lack the agent, and otherwise counts the agents that know the intercept.
func (r *interceptReconciler) progress(ctx context.Context, in *v1alpha1.Intercept, w *workload, port inject.Taken, st v1alpha1.InterceptStatus) (v1alpha1.InterceptStatus, error) {
	re, restarted := r.restarted[in.UID]
	restarted = restarted && !re.done
	if restarted {
		if err := r.m.failedCreate(ctx, w, re.at); err != nil {
			return st, err
		}
	}
	view := w.view(string(port.Protocol), port.ContainerPort, re.old, func(pod types.UID) bool { return r.m.agents.serves(pod, in.UID) })
	st.Agents = int32(view.serving)
	for i := range w.pods {
		r.m.agents.wantCall(&w.pods[i])
	}
	if view.trouble != "" {
		if p, _ := w.broken(); p != nil && w.How != kinds.ByController {
			st.Replace = &v1alpha1.PodRef{Name: p.Name, UID: string(p.UID)}
		}
		return st, fail("AgentNotStarted", "%s", view.trouble)
	}
	switch {
	case !w.Observed: // the controller has not seen the last change yet
		st.Message = "waiting for the rolling restart to begin"
	case view.missing > 0 && !restarted:
		if in.Status.State == v1alpha1.InterceptActive {
			r.m.cfg.Log.Warn("pods without an agent behind an active intercept", "intercept", in.Namespace+"/"+in.Name, "pods", view.missing)
		}
		if reason, msg := w.cannotReplace(port, in.Spec.Recreate); msg != "" {
			return st, fail(reason, "%s", msg)
		}
		if err := r.admits(ctx, w, port); err != nil {
			return st, err
		}
		if w.How == kinds.ByController {
			if err := w.restart(ctx, r.m.ctrl.GetClient()); err != nil {
				return st, fail("RestartRefused", "the workload could not be restarted: %v", err)
			}
		}
		r.restarted[in.UID] = restart{workload: w.key, at: time.Now(), old: w.withoutAgent(string(port.Protocol), port.ContainerPort)}
		st.Message = "restarting the workload to install the traffic-agent"
	case view.missing > 0:
		return st, fail("NotInjected", "pod %s came up without a traffic-agent: the API server did not reach the agent-injector webhook", view.missingPod)
	case view.waiting > 0 || view.serving < int(w.Replicas) && view.draining == 0 && (restarted || view.serving == 0):
		st.Message = fmt.Sprintf("waiting for the traffic-agents of %d pods (%d ready)%s", max(view.waiting+view.serving, int(w.Replicas)), view.serving, view.because())
	case view.draining > 0:
		st.Message = fmt.Sprintf("waiting for %d old pods to leave the service", view.draining)
		if p := w.next(re.old); p != nil && w.How != kinds.ByController {
			st.Message = fmt.Sprintf("replacing pod %s (%d to go)", p.Name, view.draining)
			st.Replace = &v1alpha1.PodRef{Name: p.Name, UID: string(p.UID)}
		}
	case restarted && view.fresh > 0 && w.Why != "": // where there is a gap, nobody else answers until clients know of the new pods
		st.Message = fmt.Sprintf("waiting until clients know of %d new pods", view.fresh)
	default:
		st.State = v1alpha1.InterceptActive
		if restarted {
			re.done = true
			r.restarted[in.UID] = re
		}
	}
	return st, nil
}

// admits refuses, before anything is restarted, pods that the namespace would not let in (Pod Security Admission, KEP-2579).
func (r *interceptReconciler) admits(ctx context.Context, w *workload, port inject.Taken) error {
	if port.Way != agentcfg.ByRedirect {
		return nil
	}
	var ns corev1.Namespace
	if err := r.m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Name: w.key.Namespace}, &ns); err != nil {
		return client.IgnoreNotFound(err)
	}
	if level := ns.Labels["pod-security.kubernetes.io/enforce"]; level == "baseline" || level == "restricted" {
		return fail("PodSecurity", "port %d has to be redirected by a container with NET_ADMIN, which the pod security standard of namespace %s (%s) does not let in", port.ContainerPort, ns.Name, level)
	}
	return nil
}

// conflict refuses a port that an older intercept of the same workload holds, or requests of it that both would take; the answer names the holder.
// A laptop that is away blocks nobody: its own user takes the port over at once, others wait for the end of its session.
func (r *interceptReconciler) conflict(ctx context.Context, in *v1alpha1.Intercept, port inject.Taken, m *match.Matcher) (wait string, err error) {
	var list v1alpha1.InterceptList
	if err := r.m.ctrl.GetClient().List(ctx, &list, client.InNamespace(in.Namespace)); err != nil {
		return "", err
	}
	for i := range list.Items {
		o := &list.Items[i]
		if o.UID == in.UID || o.Spec.Mode == v1alpha1.ModeEgress || o.Spec.Workload != in.Spec.Workload || o.Status.State == v1alpha1.InterceptFailed || !older(o, in) || !r.takes(o, port) {
			continue
		}
		om, err := match.Compile(o.Spec.HTTP.Rule())
		if err != nil || !match.Compare(m, om).Conflict() {
			continue
		}
		what := ""
		if rule := o.Spec.HTTP.Rule(); !rule.IsZero() {
			what = " for requests with " + rule.String() + ","
		}
		holder := fmt.Sprintf("port %d of %s is intercepted%s by %s (intercept %s since %s)", port.ContainerPort, in.Spec.Workload.Name, what, o.Spec.User, o.Spec.Name, o.CreationTimestamp.Format(time.TimeOnly))
		switch {
		case in.Spec.Takeover:
			if err := r.takeOver(ctx, o, in, port); err != nil {
				return "", err
			}
		case r.m.laptops.tunnel(types.UID(o.Holder())) != nil:
			return "", fail("PortHeld", "%s", holder)
		case o.Spec.User == in.Spec.User:
			r.m.cfg.Log.Info("intercept of a lost laptop makes way", "intercept", o.Namespace+"/"+o.Name, "user", o.Spec.User)
			if err := r.m.ctrl.GetClient().Delete(ctx, o, client.Preconditions{UID: &o.UID}); client.IgnoreNotFound(err) != nil {
				return "", err
			}
			r.m.engaged.remove(o.UID)
		default:
			return holder + ", whose laptop is away: waiting for the end of its session", nil
		}
	}
	return "", nil
}

// takeOver ends an intercept for another one. It stays as an object, which tells its laptop why.
func (r *interceptReconciler) takeOver(ctx context.Context, o, by *v1alpha1.Intercept, port inject.Taken) error {
	r.m.cfg.Log.Info("intercept is taken over", "intercept", o.Namespace+"/"+o.Name, "user", o.Spec.User, "by", by.Spec.User)
	r.m.engaged.remove(o.UID)
	r.ended(ctx, o.UID)
	st := v1alpha1.InterceptStatus{
		State: v1alpha1.InterceptFailed, Reason: "TakenOver", Session: o.Status.Session, Ports: o.Status.Ports, Container: o.Status.Container,
		Message: fmt.Sprintf("port %d of %s was taken over by %s at %s", port.ContainerPort, o.Spec.Workload.Name, by.Spec.User, time.Now().Format(time.TimeOnly)),
	}
	return r.writeStatus(ctx, o, st)
}

// takes says whether an intercept has the port. What is engaged is known here before the cache has the status that says so.
func (r *interceptReconciler) takes(o *v1alpha1.Intercept, port inject.Taken) bool {
	if g, ok := r.m.engaged.get(o.UID); ok {
		return g.Port == port.ContainerPort && g.Protocol == string(port.Protocol)
	}
	return slices.ContainsFunc(o.Status.Ports, func(p v1alpha1.InterceptedPort) bool {
		return p.ContainerPort == int32(port.ContainerPort) && p.Protocol == string(port.Protocol)
	})
}

// older orders two intercepts the same way for every replica.
func older(a, b *v1alpha1.Intercept) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.UID < b.UID
}

// gone takes an intercept out of force. A workload that its agents kept from coming up is restarted without them.
func (r *interceptReconciler) gone(ctx context.Context, name types.NamespacedName) error {
	uid, ok := r.names[name]
	if !ok {
		return nil
	}
	r.m.engaged.remove(uid)
	r.ended(ctx, uid)
	if re, ok := r.restarted[uid]; ok {
		if err := r.heal(ctx, re); err != nil {
			return err // and look again
		}
	}
	delete(r.restarted, uid)
	delete(r.names, name)
	return nil
}

// ended tells of the end of an intercept that was in force.
func (r *interceptReconciler) ended(ctx context.Context, uid types.UID) {
	if rec, ok := r.inForce[uid]; ok {
		delete(r.inForce, uid)
		r.m.tell(ctx, uid, rec, eventEnded)
	}
}

// heal restarts a workload whose agents could not start, once nobody intercepts it any more: its pods then come up without them.
func (r *interceptReconciler) heal(ctx context.Context, re restart) error {
	key := re.workload
	if len(r.m.engaged.of(key)) > 0 {
		return nil
	}
	w, err := r.m.loadWorkload(ctx, key.Namespace, v1alpha1.WorkloadRef{Kind: key.Kind, Name: key.Name})
	var p *problem
	if errors.As(err, &p) {
		return nil // the workload is gone too
	}
	if err == nil {
		err = r.m.failedCreate(ctx, w, re.at)
	}
	if err != nil {
		return err
	}
	if _, broken := w.broken(); !broken || w.How != kinds.ByController { // pods that are replaced by deletion are the laptop's to replace
		return nil
	}
	r.m.cfg.Log.Info("restarting a workload whose agents did not start", "workload", key.Name)
	return w.restart(ctx, r.m.ctrl.GetClient())
}

func (r *interceptReconciler) writeStatus(ctx context.Context, in *v1alpha1.Intercept, st v1alpha1.InterceptStatus) error {
	if statusEqual(in.Status, st) {
		return nil
	}
	base := in.DeepCopy()
	// The cache may be behind our own last write: the patch carries every field, not only those that differ from what the cache has.
	base.Status = v1alpha1.InterceptStatus{State: "-", Reason: "-", Message: "-", Container: "-", Session: "-", Agents: -1, Replace: &v1alpha1.PodRef{Name: "-", UID: "-"}, Ports: []v1alpha1.InterceptedPort{{Protocol: "-"}}}
	in.Status = st
	r.m.cfg.Log.Info("intercept", "intercept", in.Namespace+"/"+in.Name, "user", in.Spec.User, "state", st.State, "detail", st.Message)
	return client.IgnoreNotFound(r.m.ctrl.GetClient().Status().Patch(ctx, in, client.MergeFrom(base)))
}

func statusEqual(a, b v1alpha1.InterceptStatus) bool {
	return a.State == b.State && a.Reason == b.Reason && a.Message == b.Message && a.Agents == b.Agents && a.Container == b.Container && a.Session == b.Session && slices.Equal(a.Ports, b.Ports) && reflect.DeepEqual(a.Replace, b.Replace)
}

// facts reads what decides how ports of pods in the namespace can be taken.
func (m *Manager) facts(ctx context.Context, ns string) (inject.Facts, error) {
	var svcs corev1.ServiceList
	if err := m.ctrl.GetClient().List(ctx, &svcs, client.InNamespace(ns)); err != nil {
		return inject.Facts{}, err
	}
	var pols networkingv1.NetworkPolicyList
	if err := m.ctrl.GetAPIReader().List(ctx, &pols, client.InNamespace(ns)); err != nil {
		return inject.Facts{}, err
	}
	return inject.Facts{Services: svcs.Items, NetworkPolicies: pols.Items}, nil
}
