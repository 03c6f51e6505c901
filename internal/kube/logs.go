package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"

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
	return c.explain(configMaps.patch(ctx, c, managerNS, loggingName, patch), "change the log level of the traffic-manager and the agents")
}

// maxLogs bounds the log of one container in bytes: its end, as that of the local logs.
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
	list, err := pods.list(ctx, c, ns, selector)
	if err != nil {
		return nil, c.explain(err, "list the pods of namespace "+ns)
	}
	var out []PodLog
	for i := range list.Items {
		p := &list.Items[i]
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
	r, err := pods.at(c.api.Get(), p.Namespace).Name(p.Name).SubResource("log").
		Param("container", container).Param("previous", strconv.FormatBool(previous)).Stream(ctx)
	if err != nil {
		out.Err = c.explain(err, "read the log of pod "+p.Name)
		return out
	}
	defer r.Close()
	out.Text, out.Err = end(r, maxLogs)
	return out
}

// end is the end of what r has, up to limit bytes of it (limitBytes of the API would be the beginning).
func end(r io.Reader, limit int) ([]byte, error) {
	var b []byte
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		if b = append(b, buf[:n]...); len(b) > 2*limit {
			b = append(b[:0], b[len(b)-limit:]...)
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return b[max(0, len(b)-limit):], err
		}
	}
}
