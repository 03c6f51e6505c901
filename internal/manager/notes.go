package manager

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/inject"
)

// refuseTLS refuses an intercept by request of a port whose requests nobody can see.
func refuseTLS(w *workload, port inject.Taken, facts inject.Facts) error {
	secrets, err := agentcfg.TLSSecrets(w.Template.Annotations)
	if err != nil {
		return fail("BadTLS", "%s: %v", w.Name(), err)
	}
	if secrets[port.ContainerPort].Server != "" {
		return nil
	}
	if why := inject.TLSReason(&w.Template.Spec, port, facts); why != "" {
		return fail("TLS", "port %d of %s speaks TLS (known by %s), in which requests cannot be seen: name the secret of its certificate in the pod template with the annotation %s: %d=SECRET, or take the port whole, without a match",
			port.ContainerPort, w.Name(), why, agentcfg.AnnotationTLS, port.ContainerPort)
	}
	return nil
}

// take takes a call of an agent.
func (a *agents) take(c *agentConn, method string, body []byte) (any, error) {
	if method != control.AgentNote {
		return nil, fmt.Errorf("unknown method %q", method)
	}
	var n control.Note
	if err := json.Unmarshal(body, &n); err != nil {
		return nil, err
	}
	n.Text = strings.ToValidUTF8(n.Text[:min(len(n.Text), maxNote)], "")
	c.mu.Lock()
	old, known := c.notes[n.Port]
	ok := known || len(c.notes) < maxNotes && slices.Contains([]string{"TCP", "UDP"}, n.Port.Protocol)
	if ok {
		c.notes[n.Port] = n.Text
	}
	c.mu.Unlock()
	switch {
	case !ok:
		return nil, errors.New("no port of a pod's, or too many of them")
	case old == n.Text:
		return struct{}{}, nil
	}
	a.log.Info("agent tells", "pod", c.podName, "port", n.Port.Number, "detail", n.Text)
	a.m.wake(c.workload)
	return struct{}{}, nil
}

// maxNote is how much of a note is kept, in bytes, and maxNotes how many of an agent: any pod may be one.
const (
	maxNote  = 500
	maxNotes = 64
)

// noteOn is what agents of a workload have told about one of the ports, or "".
func (a *agents) noteOn(w workloadKey, ports []control.Port) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.byPod {
		if c.workload != w {
			continue
		}
		if text := c.note(ports); text != "" {
			return text
		}
	}
	return ""
}

func (c *agentConn) note(ports []control.Port) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range ports {
		if text := c.notes[p]; text != "" {
			return text
		}
	}
	return ""
}
