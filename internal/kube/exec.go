package kube

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"time"

	"k8s.io/client-go/tools/remotecommand"
)

const (
	// execTimeout bounds a command in a container.
	execTimeout = 5 * time.Second
	// maxEnviron bounds what it may say.
	maxEnviron = 1 << 20
)

// ContainerEnviron reads the environment that a process of the container begins with, the variables of its image included, by running cat in
// there, with the user's own right to do so. There may be no cat.
func (c *Cluster) ContainerEnviron(ctx context.Context, ns, pod, container string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()
	url := pods.at(c.api.Post(), ns).Name(pod).SubResource("exec").
		Param("container", container).Param("command", "cat").Param("command", "/proc/self/environ").Param("stdout", "true").Param("stderr", "true").URL()
	ws, err := remotecommand.NewWebSocketExecutor(c.config, "GET", url.String())
	if err != nil {
		return nil, err
	}
	spdy, err := remotecommand.NewSPDYExecutor(c.config, "POST", url)
	if err != nil {
		return nil, err
	}
	exec, err := remotecommand.NewFallbackExecutor(ws, spdy, Obstructed)
	if err != nil {
		return nil, err
	}
	out, said := &bounded{left: maxEnviron}, &bounded{left: 1 << 10}
	if err := exec.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: out, Stderr: said}); err != nil {
		if s := strings.TrimSpace(said.String()); s != "" {
			return nil, fmt.Errorf("run cat in container %s: %s", container, s)
		}
		return nil, fmt.Errorf("run cat in container %s: %w", container, err)
	}
	vars := map[string]string{}
	for kv := range strings.SplitSeq(out.String(), "\x00") {
		if name, value, ok := strings.Cut(kv, "="); ok {
			vars[name] = value
		}
	}
	return vars, nil
}

// bounded keeps the first bytes of what is written to it.
type bounded struct {
	bytes.Buffer
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.left)
	b.left -= n
	b.Buffer.Write(p[:n])
	return len(p), nil
}
