package inject

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

const tokenVolumeName = "doppel-token"

func tokenVolume() corev1.Volume {
	expiry := int64(3600)
	return corev1.Volume{Name: tokenVolumeName, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
			Audience: agentcfg.Audience, ExpirationSeconds: &expiry, Path: "token",
		}}},
	}}}
}

func agentContainer(ac *agentcfg.Config, cfg Config, spec *corev1.PodSpec) corev1.Container {
	c := corev1.Container{
		Name:            agentcfg.Container,
		Image:           cfg.Image,
		ImagePullPolicy: cfg.PullPolicy,
		Env: []corev1.EnvVar{
			configEnv(ac),
			{Name: "DOPPEL_LOG_LEVEL", Value: cfg.LogLevel},
			fieldEnv(agentcfg.EnvPodName, "metadata.name"),
			fieldEnv(agentcfg.EnvPodNamespace, "metadata.namespace"),
			fieldEnv(agentcfg.EnvPodIP, "status.podIP"),
		},
		ReadinessProbe: &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/readyz", Port: intstr.FromInt32(int32(ac.HealthPort))}},
			PeriodSeconds: 1, TimeoutSeconds: 2, FailureThreshold: 3,
		},
		Resources:       resources(cfg, spec, "256Mi"),
		SecurityContext: restricted(runsAsRoot(spec)),
		// What it said last is in the pod's status when it does not start.
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		VolumeMounts:             []corev1.VolumeMount{{Name: tokenVolumeName, MountPath: agentcfg.TokenDir, ReadOnly: true}},
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

// resources are those of a container of ours: what is configured, or little, with a limit of memory. A quota of a namespace may ask for some of every container,
// the one that has ended before the app begins too.
func resources(cfg Config, spec *corev1.PodSpec, memory string) corev1.ResourceRequirements {
	switch {
	case spec.Resources != nil:
		return corev1.ResourceRequirements{} // it shares what the pod has as a whole (KEP-2837)
	case cfg.Resources != nil:
		return *cfg.Resources.DeepCopy()
	}
	return corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("5m"), corev1.ResourceMemory: resource.MustParse("24Mi")},
		Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(memory)},
	}
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
func redirectContainer(ac *agentcfg.Config, cfg Config, spec *corev1.PodSpec) corev1.Container {
	no, yes, root := false, true, int64(0)
	return corev1.Container{
		Name:            agentcfg.InitContainer,
		Image:           cfg.Image,
		ImagePullPolicy: cfg.PullPolicy,
		Args:            []string{"redirect"},
		Env:             []corev1.EnvVar{configEnv(ac)},
		VolumeMounts:    []corev1.VolumeMount{{Name: tokenVolumeName, MountPath: agentcfg.TokenDir, ReadOnly: true}}, // keeps the app's token out

		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		Resources:                resources(cfg, spec, "64Mi"),
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

// configEnv carries the agent's configuration; the kubelet makes $$ a dollar sign again.
func configEnv(ac *agentcfg.Config) corev1.EnvVar {
	return corev1.EnvVar{Name: agentcfg.EnvConfig, Value: strings.ReplaceAll(ac.String(), "$", "$$")}
}

func fieldEnv(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}}
}
