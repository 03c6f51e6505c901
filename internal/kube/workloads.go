package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/kinds"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// Workload is one thing that can be intercepted, as `doppel list` shows it.
type Workload struct {
	Kind      string
	Name      string
	Namespace string
	Agent     bool   // some pod has a traffic-agent
	NotReady  string // why it cannot be intercepted; empty if it can
	Keeps     bool   // its pods have an agent, intercepted or not

	how    kinds.How
	busy   bool         // a pod of it ends, or is not ready
	agents []corev1.Pod // pods with an agent
}

// Workloads lists what can be intercepted in a namespace, or in all for "": what controls pods and is controlled by nothing else, and pods
// alone.
func (c *Cluster) Workloads(ctx context.Context, ns string) ([]Workload, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	owners, err := c.controllers(ctx, ns)
	if err != nil {
		return nil, c.explain(err, "list the workloads of namespace "+ns)
	}
	list, err := pods.list(ctx, c, ns, "")
	if err != nil {
		return nil, c.explain(err, "list the pods of namespace "+ns)
	}
	above, sets := map[types.UID]types.UID{}, map[types.UID][]appsv1.ReplicaSet{} // what controls a controller
	for _, o := range owners {
		if c := metav1.GetControllerOf(o); c != nil {
			above[o.GetUID()] = c.UID
			if rs, ok := o.(*appsv1.ReplicaSet); ok {
				sets[c.UID] = append(sets[c.UID], *rs)
			}
		}
	}
	with, busy := map[types.UID][]corev1.Pod{}, map[types.UID]bool{}
	for i := range list.Items {
		p := &list.Items[i]
		if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed { // evicted, for one: its controller has another, and leaves it there
			continue
		}
		by := metav1.GetControllerOf(p)
		if by == nil && p.DeletionTimestamp == nil {
			owners = append(owners, p)
		}
		uid := p.UID
		if by != nil {
			uid = cmp.Or(above[by.UID], by.UID)
		}
		busy[uid] = busy[uid] || p.DeletionTimestamp != nil || !isReady(p)
		if hasAgent(p) {
			with[uid] = append(with[uid], *p)
		}
	}
	out := []Workload{}
	for _, o := range owners {
		if i, ok := kinds.Of(o); ok && i.Owner == "" {
			i.FromSets(sets[o.GetUID()])
			agents := with[o.GetUID()]
			out = append(out, Workload{Kind: i.Kind, Name: o.GetName(), Namespace: o.GetNamespace(), NotReady: notReady(&i), Agent: len(agents) > 0, how: i.How, Keeps: agentcfg.Keeps(i.Template.Annotations), busy: busy[o.GetUID()], agents: agents})
		}
	}
	return out, nil
}

// rollouts are those of Argo, in clusters that have them.
var rollouts = resource[unstructured.Unstructured, unstructured.UnstructuredList]{kinds.RolloutVersion, "rollouts"}

// byKind are what a name may be the name of, Jobs among them, of which KindOf says that they are none of ours.
var byKind = map[string]interface {
	at(req *rest.Request, ns string) *rest.Request
}{
	kinds.CronJob: cronJobs, kinds.DaemonSet: daemonSets, kinds.Deployment: deployments, kinds.Job: jobs,
	kinds.Pod: pods, kinds.ReplicaSet: replicaSets, kinds.Rollout: rollouts, kinds.StatefulSet: statefulSets,
}

func (c *Cluster) rollouts(ctx context.Context, ns string) ([]unstructured.Unstructured, error) {
	b, err := rollouts.at(c.api.Get(), ns).Do(ctx).Raw()
	if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) { // what one may not see is not there
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list unstructured.UnstructuredList
	return list.Items, list.UnmarshalJSON(b)
}

// controllers lists what controls pods.
func (c *Cluster) controllers(ctx context.Context, ns string) ([]metav1.Object, error) {
	var ds *appsv1.DeploymentList
	var ss *appsv1.StatefulSetList
	var es *appsv1.DaemonSetList
	var rs *appsv1.ReplicaSetList
	var ros []unstructured.Unstructured
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) { ds, err = deployments.list(ctx, c, ns, ""); return err })
	g.Go(func() (err error) { ss, err = statefulSets.list(ctx, c, ns, ""); return err })
	g.Go(func() (err error) { es, err = daemonSets.list(ctx, c, ns, ""); return err })
	g.Go(func() (err error) { rs, err = replicaSets.list(ctx, c, ns, ""); return err })
	g.Go(func() (err error) { ros, err = c.rollouts(ctx, ns); return err })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out []metav1.Object
	for i := range ros {
		out = append(out, &ros[i])
	}
	for i := range ds.Items {
		out = append(out, &ds.Items[i])
	}
	for i := range ss.Items {
		out = append(out, &ss.Items[i])
	}
	for i := range es.Items {
		out = append(out, &es.Items[i])
	}
	for i := range rs.Items {
		out = append(out, &rs.Items[i])
	}
	return out, nil
}

func notReady(i *kinds.Info) string {
	switch t := i.Template; {
	case agentcfg.Forbids(t.Annotations):
		return "its annotation " + agentcfg.AnnotationInject + " forbids it"
	case t.Spec.HostNetwork:
		return "it uses the node's network"
	case i.Why != "":
		return "not without --recreate: it " + i.Why
	}
	return ""
}

func hasAgent(p *corev1.Pod) bool {
	return p.Annotations[agentcfg.Annotation] != "" && p.DeletionTimestamp == nil
}

func isReady(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// KindOf finds out what kind of workload is called name.
func (c *Cluster) KindOf(ctx context.Context, ns, name string) (kind string, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	all := slices.Sorted(maps.Keys(byKind))
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, kind := range all {
		wg.Go(func() { errs[i] = byKind[kind].at(c.api.Get(), ns).Name(name).Do(ctx).Error() })
	}
	wg.Wait()
	var found []string
	var denied error
	for i, kind := range all {
		switch {
		case errs[i] == nil:
			found = append(found, kind)
		case apierrors.IsForbidden(errs[i]): // what one may not see is not there; whoever may not see Deployments is told
			if kind == kinds.Deployment {
				denied = errs[i]
			}
		case !apierrors.IsNotFound(errs[i]):
			return "", c.explain(errs[i], "look for "+name)
		}
	}
	switch {
	case len(found) == 0 && denied != nil:
		return "", c.explain(denied, "look for "+name)
	case len(found) == 0:
		if _, err := namespaces.get(ctx, c, "", ns); apierrors.IsNotFound(err) {
			return "", uerr.Wrap(err, uerr.NotFound, "look at the namespaces with: kubectl get ns", "no namespace %s", ns)
		}
		return "", uerr.New(uerr.NotFound, "see what there is with: doppel list -n "+ns, "no workload %q in namespace %s", name, ns)
	case len(found) == 1:
		return found[0], nil
	}
	return "", uerr.New(uerr.Usage, fmt.Sprintf("say which with -w %s/%s", strings.ToLower(found[0]), name), "%s in namespace %s is a %s", name, ns, strings.Join(found, " and a "))
}

// replaceTimeout is how long a pod may take to end after its grace period, and another to be made in its place. To give up leaves the cluster
// without the pod, so a slow node gets its time.
const replaceTimeout = 5 * time.Minute

// ReplacePod deletes a pod. One without a controller is made again, for a traffic-agent to be put into it.
func (c *Cluster) ReplacePod(ctx context.Context, ns, name string, uid types.UID) error {
	p, err := pods.get(ctx, c, ns, name)
	if apierrors.IsNotFound(err) || err == nil && p.UID != uid {
		return nil // somebody else did it
	}
	if err != nil {
		return c.explain(err, "look at pod "+name)
	}
	if metav1.GetControllerOf(p) != nil {
		return c.deletePod(ctx, p)
	}
	again := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace, Labels: p.Labels, Annotations: maps.Clone(p.Annotations), OwnerReferences: p.OwnerReferences}, Spec: p.Spec}
	again.Spec.NodeName, again.Spec.EphemeralContainers = "", nil
	if again.Annotations == nil {
		again.Annotations = map[string]string{}
	}
	var asItWas *corev1.Pod // to be made for want of the one with an agent

	if original, ok := p.Annotations[agentcfg.AnnotationOriginal]; ok { // the one with the agent, which is to go
		again = &corev1.Pod{}
		if err := json.Unmarshal([]byte(original), again); err != nil {
			return fmt.Errorf("annotation %s of pod %s: %w", agentcfg.AnnotationOriginal, name, err)
		}
	} else {
		original, err := json.Marshal(again)
		if err != nil {
			return err
		}
		asItWas = again.DeepCopy()
		again.Annotations[agentcfg.AnnotationOriginal] = string(original)
		again.Annotations[agentcfg.AnnotationInject] = agentcfg.InjectEnabled
	}
	if err := c.mayMake(ctx, again); err != nil {
		return err
	}
	// From here on nobody's interrupt may leave the cluster without the pod.
	grace := int64(corev1.DefaultTerminationGracePeriodSeconds)
	if p.Spec.TerminationGracePeriodSeconds != nil {
		grace = *p.Spec.TerminationGracePeriodSeconds
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(grace)*time.Second+replaceTimeout)
	defer cancel()
	if err := c.deletePod(ctx, p); err != nil {
		return err
	}
	err = c.makeWhenEnded(ctx, again, uid)
	if err == nil || asItWas == nil {
		return err
	}
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), quotaLag+requestTimeout)
	defer cancel()
	if c.makeWhenEnded(ctx, asItWas, uid) == nil {
		e := uerr.From(err)
		return uerr.Wrap(e, e.Kind, e.Hint, "pod %s was made again as it was", name)
	}
	return err
}

// mayMake is an error unless a pod would be let in, as far as can be known while another one has its name. That the name is taken is found last; a quota
// that is full may have room when the other has ended; and who does not answer dry runs says nothing.
func (c *Cluster) mayMake(ctx context.Context, p *corev1.Pod) error {
	_, err := pods.create(ctx, c, p.Namespace, p, "dryRun", metav1.DryRunAll)
	if apierrors.IsAlreadyExists(err) || exceedsQuota(err) || err != nil && strings.Contains(err.Error(), "does not support dry run") {
		return nil
	}
	return c.explain(err, "make pod "+p.Name+" again, which was left alone")
}

// makeWhenEnded makes a pod when the one with that UID, whose name it has, has ended.
func (c *Cluster) makeWhenEnded(ctx context.Context, p *corev1.Pod, old types.UID) error {
	var ended time.Time
	for {
		now, err := pods.get(ctx, c, p.Namespace, p.Name) // each attempt before the other has ended would be counted by its namespace's quotas
		if err == nil && now.UID != old {
			return nil // it was made, and the answer got lost
		}
		if apierrors.IsNotFound(err) {
			if ended.IsZero() {
				ended = time.Now()
			}
			_, err = pods.create(ctx, c, p.Namespace, p)
			if err == nil || refusedForGood(err) || exceedsQuota(err) && time.Since(ended) > quotaLag {
				return c.explain(err, "make pod "+p.Name+" again")
			}
		}
		select {
		case <-ctx.Done():
			return uerr.Wrap(cmp.Or(err, ctx.Err()), uerr.Cluster, "look at it with: kubectl -n "+p.Namespace+" get pod "+p.Name, "pod %s was deleted to be made again, which was not possible in time", p.Name)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// quotaLag is how long a quota may take to be told of a pod that has ended; for a test to shorten.
var quotaLag = 30 * time.Second

// exceedsQuota knows what k8s.io/apiserver has no reason of its own for.
func exceedsQuota(err error) bool {
	return apierrors.IsForbidden(err) && strings.Contains(err.Error(), "exceeded quota")
}

// refusedForGood says of a pod that was not created whether to try again is useless. What admission denies may have any status.
func refusedForGood(err error) bool {
	return !exceedsQuota(err) && (apierrors.IsForbidden(err) || apierrors.IsInvalid(err) || apierrors.IsNotFound(err) || apierrors.IsBadRequest(err))
}

func (c *Cluster) deletePod(ctx context.Context, p *corev1.Pod) error {
	err := pods.remove(ctx, c, p.Namespace, p.Name, p.UID)
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return c.explain(err, "delete pod "+p.Name)
}

// RemoveAgents has the pods of the workloads of a namespace ("" for all) that have an agent replaced by pods without, and waits until no such
// pod is left. It does not look at intercepts: whoever calls it has ended them. Workloads whose template wants an agent keep it, unless only is nil:
// then there is no manager any more that would add one.
func (c *Cluster) RemoveAgents(ctx context.Context, ns string, only func(Workload) bool, progress func(string)) error {
	begun := map[string]bool{}
	for {
		list, err := c.Workloads(ctx, ns)
		if err != nil {
			return err
		}
		left := ""
		for _, w := range list {
			if !w.Agent || only != nil && (w.Keeps || !only(w)) {
				continue
			}
			left = w.Kind + " " + w.Name
			key := w.Namespace + "/" + left
			if begun[key] && (w.how == kinds.ByController || w.busy) {
				continue
			}
			if !begun[key] {
				progress(fmt.Sprintf("Removing the traffic-agent of %s in namespace %s", left, w.Namespace))
			}
			begun[key] = true
			if err := c.removeAgent(ctx, w); err != nil {
				return err
			}
		}
		if left == "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return uerr.New(uerr.Cluster, "look at it with: kubectl get pods", "%s still has pods with a traffic-agent", left)
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// removeAgent begins to replace a workload's pods, or goes on with the next one of them.
func (c *Cluster) removeAgent(ctx context.Context, w Workload) error {
	if w.how != kinds.ByController {
		p := &w.agents[0]
		return c.ReplacePod(ctx, p.Namespace, p.Name, p.UID)
	}
	req := byKind[w.Kind].at(c.api.Patch(types.MergePatchType), w.Namespace)
	err := req.Name(w.Name).Body(kinds.RestartPatch(w.Kind, time.Now())).Do(ctx).Error()
	return c.explain(err, "restart "+w.Kind+" "+w.Name)
}

// Names says whether what somebody typed, NAME or KIND/NAME, names a workload.
func Names(typed, kind, name string) bool {
	return typed == name || strings.EqualFold(typed, kind+"/"+name)
}

// RefuseKept is an error if the workload's template wants an agent: to remove it would be in vain.
func (c *Cluster) RefuseKept(ctx context.Context, ns, workload string) error {
	list, err := c.Workloads(ctx, ns)
	if err != nil {
		return err
	}
	for _, w := range list {
		if w.Keeps && Names(workload, w.Kind, w.Name) {
			return uerr.New(uerr.Conflict, "take the annotation out of the pod template; that restarts its pods without one", "%s %s keeps its traffic-agent: its pod template says %s: %s", w.Kind, w.Name, agentcfg.AnnotationInject, agentcfg.InjectEnabled)
		}
	}
	return nil
}

// RefuseIntercepted is an error if the workload (all of them for "") is intercepted: its agent is in use.
func (c *Cluster) RefuseIntercepted(ctx context.Context, ns, workload string) error {
	list, err := c.Intercepts(ctx, ns)
	if err != nil {
		return err
	}
	for i := range list {
		if in := &list[i]; workload == "" || Names(workload, in.Spec.Workload.Kind, in.Spec.Workload.Name) {
			return uerr.New(uerr.Conflict, "end it with: doppel leave "+in.Spec.Name+"; an administrator can delete the Intercept object", "%s in namespace %s is intercepted by %s", in.Spec.Workload.Name, in.Namespace, in.Spec.User)
		}
	}
	return nil
}

// EndAll deletes every intercept in the namespaces ("" for all) and every session in the manager's.
func (c *Cluster) EndAll(ctx context.Context, managerNS string, namespaces []string) error {
	for _, ns := range namespaces {
		ins, err := c.Intercepts(ctx, ns)
		if apierrors.IsNotFound(errors.Unwrap(err)) {
			return nil // nothing of ours is installed
		}
		if err != nil {
			return err
		}
		for i := range ins {
			if err := c.DeleteIntercept(ctx, &ins[i]); err != nil {
				return err
			}
		}
	}
	sessions, err := c.Sessions(ctx, managerNS)
	if err != nil {
		return err
	}
	for i := range sessions {
		if err := c.DeleteSession(ctx, &sessions[i]); err != nil {
			return err
		}
	}
	return nil
}
