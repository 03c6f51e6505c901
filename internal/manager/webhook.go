package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
)

// injectWebhook is the mutating webhook on pod creation, and hears the questions that we ask ourselves (reached). Whatever goes wrong, the pod is let through:
// doppel must never keep anybody's pod from starting, and a missed injection is noticed by the intercept's reconciler.
func (m *Manager) injectWebhook() http.Handler {
	return &admission.Webhook{Handler: admission.HandlerFunc(func(ctx context.Context, req admission.Request) admission.Response {
		dryRun := req.DryRun != nil && *req.DryRun
		if req.Kind.Kind == "Session" {
			return m.questions.answer(req.Object.Raw)
		}
		var pod corev1.Pod
		if err := json.Unmarshal(req.Object.Raw, &pod); err != nil {
			return admission.Allowed("not a pod: " + err.Error())
		}
		if !dryRun && !m.engaged.inNamespace(req.Namespace) && !agentcfg.Keeps(pod.Annotations) {
			return admission.Allowed("nothing is intercepted in this namespace")
		}
		if dryRun && pod.Annotations[agentcfg.AnnotationProbe] == agentcfg.ProbeAsked { // doppel doctor
			pod.Annotations[agentcfg.AnnotationProbe] = agentcfg.ProbeAnswered
			after, err := json.Marshal(&pod)
			if err != nil {
				return admission.Allowed("not answered: " + err.Error())
			}
			return admission.PatchResponseFromRaw(req.Object.Raw, after)
		}
		pod.Namespace = req.Namespace // empty in the object of a controller's request
		out, err := m.injectPod(ctx, &pod)
		if err != nil {
			m.cfg.Log.Warn("pod not injected", "pod", req.Namespace+"/"+pod.GenerateName, "err", err)
			return admission.Allowed("not injected: " + err.Error()).WithWarnings("doppel: no traffic-agent injected: " + err.Error())
		}
		if out == nil {
			return admission.Allowed("not intercepted")
		}
		// The patch is from what we understood of the pod, not from what came: fields that are newer than our API types stay.
		before, err1 := json.Marshal(&pod)
		after, err2 := json.Marshal(out)
		if err := errors.Join(err1, err2); err != nil {
			return admission.Allowed("not injected: " + err.Error())
		}
		m.cfg.Log.Info("injected", "pod", req.Namespace+"/"+pod.GenerateName)
		return admission.PatchResponseFromRaw(before, after)
	})}
}

// questions are those that we ask ourselves through the API server: whether it reaches the webhook.
type questions struct {
	open sync.Map // by text, true when the webhook was asked it

	mu sync.Mutex // held while one is asked, for all who want to know
	// guarded by mu
	missed time.Time // when the last was not answered
}

// questionPause is how long nobody asks again after a question that was not answered: such a one may take the webhook's time-out.
const questionPause = time.Second

// questionTimeout bounds a question, for which others wait: more than the webhook's own time-out, and that of the admission policies.
const questionTimeout = 5 * time.Second

// reached says whether the API server reaches the webhook. An error says that it could not even be tried.
func (m *Manager) reached(ctx context.Context) (bool, error) {
	q := &m.questions
	q.mu.Lock()
	defer q.mu.Unlock()
	if time.Since(q.missed) < questionPause {
		return false, nil
	}
	text := string(uuid.NewUUID())
	q.open.Store(text, false)
	o := probeSession(m.cfg.Namespace, forgedUser)
	o.Annotations = map[string]string{agentcfg.AnnotationProbe: text}
	ctx, cancel := context.WithTimeout(ctx, questionTimeout)
	defer cancel()
	err := m.ctrl.GetClient().Create(ctx, o, client.DryRunAll)
	if asked, _ := q.open.LoadAndDelete(text); asked == true {
		return true, nil
	}
	if err == nil || identityRule.refused(err) { // webhooks are asked first
		q.missed = time.Now()
		return false, nil
	}
	return false, fmt.Errorf("ask whether the API server reaches the webhook: %w", err)
}

func (q *questions) answer(session []byte) admission.Response {
	var o metav1.PartialObjectMetadata
	if json.Unmarshal(session, &o) == nil {
		q.open.CompareAndSwap(o.Annotations[agentcfg.AnnotationProbe], false, true)
	}
	return admission.Allowed("not a pod")
}

// injectPod returns the pod with an agent for what is wanted of the workload now, or nil if nothing is. A pod that always has an agent has it for
// all ports, but for those that its namespace would refuse it for.
func (m *Manager) injectPod(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	w, err := m.workloadOf(ctx, pod)
	if err != nil {
		return nil, err
	}
	wanted, engaged := map[control.Port]bool{}, m.engaged.of(w)
	for _, g := range engaged {
		if g.Ending {
			continue
		}
		for _, p := range g.Ports {
			wanted[p] = true
		}
	}
	standIns := m.engaged.replaced(w)
	if len(wanted)+len(standIns)+len(appsOf(engaged, nil)) == 0 && !agentcfg.Keeps(pod.Annotations) {
		return nil, nil
	}
	take, others, err := m.ports(ctx, pod, wanted)
	if err != nil {
		return nil, err
	}
	managers, err := m.managerAddrs(ctx)
	if err != nil {
		return nil, err
	}
	return inject.Pod(pod, inject.Config{
		Image: m.cfg.AgentImage, PullPolicy: corev1.PullPolicy(m.cfg.AgentPullPolicy), LogLevel: m.cfg.AgentLogLevel,
		Managers: managers, ManagerKey: m.identity.Fingerprint(), Ports: take, StandIns: standIns, Others: others, Resources: m.resources,
		Apps: appsOf(engaged, take), Volumes: inject.Access(m.cfg.Volumes),
	})
}

// ports are the pod's ports that an agent is to take, those wanted and, if it always has an agent, all that its namespace lets it
// take; and the others.
func (m *Manager) ports(ctx context.Context, pod *corev1.Pod, wanted map[control.Port]bool) (take, others []inject.Taken, err error) {
	keeps, redirects := agentcfg.Keeps(pod.Annotations), false
	if keeps {
		_, why, err := m.refusesRedirect(ctx, pod.Namespace)
		if err != nil {
			return nil, nil, err
		}
		redirects = why == ""
	}
	facts, err := m.facts(ctx, pod.Namespace)
	if err != nil {
		return nil, nil, err
	}
	for _, t := range inject.Ports(&pod.Spec, pod.Labels, facts) {
		if wanted[portOf(t)] || keeps && t.Protocol != corev1.ProtocolSCTP && (redirects || t.Way == agentcfg.ByName) {
			take = append(take, t)
		} else {
			others = append(others, t)
		}
	}
	return take, others, nil
}

// refusesRedirect says what lets no container of a namespace have NET_ADMIN, and for which reason of a status that stands; or "". It is the configuration, or
// the pod security standard that the namespace enforces (KEP-2579).
func (m *Manager) refusesRedirect(ctx context.Context, name string) (reason, what string, err error) {
	if m.cfg.NoRedirect {
		return "NoRedirect", "this traffic-manager's chart value agent.redirect", nil
	}
	var ns corev1.Namespace
	if err := m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Name: name}, &ns); err != nil {
		return "", "", client.IgnoreNotFound(err)
	}
	if level := ns.Labels["pod-security.kubernetes.io/enforce"]; level == "baseline" || level == "restricted" {
		return "PodSecurity", fmt.Sprintf("the pod security standard of namespace %s (%s)", name, level), nil
	}
	return "", "", nil
}

// managerAddrs are the addresses under which agents find the manager: by name, and by address for pods that do not use the cluster's DNS.
func (m *Manager) managerAddrs(ctx context.Context) ([]string, error) {
	_, port, err := net.SplitHostPort(m.cfg.AgentsAddr)
	if err != nil {
		return nil, err
	}
	var svc corev1.Service
	if err := m.ctrl.GetClient().Get(ctx, client.ObjectKey{Namespace: m.cfg.Namespace, Name: objectName}, &svc); err != nil {
		return nil, err
	}
	return []string{
		net.JoinHostPort(svc.Spec.ClusterIP, port),
		net.JoinHostPort(objectName+"."+m.cfg.Namespace+".svc."+m.cluster.domain, port),
	}, nil
}
