package inject

import (
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// standIn puts a process that does nothing in the place of containers. What the scheduler, quotas and Services see of them stays, and what
// their environment and files are; probes and hooks go, since nobody would answer them.
func standIn(pod *corev1.Pod, cfg Config) {
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		if !slices.Contains(cfg.StandIns, c.Name) {
			continue
		}
		var mounts []corev1.VolumeMount
		for _, m := range c.VolumeMounts {
			mounts = append(mounts, unprivileged(m))
		}
		*c = corev1.Container{
			Name: c.Name, Image: cfg.Image, ImagePullPolicy: cfg.PullPolicy, Args: []string{"stand-in"},
			Ports: c.Ports, Env: c.Env, EnvFrom: c.EnvFrom, Resources: c.Resources, ResizePolicy: c.ResizePolicy,
			VolumeMounts: mounts, VolumeDevices: c.VolumeDevices,
			TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
			SecurityContext:          restricted(runsAsRoot(&pod.Spec)),
		}
	}
	if pod.Labels == nil {
		pod.Labels = map[string]string{}
	}
	pod.Labels[agentcfg.LabelStandIn] = "true"
}

// FindContainer picks the container of a pod that a user wants replaced, with its ports: those named first, in that order, then the others.
// An empty name means the only container, the one that the named ports belong to, or the only one that services lead to.
func FindContainer(spec *corev1.PodSpec, ports []Taken, names []string, service, container string) (string, []Taken, error) {
	var first []Taken
	if len(names) > 0 {
		var err error
		if first, err = Find(ports, names, service, container); err != nil {
			return "", nil, err
		}
		if container == "" {
			container = first[0].Container
		}
	}
	if container == "" {
		container = onlyContainer(spec, ports)
	}
	if container == "" {
		return "", nil, &PortError{"AmbiguousContainer", "several containers: " + list(spec.Containers)}
	}
	if !hasContainer(spec.Containers, container) {
		return "", nil, &PortError{"NoSuchContainer", "no container \"" + container + "\" that can be replaced; there is " + list(spec.Containers)}
	}
	for _, p := range first {
		if p.Container != container {
			return "", nil, &PortError{"AmbiguousContainer", "ports of several containers among those: " + describe(first)}
		}
	}
	for _, p := range ports {
		is := func(o Taken) bool { return o.ContainerPort == p.ContainerPort && o.Protocol == p.Protocol }
		if p.Container == container && p.Protocol != corev1.ProtocolSCTP && !slices.ContainsFunc(first, is) {
			first = append(first, p)
		}
	}
	return container, first, nil
}

// onlyContainer is the container that can be meant without a name, or "".
func onlyContainer(spec *corev1.PodSpec, ports []Taken) string {
	if len(spec.Containers) == 1 {
		return spec.Containers[0].Name
	}
	only := ""
	for _, p := range ports {
		switch {
		case len(p.Services) == 0 || p.Container == only:
		case only != "":
			return ""
		default:
			only = p.Container
		}
	}
	return only
}

func list(cs []corev1.Container) (out string) {
	for i, c := range cs {
		if i > 0 {
			out += ", "
		}
		out += c.Name
	}
	return out
}
