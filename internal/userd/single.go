package userd

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/rootapi"
)

// Outside dials what is not the cluster's, for a network in which everything comes to us. ok is false for what is the cluster's.
type Outside interface {
	DialTCP(ctx context.Context, dst netip.AddrPort) (s flow.Stream, ok bool, err error)
	DialUDP(ctx context.Context, dst netip.AddrPort) (p flow.Packets, ok bool, err error)
}

// SingleConfig is what a session without a daemon is made from.
type SingleConfig struct {
	Request localapi.ConnectRequest
	// Root leads to whoever sets up the network.
	Root     func(context.Context, rootapi.Options) (*rootapi.Client, error)
	Outside  Outside
	Log      *slog.Logger
	Progress localapi.Progress
	// Ended is called once if the session ends by itself.
	Ended func(error)
}

// Single is a session that ends with this process instead of a user daemon: that of doppel run.
type Single struct{ s *session }

// OpenSingle connects.
func OpenSingle(ctx context.Context, cfg SingleConfig) (*Single, error) {
	if cfg.Root == nil || cfg.Log == nil || cfg.Progress == nil || cfg.Ended == nil {
		return nil, errors.New("userd: incomplete configuration")
	}
	req := cfg.Request
	cluster, err := kube.Load(kube.Options{Kubeconfig: req.Kubeconfig, Context: req.Context, Namespace: req.Namespace, As: req.As, AsGroups: req.AsGroups})
	if err != nil {
		return nil, err
	}
	s, err := openSession(ctx, sessionConfig{
		cluster: cluster, managerNS: cmp.Or(req.ManagerNamespace, kube.DefaultManagerNamespace), log: cfg.Log, progress: cfg.Progress,
		ended: func(_ *session, err error) { cfg.Ended(err) },
		vif:   &vif{root: cfg.Root, outside: cfg.Outside, log: cfg.Log}, points: &points{},
	})
	if err != nil {
		return nil, err
	}
	return &Single{s}, nil
}

// Close ends the session and removes it from the cluster.
func (s *Single) Close() { s.s.close() }
