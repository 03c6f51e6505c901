package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/inject"
)

// injectWebhook is the mutating webhook on pod creation. Whatever goes wrong, the pod is let through:
// doppel must never keep anybody's pod from starting, and a missed injection is noticed by the intercept's reconciler.
func (m *Manager) injectWebhook() http.Handler {
	return &admission.Webhook{Handler: admission.HandlerFunc(func(ctx context.Context, req admission.Request) admission.Response {
		dryRun := req.DryRun != nil && *req.DryRun
		if !dryRun && !m.engaged.inNamespace(req.Namespace) {
			return admission.Allowed("nothing is intercepted in this namespace")
		}
		var pod corev1.Pod
		if err := json.Unmarshal(req.Object.Raw, &pod); err != nil {
			return admission.Allowed("not a pod: " + err.Error())
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

// injectPod returns the pod with an agent for the ports that are intercepted now, or nil if none of them is.
func (m *Manager) injectPod(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	w, err := m.workloadOf(ctx, pod)
	if err != nil {
		return nil, err
	}
	wanted := map[string]bool{}
	for _, g := range m.engaged.of(w) {
		wanted[fmt.Sprintf("%s/%d", g.Protocol, g.Port)] = true
	}
	if len(wanted) == 0 {
		return nil, nil
	}
	facts, err := m.facts(ctx, pod.Namespace)
	if err != nil {
		return nil, err
	}
	var take, others []inject.Taken
	for _, t := range inject.Ports(&pod.Spec, pod.Labels, facts) {
		if wanted[fmt.Sprintf("%s/%d", t.Protocol, t.ContainerPort)] {
			take = append(take, t)
		} else {
			others = append(others, t)
		}
	}
	managers, err := m.managerAddrs(ctx)
	if err != nil {
		return nil, err
	}
	return inject.Pod(pod, inject.Config{
		Image: m.cfg.AgentImage, PullPolicy: corev1.PullPolicy(m.cfg.AgentPullPolicy), LogLevel: m.cfg.AgentLogLevel,
		Managers: managers, ManagerKey: m.identity.Fingerprint(), Ports: take, Others: others, Resources: m.resources,
	})
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
