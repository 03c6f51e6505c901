package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// TestOpenShift has a project as OpenShift makes one: the restricted pod security standard, and pods that run as a uid which no image knows, of group 0
// (SCC restricted-v2). The other half of it, OwnerReferencesPermissionEnforcement, is on in every lab.
func TestOpenShift(t *testing.T) {
	c := theCluster(t)
	const uid = 1000650000
	ns := c.namespace(t, "project")
	patch := []byte(`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"restricted"}}}`)
	ok(c.core.CoreV1().Namespaces().Patch(t.Context(), ns, "application/merge-patch+json", patch, metav1.PatchOptions{}))(t)
	bin := c.probe(t)
	l := newLaptop(t, "ocp")
	l.withManager(t)
	row := taken{
		name: "arbitrary", kind: "Deployment", ports: []corev1.ContainerPort{{Name: "probe", ContainerPort: 7000}},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromString("probe")}}},
		change: func(o any) {
			id, group, yes, no := int64(uid), int64(0), true, false
			spec := &o.(*appsv1.Deployment).Spec.Template.Spec
			spec.SecurityContext = &corev1.PodSecurityContext{
				RunAsUser: &id, RunAsGroup: &group, FSGroup: &id, RunAsNonRoot: &yes, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			}
			spec.Containers[0].SecurityContext = &corev1.SecurityContext{AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
		},
	}
	numbered := row
	numbered.name, numbered.service = "numbered", &corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(7000)}}}
	for _, r := range []taken{row, numbered} {
		c.workload(t, ns, r)
		c.available(t, ns, r.name)
	}
	l.run(t, "doppel", "connect", "-n", ns)
	l.start(t, bin, "name", "laptop", "tcp://127.0.0.1:7100")

	for _, mode := range []string{"intercept", "replace"} {
		l.run(t, "doppel", mode, row.name, "-p", "7100")
		if err := c.says(t, bin, ns, row, "laptop"); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
		ip := c.podOf(t, ns, row.name).Status.PodIP
		script := `for p in $(pgrep -f '[t]raffic-agent'); do if nsenter -n -t $p ip -4 addr show | grep -qF ' ` + ip + `/'; then stat -c %u /proc/$p; fi; done | sort -u`
		if uids, err := c.lab("node", "exec", "--", "sh", "-c", script); err != nil || strings.TrimSpace(uids) != "1000650000" {
			t.Errorf("%s: its agent runs as %q, %v", mode, uids, err)
		}
		files := l.sh(t, "cat /run/user/0/doppel/mounts/"+row.name+"/var/run/secrets/kubernetes.io/serviceaccount/namespace")
		if files != ns {
			t.Errorf("%s: its namespace is %q", mode, files)
		}
		l.run(t, "doppel", "leave", row.name)
		eventually(t, time.Minute, func() error { return c.says(t, bin, ns, row, row.name) })
	}

	// A redirect needs an init container with NET_ADMIN, which this standard forbids.
	before := c.revision(t, ns, numbered.name)
	r := l.try(t, "doppel", "intercept", numbered.name, "-p", "7100")
	if r.code == 0 || !strings.Contains(r.stderr, "PodSecurity") && !strings.Contains(r.stderr, "pod security") {
		t.Errorf("a port that only a redirect can take: %v", r)
	}
	want(t, l.run(t, "doppel", "list", "-i"), "No intercepts")
	if after := c.revision(t, ns, numbered.name); after != before {
		t.Errorf("its template was changed: revision %s became %s", before, after)
	}
	l.run(t, "doppel", "uninstall", "--all-agents")
	l.run(t, "doppel", "quit", "-s")
}

func (c *cluster) revision(t *testing.T, ns, name string) string {
	t.Helper()
	d := ok(c.core.AppsV1().Deployments(ns).Get(context.Background(), name, metav1.GetOptions{}))(t)
	return d.Annotations["deployment.kubernetes.io/revision"]
}
