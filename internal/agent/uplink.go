package agent

import (
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// uplink is the agent's tunnel to the manager.
type uplink struct {
	cfg      Config
	identity *tunnel.Identity
	table    *table
	apps     *apps
	canaries canaries

	decisions decisions
	notes     notes
	link      *tunnel.Link

	current atomic.Pointer[mux.Session] // the latest
	suspect atomic.Pointer[mux.Session] // a flow timed out on it: no other is offered until a ping comes back, and nothing is sent on those that are open

	calls   chan answered // of the manager, for dial
	callers callers
}

// answered is a tunnel over a connection that the manager made.
type answered struct {
	s     *mux.Session
	reply wire.HelloReply
}

func newUplink(cfg Config, t *table) (*uplink, error) {
	id, err := tunnel.NewIdentity(cfg.Pod)
	if err != nil {
		return nil, err
	}
	u := &uplink{cfg: cfg, identity: id, table: t, calls: make(chan answered)}
	t.silent = u.silent
	u.apps = &apps{shown: cfg.Agent.Apps, environ: cfg.Environ, table: t, log: cfg.Log}
	u.link = tunnel.NewLink(tunnel.LinkConfig{
		Dial:  u.dial,
		Serve: u.serve,
		OnUp: func(s *mux.Session, _ wire.HelloReply) {
			u.current.Store(s)
			if u.suspect.Swap(nil) != nil {
				t.changed()
			}
			cfg.Log.Info("connected to the manager")
		},
		// Requests may follow each other for long on flows that are open, while nobody offers another.
		OnSilent: u.doubt,
		OnDown:   func(err error) { cfg.Log.Info("connection to the manager lost, the app answers", "err", err) },
		// An agent never gives up and never ends by itself: the app's connections come through it.
		Permanent: func(error) bool { return false },
		Log:       cfg.Log,
	})
	return u, nil
}

func (u *uplink) run(ctx context.Context) error { return u.link.Run(ctx) }

var errNoManager = errors.New("no connection to the manager")

// open offers a flow to the laptop of an intercept. An error means: nobody took it.
func (u *uplink) open(ctx context.Context, h wire.InterceptHeader) (*mux.Stream, error) {
	s := u.link.Session()
	if s == nil || u.suspect.Load() == s {
		return nil, errNoManager
	}
	st, _, err := s.Open(ctx, wire.AppendIntercept(nil, h))
	if errors.Is(err, context.DeadlineExceeded) {
		u.doubt(s)
	}
	return st, err
}

// doubt has the app get what comes, also on connections of which the laptop has had something already, until the manager answers a ping.
func (u *uplink) doubt(s *mux.Session) {
	if u.suspect.Swap(s) == s {
		return
	}
	u.table.changed()
	go u.probe(s)
}

// silent says whether the manager is not trusted. One that has ended its session meanwhile is not until there is another: what is open on that one may
// not have ended yet.
func (u *uplink) silent() bool {
	s := u.suspect.Load()
	return s != nil && s == u.current.Load()
}

// probe clears the suspicion when the manager answers a ping; a dead session ends by the mux's keepalive.
func (u *uplink) probe(s *mux.Session) {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		_, err := s.Ping(ctx)
		cancel()
		if err == nil && u.suspect.CompareAndSwap(s, nil) {
			u.table.changed()
		}
		if err == nil || s.Err() != nil {
			return
		}
	}
}

// dialTimeout bounds one attempt to connect, with the handshake: a manager that hangs accepts connections too.
const dialTimeout = 10 * time.Second

// dial makes a new tunnel, or takes one that the manager asked for meanwhile: the manager resumes none of an agent, whose way to it
// fails only together with one of the two pods.
func (u *uplink) dial(ctx context.Context, _ *mux.Session) (*mux.Session, wire.HelloReply, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	type result struct {
		answered
		err error
	}
	dialled := make(chan result, 1)
	go func() {
		var r result
		raw, err := dialAny(ctx, u.cfg.Agent.Managers)
		if r.err = err; err == nil {
			r.s, r.reply, r.err = u.tunnel(ctx, raw, nil)
		}
		dialled <- r
	}()
	select {
	case r := <-dialled:
		return r.s, r.reply, r.err
	case a := <-u.calls:
		cancel()
		if r := <-dialled; r.err == nil { // at the same moment: it is the one that the manager keeps
			_ = a.s.Close()
			return r.s, r.reply, nil
		}
		return a.s, a.reply, nil
	}
}

// callTimeout bounds the answer to a call of the manager, until dial takes it.
const callTimeout = 2 * time.Second

// answer makes a tunnel over a connection from whoever says to be the manager, and proves it there. It is the way for a manager that has just
// started, which kube-proxy's rules do not know for a second, and for one that a NetworkPolicy keeps this pod from reaching.
func (u *uplink) answer(raw net.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	known := u.callers.add(cancel)
	defer known()
	s, reply, err := u.tunnel(ctx, raw, known)
	if err != nil {
		u.cfg.Log.Info("call not answered", "err", err)
		return
	}
	u.link.Check() // a tunnel that is up may be dead, and a pause is over
	select {
	case u.calls <- answered{s, reply}:
	case <-ctx.Done(): // the one that is up lives
		_ = s.Close()
	}
}

// maxCallers is how many may call at once that have yet to show the manager's key. Any pod can call, so that one more ends the oldest and not itself.
const maxCallers = 8

// callers are those who call and have not shown the manager's key.
type callers struct {
	mu  sync.Mutex
	all list.List // guarded by mu; what ends each, the oldest first
}

// add adds one that end ends, and returns what to call when it has shown the key or ended.
func (c *callers) add(end context.CancelFunc) (known func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all.Len() == maxCallers {
		c.all.Remove(c.all.Front()).(context.CancelFunc)()
	}
	e := c.all.PushBack(end)
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.all.Remove(e)
	}
}

// tunnel makes a tunnel over a connection; proved is called when the manager has shown its key.
func (u *uplink) tunnel(ctx context.Context, raw net.Conn, proved func()) (*mux.Session, wire.HelloReply, error) {
	token, err := u.cfg.Token()
	if err != nil {
		_ = raw.Close()
		return nil, wire.HelloReply{}, fmt.Errorf("read the service account token: %w", err)
	}
	return tunnel.Client(ctx, raw, tunnel.ClientConfig{
		Identity: u.identity,
		Peer:     u.cfg.Agent.ManagerKey,
		Proved:   proved,
		Hello: wire.Hello{
			Version: wire.Version, Product: buildinfo.Version, Role: wire.RoleAgent,
			Token: token, Pod: u.cfg.Pod, Namespace: u.cfg.Namespace,
		},
	})
}

// dialAny tries the addresses in order: the service's name first, its address for pods whose DNS is not the cluster's.
func dialAny(ctx context.Context, addrs []string) (net.Conn, error) {
	var errs []error
	for _, a := range addrs {
		d := net.Dialer{Timeout: 2 * time.Second}
		c, err := d.DialContext(ctx, "tcp", a)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// serve answers the manager, which asks to take a new table, and to connect for a laptop that the table says may ask so.
func (u *uplink) serve(ctx context.Context, s *mux.Session) error {
	return tunnel.Serve(ctx, s, tunnel.Handlers{
		Intercept: u.connect,
		Files:     u.apps.files,
		DNS:       u.resolve,
		Control: func(_ context.Context, method string, body []byte) (any, error) {
			switch method {
			case control.ManagerIntercepts:
			case control.ManagerEnvironment:
				return u.apps.environment(body)
			case control.ManagerWhy:
				return u.why(body)
			case control.ManagerCanary:
				return u.canaries.expect(body, false)
			case control.ManagerCanaryUDP:
				return u.canaries.expect(body, true)
			default:
				return nil, fmt.Errorf("unknown method %q", method)
			}
			var t control.Table
			if err := json.Unmarshal(body, &t); err != nil {
				return nil, err
			}
			u.decisions.keep(t)
			for _, e := range u.table.set(t, u.cfg.Log) {
				u.tell(s, control.Note{Port: control.Port{Protocol: e.Protocol, Number: e.ContainerPort}, Text: newerRule}, "")
			}
			if u.cfg.Level != nil {
				if err := u.cfg.Level.Change(t.LogLevel, 0); err != nil {
					u.cfg.Log.Warn("log level not changed", "err", err)
				}
			}
			u.cfg.Log.Info("intercepts set", "count", len(t.Items))
			return struct{}{}, nil
		},
	})
}

// newerRule is what people are told whose intercept comes from a newer manager and is not understood.
const newerRule = "the traffic-agents in the pods are older than what this intercept wants, so the app gets its requests: restart the workload to have new agents (kubectl rollout restart)"

// egressTimeout bounds a connection out of the pod; the manager waits a little longer.
const egressTimeout = 9 * time.Second

// connect carries a laptop's flow out of the pod.
func (u *uplink) connect(r *mux.Request, h wire.InterceptHeader) {
	if !u.table.connects(h.Intercept) {
		_ = r.Reject(wire.CodeNotFound, "no such intercept")
		return
	}
	network := "tcp"
	if h.Proto == wire.ProtoUDP {
		network = "udp"
	}
	d := net.Dialer{Timeout: egressTimeout}
	c, err := d.DialContext(r.Context(), network, h.Dst.String())
	if err != nil {
		_ = r.Reject(wire.CodeOf(err), err.Error())
		return
	}
	_ = tunnel.ServeConn(r, c, nil) // how a flow ended is between its two ends
}
