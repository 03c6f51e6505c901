package userd

import (
	"context"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/localapi"
)

// list joins the workloads of a namespace with the intercepts in it, ours and those of colleagues.
func (s *session) list(ctx context.Context, req localapi.ListRequest) (localapi.ListResult, error) {
	ns := req.Namespace
	if ns == "" && !req.AllNamespaces {
		ns = s.cluster.Namespace
	}
	out := localapi.ListResult{Namespace: ns, Workloads: []localapi.Workload{}}
	ws, err := s.cluster.Workloads(ctx, ns)
	if err != nil {
		return out, err
	}
	ins, err := s.cluster.Intercepts(ctx, ns)
	if err != nil {
		return out, err
	}
	for _, w := range ws {
		lw := localapi.Workload{Name: w.Name, Namespace: w.Namespace, Kind: w.Kind, Agent: w.Agent, NotReady: w.NotReady}
		if s.manager.EnabledOnly && !w.Keeps {
			lw.NotReady = "its pod template does not say " + agentcfg.AnnotationInject + ": " + agentcfg.InjectEnabled + " (agent.injection: enabledOnly)"
		}
		for i := range ins {
			if in := &ins[i]; in.Namespace == w.Namespace && in.Spec.Workload.Kind == w.Kind && in.Spec.Workload.Name == w.Name && in.Spec.Mode != v1alpha1.ModeEgress {
				lw.Intercepts = append(lw.Intercepts, describe(in, s.uid()))
			}
		}
		out.Workloads = append(out.Workloads, lw)
	}
	return out, nil
}
