package manager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/kinds"
	"github.com/doppel-dev/doppel/internal/match"
)

// pendingPoll is how often an intercept that waits for pods is looked at again; events of agents wake it earlier.
const pendingPoll = 300 * time.Millisecond

// activePoll is how often a workload is looked at whose intercepts are active or wait for a laptop, but not more than one in each activeEach: with thousands,
// nothing else would be done.
const (
	activePoll = 10 * time.Second
	activeEach = 100 * time.Millisecond
)

// interceptReconciler brings the intercepts of one workload into force.
//
//	Pending ──every pod has an agent that knows it──▶ Active
//	   └──cannot be taken, or the cluster refuses the agent──▶ Failed (final: the laptop deletes it)
type interceptReconciler struct {
	m *Manager
	// restarted remembers for which intercepts a restart was asked for, so that a missed injection is noticed and not repeated for ever.
	restarted map[types.UID]restart
	// inForce remembers what has to be said when an intercept ends.
	inForce map[types.UID]record
	// seen is when an intercept was looked at for the first time: all that are not gone.
	seen map[types.UID]time.Time
	// missed is since when, without a break, the API server has not reached the webhook for the sake of an intercept.
	missed map[types.UID]time.Time
	// failed are those that stay so, which the cache may not know yet.
	failed map[types.UID]bool
	// quiet is for how long the object of a new intercept does not say what it waits for: pendingPoll.
	quiet time.Duration

	// of one look
	all     []v1alpha1.Intercept // the oldest first
	reading *reading             // nil: nobody has needed it yet
}

func newInterceptReconciler(m *Manager) *interceptReconciler {
	return &interceptReconciler{
		m: m, restarted: map[types.UID]restart{}, inForce: map[types.UID]record{}, seen: map[types.UID]time.Time{}, missed: map[types.UID]time.Time{}, failed: map[types.UID]bool{}, quiet: pendingPoll,
	}
}

// reading is a workload as the API server has it, and what decides about its ports.
type reading struct {
	w            *workload
	facts        inject.Facts
	err, noFacts error // why w and facts are not known
}

// read reads the workload, once for all of its intercepts. An error about the workload is told before one about the facts.
func (r *interceptReconciler) read(ctx context.Context, in *v1alpha1.Intercept) *reading {
	if r.reading == nil {
		now := &reading{}
		var facts errgroup.Group // beside the workload: each is a question to the API server, and somebody waits
		facts.Go(func() error {
			now.facts, now.noFacts = r.m.facts(ctx, in.Namespace)
			return nil
		})
		now.w, now.err = r.m.loadWorkload(ctx, in.Namespace, in.Spec.Workload)
		_ = facts.Wait() // none
		r.reading = now
	}
	return r.reading
}

// restart is a restart of a workload that an intercept asked for.
type restart struct {
	old   map[types.UID]bool // the pods that it is to replace
	at    time.Time
	done  bool // the intercept has been active since: pods that come up without an agent later are worth another
	again bool // its pods came up without an agent while this leader was new (see progress), and it is the second one
	// blocked is since when, without a break, pods could not be created for a reason that passes.
	blocked time.Time
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

// begin looks which intercepts there are, and ends what was in force of those that are gone.
func (r *interceptReconciler) begin(ctx context.Context, key workloadKey) error {
	var list v1alpha1.InterceptList
	if err := r.m.ctrl.GetClient().List(ctx, &list, client.MatchingFields{workloadIndex: key.String()}); err != nil {
		return err
	}
	r.all, r.reading = list.Items, nil
	slices.SortFunc(r.all, func(a, b v1alpha1.Intercept) int {
		if older(&a, &b) {
			return -1
		}
		return 1
	})
	there := map[types.UID]bool{}
	for i := range r.all {
		there[r.all[i].UID] = true
	}
	var errs []error
	for uid := range r.seen {
		if !there[uid] {
			errs = append(errs, r.gone(ctx, key, uid))
		}
	}
	return errors.Join(errs...)
}

// look takes the next step for one of them.
func (r *interceptReconciler) look(ctx context.Context, in *v1alpha1.Intercept) (reconcile.Result, error) {
	if _, known := r.seen[in.UID]; !known {
		r.seen[in.UID] = time.Now()
	}
	sess, err := r.session(ctx, in)
	if err != nil {
		return reconcile.Result{}, err
	}
	if sess == nil && in.Spec.Session != "" {
		r.m.cfg.Log.Info("intercept ended with its session", "intercept", in.Namespace+"/"+in.Name)
		return reconcile.Result{}, client.IgnoreNotFound(r.m.ctrl.GetClient().Delete(ctx, in, client.Preconditions{UID: &in.UID}))
	}
	if r.hasFailed(in) {
		return reconcile.Result{}, nil
	}
	if err := r.m.withheld(in); err != nil {
		r.m.lookedAt(in)
		return reconcile.Result{}, r.writeStatus(ctx, in, v1alpha1.InterceptStatus{State: v1alpha1.InterceptFailed, Reason: err.reason, Message: err.msg})
	}
	if sess == nil && in.Spec.Session == "" {
		r.m.lookedAt(in)
		r.m.engaged.remove(in.UID)
		r.ended(ctx, in.UID)
		delete(r.missed, in.UID)
		if r.soon(in) {
			return reconcile.Result{RequeueAfter: pendingPoll}, nil
		}
		return reconcile.Result{RequeueAfter: activePoll}, r.writeStatus(ctx, in, v1alpha1.InterceptStatus{
			State: v1alpha1.InterceptPending, Message: "waiting for " + in.Spec.User + " to connect with --accept-intercepts",
		})
	}
	st, err := r.engage(ctx, in, sess)
	var p *problem
	if errors.As(err, &p) {
		st = v1alpha1.InterceptStatus{State: v1alpha1.InterceptFailed, Reason: p.reason, Message: p.msg, Ports: st.Ports, Container: st.Container, Replace: st.Replace}
		r.m.engaged.remove(in.UID)
		r.ended(ctx, in.UID)
	} else if err != nil {
		return reconcile.Result{}, err
	}
	r.m.lookedAt(in)
	if st.State == v1alpha1.InterceptPending && r.wasActive(in) {
		st.Reason = reasonInterrupted
	}
	if in.Spec.Session == "" {
		st.Session = string(sess.UID)
	}
	if st.State == v1alpha1.InterceptPending && r.soon(in) {
		return reconcile.Result{RequeueAfter: pendingPoll}, nil
	}
	if err := r.writeStatus(ctx, in, st); err != nil {
		return reconcile.Result{}, err
	}
	if rec := r.inForce[in.UID]; rec.untold {
		rec.untold = false
		r.inForce[in.UID] = rec
		r.m.tell(ctx, in.UID, rec, eventBegan)
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

// reasonInterrupted is why an intercept is pending that was active.
const reasonInterrupted = "Interrupted"

// wasActive says so also of what was active under another leader.
func (r *interceptReconciler) wasActive(in *v1alpha1.Intercept) bool {
	_, ok := r.inForce[in.UID]
	return ok || in.Status.State == v1alpha1.InterceptActive || in.Status.Reason == reasonInterrupted
}

// hasFailed says so for good.
func (r *interceptReconciler) hasFailed(in *v1alpha1.Intercept) bool {
	return in.Status.State == v1alpha1.InterceptFailed || r.failed[in.UID]
}

// soon says of an intercept that is pending that it has only just been made, and nothing had to be restarted for it: most of these are active in a moment,
// which an object that says what they wait for would only delay. One that was active under another leader is, as soon as its agents and laptop have come to us.
func (r *interceptReconciler) soon(in *v1alpha1.Intercept) bool {
	if _, restarted := r.restarted[in.UID]; restarted {
		return false
	}
	if in.Status.State == v1alpha1.InterceptActive {
		return r.m.newLeader()
	}
	return in.Status.State == "" && time.Since(r.seen[in.UID]) < r.quiet
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
		if s.Spec.User != in.Spec.User || !s.Spec.AcceptIntercepts {
			continue
		}
		away := r.m.laptops.tunnel(s.UID) == nil
		if string(s.UID) == in.Status.Session && (!away || in.Spec.Mode == v1alpha1.ModeReplace) { // a replaced app comes back with the session's end only
			return s, nil
		}
		if string(s.UID) == in.Status.Session && r.m.newLeader() && !r.m.laptops.wasHere(s.UID) { // it may be about to come
			return nil, nil
		}
		if away {
			continue
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
	for _, p := range in.Spec.Ports {
		if target, err := netip.ParseAddrPort(p.Target); in.Spec.Session == "" && p.Target != "" && (err != nil || !target.Addr().IsLoopback()) {
			return st, fail("BadTarget", "a target in spec.ports is %q and has to be an address of the laptop's loopback with a port, such as 127.0.0.1:3000", p.Target)
		}
	}
	if !r.m.responsible(in.Namespace) {
		return st, fail("NamespaceNotAllowed", "the administrator does not allow intercepts in namespace %s", in.Namespace)
	}
	now := r.read(ctx, in)
	w, facts, err := now.w, now.facts, now.err
	if _, replaced := r.restarted[in.UID]; replaced && in.Spec.Workload.Kind == kinds.Pod && isNoWorkload(err) {
		st.Message = "waiting until pod " + in.Spec.Workload.Name + " is made again"
		return st, nil
	}
	if err != nil {
		return st, err
	}
	if agentcfg.Forbids(w.Template.Annotations) { // at once, also where old pods still have an agent
		return st, fail("CannotInject", "the pods of %s cannot have a traffic-agent: %v", w.Name(), inject.ErrForbidden)
	}
	if r.m.cfg.Injection == InjectEnabledOnly && !agentcfg.Keeps(w.Template.Annotations) {
		return st, fail("NotEnabled", "%s may not be intercepted: its pod template does not say %s: %s, and the administrator allows others to have no traffic-agent (agent.injection: %s)",
			w.Name(), agentcfg.AnnotationInject, agentcfg.InjectEnabled, InjectEnabledOnly)
	}
	if now.noFacts != nil {
		return st, now.noFacts
	}
	container, taken, err := wanted(in, w.Template, inject.Ports(&w.Template.Spec, w.Template.Labels, facts))
	if err != nil {
		return st, err
	}
	ms, err := matchers(&in.Spec)
	if err != nil {
		return st, err
	}
	st.Requests = requestsOf(&in.Spec)
	byRequest := st.Requests != ""
	replaces := in.Spec.Mode == v1alpha1.ModeReplace
	if replaces && byRequest {
		return st, fail("BadMatch", "a container is replaced for all requests: there is nobody left to answer the others")
	}
	if replaces && w.How != kinds.ByController {
		return st, fail("CannotReplace", "%s has pods that no controller replaces when its template changes: if the laptop were gone, nothing would bring the app back", w.Name())
	}
	st.Container = container
	var ports []control.Port
	var words []string
	for _, p := range taken {
		words = append(words, fmt.Sprintf("%d/%s", p.ContainerPort, p.Protocol))
		st.Taken = strings.Join(words, ", ")
		st.Ports = append(st.Ports, v1alpha1.InterceptedPort{
			Protocol: string(p.Protocol), ContainerPort: int32(p.ContainerPort), Service: p.Via().Service, ServicePort: p.Via().Port, Way: string(p.Way),
		})
		ports = append(ports, portOf(p))
		if p.Protocol != corev1.ProtocolTCP && byRequest {
			return st, fail("BadMatch", "port %d of %s is a %s port: HTTP requests come over TCP", p.ContainerPort, in.Spec.Workload.Name, p.Protocol)
		}
		if byRequest {
			if err := refuseTLS(w, p, facts); err != nil {
				return st, err
			}
		}
	}
	g := engagement{UID: in.UID, Session: sess.UID, User: in.Spec.User, Workload: w.key, Ports: ports, Rules: rulesOf(ms), Preview: in.Spec.Preview, Mode: in.Spec.Mode, ToPod: in.Spec.ToPod}
	if replaces {
		g.Container = container
	}
	if p := in.Spec.Preview; p != nil { // an ID is not secret to those who may read intercepts
		if o, ok := r.m.engaged.preview(p.ID); ok && o.User != in.Spec.User {
			return st, fail("PreviewHeld", "the preview is that of an intercept of %s", o.User)
		}
	}
	if in.Spec.Mode != v1alpha1.ModeEgress && in.Spec.Mode != v1alpha1.ModeWiretap {
		g.Shown = container
		g.Hosts, g.OwnDNS = hostsOf(&w.Template.Spec), ownDNS(&w.Template.Spec)
	}
	if size, ok := r.m.engaged.fits(g); !ok {
		return st, fail("TooMuch", "the intercepts of %s would be too much for its traffic-agents: %d bytes of ports and matches with this one, of at most %d", w.Name(), size, maxTable)
	}
	if takes(in) {
		if st.Message, err = r.conflict(ctx, in, g, ms, w, taken); err != nil || st.Message != "" {
			return st, err
		}
	}
	for _, o := range r.m.engaged.of(w.key) {
		if o.Ending && takes(in) && g.follows(o) { // what it still has is this one's now
			r.m.engaged.remove(o.UID)
		}
	}
	if !r.m.engaged.set(g) { // since we looked
		return st, fail("PreviewHeld", "the preview is that of somebody else's intercept")
	}
	st, err = r.progress(ctx, in, w, taken, st)
	if err == nil && st.State == v1alpha1.InterceptActive && byRequest {
		st.Message = cmp.Or(st.Message, r.m.agents.noteOn(w.key, ports))
	}
	if _, told := r.inForce[in.UID]; err == nil && st.State == v1alpha1.InterceptActive && !told {
		r.inForce[in.UID] = newRecord(in, sess, w, container, taken)
	}
	return st, err
}

// matchers are the compiled rules of an intercept.
func matchers(spec *v1alpha1.InterceptSpec) ([]*match.Matcher, error) {
	if spec.Preview != nil && spec.Mode != "" && spec.Mode != v1alpha1.ModeIntercept {
		return nil, fail("BadMatch", "only an intercept has a preview, and this is of mode %s", spec.Mode)
	}
	var out []*match.Matcher
	for _, rule := range spec.Rules() {
		m, err := match.Compile(rule)
		if err != nil {
			return nil, fail("BadMatch", "the match cannot be used: %v", err)
		}
		out = append(out, m)
	}
	return out, nil
}

func rulesOf(ms []*match.Matcher) []match.Rule {
	var out []match.Rule
	for _, m := range ms {
		out = append(out, m.Rule())
	}
	return out
}

// requestsOf says in words which HTTP requests an intercept takes; "": all connections.
func requestsOf(spec *v1alpha1.InterceptSpec) string {
	var out []string
	if spec.Preview != nil {
		out = append(out, "requests of a preview")
	}
	switch rule := spec.HTTP.Rule(); {
	case !rule.IsZero():
		out = append(out, "requests with "+rule.String())
	case spec.HTTP != nil || spec.Preview == nil:
		return ""
	}
	return strings.Join(out, " and ")
}

// wanted are the container and the ports that an intercept is about, among those of its workload.
func wanted(in *v1alpha1.Intercept, pod *corev1.PodTemplateSpec, all []inject.Taken) (container string, taken []inject.Taken, err error) {
	var names []string
	for _, p := range in.Spec.Ports {
		names = append(names, p.Port)
	}
	switch in.Spec.Mode {
	case v1alpha1.ModeEgress:
		taken, err = inject.Any(all)
	case v1alpha1.ModeReplace:
		container, taken, err = inject.FindContainer(&pod.Spec, all, names, in.Spec.Service, in.Spec.Container)
	case v1alpha1.ModeIngest:
		container, err = inject.FindApp(pod, in.Spec.Container)
	case v1alpha1.ModeIntercept, v1alpha1.ModeWiretap:
		fallthrough
	default:
		taken, err = inject.Find(all, names, in.Spec.Service, in.Spec.Container)
	}
	var pe *inject.PortError
	if errors.As(err, &pe) {
		return "", nil, fail(pe.Reason, "%s %s has %s", in.Spec.Workload.Kind, in.Spec.Workload.Name, pe.Msg)
	}
	if err == nil && container == "" {
		container = taken[0].Container
	}
	return container, taken, err
}

func portOf(t inject.Taken) control.Port {
	return control.Port{Protocol: string(t.Protocol), Number: t.ContainerPort}
}

// progress has the workload's pods replaced if they lack the agent, and otherwise counts the agents that know the intercept.
func (r *interceptReconciler) progress(ctx context.Context, in *v1alpha1.Intercept, w *workload, taken []inject.Taken, st v1alpha1.InterceptStatus) (v1alpha1.InterceptStatus, error) {
	g, _ := r.m.engaged.get(in.UID)
	f := r.fit(in, g)
	r.adopt(in, w, f)
	re, restarted := r.restarted[in.UID]
	restarted = restarted && !re.done
	view, err := r.view(ctx, in, w, f)
	if err != nil {
		return st, err
	}
	if view.missing == 0 {
		delete(r.missed, in.UID)
	}
	st.Agents = int32(view.serving)
	for i := range w.pods {
		r.m.agents.wantCall(&w.pods[i])
	}
	if in.Spec.Mode != v1alpha1.ModeEgress && in.Status.State != v1alpha1.InterceptActive && view.missing == 0 && !restarted && r.m.agents.onAll(w) {
		r.proven(in, w, taken) // it will be asked for, and takes as long as the agents need to be told
	}
	if in.Spec.Mode == v1alpha1.ModeIngest && view.serving > 0 { // one pod has all that there is to have; the others may be as they are
		return r.activated(in.UID, st), nil
	}
	if view.trouble != "" && view.ran && r.wasActive(in) && !restarted { // a container that was killed twice comes back; the other agents go on
		st.Message = view.trouble
		return st, nil
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
	case view.missing > 0 && (!restarted || r.m.newLeader() && !re.again): // the API server may have asked the webhook of the leader before, which has just ended
		if in.Status.State == v1alpha1.InterceptActive {
			r.m.cfg.Log.Warn("pods without an agent behind an active intercept", "intercept", in.Namespace+"/"+in.Name, "pods", view.missing)
		}
		if wait, err := r.mayRestart(ctx, in, g, w, taken, f); err != nil || wait != "" {
			st.Message = wait
			return st, err
		}
		if w.How == kinds.ByController {
			r.reading = nil
			if err := w.restart(ctx, r.m); refused(err) {
				return st, fail("RestartRefused", "the workload could not be restarted: %v", err)
			} else if err != nil {
				st.Message = fmt.Sprintf("the workload could not be restarted, which is tried again: %v", err)
				return st, nil
			}
		} else { // a pod may have been let in before the webhook knew what is wanted
			var err error
			if w.pods, err = r.m.podsOf(ctx, &w.Info); err != nil {
				return st, err
			}
		}
		r.restarted[in.UID] = restart{at: time.Now(), old: w.withoutAgent(f, anyPod), again: restarted}
		st.Message = "restarting the workload to install the traffic-agent"
	case view.missing > 0:
		return st, fail("NotInjected", "pod %s came up without a traffic-agent: the API server did not reach the agent-injector webhook", view.missingPod)
	case view.waiting > 0 || view.serving < int(w.Replicas) && view.draining == 0 && (restarted || view.serving == 0):
		st.Message = fmt.Sprintf("waiting for the traffic-agents of %d pods (%d ready)%s", max(view.waiting+view.serving, int(w.Replicas)), view.serving, view.because())
	case view.draining > 0:
		st.Message = fmt.Sprintf("waiting for %d old pods to leave the service%s", view.draining, view.because())
		if p := w.next(re.old); p != nil && w.How != kinds.ByController {
			st.Message = fmt.Sprintf("replacing pod %s (%d to go)", p.Name, view.draining)
			st.Replace = &v1alpha1.PodRef{Name: p.Name, UID: string(p.UID)}
		}
	case restarted && view.fresh > 0 && w.Why != "": // where there is a gap, nobody else answers until clients know of the new pods
		st.Message = fmt.Sprintf("waiting until clients know of %d new pods", view.fresh)
	default:
		if in.Spec.Mode == v1alpha1.ModeEgress { // nothing comes to it
			return r.activated(in.UID, st), nil
		}
		problem, known := r.proven(in, w, taken)
		if st.Message = problem; !known && in.Status.State != v1alpha1.InterceptActive {
			st.Message = "making sure that connections arrive"
			return st, nil
		}
		return r.activated(in.UID, st), nil
	}
	return st, nil
}

// webhookPatience is how long the API server may not reach the webhook, until an intercept that needs a restart is given up. kube-proxy and network
// policies may take as long to know a new pod of ours, and a new leader has leaderNew.
const webhookPatience = 2 * time.Second

// view is what the pods mean for an intercept. That more of them cannot be created keeps it from becoming active while they are replaced for it; otherwise
// its agents are there or not.
func (r *interceptReconciler) view(ctx context.Context, in *v1alpha1.Intercept, w *workload, f fit) (podsView, error) {
	of, re := r.underWay(in.UID)
	why := ""
	if of != "" {
		var err error
		if why, err = r.m.cannotCreate(ctx, w, re.at); err != nil {
			return podsView{}, err
		}
		if !passes(why) || w.ending() {
			re.blocked = time.Time{}
		} else if re.blocked.IsZero() {
			re.blocked = time.Now()
		}
		r.restarted[of] = re
	}
	now := *w
	if now.Failure = why; passes(why) && (re.blocked.IsZero() || time.Since(re.blocked) < quotaPatience) {
		now.Failure = ""
	}
	v := now.view(r.m.clock, f, re.old, func(pod types.UID) bool { return r.m.agents.serves(pod, in.UID) })
	if why != "" {
		v.unready = w.blocked(why)
	}
	return v, nil
}

// underWay is the restart that an intercept waits for: its own or, if it asked for none, another's, which replaces the same pods. The agents that come
// with it are for both, unless they came before the webhook knew of this one.
func (r *interceptReconciler) underWay(uid types.UID) (of types.UID, re restart) {
	if re, ok := r.restarted[uid]; ok {
		if re.done {
			uid = ""
		}
		return uid, re
	}
	for other, o := range r.restarted {
		if !o.done && o.at.After(re.at) {
			of, re = other, o
		}
	}
	return of, re
}

// adopt has an intercept wait for the restart that the leader before us began for it, and which is under way still.
func (r *interceptReconciler) adopt(in *v1alpha1.Intercept, w *workload, f fit) {
	_, known := r.restarted[in.UID]
	if at := w.RestartedAt(); !known && r.inherited(in.UID) && w.How == kinds.ByController && at.After(in.CreationTimestamp.Time) {
		if old := w.withoutAgent(f, w.Outdated); len(old) > 0 {
			r.restarted[in.UID] = restart{at: at, old: old}
		}
	}
}

// fit is what the pods have to be like for an intercept, besides the others that are in force.
func (r *interceptReconciler) fit(in *v1alpha1.Intercept, g engagement) fit {
	f := fit{ports: g.Ports, standIn: g.Container, replaced: r.m.engaged.replaced(g.Workload)}
	if in.Spec.Mode == v1alpha1.ModeIngest {
		f.shown = g.Shown
	}
	return f
}

// mayRestart says what keeps new pods from coming up with the agent that an intercept needs, for good or for a while. One that was active waits for better
// times if they cannot be created at all, or the API server does not reach the webhook.
func (r *interceptReconciler) mayRestart(ctx context.Context, in *v1alpha1.Intercept, g engagement, w *workload, taken []inject.Taken, f fit) (wait string, err error) {
	switch {
	case w.Failure != "" && r.wasActive(in):
		return w.blocked(w.Failure), nil
	case w.Failure != "":
		return "", fail("AgentNotStarted", "%s", w.blocked(w.Failure))
	}
	if reason, msg := w.cannotReplace(taken, f.replaced, g.Shown, in.Spec.Recreate); msg != "" {
		return "", fail(reason, "%s", msg)
	}
	if err := r.admits(ctx, w, taken); err != nil {
		return "", err
	}
	asked := time.Now()
	reached, err := r.m.reached(ctx)
	if reached || err != nil {
		delete(r.missed, in.UID)
		return "", err
	}
	if r.missed[in.UID].IsZero() {
		r.missed[in.UID] = asked
	}
	if !r.wasActive(in) && !r.m.newLeader() && time.Since(r.missed[in.UID]) >= webhookPatience {
		return "", fail("NotInjected", "nothing was restarted: the API server does not reach the agent-injector webhook, and pods would come up without a traffic-agent")
	}
	return "waiting until the API server reaches the agent-injector webhook", nil
}

// activated says that an intercept is in force.
func (r *interceptReconciler) activated(uid types.UID, st v1alpha1.InterceptStatus) v1alpha1.InterceptStatus {
	if re, ok := r.restarted[uid]; ok {
		re.done = true
		r.restarted[uid] = re
	}
	st.State = v1alpha1.InterceptActive
	return st
}

// admits refuses, before anything is restarted, pods that the cluster would not let in.
func (r *interceptReconciler) admits(ctx context.Context, w *workload, taken []inject.Taken) error {
	i := slices.IndexFunc(taken, func(p inject.Taken) bool { return p.Way == agentcfg.ByRedirect })
	if i < 0 {
		return nil
	}
	reason, what, err := r.m.refusesRedirect(ctx, w.key.Namespace)
	if err == nil && what != "" {
		return fail(reason, "port %d has to be redirected by a container with NET_ADMIN, which %s does not let in", taken[i].ContainerPort, what)
	}
	return err
}

// gone takes an intercept out of force. A workload that its agents kept from coming up is restarted without them.
func (r *interceptReconciler) gone(ctx context.Context, key workloadKey, uid types.UID) error {
	if g, ok := r.m.engaged.get(uid); ok && g.replaces() && r.m.laptops.tunnel(g.Session) != nil {
		g.Ending = true // the laptop answers until the app does: see restorer
		r.m.engaged.set(g)
	} else {
		r.m.engaged.remove(uid)
	}
	r.m.looked.Delete(uid)
	r.ended(ctx, uid)
	re, restarted := r.restarted[uid]
	if restarted || r.inherited(uid) {
		if err := r.heal(ctx, key, re.at, restarted && !re.done); err != nil {
			return err // and look again
		}
	}
	delete(r.restarted, uid)
	delete(r.seen, uid)
	delete(r.missed, uid)
	delete(r.failed, uid)
	return nil
}

// inherited says of an intercept whether the leader before us may have restarted its workload.
func (r *interceptReconciler) inherited(uid types.UID) bool {
	return r.seen[uid].Sub(r.m.started) < leaderNew
}

// ended tells of the end of an intercept that was in force.
func (r *interceptReconciler) ended(ctx context.Context, uid types.UID) {
	if rec, ok := r.inForce[uid]; ok {
		delete(r.inForce, uid)
		r.m.tell(ctx, uid, rec, eventEnded)
	}
}

// heal restarts a workload whose agents could not start, once nobody intercepts it any more: its pods then come up without them. That pods cannot be created
// may be for their agents' sake while a restart since then is under way.
func (r *interceptReconciler) heal(ctx context.Context, key workloadKey, since time.Time, underWay bool) error {
	if len(r.m.engaged.of(key)) > 0 {
		return nil
	}
	w, err := r.m.loadWorkload(ctx, key.Namespace, v1alpha1.WorkloadRef{Kind: key.Kind, Name: key.Name})
	var p *problem
	if errors.As(err, &p) {
		return nil // the workload is gone too
	}
	if err == nil && underWay {
		w.Failure, err = r.m.cannotCreate(ctx, w, since)
	} else if err == nil {
		w.Failure = ""
	}
	if err != nil {
		return err
	}
	if _, broken := w.broken(); !broken || w.How != kinds.ByController { // pods that are replaced by deletion are the laptop's to replace
		return nil
	}
	r.m.cfg.Log.Info("restarting a workload whose agents did not start", "workload", key.Name)
	return w.restart(ctx, r.m)
}

func (r *interceptReconciler) writeStatus(ctx context.Context, in *v1alpha1.Intercept, st v1alpha1.InterceptStatus) error {
	if statusEqual(in.Status, st) {
		return nil
	}
	base := in.DeepCopy()
	// The cache may be behind our own last write: the patch carries every field, not only those that differ from what the cache has.
	base.Status = v1alpha1.InterceptStatus{State: "-", Reason: "-", Message: "-", Container: "-", Session: "-", Taken: "-", Requests: "-", Agents: -1, Replace: &v1alpha1.PodRef{Name: "-", UID: "-"}, Ports: []v1alpha1.InterceptedPort{{Protocol: "-"}}}
	in.Status = st
	r.m.cfg.Log.Info("intercept", "intercept", in.Namespace+"/"+in.Name, "user", in.Spec.User, "state", st.State, "detail", st.Message)
	err := client.IgnoreNotFound(r.m.ctrl.GetClient().Status().Patch(ctx, in, client.MergeFrom(base)))
	if err == nil && st.State == v1alpha1.InterceptFailed {
		r.failed[in.UID] = true
	}
	return err
}

func statusEqual(a, b v1alpha1.InterceptStatus) bool {
	return a.State == b.State && a.Reason == b.Reason && a.Message == b.Message && a.Agents == b.Agents && a.Container == b.Container && a.Session == b.Session && a.Taken == b.Taken && a.Requests == b.Requests &&
		slices.Equal(a.Ports, b.Ports) && reflect.DeepEqual(a.Replace, b.Replace)
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
