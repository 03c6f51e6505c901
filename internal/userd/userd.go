// Package userd owns the user daemon: one process a user, which holds the credentials, the session, the tunnel, the stack and the intercepts.
package userd

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"reflect"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// DefaultManagerNamespace is where the traffic-manager is looked for.
const DefaultManagerNamespace = "doppel"

// Config is what the daemon is started with.
type Config struct {
	Socket  string // required: where the CLI finds it
	LogFile string
	// RootSocket says where the root daemon listens; Root connects to it and starts it first where that needs no password.
	RootSocket func() string
	Root       func(ctx context.Context, o rootapi.Options) (*rootapi.Client, error)
	Log        *slog.Logger
	Level      *xlog.Level // Log's, to be changed on request; nil: it cannot be
}

// Daemon serves the local API.
type Daemon struct {
	cfg  Config
	log  *slog.Logger
	stop context.CancelFunc

	connecting sync.Mutex // one connect or quit at a time

	mu sync.Mutex
	// guarded by mu
	session *session
	ended   string // why the last session ended by itself
}

// New validates the configuration.
func New(cfg Config) (*Daemon, error) {
	if cfg.Socket == "" || cfg.RootSocket == nil || cfg.Root == nil || cfg.Log == nil {
		return nil, errors.New("userd: incomplete configuration")
	}
	return &Daemon{cfg: cfg, log: cfg.Log}, nil
}

// Run serves until ctx ends or a quit asks for it; the session is ended in order.
func (d *Daemon) Run(ctx context.Context) error {
	l, err := localapi.Listen(d.cfg.Socket)
	if err != nil {
		return err
	}
	ctx, d.stop = context.WithCancel(ctx)
	defer d.stop()
	mux := http.NewServeMux()
	for method, h := range map[string]http.Handler{
		localapi.MethodConnect:   localapi.Handle(d.connect),
		localapi.MethodStatus:    localapi.Handle(d.status),
		localapi.MethodQuit:      localapi.Handle(d.quit),
		localapi.MethodList:      localapi.Handle(d.list),
		localapi.MethodIntercept: localapi.Handle(d.intercept),
		localapi.MethodLeave:     localapi.Handle(d.leave),
		localapi.MethodLogLevel:  localapi.Handle(d.logLevel),
	} {
		mux.Handle("POST /v1/"+method, h)
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	d.log.Info("listening", "socket", d.cfg.Socket, "version", buildinfo.Version)
	select {
	case err = <-served:
	case <-ctx.Done():
	}
	d.end()
	sctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	return errors.Join(err, srv.Shutdown(sctx)) // lets the answer to quit out
}

// current returns the session, or an error that says what to do.
func (d *Daemon) current() (*session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session == nil {
		return nil, uerr.New(uerr.NotConnected, "connect first with: doppel connect", "not connected")
	}
	return d.session, nil
}

// end ends the session, if there is one.
func (d *Daemon) end() {
	d.mu.Lock()
	s := d.session
	d.session = nil
	d.mu.Unlock()
	if s != nil {
		s.close(true)
	}
}

func (d *Daemon) connect(ctx context.Context, req localapi.ConnectRequest, progress localapi.Progress) (localapi.ConnectResult, error) {
	d.connecting.Lock()
	defer d.connecting.Unlock()
	start := time.Now()
	if req.ManagerNamespace == "" {
		req.ManagerNamespace = DefaultManagerNamespace
	}
	if err := req.DNS.Validate(); err != nil {
		return localapi.ConnectResult{}, err
	}
	cluster, err := kube.Load(kube.Options{Kubeconfig: req.Kubeconfig, Context: req.Context, Namespace: req.Namespace, As: req.As, AsGroups: req.AsGroups})
	if err != nil {
		return localapi.ConnectResult{}, err
	}
	if s, err := d.current(); err == nil {
		if err := s.sameNetwork(req.Network); err != nil {
			return localapi.ConnectResult{}, err
		}
		if !s.same(cluster, req.ManagerNamespace) {
			return localapi.ConnectResult{}, uerr.New(uerr.Conflict, "end it first with: doppel quit", "connected already to context %s, namespace %s", s.cluster.Context, s.cluster.Namespace)
		}
		if !req.DNS.IsZero() && !reflect.DeepEqual(req.DNS, s.cfg.dns) {
			return localapi.ConnectResult{}, uerr.New(uerr.Conflict, "end it first with: doppel quit", "connected already with other DNS options")
		}
		return localapi.ConnectResult{Status: d.snapshot(), Reused: true, Elapsed: time.Since(start)}, nil
	}
	s, err := openSession(ctx, sessionConfig{
		cluster: cluster, managerNS: req.ManagerNamespace, dns: req.DNS, network: req.Network, root: d.cfg.Root, log: d.log, progress: progress, ended: d.forget,
	})
	if err != nil {
		return localapi.ConnectResult{}, err
	}
	d.mu.Lock()
	d.session, d.ended = s, ""
	d.mu.Unlock()
	if g := s.group.Context(); g.Err() != nil { // ended before it was known here
		d.forget(s, context.Cause(g))
	}
	return localapi.ConnectResult{Status: d.snapshot(), Elapsed: time.Since(start)}, nil
}

// forget is called when a session ended by itself.
func (d *Daemon) forget(s *session, err error) {
	d.log.Error("session ended", "err", err)
	d.mu.Lock()
	mine := d.session == s
	if mine {
		d.session, d.ended = nil, err.Error()
	}
	d.mu.Unlock()
	if mine {
		s.close(false)
	}
}

func (d *Daemon) status(ctx context.Context, _ localapi.Empty, _ localapi.Progress) (localapi.Status, error) {
	st := d.snapshot()
	if s, err := d.current(); err == nil && st.Session != nil {
		st.Session.LatencyMS = float64(s.latency(ctx).Microseconds()) / 1000
	}
	return st, nil
}

func (d *Daemon) snapshot() localapi.Status {
	d.mu.Lock()
	ended := d.ended
	d.mu.Unlock()
	st := localapi.Status{Version: buildinfo.Version, PID: os.Getpid(), LogFile: d.cfg.LogFile, Ended: ended}
	if s, err := d.current(); err == nil {
		st.Connected = true
		st.Session, st.Root = s.status()
	}
	return st
}

func (d *Daemon) quit(ctx context.Context, req localapi.QuitRequest, progress localapi.Progress) (localapi.Empty, error) {
	d.connecting.Lock()
	defer d.connecting.Unlock()
	d.end()
	if !req.Stop {
		return localapi.Empty{}, nil
	}
	progress("Stopping the daemons")
	if err := rootapi.Stop(ctx, d.cfg.RootSocket()); err != nil {
		d.log.Warn("root daemon not stopped", "err", err)
	}
	context.AfterFunc(ctx, d.stop) // when this answer is out
	return localapi.Empty{}, nil
}

func (d *Daemon) list(ctx context.Context, req localapi.ListRequest, _ localapi.Progress) (localapi.ListResult, error) {
	s, err := d.current()
	if err != nil {
		return localapi.ListResult{}, err
	}
	return s.list(ctx, req)
}

func (d *Daemon) intercept(ctx context.Context, req localapi.InterceptRequest, progress localapi.Progress) (localapi.Intercept, error) {
	s, err := d.current()
	if err != nil {
		return localapi.Intercept{}, err
	}
	return s.intercepts.create(ctx, req, progress)
}

func (d *Daemon) leave(ctx context.Context, req localapi.LeaveRequest, _ localapi.Progress) (localapi.Empty, error) {
	s, err := d.current()
	if err != nil {
		return localapi.Empty{}, err
	}
	return localapi.Empty{}, s.intercepts.leave(ctx, req.Name)
}

// logLevel changes the level of both daemons; a root daemon that does not run has none.
func (d *Daemon) logLevel(ctx context.Context, req localapi.LogLevelRequest, _ localapi.Progress) (localapi.Empty, error) {
	if d.cfg.Level == nil {
		return localapi.Empty{}, uerr.New(uerr.Usage, "", "this user daemon has a fixed log level")
	}
	if err := d.cfg.Level.Change(req.Level, req.For); err != nil {
		return localapi.Empty{}, uerr.Wrap(err, uerr.Usage, "", "change the log level")
	}
	root, err := rootapi.Dial(ctx, d.cfg.RootSocket(), rootapi.Options{})
	if errors.Is(err, rootapi.ErrNotRunning) {
		return localapi.Empty{}, nil
	}
	if err != nil {
		return localapi.Empty{}, err
	}
	defer root.Close()
	return localapi.Empty{}, root.LogLevel(ctx, req.Level, int(req.For/time.Second))
}
