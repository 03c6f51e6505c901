package inject

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// Facts are the objects of a pod's namespace that decide how its ports can be taken.
type Facts struct {
	Services        []corev1.Service
	NetworkPolicies []networkingv1.NetworkPolicy
}

// Taken is a port that can be taken: where it is, which service ports lead to it, and the way.
type Taken struct {
	Container     string
	ContainerPort uint16
	Protocol      corev1.Protocol
	Name          string // the container port's name, if it has one
	Way           agentcfg.Way
	Services      []ServicePort // ordered by service and port
}

// ServicePort is one port of a service.
type ServicePort struct {
	Service string
	Port    int32
	Name    string // empty if the service has one port without a name
}

// Via returns the first service port that leads to the port; the zero value if none does.
func (t Taken) Via() ServicePort {
	if len(t.Services) == 0 {
		return ServicePort{}
	}
	return t.Services[0]
}

// Ports lists every port of the pod that can be taken, ordered by number: those that services lead to and those that containers declare.
// docs/support-table.md says which way is taken when.
func Ports(spec *corev1.PodSpec, podLabels map[string]string, f Facts) []Taken {
	out := []Taken{}
	for _, c := range candidates(spec, podLabels, f) {
		c.Way = agentcfg.ByName
		if c.whyRedirect(spec, podLabels, f.NetworkPolicies) != "" {
			c.Way = agentcfg.ByRedirect
		}
		out = append(out, c.Taken)
	}
	return out
}

// candidate is a port while its way is being decided.
type candidate struct {
	Taken
	byNumber bool // some service leads to it by its number
	headless bool // some service that leads to it is headless
}

func candidates(spec *corev1.PodSpec, podLabels map[string]string, f Facts) []*candidate {
	var out []*candidate
	find := func(p corev1.Protocol, n int32) *candidate {
		i := slices.IndexFunc(out, func(c *candidate) bool { return c.Protocol == proto(p) && int32(c.ContainerPort) == n })
		if i < 0 {
			return nil
		}
		return out[i]
	}
	for _, c := range servers(spec) {
		for _, p := range c.Ports {
			if find(p.Protocol, p.ContainerPort) == nil {
				out = append(out, &candidate{Taken: Taken{Container: c.Name, ContainerPort: uint16(p.ContainerPort), Protocol: proto(p.Protocol), Name: p.Name}})
			}
		}
	}
	for i := range f.Services {
		svc := &f.Services[i]
		if !selects(svc, podLabels) {
			continue
		}
		for _, sp := range svc.Spec.Ports {
			n, ok := target(spec, sp)
			if !ok {
				continue
			}
			c := find(sp.Protocol, n)
			if c == nil { // declared nowhere: any container may listen on it
				c = &candidate{Taken: Taken{Container: defaultContainer(spec), ContainerPort: uint16(n), Protocol: proto(sp.Protocol)}}
				out = append(out, c)
			}
			c.Services = append(c.Services, ServicePort{Service: svc.Name, Port: sp.Port, Name: sp.Name})
			c.byNumber = c.byNumber || sp.TargetPort.Type == intstr.Int
			c.headless = c.headless || svc.Spec.ClusterIP == corev1.ClusterIPNone
		}
	}
	for _, c := range out {
		slices.SortFunc(c.Services, func(a, b ServicePort) int {
			return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Port, b.Port))
		})
	}
	slices.SortFunc(out, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(a.ContainerPort, b.ContainerPort), cmp.Compare(a.Protocol, b.Protocol))
	})
	return out
}

// whyRedirect says why the port's name alone cannot bring its traffic to the agent, or "".
func (c *candidate) whyRedirect(spec *corev1.PodSpec, podLabels map[string]string, pols []networkingv1.NetworkPolicy) string {
	switch {
	case c.Name == "":
		return "the port has no name"
	case len(c.Services) == 0:
		return "no service leads to the port"
	case c.byNumber:
		return "a service leads to the port by its number"
	case c.headless:
		return "a headless service leads to the port: its clients choose the number themselves"
	}
	for _, s := range servers(spec) {
		for _, p := range s.Ports {
			same := s.Name == c.Container && p.Name == c.Name
			sameNumber := proto(p.Protocol) == c.Protocol && p.ContainerPort == int32(c.ContainerPort)
			switch {
			case sameNumber && p.HostPort != 0:
				return "the port is a hostPort, which leads to it by its number"
			case same:
			case p.Name == c.Name: // after a takeover the name would lead to this one
				return "another port of the pod has the same name"
			case sameNumber: // services may lead to it by either name
				return "the number is declared twice"
			}
		}
	}
	if policyByNumber(pols, podLabels, c.ContainerPort) {
		return "a NetworkPolicy allows the port by its number"
	}
	return ""
}

// target is the container port's number that a service port leads to, by the rules of the endpoints controller (FindPort in
// k8s.io/kubernetes/pkg/api/v1/pod): the first container with a port of that name and protocol, native sidecars after the
// others; a number is taken as it is, zero means the service port's own number.
func target(spec *corev1.PodSpec, sp corev1.ServicePort) (int32, bool) {
	if sp.TargetPort.Type == intstr.Int {
		return cmp.Or(sp.TargetPort.IntVal, sp.Port), true
	}
	for _, c := range servers(spec) {
		for _, p := range c.Ports {
			if proto(p.Protocol) == proto(sp.Protocol) && p.Name == sp.TargetPort.StrVal {
				return p.ContainerPort, true
			}
		}
	}
	return 0, false
}

// servers are the containers that run as long as the pod does: the ordinary ones, then the native sidecars (KEP-753).
func servers(spec *corev1.PodSpec) []*corev1.Container {
	var out []*corev1.Container
	for i := range spec.Containers {
		out = append(out, &spec.Containers[i])
	}
	for i := range spec.InitContainers {
		if sidecar(&spec.InitContainers[i]) {
			out = append(out, &spec.InitContainers[i])
		}
	}
	return out
}

func sidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

func defaultContainer(spec *corev1.PodSpec) string {
	if len(spec.Containers) == 0 {
		return ""
	}
	return spec.Containers[0].Name
}

// policyByNumber says whether a NetworkPolicy allows the port by its number, on the pod's side or on a client's:
// such a policy would not allow the agent's port after a name takeover. Policies of clients in other namespaces are not seen.
func policyByNumber(pols []networkingv1.NetworkPolicy, podLabels map[string]string, port uint16) bool {
	for i := range pols {
		p := &pols[i].Spec
		if matchLabels(&p.PodSelector, podLabels) {
			for _, in := range p.Ingress {
				if portByNumber(in.Ports, port) {
					return true
				}
			}
		}
		for _, e := range p.Egress {
			if portByNumber(e.Ports, port) && mayReach(e.To, podLabels) {
				return true
			}
		}
	}
	return false
}

func portByNumber(ports []networkingv1.NetworkPolicyPort, port uint16) bool {
	return slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
		if p.Port == nil || p.Port.Type != intstr.Int {
			return false
		}
		end := p.Port.IntVal
		if p.EndPort != nil {
			end = *p.EndPort
		}
		return int32(port) >= p.Port.IntVal && int32(port) <= end
	})
}

// mayReach says whether an egress rule can be about the pod; no peers means everybody.
func mayReach(to []networkingv1.NetworkPolicyPeer, podLabels map[string]string) bool {
	return len(to) == 0 || slices.ContainsFunc(to, func(p networkingv1.NetworkPolicyPeer) bool {
		return p.PodSelector == nil || matchLabels(p.PodSelector, podLabels)
	})
}

func matchLabels(s *metav1.LabelSelector, podLabels map[string]string) bool {
	sel, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && sel.Matches(labels.Set(podLabels))
}

// selects says whether the service has the pod among its endpoints.
func selects(svc *corev1.Service, podLabels map[string]string) bool {
	return svc.Spec.Type != corev1.ServiceTypeExternalName && len(svc.Spec.Selector) > 0 &&
		labels.SelectorFromSet(svc.Spec.Selector).Matches(labels.Set(podLabels))
}

func proto(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}
