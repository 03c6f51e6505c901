package manager

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	// whyTimeout bounds an agent's answer.
	whyTimeout = 2 * time.Second
	// manyAgents are asked at once.
	manyAgents = 16
)

// why asks the agents of an intercept's workload what they do with its ports. The intercept is the permission, as it is for a wiretap, which would show
// its session the same requests and more.
func (m *Manager) why(ctx context.Context, session types.UID, ask control.AskWhy) (control.Why, error) {
	g, ok := m.engaged.get(types.UID(ask.Intercept))
	if !ok || g.Session != session || g.egress() || len(g.Ports) == 0 {
		return control.Why{}, &mux.RejectError{Code: wire.CodeNotFound, Msg: "the intercept takes no port now"}
	}
	conns := m.agents.all(g.Workload)
	if len(conns) == 0 {
		return control.Why{}, &mux.RejectError{Code: wire.CodeUnreachable, Msg: "no pod of " + g.Workload.Name + " has an agent that is connected"}
	}
	ask.Intercept, ask.Ports, ask.Last = "", g.Ports, min(max(ask.Last, 0), control.MaxDecisions)
	answers := make([]*control.Why, len(conns))
	ctx, cancel := context.WithTimeout(ctx, whyTimeout)
	defer cancel()
	slots := make(chan struct{}, manyAgents)
	var wg sync.WaitGroup
	for i, c := range conns {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			var a control.Why
			if err := tunnel.Control(ctx, c.mux, control.ManagerWhy, ask, &a); err != nil {
				m.cfg.Log.Debug("agent did not say why", "pod", c.podName, "err", err)
				return
			}
			answers[i] = &a
		})
	}
	wg.Wait()
	out := control.Why{Ports: []control.PortRules{}}
	for i, a := range answers {
		_, pod, _ := strings.Cut(conns[i].podName, "/")
		if a == nil {
			out.Silent = append(out.Silent, pod)
			continue
		}
		switch {
		case len(out.Pods) == 0:
			out.Ports = a.Ports
		case !sameRules(out.Ports, a.Ports):
			out.Differing = append(out.Differing, pod)
		}
		out.Pods = append(out.Pods, pod)
		for j := range a.Decisions {
			a.Decisions[j].Pod = pod
		}
		out.Decisions = append(out.Decisions, a.Decisions...)
	}
	slices.SortStableFunc(out.Decisions, func(a, b control.Decision) int { return a.At.Compare(b.At) })
	out.Decisions = out.Decisions[max(len(out.Decisions)-ask.Last, 0):]
	return out, m.nameRules(ctx, session, g.Workload, out.Ports)
}

// all are the connected agents of a workload, by the names of their pods.
func (a *agents) all(w workloadKey) []*agentConn {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []*agentConn
	for _, c := range a.byPod {
		if c.workload == w && c.mux != nil {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b *agentConn) int { return cmp.Compare(a.podName, b.podName) })
	return out
}

func sameRules(a, b []control.PortRules) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

// nameRules says whose the rules are. The API server shows the same to everybody who may intercept the workload.
func (m *Manager) nameRules(ctx context.Context, session types.UID, w workloadKey, ports []control.PortRules) error {
	var list v1alpha1.InterceptList
	if err := m.ctrl.GetClient().List(ctx, &list, client.InNamespace(w.Namespace)); err != nil {
		return err
	}
	of := map[string]*v1alpha1.Intercept{}
	for i := range list.Items {
		of[string(list.Items[i].UID)] = &list.Items[i]
	}
	for _, p := range ports {
		for i := range p.Rules {
			r := &p.Rules[i]
			if in := of[r.Intercept]; in != nil {
				r.User, r.Name, r.Since, r.Mine = in.Spec.User, in.Spec.Name, in.CreationTimestamp.Time, in.Holder() == string(session)
			}
		}
	}
	return nil
}
