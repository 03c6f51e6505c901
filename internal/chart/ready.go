package chart

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	// pollInterval is how often a waiting command looks. It polls: a handful of small reads over a few seconds, and no watch to lose.
	pollInterval = 250 * time.Millisecond
	// podSelector selects the manager's pods.
	podSelector = "app.kubernetes.io/name=traffic-manager,app.kubernetes.io/instance=" + ReleaseName
	// revisionKey numbers the ReplicaSets of a Deployment.
	revisionKey = "deployment.kubernetes.io/revision"
)

// lookHint is for failures of the manager itself: a failed install is taken back, and its pod with it.
func lookHint(namespace string) string {
	return "doppel helm install --wait=false" + kube.ManagerFlag(namespace) + " leaves the pod in place to look at"
}

// How long a reason is given to go away by itself before it counts as the end.
const (
	graceRefused = 3 * time.Second  // quota, admission: a controller may still be busy with something it depends on
	gracePull    = 4 * time.Second  // a registry may stumble once
	graceNoNode  = 15 * time.Second // a node may be coming up
)

// WaitReady waits, up to o.Timeout, until the manager in o.Namespace is ready, or says why it does not become so.
func WaitReady(ctx context.Context, cfg *rest.Config, o Options) error {
	o = o.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	c, err := newClient(ctx, cfg, o.Namespace, o.Log)
	if err != nil {
		return err
	}
	return c.waitReady(ctx, o)
}

// waitReady polls the Deployment, its pods and their events until they are ready, one of them cannot become so, or ctx ends.
func (c *client) waitReady(ctx context.Context, o Options) error {
	w := watcher{namespace: c.namespace}
	said := ""
	var s sight
	for {
		now, err := c.look(ctx)
		if err != nil && ctx.Err() == nil {
			return c.explain(ctx, err, "wait for the traffic-manager")
		}
		if err == nil {
			s = now
			v := w.judge(s, time.Now())
			if v.err != nil {
				return v.err
			}
			if v.ready {
				o.Progress("traffic-manager is ready")
				return nil
			}
			if v.text != said {
				o.Progress(v.text)
				said = v.text
			}
		}
		if sleep(ctx, pollInterval) != nil {
			if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) {
				return uerr.Wrap(cause, uerr.Canceled, "", "wait for the traffic-manager")
			}
			return uerr.New(uerr.Cluster, lookHint(c.namespace), "the traffic-manager did not become ready in %s: %s%s", o.Timeout, said, c.lastWords(s))
		}
	}
}

// sight is what the cluster shows of the manager at one moment.
type sight struct {
	deployment *appsv1.Deployment
	pods       []corev1.Pod   // of the newest revision
	events     []corev1.Event // of those pods, warnings and the autoscaler's
}

// look reads a sight.
func (c *client) look(ctx context.Context) (sight, error) {
	var s sight
	d, err := c.core.AppsV1().Deployments(c.namespace).Get(ctx, ReleaseName, metav1.GetOptions{})
	if err != nil {
		return s, err
	}
	s.deployment = d
	selector := metav1.FormatLabelSelector(d.Spec.Selector) // of a release of whatever name
	sets, err := c.core.AppsV1().ReplicaSets(c.namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return s, err
	}
	pods, err := c.core.CoreV1().Pods(c.namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return s, err
	}
	hash := newestHash(d, sets.Items)
	for _, p := range pods.Items {
		if hash != "" && p.Labels[appsv1.DefaultDeploymentUniqueLabelKey] == hash && p.DeletionTimestamp == nil {
			s.pods = append(s.pods, p)
		}
	}
	if len(s.pods) == 0 {
		return s, nil
	}
	events, err := c.core.CoreV1().Events(c.namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.kind=Pod"})
	if err != nil && ctx.Err() != nil {
		return s, err // the look before knows more
	}
	if err != nil {
		return s, nil // events only explain; not everybody may read them
	}
	for _, e := range events.Items {
		for _, p := range s.pods {
			if e.InvolvedObject.UID == p.UID {
				s.events = append(s.events, e)
			}
		}
	}
	return s, nil
}

// lastWords is what a pod that runs and is not ready logged last.
func (c *client) lastWords(s sight) string {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	lines := int64(2)
	for _, p := range s.pods {
		out, err := c.unbound.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{TailLines: &lines}).DoRaw(ctx)
		if text := lastLines(string(out), int(lines)); err == nil && text != "" {
			return "; it logged: " + text
		}
	}
	return ""
}

// newestHash is the pod-template-hash of the Deployment's current revision, or empty if its ReplicaSet is not there yet.
func newestHash(d *appsv1.Deployment, sets []appsv1.ReplicaSet) string {
	for _, rs := range sets {
		if metav1.IsControlledBy(&rs, d) && rs.Annotations[revisionKey] == d.Annotations[revisionKey] &&
			d.Status.ObservedGeneration >= d.Generation {
			return rs.Labels[appsv1.DefaultDeploymentUniqueLabelKey]
		}
	}
	return ""
}

// verdict is what a sight means: ready, lost (err), or still on the way (text says how far).
type verdict struct {
	ready bool
	text  string
	err   error
}

// watcher remembers between sights since when a reason has stood in the way.
type watcher struct {
	namespace string
	since     map[string]time.Time
	pullError string
}

// judge is where all the rules are; it touches nothing.
func (w *watcher) judge(s sight, now time.Time) verdict {
	if ready(s.deployment) {
		return verdict{ready: slices.ContainsFunc(s.pods, leads), text: "waiting for the traffic-manager's new pod to take over"}
	}
	v := verdict{text: "waiting for the traffic-manager's pod to be created"}
	standing := map[string]time.Time{}
	// lasts says whether reason has stood for at least grace.
	lasts := func(reason string, grace time.Duration) bool {
		t, ok := w.since[reason]
		if !ok {
			t = now
		}
		standing[reason] = t
		return now.Sub(t) >= grace
	}
	defer func() { w.since = standing }()

	if msg := refused(s.deployment); msg != "" {
		v.text = "the cluster refuses the traffic-manager's pod: " + msg
		if lasts("refused", graceRefused) {
			v.err = w.refusal(msg)
			return v
		}
	}
	for i := range s.pods {
		p := &s.pods[i]
		if text, err := w.judgePod(p, s.events, lasts); text != "" || err != nil {
			v.text, v.err = text, err
			if err != nil {
				return v
			}
		}
	}
	return v
}

// ready is kubectl rollout status's rule: the newest template everywhere, available, and nothing else left.
func ready(d *appsv1.Deployment) bool {
	want := int32(1)
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	st := d.Status
	return st.ObservedGeneration >= d.Generation && st.UpdatedReplicas >= want && st.AvailableReplicas >= want && st.Replicas == st.UpdatedReplicas
}

// leads says whether the manager's Services lead to a pod: of several that are ready one works (internal/manager/active.go).
func leads(p corev1.Pod) bool { return p.Labels["app.kubernetes.io/part-of"] == "doppel" }

// refused is why the API server took no pod of the Deployment, if it did not.
func refused(d *appsv1.Deployment) string {
	if d.Status.ObservedGeneration < d.Generation {
		return ""
	}
	for _, c := range d.Status.Conditions {
		if c.Type == appsv1.DeploymentReplicaFailure && c.Status == corev1.ConditionTrue {
			return oneLine(c.Message)
		}
	}
	return ""
}

// refusal is the error for a pod that the API server does not take.
func (w *watcher) refusal(msg string) error {
	const what = "the cluster refuses the traffic-manager's pod: %s"
	switch {
	case strings.Contains(msg, "exceeded quota"), strings.Contains(msg, "failed quota"):
		return uerr.New(uerr.Cluster, "raise the quota of namespace "+w.namespace+", or choose another with --manager-namespace", what, msg)
	case strings.Contains(msg, "maximum"), strings.Contains(msg, "minimum"):
		return uerr.New(uerr.Cluster, "fit manager.resources to the LimitRange of namespace "+w.namespace, what, msg)
	}
	return uerr.New(uerr.Denied, "an admission policy of this cluster is in the way; its administrator can exempt namespace "+w.namespace, what, msg)
}

// judgePod says how far a pod is, or why it will not get further.
func (w *watcher) judgePod(p *corev1.Pod, events []corev1.Event, lasts func(string, time.Duration) bool) (string, error) {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			msg := oneLine(c.Message)
			if c.Reason == corev1.PodReasonUnschedulable && !scalingUp(p, events) && lasts("no node", graceNoNode) {
				return "", uerr.New(uerr.Cluster, "make room, or choose nodes with manager.nodeSelector and manager.tolerations",
					"no node takes the traffic-manager: %s", msg)
			}
			return "waiting for a node: " + msg, nil
		}
	}
	for _, cs := range p.Status.ContainerStatuses {
		image := cs.Image
		for _, c := range p.Spec.Containers {
			if c.Name == cs.Name {
				image = c.Image
			}
		}
		if text, err := w.judgeContainer(image, cs, lasts); text != "" || err != nil {
			return text, err
		}
	}
	if msg := lastWarning(p, events); msg != "" {
		return "starting the traffic-manager: " + msg, nil
	}
	return "starting the traffic-manager", nil
}

func (w *watcher) judgeContainer(image string, cs corev1.ContainerStatus, lasts func(string, time.Duration) bool) (string, error) {
	wait := cs.State.Waiting
	if wait == nil {
		return "", nil
	}
	msg := oneLine(wait.Message)
	switch wait.Reason {
	case "ErrImagePull", "ImagePullBackOff":
		if wait.Reason == "ErrImagePull" || w.pullError == "" {
			w.pullError = msg // the back-off's own message tells less
		}
		if !lasts("pull", gracePull) {
			return "pulling the image fails, trying again", nil
		}
		return "", imageError(image, w.pullError)
	case "ErrImageNeverPull", "InvalidImageName", "ImageInspectError", "RegistryUnavailable", "SignatureValidationFailed":
		return "", imageError(image, or(msg, wait.Reason))
	case "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff":
		if t := cs.LastTerminationState.Terminated; t != nil {
			msg = fmt.Sprintf("exit code %d", t.ExitCode)
			if t.Reason != "Error" && t.Reason != "" {
				msg += " (" + t.Reason + ")"
			}
			if out := lastLines(t.Message, 3); out != "" {
				msg += ": " + out
			}
		}
		return "", uerr.New(uerr.Cluster, lookHint(w.namespace), "the traffic-manager does not start: %s", or(msg, wait.Reason))
	}
	return "", nil
}

func imageError(image, msg string) error {
	return uerr.New(uerr.Cluster, "name a registry that this cluster can pull from: --set image.registry=REGISTRY (and image.pullSecrets if it wants credentials)",
		"the image %s cannot be pulled: %s", image, pullNoiseRE.ReplaceAllString(msg, ""))
}

// pullNoiseRE is what containerd says before the reason, naming the image each time.
var pullNoiseRE = regexp.MustCompile(`failed to (pull and unpack image|resolve (reference|image)) "[^"]*": `)

// scalingUp is true if a cluster autoscaler promised a node.
func scalingUp(p *corev1.Pod, events []corev1.Event) bool {
	for _, e := range events {
		if e.InvolvedObject.UID == p.UID && (e.Reason == "TriggeredScaleUp" || e.Reason == "Nominated") {
			return true
		}
	}
	return false
}

// lastWarning is the newest warning about p, such as a volume that does not mount or a probe that fails; what goes wrong with images and
// containers stands in the pod's status.
func lastWarning(p *corev1.Pod, events []corev1.Event) string {
	var newest *corev1.Event
	for i := range events {
		e := &events[i]
		if e.InvolvedObject.UID == p.UID && e.Type == corev1.EventTypeWarning && e.Reason != "Failed" && e.Reason != "BackOff" &&
			(newest == nil || e.LastTimestamp.After(newest.LastTimestamp.Time)) {
			newest = e
		}
	}
	if newest == nil {
		return ""
	}
	return oneLine(newest.Message)
}

// lastLines returns up to n of the last non-empty lines of s, as one line.
func lastLines(s string, n int) string {
	var lines []string
	for line := range strings.Lines(s) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], " | ")
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}
