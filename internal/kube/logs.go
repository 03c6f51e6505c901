package kube

import (
	"context"
	"fmt"
	"io"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// loggingName is the ConfigMap by which the manager and the agents are told another log level.
const loggingName = managerName + "-logging"

// SetLogLevel has the manager and all agents log at a level until a time; the zero time has no end, and level "" ends it now.
func (c *Cluster) SetLogLevel(ctx context.Context, managerNS, level string, until time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	value := func(s string) string {
		if s == "" {
			return "null"
		}
		return fmt.Sprintf("%q", s)
	}
	end := ""
	if !until.IsZero() {
		end = until.Add(c.Skew()).UTC().Format(time.RFC3339)
	}
	patch := fmt.Sprintf(`{"data":{"level":%s,"until":%s}}`, value(level), value(end))
	_, err := c.core.CoreV1().ConfigMaps(managerNS).Patch(ctx, loggingName, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return c.explain(err, "change the log level of the traffic-manager and the agents")
}

// maxLogs bounds the log of one container in bytes.
const maxLogs = 4 << 20

// PodLog is what one container logged, this time or before its last restart.
type PodLog struct {
	Pod, Container string
	Previous       bool
	Text           []byte
	Err            error
}

// ManagerLogs are the logs of the manager's pods.
func (c *Cluster) ManagerLogs(ctx context.Context, managerNS string) ([]PodLog, error) {
	return c.logs(ctx, managerNS, "app.kubernetes.io/name="+managerName, func(*corev1.Pod) string { return managerName })
}

// AgentLogs are the logs of the agents in a namespace.
func (c *Cluster) AgentLogs(ctx context.Context, ns string) ([]PodLog, error) {
	return c.logs(ctx, ns, "", func(p *corev1.Pod) string {
		if !hasAgent(p) {
			return ""
		}
		return agentcfg.Container
	})
}

func (c *Cluster) logs(ctx context.Context, ns, selector string, container func(*corev1.Pod) string) ([]PodLog, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*requestTimeout)
	defer cancel()
	pods, err := c.core.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, c.explain(err, "list the pods of namespace "+ns)
	}
	var out []PodLog
	for i := range pods.Items {
		p := &pods.Items[i]
		name := container(p)
		if name == "" {
			continue
		}
		out = append(out, c.log(ctx, p, name, false))
		for _, st := range p.Status.ContainerStatuses {
			if st.Name == name && st.RestartCount > 0 {
				out = append(out, c.log(ctx, p, name, true))
			}
		}
	}
	return out, nil
}

func (c *Cluster) log(ctx context.Context, p *corev1.Pod, container string, previous bool) PodLog {
	out := PodLog{Pod: p.Name, Container: container, Previous: previous}
	limit := int64(maxLogs)
	r, err := c.core.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{Container: container, Previous: previous, LimitBytes: &limit}).Stream(ctx)
	if err != nil {
		out.Err = c.explain(err, "read the log of pod "+p.Name)
		return out
	}
	defer r.Close()
	out.Text, out.Err = io.ReadAll(r)
	return out
}
