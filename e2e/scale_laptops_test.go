package e2e

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/kinds"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	protocol "github.com/doppel-dev/doppel/internal/wire"
)

// peer is a laptop's end of a tunnel.
type peer struct {
	cluster *kube.Cluster
	user    string
	session *v1alpha1.Session
	mux     *mux.Session

	mu sync.Mutex
	// guarded by mu
	states map[string]control.Intercept // by UID, as the manager last said
}

// connect makes the sessions, crowdAtOnce at a time, as doppel connect does but for the laptop's network.
func (w *scale) connect(t *testing.T) spread {
	t.Helper()
	ctx := t.Context()
	w.peers = make([]*peer, w.n.Sessions)
	took := make([]time.Duration, w.n.Sessions)
	t.Cleanup(func() {
		for _, p := range w.peers {
			if p != nil {
				_ = p.mux.Close()
			}
		}
	})
	each(t, w.n.Sessions, crowdAtOnce, func(_ context.Context, i int) error {
		cl, err := kube.Load(kube.Options{})
		if err != nil {
			return err
		}
		began := time.Now()
		w.peers[i], err = w.join(ctx, cl)
		took[i] = time.Since(began)
		return err
	})
	return spreadOf(took)
}

func (w *scale) join(ctx context.Context, cl *kube.Cluster) (*peer, error) {
	p := &peer{cluster: cl, states: map[string]control.Intercept{}}
	var err error
	if p.user, err = cl.WhoAmI(ctx); err != nil {
		return nil, err
	}
	manager, err := cl.Manager(ctx, managerNS)
	if err != nil {
		return nil, err
	}
	id, err := tunnel.NewIdentity("laptop")
	if err != nil {
		return nil, err
	}
	reach, err := cl.ReachThrough(ctx, manager)
	if err != nil {
		return nil, err
	}
	p.session, err = cl.CreateSession(ctx, managerNS, v1alpha1.SessionSpec{User: p.user, Key: id.Fingerprint(), Namespace: cl.Namespace, Reach: reach, Client: "crowd"})
	if err != nil {
		return nil, err
	}
	raw, err := cl.Attach(ctx, managerNS, kube.ServiceProxy)
	if err != nil {
		return nil, err
	}
	p.mux, _, err = tunnel.Client(ctx, raw, tunnel.ClientConfig{
		Identity: id, Peer: manager.Key, Hello: protocol.Hello{Version: protocol.Version, Role: protocol.RoleLaptop, Session: string(p.session.UID)},
	})
	if err != nil {
		return nil, err
	}
	go func() { _ = tunnel.Serve(ctx, p.mux, tunnel.Handlers{}) }()
	info, err := tunnel.Watch(ctx, p.mux, control.LaptopCluster, control.AskCluster{Changes: true})
	if err != nil {
		return nil, err
	}
	var first control.Cluster
	if err := info.Next(ctx, &first); err != nil {
		return nil, err
	}
	go func() { // later values are taken too
		for info.Next(ctx, &control.Cluster{}) == nil {
		}
	}()
	states, err := tunnel.Watch(ctx, p.mux, control.LaptopIntercepts, nil)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			var now control.Intercepts
			if states.Next(ctx, &now) != nil {
				return
			}
			p.mu.Lock()
			clear(p.states)
			for _, in := range now.Items {
				p.states[in.UID] = in
			}
			p.mu.Unlock()
		}
	}()
	return p, nil
}

// active says how many intercepts of a laptop are.
func (p *peer) active() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, in := range p.states {
		if in.State == string(v1alpha1.InterceptActive) {
			n++
		}
	}
	return n
}

// take creates the k-th intercept of all.
func (w *scale) take(ctx context.Context, k int) (*v1alpha1.Intercept, error) {
	p, workload := w.peers[k%len(w.peers)], k%w.n.Workloads
	return p.cluster.CreateIntercept(ctx, crowdNS(workload), v1alpha1.InterceptSpec{
		User: p.user, Session: string(p.session.UID), Name: crowdName(workload), Workload: v1alpha1.WorkloadRef{Kind: kinds.Pod, Name: crowdName(workload)},
		Ports: []v1alpha1.WantedPort{{Port: "http", Target: "127.0.0.1:3000"}},
		HTTP:  &v1alpha1.HTTPMatch{Headers: []v1alpha1.HeaderMatch{{Name: crowdHeader, TextMatch: v1alpha1.TextMatch{Op: "equal", Value: fmt.Sprint("user-", k)}}}},
	})
}

// intercept makes all intercepts, and waits until their laptops hear that they are active.
func (w *scale) intercept(t *testing.T) {
	t.Helper()
	each(t, w.n.Intercepts, 16, func(ctx context.Context, k int) error {
		_, err := w.take(ctx, k)
		return err
	})
	eventually(t, 20*time.Minute, func() error {
		n := 0
		for _, p := range w.peers {
			n += p.active()
		}
		if n != w.n.Intercepts {
			return fmt.Errorf("%d of %d intercepts are active", n, w.n.Intercepts)
		}
		return nil
	})
}
