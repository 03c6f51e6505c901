package manager

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
	"github.com/doppel-dev/doppel/internal/kinds"
)

// endpointLag is how long clients may not know that a pod has become ready, or was deleted: kube-proxy writes its rules at most once a second
// by default (--nftables-min-sync-period, --iptables-min-sync-period). The times of both are cut to whole seconds, which is the other one.
const endpointLag = 1500*time.Millisecond + time.Second

// workload is a workload with its pods as they are now.
type workload struct {
	kinds.Info
	key  workloadKey
	pods []corev1.Pod
}

// loadWorkload reads the workload and its pods from the API server.
func (m *Manager) loadWorkload(ctx context.Context, ns string, ref v1alpha1.WorkloadRef) (*workload, error) {
	r := m.ctrl.GetAPIReader()
	o := kinds.New(ref.Kind)
	if o == nil {
		return nil, fail("UnsupportedKind", "%s is no kind of workload that doppel knows", ref.Kind)
	}
	err := r.Get(ctx, client.ObjectKey{Namespace: ns, Name: ref.Name}, o.(client.Object))
	if apimeta.IsNoMatchError(err) {
		return nil, fail("UnsupportedKind", "this cluster has no %ss", ref.Kind)
	}
	if apierrors.IsForbidden(err) && ref.Kind == kinds.Rollout { // the chart has these rights where the cluster had Rollouts
		return nil, fail("UnsupportedKind", "the traffic-manager has no rights on Rollouts yet; an administrator gives them with: doppel helm upgrade")
	}
	if apierrors.IsNotFound(err) {
		return nil, fail("NoWorkload", "no %s %q in namespace %s", ref.Kind, ref.Name, ns)
	}
	if err != nil {
		return nil, err
	}
	info, _ := kinds.Of(o)
	w := &workload{Info: info, key: workloadKey{ns, ref.Kind, ref.Name}}
	switch {
	case info.Owner != "":
		return nil, fail("Owned", "%s %s belongs to %s", ref.Kind, ref.Name, info.Owner)
	case info.How == kinds.Never:
		return nil, fail("CannotRoll", "%s %s", info.Name(), info.Why)
	}
	for _, name := range info.Claims() {
		var c corev1.PersistentVolumeClaim
		switch err := r.Get(ctx, client.ObjectKey{Namespace: ns, Name: name}, &c); {
		case err == nil:
			w.Claim(&c)
		case !apierrors.IsNotFound(err):
			return nil, err
		}
	}
	w.pods, err = m.podsOf(ctx, &w.Info)
	return w, err
}

// cannotCreate is why the workload's controller cannot create pods since a restart, or "". That of a set, other than a Deployment's, says so by events only,
// and no more that it is over: when all are there, it is.
func (m *Manager) cannotCreate(ctx context.Context, w *workload, since time.Time) (string, error) {
	if w.Kind != kinds.StatefulSet && w.Kind != kinds.DaemonSet || len(w.pods) >= int(w.Replicas) {
		return w.Failure, nil
	}
	var list corev1.EventList
	of := client.MatchingFields{"involvedObject.uid": string(w.Object.GetUID()), "reason": "FailedCreate"}
	if err := m.ctrl.GetAPIReader().List(ctx, &list, client.InNamespace(w.key.Namespace), of); err != nil {
		return "", err
	}
	why := ""
	for _, e := range list.Items {
		if !e.LastTimestamp.Time.Before(since.Truncate(time.Second)) { // events know whole seconds
			why = e.Message
		}
	}
	return why, nil
}

// quotaPatience is how long pods may not be created for want of quota, after a restart and with no pod that is ending: what has just ended may not have been
// counted yet, and a controller tries again after a pause that is about as long as it has tried already.
const quotaPatience = 30 * time.Second

// passes says whether what pods cannot be created for may be over soon.
func passes(why string) bool { return strings.Contains(why, "exceeded quota") }

// podsOf lists a workload's pods, but for those that have ended.
func (m *Manager) podsOf(ctx context.Context, w *kinds.Info) ([]corev1.Pod, error) {
	if p, ok := w.Object.(*corev1.Pod); ok {
		return []corev1.Pod{*p}, nil
	}
	r, ns := m.ctrl.GetAPIReader(), w.Object.GetNamespace()
	sel, err := metav1.LabelSelectorAsSelector(w.Selector)
	if err != nil {
		return nil, err
	}
	var pods corev1.PodList
	var sets appsv1.ReplicaSetList
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return r.List(gctx, &pods, client.InNamespace(ns), client.MatchingLabelsSelector{Selector: sel})
	})
	if w.OwnsSets() {
		g.Go(func() error {
			return r.List(gctx, &sets, client.InNamespace(ns), client.MatchingLabelsSelector{Selector: sel})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	owners := map[types.UID]bool{w.Object.GetUID(): true}
	if w.OwnsSets() {
		ours := slices.DeleteFunc(sets.Items, func(s appsv1.ReplicaSet) bool { return !metav1.IsControlledBy(&s, w.Object) })
		for i := range ours {
			owners[ours[i].UID] = true
		}
		w.FromSets(ours)
	}
	return slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool {
		o := metav1.GetControllerOf(&p)
		return o == nil || !owners[o.UID] || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
	}), nil
}

// cannotReplace says why the workload's pods cannot be replaced by pods with an agent for the ports and stand-ins, or "". Where there would be a gap (D8),
// somebody has to want it.
func (w *workload) cannotReplace(ports []inject.Taken, standIns []string, shown string, recreate bool) (reason, msg string) {
	if w.Why != "" && !recreate {
		return "Gap", fmt.Sprintf("%s %s: it cannot be restarted without a gap", w.Name(), w.Why)
	}
	pod := &corev1.Pod{ObjectMeta: w.Template.ObjectMeta, Spec: w.Template.Spec}
	cfg := inject.Config{Ports: ports, StandIns: standIns}
	if shown != "" {
		cfg.Apps = []string{shown}
	}
	if _, err := inject.Pod(pod, cfg); err != nil {
		return "CannotInject", fmt.Sprintf("the pods of %s cannot have a traffic-agent: %v", w.Name(), err)
	}
	return "", ""
}

// restart is kubectl rollout restart.
func (w *workload) restart(ctx context.Context, m *Manager) error {
	return m.ctrl.GetClient().Patch(ctx, w.Object.(client.Object), client.RawPatch(types.MergePatchType, kinds.RestartPatch(w.Kind, m.clock.now())))
}

// refused says whether a change would be refused again. What admission denies may have any status.
func refused(err error) bool {
	return apierrors.IsForbidden(err) || apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) || err != nil && strings.Contains(err.Error(), "denied")
}

// podsView is what the pods of a workload mean for one intercept.
type podsView struct {
	serving    int    // have an agent that knows the intercept
	waiting    int    // have an agent that does not know it yet
	fresh      int    // serve, but clients may not know of them yet
	missing    int    // pods without an agent for the ports that came up after the restart, or before any
	missingPod string // one of them
	draining   int    // old pods that clients may still reach
	trouble    string // why an agent will not come up
	ran        bool   // that agent has run in its pod, and may again
	unready    string // why one of the waiting pods does not get ready, if it says so
}

// because is the reason of a wait, behind a colon, or "".
func (v podsView) because() string {
	if v.unready == "" {
		return ""
	}
	return ": " + v.unready
}

// fit is what a pod has to be like for an intercept.
type fit struct {
	ports    []control.Port // its agent takes them
	standIn  string         // the container that is replaced; "": none
	replaced []string       // all containers that are: another one must not be
	shown    string         // its agent has this container's environment and files; "": need not
}

// view looks at the pods; old are those that a restart was to replace. One that lacks a container which nobody wants replaced any more is as
// good as gone (see restorer).
func (w *workload) view(c *clock, f fit, old map[types.UID]bool, serves func(types.UID) bool) podsView {
	var v podsView
	covers := f.fits
	for i := range w.pods {
		p := &w.pods[i]
		switch {
		case p.DeletionTimestamp != nil:
			if !covers(p) && c.within(endpointLag, deletedAt(p)) { // clients still reach it
				v.draining++
			}
		case inVain(p, f.replaced):
			v.draining++
		case covers(p) && serves(p.UID) && ready(p):
			v.serving++
			if c.within(endpointLag, readySince(p)) {
				v.fresh++
			}
		case covers(p):
			v.waiting++
			if trouble, ran := agentTrouble(p); trouble != "" {
				v.ran = ran && (v.ran || v.trouble == "")
				v.trouble = trouble
			}
			v.unready = cmp.Or(notReady(p), v.unready)
		case old[p.UID], len(old) > 0 && w.How == kinds.ByController && w.Outdated(p): // or was let in before the webhook knew what is wanted
			v.draining++ // the rollout has not come to it yet
		default:
			v.missing++
			v.missingPod = p.Name
		}
	}
	if w.Failure != "" {
		v.trouble, v.ran = w.blocked(w.Failure), false
	}
	return v
}

// blocked says that the workload's controller cannot create pods.
func (w *workload) blocked(why string) string { return w.Name() + " cannot create pods: " + why }

// ending says whether a pod is about to give back what it has.
func (w *workload) ending() bool {
	return slices.ContainsFunc(w.pods, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
}

// withoutAgent are the pods that a restart is to replace, of those that are asked for.
func (w *workload) withoutAgent(f fit, which func(*corev1.Pod) bool) map[types.UID]bool {
	old := map[types.UID]bool{}
	for i := range w.pods {
		if which(&w.pods[i]) && !f.fits(&w.pods[i]) {
			old[w.pods[i].UID] = true
		}
	}
	return old
}

func anyPod(*corev1.Pod) bool { return true }

// next is the pod that is to be deleted where that is the way to replace pods: one of the old ones, when none is under way.
func (w *workload) next(old map[types.UID]bool) *corev1.Pod {
	var next *corev1.Pod
	for i := range w.pods {
		switch p := &w.pods[i]; {
		case p.DeletionTimestamp != nil:
			return nil
		case old[p.UID]:
			next = p
		}
	}
	if len(w.pods) < int(w.Replicas) && len(w.pods) > 0 { // the last one's successor is not there yet
		return nil
	}
	return next
}

// broken says whether an agent keeps pods of the workload from coming up, and which one. What its controller is about to replace is none of them.
func (w *workload) broken() (*corev1.Pod, bool) {
	for i := range w.pods {
		p := &w.pods[i]
		if p.DeletionTimestamp != nil || !inject.Injected(p) || w.How == kinds.ByController && w.Outdated(p) {
			continue
		}
		if trouble, _ := agentTrouble(p); trouble != "" {
			return p, true
		}
	}
	return nil, w.Failure != ""
}

// fits says whether the pod has an agent that takes all of the ports and has what is to be shown, and the stand-in that is wanted.
func (f fit) fits(p *corev1.Pod) bool {
	c := agentOf(p)
	return c != nil && (f.standIn == "" || c.StandsIn(f.standIn)) && !inVain(p, f.replaced) && (f.shown == "" || c.Shows(f.shown)) &&
		!slices.ContainsFunc(f.ports, func(p control.Port) bool { return !c.Covers(p.Protocol, p.Number) })
}

// inVain says whether a stand-in is in the pod that is none of those wanted.
func inVain(p *corev1.Pod, wanted []string) bool {
	c := agentOf(p)
	return c != nil && slices.ContainsFunc(c.StandIns, func(name string) bool { return !slices.Contains(wanted, name) })
}

// agentOf is the configuration of the pod's agent, or nil.
func agentOf(p *corev1.Pod) *agentcfg.Config {
	if !inject.Injected(p) {
		return nil
	}
	c, err := agentcfg.Parse(p.Annotations[agentcfg.Annotation])
	if err != nil {
		return nil
	}
	return c
}

// agentStarted is when the pod's agent began to run; zero if it does not.
func agentStarted(p *corev1.Pod) time.Time {
	for _, cs := range p.Status.ContainerStatuses {
		if cs.Name == agentcfg.Container && cs.State.Running != nil {
			return cs.State.Running.StartedAt.Time
		}
	}
	return time.Time{}
}

// deletedAt is when a pod's deletion was asked for.
func deletedAt(p *corev1.Pod) time.Time {
	deleted := p.DeletionTimestamp.Time
	if p.DeletionGracePeriodSeconds != nil {
		deleted = deleted.Add(-time.Duration(*p.DeletionGracePeriodSeconds) * time.Second)
	}
	return deleted
}

func ready(p *corev1.Pod) bool { return !readySince(p).IsZero() }

// readySince is when the pod became ready; zero if it is not.
func readySince(p *corev1.Pod) time.Time {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return cmp.Or(c.LastTransitionTime.Time, time.Unix(1, 0))
		}
	}
	return time.Time{}
}

// hopeless are the waiting reasons of a container that do not mend themselves within seconds.
var hopeless = []string{"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError", crashLoop}

// crashLoop is the waiting reason of a container that has run, and that the kubelet will start again.
const crashLoop = "CrashLoopBackOff"

// agentTrouble says why the pod's agent or init container will not start, with the kubelet's words, or "", and whether the agent has run in the pod.
func agentTrouble(p *corev1.Pod) (trouble string, ran bool) {
	for _, cs := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if cs.Name != agentcfg.Container && cs.Name != agentcfg.InitContainer {
			continue
		}
		if w := cs.State.Waiting; w != nil && slices.Contains(hopeless, w.Reason) {
			trouble = fmt.Sprintf("the %s of pod %s does not start: %s: %s", cs.Name, p.Name, w.Reason, cmp.Or(lastWords(cs.LastTerminationState.Terminated), w.Message))
			return trouble, cs.Name == agentcfg.Container && w.Reason == crashLoop
		}
	}
	return "", false
}

// lastWords says how a container ended, or "". What is killed says nothing of it: its last lines are of something else.
func lastWords(t *corev1.ContainerStateTerminated) string {
	switch {
	case t == nil:
		return ""
	case t.Reason == "OOMKilled":
		return "it needed more memory than its limit (OOMKilled)"
	case t.ExitCode > 128: // as a shell counts (POSIX, exit status)
		return fmt.Sprintf("it was ended by signal %d", t.ExitCode-128)
	}
	return strings.Join(strings.Fields(t.Message), " ")
}

// notReady says why a pod is not ready where waiting may still help: the scheduler's words, or those about the app's containers.
func notReady(p *corev1.Pod) string {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse && c.Message != "" {
			return fmt.Sprintf("pod %s is not scheduled: %s", p.Name, c.Message)
		}
	}
	for _, cs := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if w := cs.State.Waiting; w != nil && slices.Contains(hopeless, w.Reason) {
			return fmt.Sprintf("container %s of pod %s does not start: %s: %s", cs.Name, p.Name, w.Reason, w.Message)
		}
	}
	return ""
}

// workloadOf finds the workload that a pod belongs to through its owners.
func (m *Manager) workloadOf(ctx context.Context, pod *corev1.Pod) (workloadKey, error) {
	o := metav1.GetControllerOf(pod)
	if o == nil {
		return workloadKey{pod.Namespace, "Pod", pod.Name}, nil
	}
	if o.Kind != "ReplicaSet" || !strings.HasPrefix(o.APIVersion, "apps/") {
		return workloadKey{pod.Namespace, o.Kind, o.Name}, nil
	}
	var rs appsv1.ReplicaSet
	if err := m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: o.Name}, &rs); err != nil {
		return workloadKey{}, fmt.Errorf("owner of pod %s: %w", pod.Name, err)
	}
	if ro := metav1.GetControllerOf(&rs); ro != nil {
		return workloadKey{pod.Namespace, ro.Kind, ro.Name}, nil
	}
	return workloadKey{pod.Namespace, "ReplicaSet", rs.Name}, nil
}
