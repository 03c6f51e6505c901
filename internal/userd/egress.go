package userd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// egressName is the name of the intercept through which flows leave from a workload's pods. A user cannot give an intercept that name: it
// is no name of a workload.
func egressName(workload string) string { return "proxy-via:" + workload }

// egress has the agents of a workload connect for this session, in the connected namespace.
func (x *intercepts) egress(ctx context.Context, workload string, progress localapi.Progress) error {
	ns := x.s.cluster.Namespace
	progress("Preparing the pods of %s to connect for this machine", workload)
	ref, err := x.workload(ctx, ns, workload)
	if err != nil {
		return err
	}
	in := &intercept{name: egressName(workload), object: &v1alpha1.Intercept{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns},
		Spec: v1alpha1.InterceptSpec{
			User: x.s.user, Session: x.s.uid(), Name: egressName(workload), Mode: v1alpha1.ModeEgress,
			Workload: ref,
		},
	}}
	_, err = x.establish(ctx, in, defaultInterceptTimeout, progress)
	return err
}

// egressUID is the object through which flows leave from a workload's pods, "" while there is none.
func (x *intercepts) egressUID(workload string) string {
	x.mu.Lock()
	defer x.mu.Unlock()
	if in := x.byName[egressName(workload)]; in != nil {
		return string(in.object.UID)
	}
	return ""
}

// owner finds whose a flow's destination is, translates it, and names the workload whose pods the flow leaves from, if any; nil: it is no
// session's. Where all traffic comes to us, what is of no subnet has the cluster decide.
func (n *network) owner(dst netip.AddrPort) (s *session, workload string, real netip.AddrPort) {
	members := n.members()
	for _, s := range members { // no two have the same addresses here
		if workload, real, ok := s.addrs.real(dst); ok {
			return s, workload, real
		}
	}
	if n.vif.outside != nil && len(members) > 0 {
		return members[0], "", dst
	}
	return nil, "", dst
}

// open opens the flow of an application: from the manager, or from a workload's pods where the destination's subnet says so.
func (n *network) open(ctx context.Context, proto uint8, src, dst netip.AddrPort) (*mux.Stream, error) {
	s, workload, real := n.owner(dst)
	if s == nil {
		return nil, syscall.EHOSTUNREACH // a subnet that the cluster or the laptop has just taken away
	}
	m, err := s.tunnel(ctx, flowPatience)
	if err != nil {
		return nil, os.ErrDeadlineExceeded // the application's SYN is sent again; the tunnel may be back by then
	}
	hdr := wire.AppendTCP(nil, wire.FlowHeader{Src: src, Dst: real})
	if proto == wire.ProtoUDP {
		hdr = wire.AppendUDP(nil, wire.FlowHeader{Src: src, Dst: real})
	}
	if workload != "" {
		uid := s.intercepts.egressUID(workload)
		if uid == "" {
			return nil, syscall.EHOSTUNREACH // somebody deleted it in the cluster
		}
		hdr = wire.AppendIntercept(nil, wire.InterceptHeader{Intercept: uid, Proto: proto, Src: src, Dst: real})
	}
	st, _, err := m.Open(ctx, hdr)
	return st, ofFlow(err)
}

// ofFlow keeps an application from being told of what happened to the tunnel: "no route to host" is then said of the way to the API
// server. It gets no answer, as while the tunnel is away, and tries again.
func ofFlow(err error) error {
	if errors.Is(err, mux.ErrSession) {
		return fmt.Errorf("%w: %v", os.ErrDeadlineExceeded, err) //nolint:errorlint // the cause must not be found in it
	}
	return err
}
