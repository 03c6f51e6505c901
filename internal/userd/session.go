package userd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/netwatch"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	// connectTimeout bounds each of the waits of a connect: for the tunnel, and for the cluster's information.
	connectTimeout = 10 * time.Second
	// deniedPatience is how long an API server may refuse a session that was connected before.
	deniedPatience = 5 * time.Second
	// flowPatience is how long a new flow waits for a tunnel that is away; then the application's system tries again.
	flowPatience = 3 * time.Second
	// queryPatience is the same for a DNS query, whose asker waits a few seconds only.
	queryPatience = time.Second
)

type sessionConfig struct {
	name      string // by which the user calls it
	cluster   *kube.Cluster
	managerNS string
	dns       localapi.DNSOptions
	network   localapi.NetworkOptions
	accept    bool // intercepts that the user has declared in the cluster
	vif       *vif
	points    *points
	log       *slog.Logger
	progress  localapi.Progress
	ended     func(*session, error)
}

// session is this laptop in one cluster: the Session object, the tunnel, the network and the intercepts.
type session struct {
	cfg      sessionConfig
	cluster  *kube.Cluster
	log      *slog.Logger
	user     string
	manager  kube.ManagerInfo
	identity *tunnel.Identity
	group    *lifecycle.Group
	entrance entrance

	link       *tunnel.Link
	addrs      *addresses // once it is in the network
	intercepts *intercepts
	news       sync.Mutex           // one piece of news of the cluster at a time
	info       chan control.Cluster // the last one, until the network is set up

	mu sync.Mutex
	// guarded by mu
	net        *network
	object     *v1alpha1.Session
	first      string        // the UID of its first object
	key        string        // the manager's, if it was exchanged since we connected
	renew      time.Duration // zero until the first tunnel was up
	version    string        // of the traffic-manager that has the tunnel, or had it last; empty until there was one
	down       error         // why the tunnel is down; nil when it is up
	deniedFrom time.Time     // since when the API server does not let us through; zero: it does
	renewErr   error         // why the last renewal failed
}

// openSession does everything a connect does; when it fails nothing is left behind.
func openSession(ctx context.Context, cfg sessionConfig) (*session, error) {
	s := &session{cfg: cfg, cluster: cfg.cluster, log: cfg.log, info: make(chan control.Cluster, 1)}
	s.entrance.attach = func(ctx context.Context, t kube.Transport) (net.Conn, error) {
		if t == kube.Direct {
			return kube.DialDirect(ctx, s.manager.Direct)
		}
		return s.cluster.Attach(ctx, s.cfg.managerNS, t)
	}
	s.intercepts = newIntercepts(s)
	if err := s.introduce(ctx); err != nil {
		return nil, err
	}
	s.group = lifecycle.New(context.Background(), cfg.log)
	s.link = tunnel.NewLink(tunnel.LinkConfig{
		Dial: s.dial, Serve: s.serve, OnUp: s.onUp, OnDown: s.onDown, OnRetry: s.onRetry, Permanent: s.permanent, Log: cfg.log,
	})
	s.group.Go("tunnel", s.link.Run)
	s.group.Go("network watch", func(ctx context.Context) error { return netwatch.Watch(ctx, s.networkChanged) })
	if err := s.join(ctx); err != nil {
		s.close()
		return nil, err
	}
	s.group.Go("renewal", s.renewals)
	s.group.Go("better transport", s.seekBetter)
	go func() {
		<-s.group.Context().Done()
		if err := context.Cause(s.group.Context()); !errors.Is(err, lifecycle.ErrStopped) {
			cfg.ended(s, err)
		}
	}()
	return s, nil
}

// introduce finds the manager, says who we are, and creates the Session object.
func (s *session) introduce(ctx context.Context) error {
	s.cfg.progress("Looking for the traffic-manager in namespace %s", s.cfg.managerNS)
	var err error
	if s.user, err = s.cluster.WhoAmI(ctx); err != nil {
		return err
	}
	if s.manager, err = s.cluster.Manager(ctx, s.cfg.managerNS); err != nil {
		return err
	}
	s.entrance.direct = len(s.manager.Direct) > 0
	if s.manager.Protocol != wire.Version {
		return uerr.New(uerr.Conflict, "upgrade the older of the two; the manager with: doppel helm upgrade"+kube.ManagerFlag(s.cfg.managerNS), "the traffic-manager (%s) speaks tunnel protocol %d, this doppel (%s) speaks %d", s.manager.Version, s.manager.Protocol, buildinfo.Version, wire.Version)
	}
	if s.identity, err = tunnel.NewIdentity("laptop"); err != nil {
		return err
	}
	return s.createObject(context.WithoutCancel(ctx)) // an interrupt must not leave an object that nobody knows of
}

// createObject creates the Session, with what its user may reach at this moment.
func (s *session) createObject(ctx context.Context) error {
	reach, err := s.cluster.ReachThrough(ctx, s.manager)
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	o, err := s.cluster.CreateSession(ctx, s.cfg.managerNS, v1alpha1.SessionSpec{
		User: s.user, Key: s.identity.Fingerprint(), Namespace: s.cluster.Namespace, Reach: reach, AcceptIntercepts: s.cfg.accept,
		Client: fmt.Sprintf("doppel/%s %s", buildinfo.Version, host),
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.object = o
	s.first = cmp.Or(s.first, string(o.UID))
	s.mu.Unlock()
	return nil
}

// join waits for the tunnel and the cluster's information and then sets the laptop's network.
func (s *session) join(ctx context.Context) error {
	s.cfg.progress("Attaching through the API server")
	wctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if _, err := s.link.Wait(wctx); err != nil {
		return s.whyDown(err)
	}
	var info control.Cluster
	select {
	case info = <-s.info:
	case <-s.group.Context().Done():
		return s.whyDown(context.Cause(s.group.Context()))
	case <-wctx.Done():
		return uerr.New(uerr.Cluster, fmt.Sprintf("look at it with: kubectl -n %s logs deploy/traffic-manager", s.cfg.managerNS), "the traffic-manager does not say what the cluster's network is")
	}
	s.cfg.progress("Setting up the network")
	n, err := s.cfg.vif.join(ctx, s, info)
	if err != nil {
		return err
	}
	s.joined(n)
	s.group.Go("network", n.run)
	for _, w := range s.addrs.workloads() {
		if err := s.intercepts.egress(ctx, w, s.cfg.progress); err != nil {
			return err
		}
	}
	return nil
}

// whyDown prefers the tunnel's own reason over a mere timeout.
func (s *session) whyDown(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down != nil {
		err = s.down
	}
	var re *mux.RejectError
	if errors.As(err, &re) {
		return uerr.Wrap(err, uerr.Cluster, fmt.Sprintf("look at it with: kubectl -n %s logs deploy/traffic-manager", s.cfg.managerNS), "the traffic-manager refused the session")
	}
	return uerr.Wrap(err, uerr.Cluster, fmt.Sprintf("look at it with: kubectl -n %s get pods", s.cfg.managerNS), "no tunnel to the traffic-manager")
}

// permanent says which errors redialling cannot mend. An API server that has just started does not know yet who may do what: once
// we were connected its no counts only when it has lasted.
func (s *session) permanent(err error) bool {
	var re *mux.RejectError
	if errors.As(err, &re) {
		return re.Code == wire.CodeDenied || re.Code == wire.CodeVersion
	}
	if uerr.From(err).Kind != uerr.Denied {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deniedFrom.IsZero() {
		s.deniedFrom = time.Now()
	}
	return s.renew == 0 || time.Since(s.deniedFrom) > deniedPatience
}

// dial opens a tunnel for our session. A session that the manager does not know any more (a long sleep) is replaced by a new one.
func (s *session) dial(ctx context.Context, old *mux.Session) (*mux.Session, wire.HelloReply, error) {
	m, reply, err := s.attach(ctx, old)
	if errors.Is(err, tunnel.ErrPin) && s.exchanged(ctx) {
		m, reply, err = s.attach(ctx, old)
	}
	var re *mux.RejectError
	if errors.As(err, &re) && re.Code == wire.CodeGone {
		s.log.Info("the session is gone, creating another", "session", s.uid(), "why", re.Msg)
		if re.Msg == control.SessionDeleted {
			s.intercepts.revoked()
		}
		if err := s.createObject(context.WithoutCancel(ctx)); err != nil {
			return nil, reply, err
		}
		return s.attach(ctx, nil)
	}
	return m, reply, err
}

// exchanged says whether the API server names another key of the manager's than the one that we know, and has it known.
func (s *session) exchanged(ctx context.Context) bool {
	now, err := s.cluster.Manager(ctx, s.cfg.managerNS)
	if err != nil || now.Key == s.managerKey() {
		return false
	}
	s.log.Info("the traffic-manager has another key", "key", now.Key)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key = now.Key
	return true
}

func (s *session) managerKey() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return cmp.Or(s.key, s.manager.Key)
}

func (s *session) attach(ctx context.Context, old *mux.Session) (*mux.Session, wire.HelloReply, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout) // what hangs accepts connections too
	defer cancel()
	var m *mux.Session
	var reply wire.HelloReply
	err := s.entrance.open(ctx, func(ctx context.Context, raw net.Conn) (err error) {
		cfg := tunnel.ClientConfig{
			Identity: s.identity, Peer: s.managerKey(), Resume: old,
			Hello: wire.Hello{Version: wire.Version, Product: buildinfo.Version, Role: wire.RoleLaptop, Session: s.uid()},
		}
		if d, ok := raw.(*kube.DirectConn); ok {
			cfg.Direct, cfg.ServerName = true, d.Host
		}
		m, reply, err = tunnel.Client(ctx, raw, cfg)
		return err
	})
	return m, reply, err
}

// networkChanged makes sure that nothing waits for connections of a network that is no more.
func (s *session) networkChanged() {
	s.cluster.CloseIdle()
	if m := s.link.Session(); m != nil && s.cluster.Stranded() {
		m.Drop(errors.New("this machine no longer has the address that the tunnel was made from"))
	}
	s.link.Check()
}

// tunnel returns the tunnel, or waits a while for one that is away.
func (s *session) tunnel(ctx context.Context, patience time.Duration) (*mux.Session, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return s.link.Wait(ctx)
}

// firstUID names the session for as long as it lasts: a new object may take the place of its first.
func (s *session) firstUID() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.first
}

func (s *session) uid() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.object.UID)
}

func (s *session) onUp(_ *mux.Session, r wire.HelloReply) {
	var info struct {
		RenewInterval string `json:"renewInterval"`
	}
	renew := 10 * time.Minute
	if json.Unmarshal(r.Info, &info) == nil {
		if d, err := time.ParseDuration(info.RenewInterval); err == nil && d > 0 {
			renew = d
		}
	}
	s.mu.Lock()
	s.down, s.renew, s.deniedFrom, s.version = nil, renew, time.Time{}, r.Product
	s.mu.Unlock()
	s.log.Info("tunnel up", "manager", r.Manager, "version", r.Product)
}

func (s *session) onDown(err error) {
	if away, ok := errors.AsType[*mux.GoAwayError](err); ok && away.Code == wire.CodeGone && away.Msg == control.SessionDeleted {
		s.intercepts.revoked()
	}
	s.mu.Lock()
	s.down = err
	s.mu.Unlock()
	s.log.Warn("tunnel down", "err", err)
}

func (s *session) onRetry(err error, _ time.Duration) {
	s.mu.Lock()
	s.down = err
	s.mu.Unlock()
	s.log.Debug("no tunnel yet", "err", err)
}

// serve runs while a tunnel is up: it takes intercepted flows, and follows the cluster's names and our intercepts.
func (s *session) serve(ctx context.Context, m *mux.Session) error {
	g := lifecycle.New(ctx, s.log)
	g.Go("flows", func(ctx context.Context) error {
		defer g.Stop()
		return tunnel.Serve(ctx, m, tunnel.Handlers{Intercept: s.intercepts.take})
	})
	g.Go("cluster information", func(ctx context.Context) error {
		var last control.Cluster
		return follow(ctx, m, control.LaptopCluster, control.AskCluster{Changes: true}, func(c control.Cluster) {
			last = c.After(last)
			s.onCluster(last)
		})
	})
	g.Go("intercept states", func(ctx context.Context) error {
		return follow(ctx, m, control.LaptopIntercepts, nil, s.intercepts.update)
	})
	s.intercepts.resume()
	return g.Wait()
}

// follow hands every message of a watch to fn. The end of the tunnel is no failure of the watch: others tell of it.
func follow[T any](ctx context.Context, m *mux.Session, method string, ask any, fn func(T)) error {
	w, err := tunnel.Watch(ctx, m, method, ask)
	for err == nil {
		var v T
		if err = w.Next(ctx, &v); err == nil {
			fn(v)
		}
	}
	if m.Err() != nil {
		return nil
	}
	return fmt.Errorf("watch %s: %w", method, err)
}

// joined notes the network, and tells it what has come of the cluster while it was being set up.
func (s *session) joined(n *network) {
	s.news.Lock()
	defer s.news.Unlock()
	s.mu.Lock()
	s.net = n
	s.mu.Unlock()
	select {
	case c := <-s.info:
		n.setCluster(s, c)
	default:
	}
}

func (s *session) onCluster(c control.Cluster) {
	s.news.Lock()
	defer s.news.Unlock()
	select {
	case <-s.info: // older
	default:
	}
	s.info <- c
	s.mu.Lock()
	n := s.net
	s.mu.Unlock()
	if n != nil {
		n.setCluster(s, c)
	}
}

// namesChanged has the resolver look at the session's names again.
func (s *session) namesChanged() {
	s.mu.Lock()
	n := s.net
	s.mu.Unlock()
	if n != nil {
		n.renew()
	}
}

// renewals keeps the session valid with the user's own credentials (D2): whoever loses the right to it loses the session.
func (s *session) renewals(ctx context.Context) error {
	for {
		s.mu.Lock()
		wait := s.renew
		failed := s.renewErr != nil
		s.mu.Unlock()
		if wait <= 0 {
			wait = 10 * time.Minute
		}
		if failed {
			wait = min(wait, 10*time.Second)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		s.mu.Lock()
		o := s.object
		s.mu.Unlock()
		err := s.cluster.RenewSession(ctx, o)
		if err != nil && ctx.Err() == nil {
			s.log.Warn("session not renewed", "err", err)
		}
		s.mu.Lock()
		s.renewErr = err
		s.mu.Unlock()
	}
}

// close ends the session: first what the laptop has, then the objects in the cluster.
func (s *session) close() {
	s.mu.Lock()
	n := s.net
	s.mu.Unlock()
	if n != nil {
		s.cfg.vif.leave(n, s)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s.intercepts.removeAll(ctx)
	s.group.Stop()
	if err := s.group.Wait(); err != nil {
		s.log.Debug("session ended with", "err", err)
	}
	s.mu.Lock()
	o := s.object // nobody makes another one in its place any more
	s.mu.Unlock()
	if err := s.cluster.DeleteSession(ctx, o); err != nil {
		s.log.Warn("session object not deleted; the manager will", "err", err)
	}
}

// same says whether a connect asks for what this session is.
func (s *session) same(c *kube.Cluster, managerNS string) bool {
	return s.cluster.Context == c.Context && s.cluster.Namespace == c.Namespace && s.cluster.Server == c.Server && s.cluster.SameUser(c) && s.cfg.managerNS == managerNS
}

// wanted refuses a connect that asks for something else than what this session is; no options are no wish.
func (s *session) wanted(req localapi.ConnectRequest, c *kube.Cluster) error {
	const hint = "end it first with: doppel quit"
	switch {
	case !reflect.DeepEqual(req.Network, localapi.NetworkOptions{}) && !reflect.DeepEqual(req.Network, s.cfg.network):
		return uerr.New(uerr.Conflict, hint, "connected already with other subnets")
	case !s.same(c, req.ManagerNamespace) && req.Name != "":
		return uerr.New(uerr.Conflict, "end it first with: doppel quit --use "+req.Name+"; or choose another name", "connection %s is to context %s, namespace %s", req.Name, s.cluster.Context, s.cluster.Namespace)
	case !s.same(c, req.ManagerNamespace):
		return uerr.New(uerr.Conflict, hint+"; or connect beside it with --name", "connected already to context %s, namespace %s", s.cluster.Context, s.cluster.Namespace)
	case !req.DNS.IsZero() && !reflect.DeepEqual(req.DNS, s.cfg.dns):
		return uerr.New(uerr.Conflict, hint, "connected already with other DNS options")
	case req.AcceptIntercepts && !s.cfg.accept:
		return uerr.New(uerr.Conflict, hint, "connected already without --accept-intercepts")
	case req.RefuseIntercepts && s.cfg.accept:
		return uerr.New(uerr.Conflict, hint, "connected already with --accept-intercepts")
	}
	return nil
}

func (s *session) status() (*localapi.Session, *localapi.RootStatus) {
	s.mu.Lock()
	o, n, down, renewErr, version := s.object, s.net, s.down, s.renewErr, cmp.Or(s.version, s.manager.Version)
	s.mu.Unlock()
	out := &localapi.Session{
		Connection: s.cfg.name, Context: s.cluster.Context, Namespace: s.cluster.Namespace, Server: s.cluster.Server, User: s.user,
		Name: o.Name, UID: string(o.UID), ManagerNamespace: s.cfg.managerNS, ManagerVersion: version,
		Tunnel: "up", Transport: s.entrance.status(), Reach: localapi.Reach{Namespaces: o.Spec.Reach.Namespaces, Outside: o.Spec.Reach.Outside},
	}
	out.Intercepts, out.Problems = s.intercepts.all()
	if down != nil {
		out.Tunnel = "down: " + down.Error()
	}
	if renewErr != nil {
		out.Problems = append(out.Problems, "the session could not be renewed and will end: "+renewErr.Error())
	}
	if p := reachProblem(o.Spec.Reach, s.cluster.Namespace, s.manager.Namespaces); p != "" {
		out.Problems = append(out.Problems, p)
	}
	if n == nil {
		return out, nil
	}
	out.Subnets = s.addrs.list()
	out.Problems = append(out.Problems, n.problems()...)
	out.Flows = n.flows()
	return out, n.status()
}

// pingTimeout bounds the ping that status sends.
const pingTimeout = time.Second

// latency is the time of a ping through the tunnel and back, or 0.
func (s *session) latency(ctx context.Context) time.Duration {
	m := s.link.Session()
	if m == nil {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	d, err := m.Ping(ctx)
	if err != nil {
		s.log.Debug("no answer to a ping", "err", err)
		return 0
	}
	return d
}

// reachProblem says what a user lacks who is connected and cannot reach what they connected to, or "". managed are the manager's namespaces, none
// for all.
func reachProblem(r v1alpha1.Reach, namespace string, managed []string) string {
	const ask = "ask an administrator to bind role doppel-reach or doppel-intercept there, then connect again"
	switch {
	case len(managed) > 0 && !slices.Contains(managed, namespace):
		return "this traffic-manager is for " + strings.Join(managed, ", ") + " and not for namespace " + namespace + ": connect with -n to one of them, or choose another manager with --manager-namespace"
	case slices.Equal(r.Namespaces, []string{v1alpha1.ReachAll}):
		return ""
	case len(r.Namespaces) == 0:
		return "you may not reach any namespace that you may see; " + ask
	case len(r.Namespaces) == v1alpha1.MaxReach:
		return fmt.Sprintf("a session reaches %d namespaces at most; if you may reach more, ask an administrator for the right in the whole cluster (role doppel-reach in a ClusterRoleBinding), then connect again", v1alpha1.MaxReach)
	case !slices.Contains(r.Namespaces, namespace):
		return "you may not reach namespace " + namespace + "; " + ask
	}
	return ""
}
