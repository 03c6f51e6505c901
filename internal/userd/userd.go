// Package userd owns the user daemon: one process a user, which holds the credentials, the session, the tunnel, the stack and the intercepts.
package userd

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// Config is what the daemon is started with.
type Config struct {
	Socket  string // required: where the CLI finds it
	LogFile string
	// RootSocket says where the root daemon listens; Root connects to it and starts it first where that needs no password.
	RootSocket func() string
	Root       func(ctx context.Context, o rootapi.Options) (*rootapi.Client, error)
	Logins     func() ([]relayclient.Login, error) // at relays; nil: this machine is not known to any
	Log        *slog.Logger
	Level      *xlog.Level // Log's, to be changed on request; nil: it cannot be
}

// Daemon serves the local API.
type Daemon struct {
	cfg  Config
	log  *slog.Logger
	stop context.CancelFunc

	vif      *vif
	points   points
	presence *relayclient.Presence // nil: this machine is not known to relays

	connecting chan struct{} // holds one while somebody connects or quits, in the order of their coming (see turn)

	mu sync.Mutex
	// guarded by mu
	sessions []*session // in the order in which they were made
	ended    string     // why the last session ended by itself
	stopping bool       // there is going to be no session any more
	// startLevel is the log level that counts as the one at the start; "" is each process's own.
	startLevel string
}

// New validates the configuration.
func New(cfg Config) (*Daemon, error) {
	if cfg.Socket == "" || cfg.RootSocket == nil || cfg.Root == nil || cfg.Log == nil {
		return nil, errors.New("userd: incomplete configuration")
	}
	d := &Daemon{cfg: cfg, log: cfg.Log, vif: &vif{root: cfg.Root, log: cfg.Log}, connecting: make(chan struct{}, 1)}
	if cfg.Logins != nil {
		d.presence = d.newPresence()
	}
	return d, nil
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
		localapi.MethodEnviron:   localapi.Handle(d.environ),
		localapi.MethodFiles:     localapi.HandleStream(d.files),
		localapi.MethodWhy:       localapi.Handle(d.why),
		localapi.MethodLogLevel:  localapi.Handle(d.logLevel),
		localapi.MethodRelay:     localapi.Handle(d.relay),
		localapi.MethodPreview:   localapi.Handle(d.preview),
		localapi.MethodStacks:    localapi.Handle(stacks),
	} {
		mux.Handle("POST /v1/"+method, h)
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	var present sync.WaitGroup
	if d.presence != nil {
		present.Go(func() { d.presence.Run(ctx) })
	}
	d.log.Info("listening", "socket", d.cfg.Socket, "version", buildinfo.Version)
	select {
	case err = <-served:
	case <-ctx.Done():
	}
	d.stop()
	present.Wait()
	d.refuse()
	d.end(d.all())
	sctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	return errors.Join(err, srv.Shutdown(sctx)) // lets the answer to quit out
}

// turn waits until nobody else connects or quits, and returns what ends that.
func (d *Daemon) turn(ctx context.Context) (done func(), err error) {
	select {
	case d.connecting <- struct{}{}:
		return func() { <-d.connecting }, nil
	case <-ctx.Done():
		return nil, uerr.New(uerr.Canceled, "", "interrupted")
	}
}

// refuse lets no session be made from now on: whoever waits for one would be told that it is there, and it would end with the daemon.
func (d *Daemon) refuse() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopping = true
}

var errStopping = uerr.New(uerr.Conflict, "connect again with: doppel connect", "the user daemon was just told to end")

// keep enters a session, unless the daemon is about to end.
func (d *Daemon) keep(s *session) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopping {
		return errStopping
	}
	d.sessions, d.ended = append(slices.Clone(d.sessions), s), ""
	return nil
}

func (d *Daemon) isStopping() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stopping
}

// all are the sessions.
func (d *Daemon) all() []*session {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.sessions)
}

// use returns the session that want chooses (localapi.Choice), or an error that says what to do.
func (d *Daemon) use(want string) (*session, error) { return choose(d.all(), want) }

func choose(all []*session, want string) (*session, error) {
	if len(all) == 0 {
		return nil, uerr.New(uerr.NotConnected, "connect first with: doppel connect", "not connected")
	}
	re, err := regexp.Compile(want)
	if err != nil {
		return nil, uerr.Wrap(err, uerr.Usage, "give the name of a connection, or a regular expression", "--use")
	}
	var names, found []string
	var s *session
	for _, o := range all {
		names = append(names, o.cfg.name)
		switch {
		case o.cfg.name == want:
			return o, nil
		case re.MatchString(o.cfg.name):
			found, s = append(found, o.cfg.name), o
		}
	}
	switch len(found) {
	case 0:
		return nil, uerr.New(uerr.NotFound, "there is: "+strings.Join(names, ", "), "no connection %q", want)
	case 1:
		return s, nil
	}
	return nil, uerr.New(uerr.Usage, "choose one with --use NAME", "there are several connections: %s", strings.Join(found, ", "))
}

// end ends sessions, the last first: it yielded to those before it.
func (d *Daemon) end(all []*session) {
	for _, s := range slices.Backward(all) {
		if d.take(s) {
			s.close()
		}
	}
}

// take removes a session from the list; false: it is not there any more.
func (d *Daemon) take(s *session) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := slices.Index(d.sessions, s)
	if i < 0 {
		return false
	}
	d.sessions = slices.Delete(slices.Clone(d.sessions), i, i+1)
	return true
}

func (d *Daemon) connect(ctx context.Context, req localapi.ConnectRequest, progress localapi.Progress) (localapi.ConnectResult, error) {
	done, err := d.turn(ctx)
	if err != nil {
		return localapi.ConnectResult{}, err
	}
	defer done()
	if d.isStopping() {
		return localapi.ConnectResult{}, errStopping
	}
	start := time.Now()
	if req.ManagerNamespace == "" {
		req.ManagerNamespace = kube.DefaultManagerNamespace
	}
	if err := req.DNS.Validate(); err != nil {
		return localapi.ConnectResult{}, err
	}
	cluster, err := kube.Load(kube.Options{Kubeconfig: req.Kubeconfig, Context: req.Context, Namespace: req.Namespace, As: req.As, AsGroups: req.AsGroups, Env: append([]string{}, req.Env...)})
	if err != nil {
		return localapi.ConnectResult{}, err
	}
	if s := d.meant(req.Name, cluster, req.ManagerNamespace); s != nil {
		if err := s.wanted(req, cluster); err != nil {
			return localapi.ConnectResult{}, err
		}
		return localapi.ConnectResult{Status: d.snapshot(s), Reused: true, Elapsed: time.Since(start)}, nil
	}
	s, err := openSession(ctx, sessionConfig{
		name: cmp.Or(req.Name, cluster.Context), cluster: cluster, managerNS: req.ManagerNamespace, dns: req.DNS, network: req.Network, accept: req.AcceptIntercepts,
		vif: d.vif, points: &d.points, log: d.log, progress: progress, ended: d.forget,
	})
	if err != nil {
		return localapi.ConnectResult{}, err
	}
	if err := d.keep(s); err != nil {
		s.close()
		return localapi.ConnectResult{}, err
	}
	if g := s.group.Context(); g.Err() != nil { // ended before it was known here
		d.forget(s, context.Cause(g))
	}
	return localapi.ConnectResult{Status: d.snapshot(s), Elapsed: time.Since(start)}, nil
}

// meant is the session that a connect is about: the one of that name; without a name one to the same cluster, else the first. nil: a new one.
func (d *Daemon) meant(name string, c *kube.Cluster, managerNS string) *session {
	all := d.all()
	for _, s := range all {
		if name != "" && s.cfg.name == name || name == "" && s.same(c, managerNS) {
			return s
		}
	}
	if name != "" || len(all) == 0 {
		return nil
	}
	return all[0]
}

// forget is called when a session ended by itself.
func (d *Daemon) forget(s *session, err error) {
	d.log.Error("session ended", "err", err)
	if !d.take(s) {
		return
	}
	d.mu.Lock()
	d.ended = err.Error()
	d.mu.Unlock()
	s.close()
}

func (d *Daemon) status(ctx context.Context, req localapi.StatusRequest, _ localapi.Progress) (localapi.Status, error) {
	all := d.all()
	if req.Use != "" {
		s, err := choose(all, req.Use)
		if err != nil {
			return localapi.Status{}, err
		}
		all = []*session{s}
	}
	st := d.snapshot(all...)
	for i, s := range all {
		out := st.Session
		if i > 0 {
			out = &st.Others[i-1]
		}
		out.LatencyMS = float64(s.latency(ctx).Microseconds()) / 1000
	}
	return st, nil
}

func (d *Daemon) snapshot(all ...*session) localapi.Status {
	d.mu.Lock()
	st := localapi.Status{Version: buildinfo.Version, PID: os.Getpid(), LogFile: d.cfg.LogFile, Ended: d.ended, Connected: len(all) > 0, Relays: d.relays()}
	d.mu.Unlock()
	for i, s := range all {
		out, root := s.status()
		if i == 0 {
			st.Session, st.Root = out, root
		} else {
			st.Others = append(st.Others, *out)
		}
	}
	return st
}

func (d *Daemon) quit(ctx context.Context, req localapi.QuitRequest, progress localapi.Progress) (localapi.QuitResult, error) {
	done, err := d.turn(ctx)
	if err != nil {
		return localapi.QuitResult{}, err
	}
	defer done()
	ending := d.all()
	if req.IfIdle && len(ending) > 0 {
		return localapi.QuitResult{Kept: true}, nil
	}
	if req.Use != "" {
		s, err := choose(ending, req.Use)
		if err != nil {
			return localapi.QuitResult{}, err
		}
		ending = []*session{s}
	}
	if req.UID != "" {
		ending = slices.DeleteFunc(slices.Clone(ending), func(s *session) bool { return s.firstUID() != req.UID })
		if len(ending) == 0 {
			return localapi.QuitResult{}, uerr.New(uerr.NotFound, "see what there is with: doppel status", "the connection had ended already")
		}
	}
	if req.Stop {
		d.refuse() // a connect that waits for its turn too
	}
	d.end(ending)
	if !req.Stop {
		return localapi.QuitResult{}, nil
	}
	progress("Stopping the daemons")
	kept, err := rootapi.Stop(ctx, d.cfg.RootSocket(), req.IfIdle)
	if err != nil {
		d.log.Warn("root daemon not stopped", "err", err)
	}
	context.AfterFunc(ctx, d.stop) // when this answer is out
	return localapi.QuitResult{Kept: kept}, nil
}

func (d *Daemon) list(ctx context.Context, req localapi.ListRequest, _ localapi.Progress) (localapi.ListResult, error) {
	s, err := d.use(req.Use)
	if err != nil {
		return localapi.ListResult{}, err
	}
	return s.list(ctx, req)
}

func (d *Daemon) intercept(ctx context.Context, req localapi.InterceptRequest, progress localapi.Progress) (localapi.Intercept, error) {
	s, err := d.use(req.Use)
	if err != nil {
		return localapi.Intercept{}, err
	}
	return s.intercepts.create(ctx, req, progress)
}

func (d *Daemon) leave(ctx context.Context, req localapi.LeaveRequest, progress localapi.Progress) (localapi.Empty, error) {
	s, err := d.with(req.Name, req.Use)
	if err != nil {
		return localapi.Empty{}, err
	}
	if req.UID != "" && s.intercepts.other(req.Name, req.UID) {
		return localapi.Empty{}, uerr.New(uerr.NotFound, "see your intercepts with: doppel list -i", "intercept %s had ended already; there is another one of its name", req.Name)
	}
	return localapi.Empty{}, s.intercepts.leave(ctx, req.Name, progress)
}

func (d *Daemon) environ(ctx context.Context, req localapi.EnvironRequest, _ localapi.Progress) (localapi.Environ, error) {
	s, err := d.with(req.Name, req.Use)
	if err != nil {
		return localapi.Environ{}, err
	}
	return s.intercepts.environ(ctx, req.Name)
}

func (d *Daemon) files(ctx context.Context, req localapi.FilesRequest) (localapi.Stream, error) {
	s, err := d.with(req.Name, req.Use)
	if err != nil {
		return nil, err
	}
	return s.intercepts.stream(ctx, req.Name)
}

func (d *Daemon) why(ctx context.Context, req localapi.WhyRequest, _ localapi.Progress) (localapi.Why, error) {
	s, err := d.with(req.Name, req.Use)
	if err != nil {
		return localapi.Why{}, err
	}
	return s.intercepts.why(ctx, req)
}

// with returns the session that has an intercept, or the one that use chooses.
func (d *Daemon) with(intercept, use string) (*session, error) {
	all := d.all()
	if use == "" && len(all) > 1 {
		if with := slices.DeleteFunc(slices.Clone(all), func(s *session) bool { return !s.intercepts.has(intercept) }); len(with) > 0 {
			all = with
		}
	}
	return choose(all, use)
}

// logLevel changes the level of both daemons; a root daemon that does not run has none.
func (d *Daemon) logLevel(ctx context.Context, req localapi.LogLevelRequest, _ localapi.Progress) (localapi.Empty, error) {
	if d.cfg.Level == nil {
		return localapi.Empty{}, uerr.New(uerr.Usage, "", "this user daemon has a fixed log level")
	}
	if req.Level == "" {
		d.mu.Lock()
		req.Level, req.For = d.startLevel, 0
		d.mu.Unlock()
	}
	if err := d.cfg.Level.Change(req.Level, req.For); err != nil {
		return localapi.Empty{}, uerr.Wrap(err, uerr.Usage, "", "change the log level")
	}
	if req.Start {
		d.mu.Lock()
		d.startLevel = req.Level
		d.mu.Unlock()
	}
	root, err := rootapi.Dial(ctx, d.cfg.RootSocket(), rootapi.Options{})
	if errors.Is(err, rootapi.ErrNotRunning) {
		return localapi.Empty{}, nil
	}
	if err != nil {
		return localapi.Empty{}, err
	}
	defer root.Close()
	return localapi.Empty{}, root.LogLevel(ctx, req.Level, int((req.For+time.Second-1)/time.Second)) // up: 0 has no end
}
