package inject

import (
	"encoding/json"
	"path"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// FuzzPod: of any pod that an API server may ask about, the agent's container has none of the volumes that its annotation keeps back, and no right.
func FuzzPod(f *testing.F) {
	f.Add([]byte(`{"spec":{"containers":[{"name":"app","ports":[{"name":"http","containerPort":8080}],"env":[{"name":"A","value":"$(B)"}],"volumeMounts":[{"name":"v","mountPath":"/etc/secret/"}]}],"volumes":[{"name":"v","emptyDir":{}}]}}`), "/etc/secret=none")
	f.Add([]byte(`{"spec":{"initContainers":[{"name":"side","restartPolicy":"Always"}],"containers":[{"name":"app","ports":[{"containerPort":8080},{"containerPort":8080,"protocol":"UDP"}]}]}}`), "*=rw")
	f.Add([]byte(`{"metadata":{"annotations":{"doppel.dev/tls":"8080=x"}},"spec":{"containers":[{"name":"app"}]}}`), "/a=ro,/b")
	f.Add([]byte(`{"spec":{"containers":[{"name":"app","ports":[{"name":"http","containerPort":8080}],"securityContext":{"privileged":true},"volumeMounts":[{"name":"v","mountPath":"/v","mountPropagation":"Bidirectional"}]}],"volumes":[{"name":"v","hostPath":{"path":"/v"}}]}}`), "")
	f.Add([]byte(`null`), "")
	f.Fuzz(func(t *testing.T, text []byte, volumes string) {
		var pod corev1.Pod
		if json.Unmarshal(text, &pod) != nil || len(pod.Spec.Containers) == 0 {
			return
		}
		if pod.Annotations == nil {
			pod.Annotations = map[string]string{}
		}
		pod.Annotations[agentcfg.AnnotationVolumes] = volumes
		app := pod.Spec.Containers[0]
		out, err := Pod(&pod, Config{Image: "agent", Managers: []string{"m:1"}, ManagerKey: "k", Ports: Ports(&pod.Spec, pod.Labels, Facts{}), Apps: []string{app.Name}})
		if err != nil || out == nil {
			return
		}
		policy, err := parsePolicy(volumes, "")
		if err != nil {
			t.Fatalf("%q is taken: %v", volumes, err)
		}
		i := slices.IndexFunc(out.Spec.Containers, func(c corev1.Container) bool { return c.Name == agentcfg.Container })
		if i < 0 {
			return
		}
		agent := out.Spec.Containers[i]
		if s := agent.SecurityContext; !*s.RunAsNonRoot || !*s.ReadOnlyRootFilesystem || *s.AllowPrivilegeEscalation || s.Privileged != nil || s.Capabilities.Add != nil {
			t.Errorf("%+v", s)
		}
		for _, m := range agent.VolumeMounts {
			if m.MountPropagation != nil && *m.MountPropagation == corev1.MountPropagationBidirectional {
				t.Errorf("refused without privilege: %+v", m)
			}
		}
		for _, m := range app.VolumeMounts {
			if policy.of(path.Clean(m.MountPath)) != NoAccess {
				continue
			}
			shared := func(o corev1.VolumeMount) bool { // the same volume may be somewhere else of the app, too
				return o.Name == m.Name && o.MountPath != m.MountPath && policy.of(path.Clean(o.MountPath)) != NoAccess
			}
			if slices.ContainsFunc(agent.VolumeMounts, func(o corev1.VolumeMount) bool { return o.Name == m.Name }) && !slices.ContainsFunc(app.VolumeMounts, shared) {
				t.Errorf("%q: the agent has %+v", volumes, m)
			}
		}
	})
}
