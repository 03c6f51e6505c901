package manager

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// egress carries a laptop's flow out of a pod: to an agent of the workload that the session has an Egress intercept on. That object is the
// permission: the API server let the session's user create it in the workload's namespace.
func (a *agents) egress(session types.UID, r *mux.Request, h wire.InterceptHeader) {
	g, ok := a.m.engaged.get(types.UID(h.Intercept))
	if !ok || g.Session != session || !g.egress() && len(g.ToPod) == 0 {
		_ = r.Reject(wire.CodeNotFound, "no such intercept")
		return
	}
	toPod := h.Dst.Addr().Unmap().IsLoopback() && slices.ContainsFunc(g.ToPod, func(p v1alpha1.PodPort) bool {
		return p.Port == int32(h.Dst.Port()) && (p.Protocol == "UDP") == (h.Proto == wire.ProtoUDP)
	})
	if !toPod && (!g.egress() || !mayEgress(h.Dst)) {
		_ = r.Reject(wire.CodeUnreachable, "not an address that a pod is asked to reach")
		return
	}
	c := a.serving(g, nil)
	if c == nil {
		_ = r.Reject(wire.CodeUnreachable, "no pod of "+g.Workload.Name+" has an agent that is connected")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), dialTimeout)
	out, _, err := c.mux.Open(ctx, wire.AppendIntercept(nil, h))
	cancel()
	if err != nil {
		code := wire.CodeOf(err)
		var re *mux.RejectError
		if errors.As(err, &re) {
			code = re.Code
		}
		_ = r.Reject(code, "from a pod of "+g.Workload.Name+": "+err.Error())
		return
	}
	in, err := r.Accept(nil)
	if err != nil {
		out.Reset()
		return
	}
	_ = tunnel.Join(h.Proto, in, out) // how a flow ended is between its two ends
}

// serving returns an agent that has acknowledged an engagement and is as wanted, or nil.
func (a *agents) serving(g engagement, wanted func(*agentConn) bool) *agentConn {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.byPod {
		if c.workload == g.Workload && c.serves(g.UID) && (wanted == nil || wanted(c)) {
			return c
		}
	}
	return nil
}

// mayEgress lets a flow go to the pod's own loopback, which mayDial forbids for the manager's, and to what mayDial allows.
func mayEgress(to netip.AddrPort) bool {
	return to.Addr().Unmap().IsLoopback() || mayDial(to)
}
