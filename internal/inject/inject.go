// Package inject owns the traffic-agent's injection: a pure function from a pod and a configuration to the pod with an agent.
package inject

import (
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// Config is what injection needs to know besides the pod.
type Config struct {
	Image      string
	PullPolicy corev1.PullPolicy
	LogLevel   string
	Managers   []string
	ManagerKey string
	// Resources of the agent's container; nil means a small request and a memory limit.
	Resources *corev1.ResourceRequirements
	// Ports are the ports to take, as Ports listed them.
	Ports []Taken
}

// Pod returns a copy of pod with the agent in it. A pod that already has one is returned unchanged.
func Pod(pod *corev1.Pod, cfg Config) (*corev1.Pod, error) {
	out := pod.DeepCopy()
	if Injected(pod) {
		return out, nil
	}
	if err := injectable(pod, cfg); err != nil {
		return nil, err
	}
	ac := agentConfig(&pod.Spec, cfg)
	for _, p := range ac.Ports {
		if p.Way == agentcfg.ByName {
			takeName(&out.Spec, p)
		} else if p.ProbePort != 0 {
			moveProbes(&out.Spec, p)
		}
	}
	out.Spec.Containers = append(out.Spec.Containers, agentContainer(ac, cfg, runsAsRoot(&pod.Spec)))
	if ac.NeedsRedirect() {
		out.Spec.InitContainers = append(out.Spec.InitContainers, redirectContainer(ac, cfg))
	}
	out.Spec.Volumes = append(out.Spec.Volumes, tokenVolume())
	if out.Annotations == nil {
		out.Annotations = map[string]string{}
	}
	out.Annotations[agentcfg.Annotation] = ac.String()
	return out, nil
}

// Injected says whether the pod has an agent.
func Injected(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == agentcfg.Container })
}

// ErrForbidden is returned for a pod whose template says doppel.dev/inject: "false".
var ErrForbidden = errors.New(`the annotation doppel.dev/inject: "false" forbids it`)

func injectable(pod *corev1.Pod, cfg Config) error {
	switch {
	case pod.Annotations[agentcfg.AnnotationInject] == "false":
		return ErrForbidden
	case pod.Spec.HostNetwork:
		return errors.New("the pod uses the node's network (hostNetwork)")
	case len(cfg.Ports) == 0:
		return errors.New("no ports to take")
	}
	return nil
}

// agentConfig gives every taken port the agent's ports, next to the ports that the pod uses itself.
func agentConfig(spec *corev1.PodSpec, cfg Config) *agentcfg.Config {
	used := map[uint16]bool{}
	for _, c := range slices.Concat(spec.Containers, spec.InitContainers) {
		for _, p := range c.Ports {
			used[uint16(p.ContainerPort)] = true
		}
	}
	for _, t := range cfg.Ports {
		used[t.ContainerPort] = true
	}
	next := uint16(agentcfg.FirstPort)
	alloc := func() uint16 {
		for used[next] {
			next++
		}
		used[next] = true
		return next
	}
	ac := &agentcfg.Config{Managers: cfg.Managers, ManagerKey: cfg.ManagerKey, HealthPort: alloc()}
	for _, t := range cfg.Ports {
		p := agentcfg.Port{Protocol: string(t.Protocol), ContainerPort: t.ContainerPort, Container: t.Container, Way: t.Way, AgentPort: alloc()}
		if t.Way == agentcfg.ByName {
			p.Name = t.Name
		} else if t.Protocol == corev1.ProtocolTCP && probed(spec, t.Container, t.ContainerPort) {
			p.ProbePort = alloc()
		}
		ac.Ports = append(ac.Ports, p)
	}
	return ac
}

// takeName removes the port's name from the app's container (the agent's container carries it from now on)
// and lets the app's probes and hooks that used the name use the number.
func takeName(spec *corev1.PodSpec, p agentcfg.Port) {
	for i := range spec.Containers {
		c := &spec.Containers[i]
		if c.Name != p.Container {
			continue
		}
		for j := range c.Ports {
			if c.Ports[j].Name == p.Name && string(proto(c.Ports[j].Protocol)) == p.Protocol {
				c.Ports[j].Name = ""
			}
		}
		eachProbePort(c, func(port *intstr.IntOrString, _ bool) {
			if port.Type == intstr.String && port.StrVal == p.Name {
				*port = intstr.FromInt32(int32(p.ContainerPort))
			}
		})
	}
}

// moveProbes lets the probes of a redirected port go to the agent's probe port, where the agent always asks the app.
// Lifecycle hooks with an explicit host other than the pod are left alone.
func moveProbes(spec *corev1.PodSpec, p agentcfg.Port) {
	for i := range spec.Containers {
		c := &spec.Containers[i]
		eachProbePort(c, func(port *intstr.IntOrString, ownHost bool) {
			if ownHost && resolves(c, *port, p.ContainerPort) && c.Name == p.Container {
				*port = intstr.FromInt32(int32(p.ProbePort))
			}
		})
		for _, pr := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
			if pr != nil && pr.GRPC != nil && c.Name == p.Container && pr.GRPC.Port == int32(p.ContainerPort) {
				pr.GRPC.Port = int32(p.ProbePort)
			}
		}
	}
}

// probed says whether a probe or hook of the container goes to the port.
func probed(spec *corev1.PodSpec, container string, port uint16) bool {
	found := false
	for i := range spec.Containers {
		c := spec.Containers[i].DeepCopy()
		if c.Name != container {
			continue
		}
		eachProbePort(c, func(p *intstr.IntOrString, ownHost bool) { found = found || ownHost && resolves(c, *p, port) })
		for _, pr := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
			found = found || pr != nil && pr.GRPC != nil && pr.GRPC.Port == int32(port)
		}
	}
	return found
}

// eachProbePort visits the port of every HTTP and TCP probe and hook; ownHost is false if the probe names another host.
func eachProbePort(c *corev1.Container, visit func(port *intstr.IntOrString, ownHost bool)) {
	for _, pr := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
		if pr == nil {
			continue
		}
		if pr.HTTPGet != nil {
			visit(&pr.HTTPGet.Port, pr.HTTPGet.Host == "")
		}
		if pr.TCPSocket != nil {
			visit(&pr.TCPSocket.Port, pr.TCPSocket.Host == "")
		}
	}
	if c.Lifecycle == nil {
		return
	}
	for _, h := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
		if h != nil && h.HTTPGet != nil {
			visit(&h.HTTPGet.Port, h.HTTPGet.Host == "")
		}
	}
}

func resolves(c *corev1.Container, p intstr.IntOrString, port uint16) bool {
	if p.Type == intstr.Int {
		return p.IntVal == int32(port)
	}
	return slices.ContainsFunc(c.Ports, func(cp corev1.ContainerPort) bool {
		return cp.Name == p.StrVal && cp.ContainerPort == int32(port)
	})
}

const tokenVolumeName = "doppel-token"

func tokenVolume() corev1.Volume {
	expiry := int64(3600)
	return corev1.Volume{Name: tokenVolumeName, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
			Audience: agentcfg.Audience, ExpirationSeconds: &expiry, Path: "token",
		}}},
	}}}
}

func agentContainer(ac *agentcfg.Config, cfg Config, podIsRoot bool) corev1.Container {
	c := corev1.Container{
		Name:            agentcfg.Container,
		Image:           cfg.Image,
		ImagePullPolicy: cfg.PullPolicy,
		Env: []corev1.EnvVar{
			{Name: agentcfg.EnvConfig, Value: ac.String()},
			{Name: "DOPPEL_LOG_LEVEL", Value: cfg.LogLevel},
			fieldEnv(agentcfg.EnvPodName, "metadata.name"),
			fieldEnv(agentcfg.EnvPodNamespace, "metadata.namespace"),
			fieldEnv(agentcfg.EnvPodIP, "status.podIP"),
		},
		ReadinessProbe: &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/readyz", Port: intstr.FromInt32(int32(ac.HealthPort))}},
			PeriodSeconds: 1, TimeoutSeconds: 2, FailureThreshold: 3,
		},
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("5m"), corev1.ResourceMemory: resource.MustParse("24Mi")},
			Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")},
		},
		SecurityContext: restricted(podIsRoot),
		VolumeMounts:    []corev1.VolumeMount{{Name: tokenVolumeName, MountPath: agentcfg.TokenDir, ReadOnly: true}},
	}
	if cfg.Resources != nil {
		c.Resources = *cfg.Resources
	}
	for _, p := range ac.Ports {
		cp := corev1.ContainerPort{ContainerPort: int32(p.AgentPort), Protocol: corev1.Protocol(p.Protocol)}
		if p.Way == agentcfg.ByName {
			cp.Name = p.Name
		}
		c.Ports = append(c.Ports, cp)
	}
	return c
}

// restricted is the security context of the agent: it passes the "restricted" pod security standard.
// The uid is left to the image (65532) so that OpenShift can choose its own, unless the pod asks for root for all its containers.
func restricted(podIsRoot bool) *corev1.SecurityContext {
	no, yes := false, true
	var uid *int64
	if podIsRoot {
		nonroot := int64(65532)
		uid = &nonroot
	}
	return &corev1.SecurityContext{
		RunAsUser:                uid,
		AllowPrivilegeEscalation: &no,
		ReadOnlyRootFilesystem:   &yes,
		RunAsNonRoot:             &yes,
		Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
}

// redirectContainer sets the nftables redirect and exits; it is the only thing with a privilege, and runs before the app.
func redirectContainer(ac *agentcfg.Config, cfg Config) corev1.Container {
	no, yes, root := false, true, int64(0)
	return corev1.Container{
		Name:            agentcfg.InitContainer,
		Image:           cfg.Image,
		ImagePullPolicy: cfg.PullPolicy,
		Args:            []string{"redirect"},
		Env:             []corev1.EnvVar{{Name: agentcfg.EnvConfig, Value: ac.String()}},
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("5m"), corev1.ResourceMemory: resource.MustParse("24Mi")},
			Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")},
		},
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: &no,
			ReadOnlyRootFilesystem:   &yes,
			RunAsNonRoot:             &no,
			RunAsUser:                &root,
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"NET_ADMIN"}},
			SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
	}
}

func runsAsRoot(spec *corev1.PodSpec) bool {
	sc := spec.SecurityContext
	return sc != nil && sc.RunAsUser != nil && *sc.RunAsUser == 0
}

func fieldEnv(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}}
}

// String describes a taken port for people: "3000/TCP (http) by name".
func (t Taken) String() string {
	s := fmt.Sprintf("%d/%s", t.ContainerPort, t.Protocol)
	if t.Name != "" {
		s += " (" + t.Name + ")"
	}
	return s + " by " + string(t.Way)
}
