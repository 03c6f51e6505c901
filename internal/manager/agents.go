package manager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// agents holds the agents connected to this replica, by pod UID.
type agents struct {
	m   *Manager
	log *slog.Logger

	mu sync.Mutex
	// guarded by mu
	byPod    map[types.UID]*agentConn
	arriving map[types.UID]*agentConn // let in, and about to be in byPod
	calling  map[types.UID]bool       // pods that are being called

	calls chan *corev1.Pod
}

// agentConn is one connected agent.
type agentConn struct {
	pod      types.UID
	podName  string
	workload workloadKey
	cfg      *agentcfg.Config // what its pod was injected with; nil: it cannot be read
	called   bool             // by us, and not the agent's own connection
	since    time.Time        // when it was let in
	mux      *mux.Session
	kick     chan struct{} // a new table is to be sent

	mu sync.Mutex
	// guarded by mu
	acked map[types.UID]engagement // intercepts in the last table that the agent acknowledged
	told  map[types.UID]engagement // and in the one that it was sent since: it may act on any of them
	notes map[control.Port]string  // what the agent has told about ports
}

func newAgents(m *Manager) *agents {
	a := &agents{m: m, log: m.cfg.Log, byPod: map[types.UID]*agentConn{}, arriving: map[types.UID]*agentConn{}, calling: map[types.UID]bool{}, calls: make(chan *corev1.Pod, 64)}
	m.engaged.onChange(func(g engagement) { a.push(g.Workload) })
	return a
}

func (a *agents) serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		c, err := lifecycle.Accept(l.Accept)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		go a.handle(ctx, c)
	}
}

// handle runs one agent's connection until it ends.
func (a *agents) handle(ctx context.Context, raw net.Conn) {
	if c := a.welcome(ctx, raw, false); c != nil {
		a.run(ctx, c)
	}
}

// welcome makes the tunnel over an agent's connection; nil: it is nobody's, or the agent has another one.
func (a *agents) welcome(ctx context.Context, raw net.Conn, called bool) *agentConn {
	conn := &agentConn{called: called, kick: make(chan struct{}, 1), notes: map[control.Port]string{}}
	s, _, err := tunnel.Server(ctx, raw, tunnel.ServerConfig{
		Identity: a.m.identity,
		Authorize: func(ctx context.Context, h wire.Hello, _ string) (wire.HelloReply, error) {
			err := a.authorize(ctx, h, conn)
			if err == nil {
				err = a.claim(conn)
			}
			return wire.HelloReply{Version: wire.Version, Product: buildinfo.Version, Manager: a.m.cfg.PodName}, err
		},
	})
	if err != nil {
		a.disclaim(conn)
		level := slog.LevelInfo
		if errors.Is(err, errConnected) {
			level = slog.LevelDebug
		}
		a.log.Log(ctx, level, "agent refused", "peer", raw.RemoteAddr(), "err", err)
		return nil
	}
	conn.mux = s
	a.add(conn)
	return conn
}

// run serves an agent until its tunnel ends.
func (a *agents) run(ctx context.Context, conn *agentConn) {
	defer a.remove(conn)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go a.sendTables(ctx, conn)
	err := tunnel.Serve(ctx, conn.mux, tunnel.Handlers{
		Intercept: func(r *mux.Request, h wire.InterceptHeader) { a.forward(conn, r, h) },
		Control:   func(_ context.Context, method string, body []byte) (any, error) { return a.take(conn, method, body) },
	})
	a.log.Debug("agent's tunnel ended", "pod", conn.podName, "err", err)
}

// An agent looks for the manager by itself, and for ownTime after its start nobody else needs to; a call may take callTimeout.
const (
	ownTime     = 2 * time.Second
	callTimeout = 2 * time.Second
)

// wantCall has a pod called whose agent should be connected here and is not.
func (a *agents) wantCall(pod *corev1.Pod) {
	if agentOf(pod) == nil || pod.DeletionTimestamp != nil || pod.Status.PodIP == "" || a.connected(pod.UID) {
		return
	}
	if started := agentStarted(pod); started.IsZero() || a.m.clock.within(ownTime, started) {
		return
	}
	select {
	case a.calls <- pod:
	default: // many are due; who wants this one asks again
	}
}

// call offers agents a connection: they need not wait for kube-proxy to know a manager that has just started, or for an egress policy to let
// them out. From then on everything is as if they had called.
func (a *agents) call(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case pod := <-a.calls:
			if !a.beginCall(pod.UID) {
				continue
			}
			wg.Go(func() {
				var conn *agentConn
				raw, err := callAgent(ctx, pod)
				if err != nil {
					a.log.Debug("agent not called", "pod", pod.Namespace+"/"+pod.Name, "err", err)
				} else {
					conn = a.welcome(ctx, raw, true)
				}
				a.mu.Lock()
				delete(a.calling, pod.UID)
				a.mu.Unlock()
				if conn != nil {
					a.run(ctx, conn)
				}
			})
		}
	}
}

func (a *agents) connected(pod types.UID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.byPod[pod] != nil
}

// onAll says whether the agents of all pods of a workload are connected.
func (a *agents) onAll(w *workload) bool {
	return !slices.ContainsFunc(w.pods, func(p corev1.Pod) bool { return !a.connected(p.UID) })
}

// beginCall says whether the pod's agent is neither connected nor being called.
func (a *agents) beginCall(pod types.UID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byPod[pod] != nil || a.calling[pod] {
		return false
	}
	a.calling[pod] = true
	return true
}

func callAgent(ctx context.Context, pod *corev1.Pod) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	addr := net.JoinHostPort(pod.Status.PodIP, strconv.Itoa(int(agentOf(pod).HealthPort)))
	return tunnel.Upgrade(ctx, &http.Transport{DisableKeepAlives: true}, "http://"+addr+agentcfg.CallPath)
}

// authorize trusts only what the token says: the pod it is bound to, which has to be there as the same one.
// The pod's own annotation and owner then say which workload the agent speaks for.
func (a *agents) authorize(ctx context.Context, h wire.Hello, conn *agentConn) error {
	if h.Role != wire.RoleAgent {
		return fmt.Errorf("role %q does not connect here", h.Role)
	}
	bound, err := a.m.tokens.pod(ctx, h.Token)
	if err != nil {
		return err
	}
	if !a.m.responsible(bound.namespace) {
		return fmt.Errorf("namespace %s is not this traffic-manager's", bound.namespace)
	}
	var pod corev1.Pod
	if err := a.m.ctrl.GetAPIReader().Get(ctx, client.ObjectKey{Namespace: bound.namespace, Name: bound.name}, &pod); err != nil {
		return err
	}
	if string(pod.UID) != bound.uid || pod.Annotations[agentcfg.Annotation] == "" {
		return errors.New("this pod has no agent")
	}
	w, err := a.m.workloadOf(ctx, &pod)
	if err != nil {
		return err
	}
	conn.pod, conn.podName, conn.workload = pod.UID, pod.Namespace+"/"+pod.Name, w
	if conn.cfg, err = agentcfg.Parse(pod.Annotations[agentcfg.Annotation]); err != nil {
		a.log.Warn("agent's configuration not understood", "pod", conn.podName, "err", err)
	}
	return nil
}

var errConnected = &mux.RejectError{Code: wire.CodeBusy, Msg: "the agent has another connection"}

// claim decides which of an agent's connections is kept, before the agent hears that it is let in: it dials while we call it, and uses what it was let in
// with, so that to end that afterwards would reset flows. A call takes the place of no connection that lives. The agent's own takes that of an older one,
// which it has lost, but not of a call that it has only just answered.
func (a *agents) claim(c *agentConn) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.byPod[c.pod]
	lives := old != nil && old.mux.Err() == nil
	if a.arriving[c.pod] != nil || lives && (c.called || old.called && time.Since(old.since) < callTimeout) {
		return errConnected
	}
	c.since = time.Now()
	a.arriving[c.pod] = c
	return nil
}

// disclaim is for a connection that has not come about.
func (a *agents) disclaim(c *agentConn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.arriving[c.pod] == c {
		delete(a.arriving, c.pod)
	}
}

// add registers an agent's connection in place of an older one.
func (a *agents) add(c *agentConn) {
	a.mu.Lock()
	old := a.byPod[c.pod]
	if old != nil {
		c.told = old.mayKnow() // as long as it has no other table
	}
	a.byPod[c.pod] = c
	delete(a.arriving, c.pod)
	a.mu.Unlock()
	if old != nil {
		_ = old.mux.Close()
	}
	a.log.Info("agent connected", "pod", c.podName, "workload", c.workload.Name)
	c.wake()
}

// wake has the newest table sent.
func (c *agentConn) wake() {
	select {
	case c.kick <- struct{}{}:
	default: // one is due already and will be the newest
	}
}

func (a *agents) remove(c *agentConn) {
	_ = c.mux.Close()
	a.mu.Lock()
	if a.byPod[c.pod] == c {
		delete(a.byPod, c.pod)
	}
	a.mu.Unlock()
	a.log.Info("agent gone", "pod", c.podName)
	a.forgotten(c.mayKnow(), nil)
	a.m.wake(c.workload)
}

// push has every agent of the workload told the new table.
func (a *agents) push(w workloadKey) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.byPod {
		if c.workload == w {
			c.wake()
		}
	}
}

// pushAll has every agent told its table again.
func (a *agents) pushAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.byPod {
		c.wake()
	}
}

// sendTables sends the table at each kick; the acknowledgement is what makes an intercept ACTIVE.
func (a *agents) sendTables(ctx context.Context, c *agentConn) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.mux.Done():
			return
		case <-c.kick:
		}
		if whole, err := a.m.whole(ctx, c.workload); !whole {
			a.log.Debug("table not known yet", "pod", c.podName, "err", err)
			time.AfterFunc(wholePoll, c.wake)
			continue
		}
		t, now := c.next(a.m.engaged)
		t.LogLevel = a.m.logging.agents()
		t.Away = a.m.away(c.workload)
		cctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := tunnel.Control(cctx, c.mux, control.ManagerIntercepts, t, nil)
		cancel()
		if err != nil {
			a.log.Warn("agent did not take its table", "pod", c.podName, "err", err)
			if errors.Is(err, mux.ErrTooLarge) {
				continue // as it would be on another tunnel; the agent keeps the one that it has
			}
			_ = c.mux.Close() // it reconnects and starts afresh
			return
		}
		before, news := c.took(now)
		a.forgotten(before, now)
		if news {
			a.m.wake(c.workload)
		}
	}
}

// next is the table to be sent now.
func (c *agentConn) next(e *engagements) (t control.Table, now map[types.UID]engagement) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, now = e.table(c.workload) // with the lock: what is not in force any more is in told, whenever one looks
	told := maps.Clone(c.told)
	if told == nil {
		told = map[types.UID]engagement{}
	}
	maps.Copy(told, now)
	c.told = told
	return t, now
}

// took notes the table that the agent has now. It returns what it may have known before, and whether other intercepts are in force.
func (c *agentConn) took(now map[types.UID]engagement) (before map[types.UID]engagement, news bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, news = c.told, !maps.EqualFunc(c.acked, now, func(engagement, engagement) bool { return true })
	c.acked, c.told = now, now
	return before, news
}

func (c *agentConn) mayKnow() map[types.UID]engagement {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.told
}

// forgotten has the laptops told whose intercepts an agent knew before, and knows no longer: one that has ended may be over now.
func (a *agents) forgotten(before, now map[types.UID]engagement) {
	for uid, g := range before {
		if _, known := now[uid]; !known {
			a.m.watchers.notify(g.Session)
		}
	}
}

// known are a session's intercepts that an agent may act on, also when they are not in force any more.
func (a *agents) known(session types.UID) map[types.UID]engagement {
	a.mu.Lock()
	conns := slices.Collect(maps.Values(a.byPod))
	a.mu.Unlock()
	out := map[types.UID]engagement{}
	for _, c := range conns {
		for uid, g := range c.mayKnow() {
			if g.Session == session {
				out[uid] = g
			}
		}
	}
	return out
}

// When we begin to lead, agents have the table of whoever led before. They get none of ours until it is whole, as long as we are new: the app would
// answer what laptops take. wholePoll is how often that is looked at besides what is told when an intercept was looked at.
// wholePatience is for how long a leader has agents wait for that: with many workloads it takes longer than it is new.
const wholePoll, wholePatience = time.Second, time.Minute

// lookedAt notes that an intercept has been looked at.
func (m *Manager) lookedAt(in *v1alpha1.Intercept) {
	if _, again := m.looked.Swap(in.UID, true); !again {
		m.agents.push(interceptKey(in))
	}
}

// whole says whether all intercepts of a workload have been looked at once since we lead, those aside that came later.
func (m *Manager) whole(ctx context.Context, w workloadKey) (bool, error) {
	if _, ok := m.wholes.Load(w); ok {
		return true, nil
	}
	if time.Since(m.started) < wholePatience {
		var list v1alpha1.InterceptList
		if err := m.ctrl.GetClient().List(ctx, &list, client.MatchingFields{workloadIndex: w.String()}, client.UnsafeDisableDeepCopy); err != nil {
			return false, err
		}
		for i := range list.Items {
			in := &list.Items[i]
			if _, looked := m.looked.Load(in.UID); !looked && in.Status.State != v1alpha1.InterceptFailed {
				return false, nil
			}
		}
	}
	m.wholes.Store(w, true)
	return true, nil
}

// workloadOf is the workload of the pod's agent. It is NotFound if that is not connected.
func (a *agents) workloadOf(pod types.UID) (workloadKey, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.byPod[pod]; c != nil {
		return c.workload, nil
	}
	return workloadKey{}, apierrors.NewNotFound(schema.GroupResource{Resource: "agents"}, string(pod))
}

// serves says whether the pod's agent is connected and has acknowledged the intercept.
func (a *agents) serves(pod, intercept types.UID) bool {
	a.mu.Lock()
	c := a.byPod[pod]
	a.mu.Unlock()
	return c != nil && c.serves(intercept)
}

func (c *agentConn) serves(intercept types.UID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.acked[intercept]
	return ok
}

// forwardTimeout leaves the agent's own second (D3) room for the way back.
const forwardTimeout = 900 * time.Millisecond

// forward carries one intercepted connection from an agent to the laptop that the intercept belongs to.
// An agent can only ever offer flows for intercepts of its own workload.
func (a *agents) forward(c *agentConn, r *mux.Request, h wire.InterceptHeader) {
	g, ok := a.m.engaged.get(types.UID(h.Intercept))
	if !ok || g.egress() || g.Workload != c.workload {
		_ = r.Reject(wire.CodeNotFound, "no such intercept")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), forwardTimeout)
	down, reply, err := a.m.laptops.open(ctx, g.Session, h)
	cancel()
	if err != nil {
		code := wire.CodeOf(err)
		var re *mux.RejectError
		if errors.As(err, &re) {
			code = re.Code
		}
		_ = r.Reject(code, "the laptop did not take it: "+err.Error())
		return
	}
	defer a.m.laptops.ended(down)
	up, err := r.Accept(reply)
	if err != nil {
		down.Reset()
		return
	}
	_ = tunnel.Join(h.Proto, up, down) // how a flow ended is between its two ends
}
