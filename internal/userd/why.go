package userd

import (
	"context"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// why asks the agents of an intercept, by the manager, where they send what comes to its ports.
func (x *intercepts) why(ctx context.Context, req localapi.WhyRequest) (localapi.Why, error) {
	var out localapi.Why
	in, _, err := x.find(req.Name)
	if err != nil {
		return out, err
	}
	m, err := x.s.tunnel(ctx, flowPatience)
	if err != nil {
		return out, uerr.Wrap(err, uerr.NotConnected, "try again when doppel status says that it is up", "the tunnel is away")
	}
	ask := control.AskWhy{Intercept: x.uidOf(in), Request: req.Request, Last: req.Last}
	if err := tunnel.Control(ctx, m, control.LaptopWhy, ask, &out.Why); err != nil {
		return out, uerr.Wrap(err, uerr.Cluster, "doppel list -i shows the state of your intercepts", "ask the traffic-agents of %s", in.object.Spec.Workload.Name)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	out.Intercept = x.view(in, x.states[string(in.object.UID)])
	return out, nil
}
