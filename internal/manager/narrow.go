package manager

import (
	"slices"
	"strings"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// narrow says whether the manager is for some namespaces only, and has no rights beyond them.
func (m *Manager) narrow() bool { return len(m.allowed) > 0 }

// responsible says whether the manager is for a namespace.
func (m *Manager) responsible(ns string) bool { return !m.narrow() || slices.Contains(m.allowed, ns) }

// withheld refuses an intercept for which this install lacks what makes it possible, or safe.
func (m *Manager) withheld(in *v1alpha1.Intercept) *problem {
	switch {
	case m.cfg.NoWebhook:
		return &problem{"NoWebhook", "nothing can be intercepted: doppel was installed without the webhook that adds the traffic-agent to pods (admission.webhook)"}
	case m.cfg.NoPolicy && in.Spec.Session == "": // anybody could have a port of that user's laptop answer
		return &problem{"NoPolicy", "intercepts cannot be declared: doppel was installed without the policy by which Kubernetes vouches for their creator (admission.policy)"}
	case m.cfg.NoPolicy && in.Spec.Takeover:
		return &problem{"NoPolicy", "intercepts of others cannot be taken over: doppel was installed without the policy that checks the right to it (admission.policy)"}
	}
	return nil
}

// losses are what laptops are told about an install that does without parts of it.
func (m *Manager) losses() []string {
	var out []string
	if m.cfg.NoPolicy {
		out = append(out, "Kubernetes does not vouch for whose session or intercept it is (admission.policy is false): everybody who may connect can act in the name of everybody who may, and reaches "+
			strings.Join(m.allowed, ", "))
	}
	if m.cfg.NoWebhook {
		out = append(out, "nothing can be intercepted: no pod gets a traffic-agent (admission.webhook is false)")
	}
	return out
}
