package kube

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// WebhookAnswers tries whether the API server gets answers from the injection webhook, in a namespace: it creates a pod as a dry run,
// which the webhook marks. An error says why that could not be tried.
func (c *Cluster) WebhookAnswers(ctx context.Context, namespace string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	yes, no := true, false
	user := int64(65532)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			GenerateName: "doppel-probe-", Annotations: map[string]string{agentcfg.AnnotationProbe: agentcfg.ProbeAsked},
			// The webhook is called for pods with a controller only.
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "doppel-probe", UID: "00000000-0000-0000-0000-000000000000", Controller: &yes}},
		},
		Spec: corev1.PodSpec{
			AutomountServiceAccountToken: &no,
			SecurityContext:              &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &user, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
			Containers: []corev1.Container{{
				Name: "probe", Image: "probe",
				SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}},
			}},
		},
	}
	out, err := pods.create(ctx, c, namespace, pod, "dryRun", metav1.DryRunAll)
	if apierrors.IsForbidden(err) {
		return false, fmt.Errorf("you may not create pods in namespace %s, which is how it is tried (as a dry run)", namespace)
	}
	if err != nil {
		return false, c.explain(err, "create a pod as a dry run")
	}
	return out.Annotations[agentcfg.AnnotationProbe] == agentcfg.ProbeAnswered, nil
}
