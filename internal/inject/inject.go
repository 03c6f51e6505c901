// Package inject owns the traffic-agent's injection: a pure function from a pod and a configuration to the pod with an agent.
package inject

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
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
	// Resources of each of the agent's containers; nil means a small request and a memory limit.
	Resources *corev1.ResourceRequirements
	// Ports are the ports to take, as Ports listed them.
	Ports []Taken
	// StandIns are the containers that are not to run.
	StandIns []string
	// Others are the pod's ports that are not taken: the agent keeps off their numbers.
	Others []Taken
	// Apps are the containers whose environment and volumes the agent has for laptops.
	Apps []string
	// Volumes is what laptops may do with volumes of which the pod's annotation says nothing.
	Volumes Access
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
	secrets, err := agentcfg.TLSSecrets(pod.Annotations)
	if err != nil {
		return nil, err
	}
	if out.Annotations == nil {
		out.Annotations = map[string]string{}
	}
	if len(cfg.StandIns) > 0 {
		standIn(out, cfg)
		pod = out.DeepCopy() // without the probes and hooks of what does not run
	}
	ac := agentConfig(&pod.Spec, cfg)
	tls := endTLS(ac, secrets)
	first := false
	for _, p := range ac.Ports {
		if p.Way == agentcfg.ByName {
			takeName(&out.Spec, p)
			continue
		}
		if p.Protocol != string(corev1.ProtocolTCP) { // no probe or hook goes there
			continue
		}
		first = first || hasPostStart(&pod.Spec, p.ContainerPort)
		moveProbes(&out.Spec, p, ac.HealthPort)
	}
	apps, err := showApps(ac, cfg, pod)
	if err != nil {
		return nil, err
	}
	agent := agentContainer(ac, cfg, &pod.Spec)
	agent.Env, agent.EnvFrom = append(agent.Env, apps.Env...), apps.EnvFrom
	agent.VolumeMounts = append(agent.VolumeMounts, apps.VolumeMounts...)
	for _, v := range tls {
		agent.VolumeMounts = append(agent.VolumeMounts, corev1.VolumeMount{Name: v.name, MountPath: v.dir, ReadOnly: true})
		out.Spec.Volumes = append(out.Spec.Volumes, v.volume())
	}
	if first {
		// The kubelet runs the hook right after its container's start, once, and starts the next container when it is done.
		out.Spec.Containers = slices.Insert(out.Spec.Containers, 0, agent)
		if out.Annotations[defaultContainerAnnotation] == "" {
			out.Annotations[defaultContainerAnnotation] = defaultContainer(&pod.Spec)
		}
	} else {
		out.Spec.Containers = append(out.Spec.Containers, agent)
	}
	if ac.NeedsRedirect() { // after the app's own init containers, which it must not concern
		out.Spec.InitContainers = append(out.Spec.InitContainers, redirectContainer(ac, cfg, &pod.Spec))
	}
	out.Spec.Volumes = append(out.Spec.Volumes, tokenVolume())
	out.Annotations[agentcfg.Annotation] = ac.String()
	return out, nil
}

// defaultContainerAnnotation says which container kubectl logs and exec mean.
const defaultContainerAnnotation = "kubectl.kubernetes.io/default-container"

// Injected says whether the pod has an agent of ours (other products have a container of the same name).
func Injected(pod *corev1.Pod) bool {
	return pod.Annotations[agentcfg.Annotation] != "" && hasContainer(pod.Spec.Containers, agentcfg.Container)
}

func hasContainer(cs []corev1.Container, name string) bool {
	return slices.ContainsFunc(cs, func(c corev1.Container) bool { return c.Name == name })
}

// ErrForbidden is returned for a pod whose template says doppel.dev/inject: disabled.
var ErrForbidden = errors.New("the annotation doppel.dev/inject: disabled forbids it")

func injectable(pod *corev1.Pod, cfg Config) error {
	spec := &pod.Spec
	switch {
	case agentcfg.Forbids(pod.Annotations):
		return ErrForbidden
	case spec.HostNetwork:
		return errors.New("the pod uses the node's network (hostNetwork)")
	case spec.OS != nil && spec.OS.Name == corev1.Windows || spec.NodeSelector[corev1.LabelOSStable] == string(corev1.Windows):
		return errors.New("the pod runs on Windows")
	case spec.RestartPolicy == corev1.RestartPolicyNever || spec.RestartPolicy == corev1.RestartPolicyOnFailure:
		return fmt.Errorf("the pod runs to completion (restartPolicy %s), which it never would with an agent", spec.RestartPolicy)
	case len(cfg.Ports)+len(cfg.StandIns)+len(cfg.Apps) == 0:
		return errors.New("no ports to take")
	}
	for _, name := range []string{agentcfg.Container, agentcfg.InitContainer} {
		if hasContainer(spec.Containers, name) || hasContainer(spec.InitContainers, name) {
			return fmt.Errorf("the pod has a container %s that is not doppel's", name)
		}
	}
	for _, name := range cfg.StandIns {
		if !hasContainer(spec.Containers, name) {
			return fmt.Errorf("the pod has no container %s that a stand-in could replace", name)
		}
	}
	if i := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool {
		return v.Name == tokenVolumeName || strings.HasPrefix(v.Name, tlsVolumePrefix)
	}); i >= 0 {
		return fmt.Errorf("the pod has a volume %s that is not doppel's", spec.Volumes[i].Name)
	}
	return earlyLiveness(spec, cfg.Ports)
}

// agentConfig gives every taken port the agent's ports, next to the ports that the pod uses itself.
func agentConfig(spec *corev1.PodSpec, cfg Config) *agentcfg.Config {
	used := usedPorts(spec, cfg)
	next := uint16(agentcfg.FirstPort)
	alloc := func() uint16 {
		for used[next] {
			next++
		}
		used[next] = true
		return next
	}
	ac := &agentcfg.Config{Managers: cfg.Managers, ManagerKey: cfg.ManagerKey, HealthPort: alloc(), StandIns: cfg.StandIns}
	for _, t := range cfg.Ports {
		p := agentcfg.Port{
			Protocol: string(t.Protocol), ContainerPort: t.ContainerPort, Container: t.Container, Way: t.Way, AgentPort: alloc(),
			Sidecar: slices.ContainsFunc(spec.InitContainers, func(c corev1.Container) bool { return c.Name == t.Container }),
		}
		if t.Way == agentcfg.ByName {
			p.Name = t.Name
		} else if t.Protocol == corev1.ProtocolTCP && moveProbes(spec.DeepCopy(), p, ac.HealthPort) {
			p.ProbePort = alloc()
		}
		ac.Ports = append(ac.Ports, p)
	}
	return ac
}

// usedPorts are the numbers that something in the pod may listen on, as far as the pod and its services tell. What protocol
// they are of does not matter: people read numbers.
func usedPorts(spec *corev1.PodSpec, cfg Config) map[uint16]bool {
	used := map[uint16]bool{}
	for _, t := range slices.Concat(cfg.Ports, cfg.Others) {
		used[t.ContainerPort] = true
	}
	for _, cs := range [][]corev1.Container{spec.Containers, spec.InitContainers} {
		for i := range cs {
			for _, p := range cs[i].Ports {
				used[uint16(p.ContainerPort)] = true
			}
			for _, h := range handlers(&cs[i]) {
				if h.port.Type == intstr.Int {
					used[uint16(h.port.IntVal)] = true
				}
			}
			for _, pr := range probes(&cs[i]) {
				if pr.GRPC != nil {
					used[uint16(pr.GRPC.Port)] = true
				}
			}
		}
	}
	return used
}

// takeName removes the port's name from the app's container (the agent's container carries it from now on)
// and lets the app's probes and hooks that used the name use the number.
func takeName(spec *corev1.PodSpec, p agentcfg.Port) {
	for _, c := range servers(spec) {
		if c.Name != p.Container {
			continue
		}
		for _, h := range handlers(c) {
			if h.port.Type == intstr.String && h.port.StrVal == p.Name {
				*h.port = intstr.FromInt32(int32(p.ContainerPort))
			}
		}
		for i := range c.Ports {
			if c.Ports[i].Name == p.Name {
				c.Ports[i].Name = ""
			}
		}
	}
}
