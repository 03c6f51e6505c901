package inject

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"

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

// Taken is a port that can be taken: where it is, which service port leads to it, and the way.
type Taken struct {
	Container     string
	ContainerPort uint16
	Protocol      corev1.Protocol
	Name          string // the container port's name, if it has one
	Way           agentcfg.Way
	Service       string // one service that leads to it; empty if none does
	ServicePort   int32
	ServicePName  string // name of that service port
}

// Ports lists every port of the pod that can be taken, ordered by number: those that services lead to and those that containers declare.
func Ports(spec *corev1.PodSpec, podLabels map[string]string, f Facts) []Taken {
	byKey := map[string]*Taken{}
	add := func(t Taken) *Taken {
		k := fmt.Sprintf("%s/%d", t.Protocol, t.ContainerPort)
		if old := byKey[k]; old != nil {
			return old
		}
		byKey[k] = &t
		return &t
	}
	for i := range spec.Containers {
		c := &spec.Containers[i]
		for _, p := range c.Ports {
			add(Taken{Container: c.Name, ContainerPort: uint16(p.ContainerPort), Protocol: proto(p.Protocol), Name: p.Name, Way: agentcfg.ByRedirect})
		}
	}
	byName := map[*Taken]bool{} // every service so far names the port
	for _, svc := range f.Services {
		if !selects(svc.Spec.Selector, podLabels) {
			continue
		}
		for _, sp := range svc.Spec.Ports {
			found, ok := target(spec, sp)
			if !ok {
				continue
			}
			t := add(found)
			if t.Service == "" {
				t.Service, t.ServicePort, t.ServicePName = svc.Name, sp.Port, sp.Name
				byName[t] = true
			}
			if sp.TargetPort.Type != intstr.String || svc.Spec.ClusterIP == corev1.ClusterIPNone {
				byName[t] = false
			}
		}
	}
	var out []Taken
	for _, t := range byKey {
		if byName[t] && t.Name != "" && !policyByNumber(f.NetworkPolicies, podLabels, t) {
			t.Way = agentcfg.ByName
		}
		out = append(out, *t)
	}
	slices.SortFunc(out, func(a, b Taken) int {
		return cmp.Or(cmp.Compare(a.ContainerPort, b.ContainerPort), cmp.Compare(a.Protocol, b.Protocol))
	})
	return out
}

// target finds the container port that a service port leads to, by the rules of the endpoints controller:
// a name is looked for in all containers with the same protocol, a number is taken as it is, zero means the service port's own number.
func target(spec *corev1.PodSpec, sp corev1.ServicePort) (Taken, bool) {
	pr := proto(sp.Protocol)
	want := sp.TargetPort
	if want.Type == intstr.Int && want.IntVal == 0 {
		want = intstr.FromInt32(sp.Port)
	}
	for i := range spec.Containers {
		c := &spec.Containers[i]
		for _, p := range c.Ports {
			if proto(p.Protocol) == pr && (want.Type == intstr.String && p.Name == want.StrVal || want.Type == intstr.Int && p.ContainerPort == want.IntVal) {
				return Taken{Container: c.Name, ContainerPort: uint16(p.ContainerPort), Protocol: pr, Name: p.Name, Way: agentcfg.ByRedirect}, true
			}
		}
	}
	if want.Type == intstr.String || len(spec.Containers) == 0 {
		return Taken{}, false
	}
	return Taken{Container: spec.Containers[0].Name, ContainerPort: uint16(want.IntVal), Protocol: pr, Way: agentcfg.ByRedirect}, true
}

// policyByNumber says whether a NetworkPolicy that selects the pod allows the port by its number:
// such a policy would not allow the agent's port after a name takeover.
func policyByNumber(pols []networkingv1.NetworkPolicy, podLabels map[string]string, t *Taken) bool {
	for i := range pols {
		sel, err := metav1.LabelSelectorAsSelector(&pols[i].Spec.PodSelector)
		if err != nil || !sel.Matches(labels.Set(podLabels)) {
			continue
		}
		for _, in := range pols[i].Spec.Ingress {
			for _, p := range in.Ports {
				if p.Port != nil && p.Port.Type == intstr.Int && inRange(t.ContainerPort, p.Port.IntVal, p.EndPort) {
					return true
				}
			}
		}
	}
	return false
}

func inRange(port uint16, from int32, to *int32) bool {
	end := from
	if to != nil {
		end = *to
	}
	return int32(port) >= from && int32(port) <= end
}

// Find picks the port a user named: a service port's or container port's name or number, narrowed by service and container.
// An empty name means the only port there is. The error lists what could have been meant.
func Find(ports []Taken, name, service, container string) (Taken, error) {
	var all, got []Taken
	for _, p := range ports {
		if p.Protocol != corev1.ProtocolTCP || container != "" && p.Container != container || service != "" && p.Service != service {
			continue
		}
		all = append(all, p)
		if name == "" || matches(p, name) {
			got = append(got, p)
		}
	}
	if name == "" && len(got) > 1 { // one of them behind a service: that is the one people mean
		if s := slices.DeleteFunc(slices.Clone(got), func(p Taken) bool { return p.Service == "" }); len(s) == 1 {
			got = s
		}
	}
	switch {
	case len(got) == 1:
		return got[0], nil
	case len(all) == 0:
		return Taken{}, &PortError{Reason: "NoPort", Msg: "no TCP port: no service selects its pods and no container declares one"}
	case len(got) == 0:
		return Taken{}, &PortError{Reason: "NoSuchPort", Msg: fmt.Sprintf("no port %q; it has %s", name, describe(all))}
	}
	return Taken{}, &PortError{Reason: "AmbiguousPort", Msg: fmt.Sprintf("port %q could be any of %s", name, describe(got))}
}

// PortError says why no port was found.
type PortError struct{ Reason, Msg string }

func (e *PortError) Error() string { return e.Msg }

func matches(p Taken, name string) bool {
	if n, err := strconv.Atoi(name); err == nil {
		return p.Service != "" && int(p.ServicePort) == n || int(p.ContainerPort) == n
	}
	return p.Service != "" && p.ServicePName == name || p.Name == name
}

func describe(ports []Taken) string {
	var b []byte
	for i, p := range ports {
		if i > 0 {
			b = append(b, ", "...)
		}
		b = strconv.AppendUint(b, uint64(p.ContainerPort), 10)
		if p.Name != "" {
			b = append(b, " ("+p.Name+")"...)
		}
		if p.Service != "" {
			b = fmt.Appendf(b, " [service %s:%d]", p.Service, p.ServicePort)
		}
	}
	return string(b)
}

func selects(selector, podLabels map[string]string) bool {
	return len(selector) > 0 && labels.SelectorFromSet(selector).Matches(labels.Set(podLabels))
}

func proto(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}
