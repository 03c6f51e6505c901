package inject

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// moveProbes lets the probes and hooks that go to a redirected port go to the agent's probe port, where the agent always asks the
// app. They may be any container's: all share the pod's network. It says whether the probe port is needed.
//
// A TCP probe becomes an HTTP probe that has the agent connect to the app: the agent itself would accept any connection.
// What a native sidecar does at its start is left alone: the redirect is not there yet, and the agent only starts afterwards.
func moveProbes(spec *corev1.PodSpec, p agentcfg.Port, health uint16) bool {
	moved := false
	for _, c := range servers(spec) {
		for _, h := range handlers(c) {
			if h.host != "" || h.atStart && sidecar(c) || !resolves(c, *h.port, p.ContainerPort) {
				continue
			}
			if h.tcp != nil {
				h.tcp.TCPSocket = nil
				h.tcp.HTTPGet = &corev1.HTTPGetAction{Path: agentcfg.AppPath(p.ContainerPort), Port: intstr.FromInt32(int32(health))}
				continue
			}
			*h.port, moved = intstr.FromInt32(int32(p.ProbePort)), true
		}
		for _, pr := range probes(c) {
			if pr.GRPC == nil || pr.GRPC.Port != int32(p.ContainerPort) || pr == c.StartupProbe && sidecar(c) {
				continue
			}
			pr.GRPC.Port, moved = int32(p.ProbePort), true
		}
	}
	return moved
}

// hasPostStart says whether a container's postStart hook goes to the port.
func hasPostStart(spec *corev1.PodSpec, port uint16) bool {
	return slices.ContainsFunc(spec.Containers, func(c corev1.Container) bool {
		return c.Lifecycle != nil && goesTo(&corev1.Container{Ports: c.Ports, Lifecycle: &corev1.Lifecycle{PostStart: c.Lifecycle.PostStart}}, port)
	})
}

// handler is what an HTTP or TCP probe or an HTTP hook goes to.
type handler struct {
	port    *intstr.IntOrString
	host    string        // other than the pod
	atStart bool          // runs before the next container is started: startup probe, postStart hook
	tcp     *corev1.Probe // the TCP probe that it is of, if it is one
}

func handlers(c *corev1.Container) []handler {
	var out []handler
	for _, pr := range probes(c) {
		if pr.HTTPGet != nil {
			out = append(out, handler{port: &pr.HTTPGet.Port, host: pr.HTTPGet.Host, atStart: pr == c.StartupProbe})
		}
		if pr.TCPSocket != nil {
			out = append(out, handler{port: &pr.TCPSocket.Port, host: pr.TCPSocket.Host, atStart: pr == c.StartupProbe, tcp: pr})
		}
	}
	if c.Lifecycle == nil {
		return out
	}
	for _, h := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
		if h != nil && h.HTTPGet != nil {
			out = append(out, handler{port: &h.HTTPGet.Port, host: h.HTTPGet.Host, atStart: h == c.Lifecycle.PostStart})
		}
	}
	return out
}

func probes(c *corev1.Container) []*corev1.Probe {
	return slices.DeleteFunc([]*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe}, func(p *corev1.Probe) bool { return p == nil })
}

// resolves says whether a probe's port is the given one; the kubelet looks a name up in the probe's own container.
func resolves(c *corev1.Container, p intstr.IntOrString, port uint16) bool {
	if p.Type == intstr.Int {
		return p.IntVal == int32(port)
	}
	return slices.ContainsFunc(c.Ports, func(cp corev1.ContainerPort) bool {
		return cp.Name == p.StrVal && cp.ContainerPort == int32(port)
	})
}

// earlyLiveness refuses the one probe for which there is no right place: a native sidecar's liveness probe of a redirected port.
// Through the agent it would fail, and kill the sidecar, until all init containers are done; past the agent the laptop would answer it.
func earlyLiveness(spec *corev1.PodSpec, ports []Taken) error {
	for i := range spec.InitContainers {
		c := &spec.InitContainers[i]
		if !sidecar(c) || c.LivenessProbe == nil {
			continue
		}
		only := corev1.Container{Name: c.Name, Ports: c.Ports, LivenessProbe: c.LivenessProbe}
		for _, t := range ports {
			if t.Way == agentcfg.ByRedirect && t.Protocol == corev1.ProtocolTCP && goesTo(&only, t.ContainerPort) {
				return fmt.Errorf("the liveness probe of native sidecar %s goes to port %d before an agent can be there; let the Service name the port in its targetPort", c.Name, t.ContainerPort)
			}
		}
	}
	return nil
}

// goesTo says whether a probe or hook of the container goes to the port of its pod.
func goesTo(c *corev1.Container, port uint16) bool {
	return slices.ContainsFunc(handlers(c), func(h handler) bool { return h.host == "" && resolves(c, *h.port, port) }) ||
		slices.ContainsFunc(probes(c), func(p *corev1.Probe) bool { return p.GRPC != nil && p.GRPC.Port == int32(port) })
}
