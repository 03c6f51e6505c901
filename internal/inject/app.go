package inject

import (
	"fmt"
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/environ"
)

// volumesDir is where the agent has the app's volumes.
const volumesDir = "/doppel/volumes"

// Access is what laptops may do with a volume.
type Access string

// The kinds of access; the zero value is ReadOnly.
const (
	NoAccess  Access = "none"
	ReadOnly  Access = "ro"
	ReadWrite Access = "rw"
)

// volumePolicy says what laptops may do with the volumes of a pod.
type volumePolicy struct {
	byPath map[string]Access
	rest   Access
}

// parsePolicy reads the annotation doppel.dev/volumes: PATH=ACCESS, separated by commas, where PATH is a mount path and * stands for all others.
// What it does not mention is as the chart says.
func parsePolicy(annotation string, chart Access) (volumePolicy, error) {
	p := volumePolicy{byPath: map[string]Access{}, rest: chart}
	if p.rest == "" {
		p.rest = ReadOnly
	}
	for _, item := range strings.Split(annotation, ",") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		where, access, _ := strings.Cut(item, "=")
		a := Access(access)
		if a != NoAccess && a != ReadOnly && a != ReadWrite || where != "*" && !path.IsAbs(where) {
			return p, fmt.Errorf("annotation %s: %q is not PATH=none, PATH=ro or PATH=rw", agentcfg.AnnotationVolumes, item)
		}
		if where == "*" {
			p.rest = a
		} else {
			p.byPath[path.Clean(where)] = a
		}
	}
	return p, nil
}

func (p volumePolicy) of(mountPath string) Access {
	if a, ok := p.byPath[mountPath]; ok {
		return a
	}
	return p.rest
}

// showApps enters the containers that laptops may see into the agent's configuration, and returns what the agent's container needs of them:
// their environment and their volumes. A variable is named otherwise there, so that it means nothing to the agent itself; the kubelet fills all
// of it in, as for the app.
func showApps(ac *agentcfg.Config, cfg Config, pod *corev1.Pod) (corev1.Container, error) {
	var agent corev1.Container
	policy, err := parsePolicy(pod.Annotations[agentcfg.AnnotationVolumes], cfg.Volumes)
	if err != nil {
		return agent, err
	}
	for i, name := range cfg.Apps {
		app := containerOf(&pod.Spec, name)
		if app == nil {
			continue
		}
		shown := agentcfg.App{Container: name, Prefix: fmt.Sprintf("%s%d_", environ.Prefix, i)}
		agent.EnvFrom = append(agent.EnvFrom, envFrom(app, shown.Prefix)...)
		agent.Env = append(agent.Env, env(app, shown.Prefix)...)
		for j, m := range app.VolumeMounts {
			at := path.Clean(m.MountPath)
			access := policy.of(at)
			if access == NoAccess {
				continue
			}
			v := agentcfg.Volume{Path: at, Dir: fmt.Sprintf("%s/%d/%d", volumesDir, i, j), ReadOnly: m.ReadOnly || access == ReadOnly || kubelets(&pod.Spec, m.Name)}
			shown.Volumes = append(shown.Volumes, v)
			m.MountPath, m.ReadOnly, m.SubPathExpr = v.Dir, v.ReadOnly, environ.Rename(m.SubPathExpr, shown.Prefix)
			if !m.ReadOnly {
				m.RecursiveReadOnly = nil // only read-only mounts have it
			}
			agent.VolumeMounts = append(agent.VolumeMounts, unprivileged(m))
		}
		ac.Apps = append(ac.Apps, shown)
	}
	return agent, nil
}

// unprivileged is a volume mount as a container without privilege may have it: it sees what others mount there, and mounts nothing for them. The API
// server refuses a pod otherwise.
func unprivileged(m corev1.VolumeMount) corev1.VolumeMount {
	if m.MountPropagation != nil && *m.MountPropagation == corev1.MountPropagationBidirectional {
		m.MountPropagation = new(corev1.MountPropagationHostToContainer)
	}
	return m
}

// kubelets says whether a volume is written by the kubelet, which mounts it for reading alone, whatever the mount says.
func kubelets(spec *corev1.PodSpec, volume string) bool {
	return slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool {
		return v.Name == volume && (v.ConfigMap != nil || v.Secret != nil || v.Projected != nil || v.DownwardAPI != nil)
	})
}

// FindApp is the container that is meant: by its name or, without one, the one that kubectl exec means, or the only one.
func FindApp(pod *corev1.PodTemplateSpec, container string) (string, error) {
	var names []string
	for _, c := range servers(&pod.Spec) {
		names = append(names, c.Name)
	}
	is := func(name string) bool { return slices.Contains(names, name) }
	preferred := pod.Annotations[defaultContainerAnnotation]
	switch {
	case container != "" && is(container):
		return container, nil
	case container != "":
		return "", &PortError{"NoSuchContainer", fmt.Sprintf("no container %q; there is %s", container, strings.Join(names, ", "))}
	case is(preferred):
		return preferred, nil
	case len(pod.Spec.Containers) == 1:
		return pod.Spec.Containers[0].Name, nil
	}
	return "", &PortError{"AmbiguousContainer", "several containers: " + strings.Join(names, ", ")}
}

// containerOf finds a container that runs as long as the pod, or nil.
func containerOf(spec *corev1.PodSpec, name string) *corev1.Container {
	cs := servers(spec)
	if i := slices.IndexFunc(cs, func(c *corev1.Container) bool { return c.Name == name }); i >= 0 {
		return cs[i]
	}
	return nil
}

func envFrom(app *corev1.Container, prefix string) []corev1.EnvFromSource {
	var out []corev1.EnvFromSource
	for _, e := range app.EnvFrom {
		e.Prefix = prefix + e.Prefix
		out = append(out, e)
	}
	return out
}

func env(app *corev1.Container, prefix string) []corev1.EnvVar {
	var out []corev1.EnvVar
	for _, e := range app.Env {
		e = *e.DeepCopy()
		e.Name, e.Value = prefix+e.Name, environ.Rename(e.Value, prefix)
		if e.ValueFrom != nil && e.ValueFrom.ResourceFieldRef != nil && e.ValueFrom.ResourceFieldRef.ContainerName == "" {
			e.ValueFrom.ResourceFieldRef.ContainerName = app.Name // not the agent's
		}
		out = append(out, e)
	}
	return out
}
