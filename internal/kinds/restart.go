package kinds

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
)

const restartedAt = "kubectl.kubernetes.io/restartedAt"

// RestartPatch is the merge patch (RFC 7386) that has a workload's controller replace its pods: what `kubectl rollout restart` and
// `kubectl argo rollouts restart` change, and the only thing of a workload that doppel ever changes.
func RestartPatch(kind string, now time.Time) []byte {
	if kind == Rollout {
		// Pods from before are evicted, its ReplicaSets make others. Pods' times are cut to seconds, and one of this second may be without an agent.
		at := now.UTC().Truncate(time.Second).Add(time.Second).Format(time.RFC3339)
		return fmt.Appendf(nil, `{"spec":{"restartAt":%q}}`, at)
	}
	return fmt.Appendf(nil, `{"spec":{"template":{"metadata":{"annotations":{%q:%q}}}}}`, restartedAt, now.Format(time.RFC3339Nano))
}

// RestartedAt is when a restart was last asked for; the zero time: never.
func (i *Info) RestartedAt() time.Time {
	if i.Kind == Rollout {
		return i.restartAt
	}
	at, _ := time.Parse(time.RFC3339, i.Template.Annotations[restartedAt])
	return at
}

// Outdated says whether the restart that was last asked for is still to replace the pod.
func (i *Info) Outdated(p *corev1.Pod) bool {
	if i.Kind == Rollout {
		return p.CreationTimestamp.Time.Before(i.restartAt)
	}
	return p.Annotations[restartedAt] != i.Template.Annotations[restartedAt]
}
