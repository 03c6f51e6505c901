package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// laptops holds the tunnels of this replica, by session UID.
//
//	attach ──▶ Connected ──connection gone──▶ Lost ──back within the grace──▶ Connected
//	                                           └──grace over, or not renewed──▶ session deleted
type laptops struct {
	m   *Manager
	log *slog.Logger

	fresh freshSessions
	turns turns

	mu sync.Mutex
	// guarded by mu
	tunnels  map[types.UID]*mux.Session // with a connection: flows may be offered
	lost     map[types.UID]lostTunnel
	revoked  map[types.UID]bool           // sessions that somebody deleted, while their tunnel was or had been here
	deleted  map[types.UID]time.Time      // when sessions were ended here: the cache may be behind, after a restart of the API server for seconds, and a laptop just be coming
	suspects map[*mux.Session]bool        // a flow timed out: no other is offered until a ping comes back (D3)
	taken    map[*mux.Stream]*mux.Session // intercepted flows that laptops have taken
}

// takenGrace is how long clients in the cluster wait for a laptop whose tunnel broke: it may be dead, and they must not hang. The
// laptop's own flows wait as long as the tunnel is kept. A laptop that has only changed its network is back before its tunnel
// breaks here.
const takenGrace = time.Second

// lostTunnel is a tunnel without connection. Its flows wait for the laptop to come back; new ones are not offered.
type lostTunnel struct {
	since time.Time
	mux   *mux.Session
}

func newLaptops(m *Manager) *laptops {
	return &laptops{m: m, log: m.cfg.Log, tunnels: map[types.UID]*mux.Session{}, lost: map[types.UID]lostTunnel{}, revoked: map[types.UID]bool{}, deleted: map[types.UID]time.Time{}, suspects: map[*mux.Session]bool{}, taken: map[*mux.Stream]*mux.Session{}}
}

// serve runs one attached connection until it ends. The tunnel on it is a new one, which is served until it ends, or one that
// goes on.
func (l *laptops) serve(ctx context.Context, raw net.Conn) { l.serveBy(ctx, raw, nil) }

// serveBy is serve. For a connection that came directly it calls greeted once it is known who it is, or that it is nobody.
func (l *laptops) serveBy(ctx context.Context, raw net.Conn, greeted func()) {
	var sess *v1alpha1.Session
	var old *mux.Session
	// Until a tunnel is registered, another connection of its laptop would not find it, and what comes later would not be what is registered last.
	leave := func() {}
	defer func() { leave() }()
	s, _, err := tunnel.Server(ctx, raw, tunnel.ServerConfig{
		Identity: l.m.identity, Direct: greeted != nil,
		Authorize: func(ctx context.Context, h wire.Hello, fingerprint string) (wire.HelloReply, error) {
			var err error
			if sess, err = l.authorize(ctx, h, fingerprint); err != nil {
				return wire.HelloReply{}, err
			}
			if leave, err = l.turns.take(ctx, sess.UID); err != nil {
				return wire.HelloReply{}, tryAgain(err)
			}
			return l.reply(h), nil
		},
		Resume: l.m.cfg.LostGrace,
		// Whoever proved the session's key may go on with the tunnels of that session, and of no other.
		Find: func(id string) *mux.Session { old = l.find(sess.UID, id); return old },
	})
	if greeted != nil {
		greeted()
	}
	if err != nil {
		l.log.Info("laptop refused", "err", err)
		return
	}
	if s != old && l.tunnel(sess.UID) != nil {
		leave() // who does not answer is waited for
		if !answers(ctx, s) {
			l.log.Info("laptop has given a connection up", "session", sess.Name)
			_ = s.Close()
			return
		}
	}
	down := s.Down()
	l.up(ctx, sess, s, leave)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { l.showStatus(ctx, sess) }) // nobody waits for that: with many laptops it takes its time
	if s == old {
		<-down
		l.down(ctx, sess, s)
		return
	}
	wg.Go(func() {
		err := tunnel.Serve(ctx, s, l.handlers(sess))
		l.log.Debug("tunnel ended", "session", sess.Name, "err", err)
	})
	<-down
	l.down(ctx, sess, s)
}

// answerTimeout is how long a laptop has to show that it wants a tunnel that takes the place of another.
const answerTimeout = 5 * time.Second

// answers says whether the other end of a new tunnel is there. A laptop may have given its connection up before we saw its Hello, and have made another,
// which must not be closed for the one that nobody wants.
func answers(ctx context.Context, s *mux.Session) bool {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	_, err := s.Ping(ctx)
	return err == nil
}

// find returns the session's tunnel of that ID.
func (l *laptops) find(uid types.UID, id string) *mux.Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range []*mux.Session{l.tunnels[uid], l.lost[uid].mux} {
		if s != nil && s.ID() == id {
			return s
		}
	}
	return nil
}

// authorize finds the session that the laptop says it is and checks the one thing that only its owner has: the key.
func (l *laptops) authorize(ctx context.Context, h wire.Hello, fingerprint string) (*v1alpha1.Session, error) {
	if h.Role != wire.RoleLaptop {
		return nil, fmt.Errorf("role %q does not attach here", h.Role)
	}
	if err := l.m.policy.ok(ctx); errors.Is(err, errNoPolicy) {
		return nil, err
	} else if err != nil {
		return nil, tryAgain(err)
	}
	s, err := l.m.sessionByUID(ctx, types.UID(h.Session))
	if err != nil {
		return nil, tryAgain(err)
	}
	uid := types.UID(h.Session)
	l.mu.Lock()
	_, deleted := l.deleted[uid]
	_, lost := l.lost[uid]
	revoked := l.revoked[uid] || !deleted && (lost || l.tunnels[uid] != nil)
	l.mu.Unlock()
	if s == nil && revoked {
		l.revoke(uid)
		return nil, errRevoked
	}
	if s == nil || s.Spec.Key != fingerprint || fingerprint == "" {
		return nil, errNoSession // the same words for both: nothing is told to whoever guesses
	}
	if deleted || l.expired(s) {
		return nil, errNoSession
	}
	return s, nil
}

// tryAgain tells the other end that the cluster is in trouble and not its right to be here.
func tryAgain(err error) error {
	return &mux.RejectError{Code: wire.CodeBusy, Msg: err.Error()}
}

// errNoSession tells a laptop to create a new session.
var errNoSession = &mux.RejectError{Code: wire.CodeGone, Msg: "no such session"}

// errRevoked tells it the same, and that its intercepts are not to come back with the new one.
var errRevoked = &mux.RejectError{Code: wire.CodeGone, Msg: control.SessionDeleted}

// info is what a laptop learns at the handshake.
type info struct {
	RenewInterval string `json:"renewInterval"`
	LostGrace     string `json:"lostGrace"`
}

func (l *laptops) reply(h wire.Hello) wire.HelloReply {
	b, err := json.Marshal(info{RenewInterval: l.m.cfg.RenewInterval.String(), LostGrace: l.m.cfg.LostGrace.String()})
	if err != nil {
		panic(err) // two strings
	}
	return wire.HelloReply{Version: wire.Version, Product: buildinfo.Version, Manager: l.m.cfg.PodName, Session: h.Session, Info: b}
}

// up registers a tunnel that has a connection, and calls registered; another one of the same session is closed: its laptop cannot go on with it.
func (l *laptops) up(ctx context.Context, sess *v1alpha1.Session, s *mux.Session, registered func()) {
	l.mu.Lock()
	old, lost := l.tunnels[sess.UID], l.lost[sess.UID].mux
	l.tunnels[sess.UID] = s
	delete(l.lost, sess.UID)
	l.mu.Unlock()
	registered() // to close the other may take a while
	l.m.cameOrWent(sess.UID)
	for _, o := range []*mux.Session{old, lost} {
		if o != nil && o != s {
			_ = o.Close()
		}
	}
	for _, w := range l.m.workloadsOfSession(ctx, sess) { // to a new leader the session was Connected all along: its object does not tell
		l.m.wake(w)
	}
	l.log.Info("laptop connected", "session", sess.Name, "user", sess.Spec.User, "client", sess.Spec.Client, "resumed", lost == s)
}

// down notes that a tunnel lost its connection. It may have another by now.
func (l *laptops) down(ctx context.Context, sess *v1alpha1.Session, s *mux.Session) {
	select {
	case <-s.Down():
	default:
		return
	}
	l.mu.Lock()
	current := l.tunnels[sess.UID] == s
	if current {
		delete(l.tunnels, sess.UID)
		l.lost[sess.UID] = lostTunnel{since: time.Now(), mux: s}
	}
	l.mu.Unlock()
	if !current {
		return
	}
	l.m.cameOrWent(sess.UID)
	down := s.Down()
	time.AfterFunc(takenGrace, func() { l.resetTaken(s, down) })
	l.log.Info("laptop lost", "session", sess.Name, "user", sess.Spec.User, "err", s.Why())
	l.showStatus(ctx, sess)
}

// showStatus writes whether the session has a tunnel, again if that has changed meanwhile: several connections of a laptop that
// roams come and go at once.
func (l *laptops) showStatus(ctx context.Context, sess *v1alpha1.Session) {
	for up := l.tunnel(sess.UID) != nil; ; up = !up {
		if up {
			l.setStatus(ctx, sess, v1alpha1.SessionConnected, "")
		} else {
			l.setStatus(ctx, sess, v1alpha1.SessionLost, "the tunnel is gone; apps answer until it is back")
		}
		if up == (l.tunnel(sess.UID) != nil) || ctx.Err() != nil {
			return
		}
	}
}

// setStatus writes what people see with kubectl; the registry above is what counts, so a failure is logged only.
func (l *laptops) setStatus(ctx context.Context, sess *v1alpha1.Session, state v1alpha1.SessionState, msg string) {
	if ctx.Err() != nil {
		return
	}
	want := sess.DeepCopy()
	want.Status = v1alpha1.SessionStatus{State: state, Since: metav1.Now(), Message: msg}
	if state == v1alpha1.SessionConnected {
		want.Status.Address = l.m.agentsAddress()
	}
	base := sess.DeepCopy()
	base.Status = v1alpha1.SessionStatus{State: "-", Address: "-", Message: "-"} // so that the patch carries every field
	if err := l.m.ctrl.GetClient().Status().Patch(ctx, want, client.MergeFrom(base)); client.IgnoreNotFound(err) != nil {
		l.log.Warn("session status not written", "session", sess.Name, "err", err)
	}
}

// tunnel returns the session's tunnel, or nil.
func (l *laptops) tunnel(uid types.UID) *mux.Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tunnels[uid]
}

// wasHere says whether a session has lost its tunnel while we lead, for no longer than it is kept.
func (l *laptops) wasHere(uid types.UID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, lost := l.lost[uid]
	return lost
}

// answers says whether flows may be offered to the session's laptop.
func (l *laptops) answers(uid types.UID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.tunnels[uid]
	return t != nil && !l.suspects[t]
}

// away are the intercepts of a workload whose laptops do not answer.
func (m *Manager) away(w workloadKey) []string {
	var out []string
	for _, g := range m.engaged.of(w) {
		if !m.laptops.answers(g.Session) {
			out = append(out, string(g.UID))
		}
	}
	return out
}

// cameOrWent has the agents told that a laptop answers, or that it does not. They could learn that by offering it a flow; but in a flow that it has taken,
// requests may follow each other, and those that it has not got when its tunnel breaks need not be lost with it.
func (m *Manager) cameOrWent(session types.UID) {
	for _, g := range m.engaged.where(func(g engagement) bool { return g.Session == session }) {
		m.agents.push(g.Workload)
	}
}

// open offers an intercepted flow to the session's laptop. An error means: it did not take it.
func (l *laptops) open(ctx context.Context, uid types.UID, h wire.InterceptHeader) (*mux.Stream, []byte, error) {
	l.mu.Lock()
	t := l.tunnels[uid]
	suspect := l.suspects[t]
	l.mu.Unlock()
	if t == nil || suspect {
		return nil, nil, errAway
	}
	octx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	down := t.Down()
	go func() { // a tunnel that is to be resumed would have the client wait for that
		select {
		case <-down:
			cancel(errAway)
		case <-octx.Done():
		}
	}()
	st, reply, err := t.Open(octx, wire.AppendIntercept(nil, h))
	if errors.Is(err, context.DeadlineExceeded) {
		l.suspect(uid, t)
	}
	if err == nil {
		l.mu.Lock()
		l.taken[st] = t
		l.mu.Unlock()
	}
	return st, reply, err
}

// errAway has the app answer at once.
var errAway = &mux.RejectError{Code: wire.CodeGone, Msg: "the laptop is not connected"}

// ended forgets an intercepted flow.
func (l *laptops) ended(st *mux.Stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.taken, st)
}

// resetTaken resets the intercepted flows of a tunnel if it has still not got another connection since it lost the one of down.
func (l *laptops) resetTaken(s *mux.Session, down <-chan struct{}) {
	if s.Down() != down {
		return
	}
	l.mu.Lock()
	var flows []*mux.Stream
	for st, of := range l.taken {
		if of == s {
			flows = append(flows, st)
		}
	}
	l.mu.Unlock()
	for _, st := range flows {
		st.Reset()
	}
}

// suspect spares other connections the wait for a laptop that hangs, until it answers a ping or its tunnel ends.
func (l *laptops) suspect(uid types.UID, t *mux.Session) {
	l.mu.Lock()
	already := l.suspects[t]
	l.suspects[t] = true
	l.mu.Unlock()
	if already {
		return
	}
	l.m.cameOrWent(uid)
	go func() {
		for t.Err() == nil {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			_, err := t.Ping(ctx)
			cancel()
			if err == nil {
				break
			}
		}
		l.mu.Lock()
		delete(l.suspects, t)
		l.mu.Unlock()
		l.m.cameOrWent(uid)
	}()
}

// silence is how long a laptop may say nothing although it was sent something, before it is asked whether it is there. A flow that is offered shows a laptop
// that hangs; on flows that it has taken requests may follow each other for as long as nobody asks.
const silence = time.Second

// runSilence suspects laptops that have taken flows, are silent and do not answer a ping.
func (l *laptops) runSilence(ctx context.Context) error {
	tick := time.NewTicker(silence)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for t, uid := range l.taking() {
			if t.Silent() >= silence {
				go l.ask(ctx, uid, t)
			}
		}
	}
}

// taking are the tunnels whose laptops have taken flows, and are not suspected yet.
func (l *laptops) taking() map[*mux.Session]types.UID {
	l.mu.Lock()
	defer l.mu.Unlock()
	some := map[*mux.Session]bool{}
	for _, t := range l.taken {
		some[t] = true
	}
	out := map[*mux.Session]types.UID{}
	for uid, t := range l.tunnels {
		if some[t] && !l.suspects[t] {
			out[t] = uid
		}
	}
	return out
}

// ask suspects a laptop that does not answer a ping.
func (l *laptops) ask(ctx context.Context, uid types.UID, t *mux.Session) {
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	if _, err := t.Ping(ctx); errors.Is(err, context.DeadlineExceeded) {
		l.suspect(uid, t)
	}
}

// maxAhead is how far a renewal may lie in the future; the admission policy holds the same bound.
const maxAhead = 5 * time.Minute

// expired says whether two renewals were missed, or the renewal time is one that no honest laptop writes.
func (l *laptops) expired(s *v1alpha1.Session) bool {
	age := l.m.clock.since(s.Spec.RenewTime.Time)
	return age > 2*l.m.cfg.RenewInterval || age < -maxAhead
}

// runLeases ends sessions whose tunnel or renewal has been missing for too long.
func (l *laptops) runLeases(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := l.checkLeases(ctx); err != nil {
			l.log.Warn("list sessions", "err", err)
		}
	}
}

func (l *laptops) checkLeases(ctx context.Context) error {
	var list v1alpha1.SessionList
	if err := l.m.ctrl.GetClient().List(ctx, &list, client.InNamespace(l.m.cfg.Namespace)); err != nil {
		return err
	}
	there := map[types.UID]bool{}
	for i := range list.Items {
		s := &list.Items[i]
		there[s.UID] = true
		if l.endedHere(s.UID) { // and the cache does not know; a laptop whose connection was being made just then is sent away
			l.drop(s.UID, wire.CodeNone, "")
			continue
		}
		if why := l.over(s); why != "" {
			l.end(ctx, s, why)
		}
	}
	for _, uid := range l.known() {
		if there[uid] {
			continue
		}
		if l.endedHere(uid) { // by us, while its laptop was coming back
			l.drop(uid, wire.CodeNone, "")
			continue
		}
		if s, err := l.m.sessionByUID(ctx, uid); err != nil {
			return err
		} else if s == nil { // its user or an administrator deleted it: nobody may go on using its tunnel
			l.log.Info("session deleted", "session", uid)
			l.revoke(uid)
		}
	}
	l.mu.Lock()
	maps.DeleteFunc(l.deleted, func(uid types.UID, at time.Time) bool { return !there[uid] && time.Since(at) > endedFor })
	l.mu.Unlock()
	return nil
}

// endedFor is how long at least it is known of a session that it was ended here: longer than a laptop's attachment takes.
const endedFor = time.Minute

func (l *laptops) endedHere(uid types.UID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, yes := l.deleted[uid]
	return yes
}

// count counts the laptops that are connected here.
func (l *laptops) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.tunnels)
}

// known lists the sessions whose tunnel is or was here.
func (l *laptops) known() []types.UID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append(slices.Collect(maps.Keys(l.tunnels)), slices.Collect(maps.Keys(l.lost))...)
}

// over says why a session has to end, or "".
func (l *laptops) over(s *v1alpha1.Session) string {
	if l.expired(s) {
		return "not renewed"
	}
	l.mu.Lock()
	_, attached := l.tunnels[s.UID]
	lost, known := l.lost[s.UID]
	l.mu.Unlock()
	if attached {
		return ""
	}
	away := time.Since(lost.since)
	if !known { // created but never attached here: count from its creation or from our own start, whichever is later
		away = min(l.m.clock.since(s.CreationTimestamp.Time), time.Since(l.m.started))
	}
	if away > l.m.cfg.LostGrace {
		return "no tunnel"
	}
	return ""
}

func (l *laptops) end(ctx context.Context, s *v1alpha1.Session, why string) {
	l.log.Info("session ended", "session", s.Name, "user", s.Spec.User, "why", why)
	err := l.m.ctrl.GetClient().Delete(ctx, s, client.Preconditions{UID: &s.UID})
	if client.IgnoreNotFound(err) != nil {
		l.log.Warn("session not deleted", "session", s.Name, "err", err)
	} else {
		l.mu.Lock()
		l.deleted[s.UID] = time.Now()
		l.mu.Unlock()
	}
	l.drop(s.UID, wire.CodeNone, "")
}

// maxRevoked bounds what is kept of sessions that somebody deleted.
const maxRevoked = 1000

// revoke ends the tunnel of a session that somebody deleted, and has its laptop know why, also when it comes back later.
func (l *laptops) revoke(uid types.UID) {
	l.mu.Lock()
	for other := range l.revoked {
		if len(l.revoked) < maxRevoked {
			break
		}
		delete(l.revoked, other)
	}
	l.revoked[uid] = true
	l.mu.Unlock()
	l.drop(uid, errRevoked.Code, errRevoked.Msg)
}

// drop closes the tunnel of a session that no longer exists.
func (l *laptops) drop(uid types.UID, code wire.Code, msg string) {
	l.mu.Lock()
	ended := []*mux.Session{l.tunnels[uid], l.lost[uid].mux}
	delete(l.tunnels, uid)
	delete(l.lost, uid)
	l.mu.Unlock()
	for _, t := range ended {
		if t != nil {
			_ = t.CloseWith(code, msg)
		}
	}
}

// maxWatches bounds what one tunnel watches at once. A laptop has one of each kind; what has been made for one that does not read is kept.
const maxWatches = 8

// errTooManyWatches refuses a watch beyond maxWatches.
var errTooManyWatches = &mux.RejectError{Code: wire.CodeBusy, Msg: "this tunnel watches too much"}

// handlers is what a laptop may ask for.
func (l *laptops) handlers(sess *v1alpha1.Session) tunnel.Handlers {
	to := l.m.reachOf(sess)
	dial := func(r *mux.Request, h wire.FlowHeader) { l.serveDial(r, h, to) }
	watches := make(chan struct{}, maxWatches)
	return tunnel.Handlers{
		TCP: dial, UDP: dial,
		Echo: func(r *mux.Request, h wire.FlowHeader) { l.serveEcho(r, h, to) },
		DNS:  func(ctx context.Context, msg []byte) ([]byte, error) { return l.m.answer(ctx, sess.UID, to, msg) },

		Intercept: func(r *mux.Request, h wire.InterceptHeader) {
			// A pod's own loopback is the workload's, whatever else the session reaches.
			if h.Dst.Addr().Unmap().IsLoopback() || l.admit(r, wire.FlowHeader{Src: h.Src, Dst: h.Dst}, to) {
				l.m.agents.egress(sess.UID, r, h)
			}
		},
		Files: func(r *mux.Request, intercept string) { l.m.agents.files(sess.UID, r, intercept) },
		Control: func(ctx context.Context, method string, body []byte) (any, error) {
			switch method {
			case control.LaptopEnvironment:
				var ask control.AskEnvironment
				if err := json.Unmarshal(body, &ask); err != nil {
					return nil, err
				}
				return l.m.agents.environment(ctx, sess.UID, types.UID(ask.Intercept))
			case control.LaptopWhy:
				var ask control.AskWhy
				if err := json.Unmarshal(body, &ask); err != nil {
					return nil, err
				}
				return l.m.why(ctx, sess.UID, ask)
			}
			return nil, fmt.Errorf("unknown method %q", method)
		},
		Watch: func(ctx context.Context, method string, body []byte, send func(any) error) error {
			select {
			case watches <- struct{}{}:
				defer func() { <-watches }()
			default:
				return errTooManyWatches
			}
			switch method {
			case control.LaptopCluster:
				var ask control.AskCluster
				if err := json.Unmarshal(body, &ask); err != nil && len(body) > 0 {
					return err
				}
				return l.m.cluster.watch(ctx, to, ask, send)
			case control.LaptopIntercepts:
				return l.m.watchIntercepts(ctx, sess.UID, send)
			}
			return fmt.Errorf("unknown watch %q", method)
		},
	}
}

// dialTimeout is how long a laptop's SYN may wait for the cluster; the laptop's own TCP gives up later than that.
const dialTimeout = 10 * time.Second

func (l *laptops) serveEcho(r *mux.Request, h wire.FlowHeader, to reach) {
	if l.admit(r, h, to) {
		_ = tunnel.ServeEcho(r, h)
	}
}

func (l *laptops) serveDial(r *mux.Request, h wire.FlowHeader, to reach) {
	if l.admit(r, h, to) {
		_ = tunnel.ServeDial(r, h, &net.Dialer{Timeout: dialTimeout}) // how a flow ended is between its two ends
	}
}

// admit says whether the flow may go where it wants, or rejects it.
func (l *laptops) admit(r *mux.Request, h wire.FlowHeader, to reach) bool {
	if !mayDial(h.Dst) {
		_ = r.Reject(wire.CodeUnreachable, "not an address of the cluster")
		return false
	}
	ok, err := to.address(r.Context(), l.m.addresses, h.Dst.Addr())
	switch {
	case err != nil:
		_ = r.Reject(wire.CodeInternal, err.Error())
	case !ok:
		_ = r.Reject(wire.CodeUnreachable, "out of this session's reach")
	}
	return ok && err == nil
}

// cacheLag is how long a session that was just made may not be in the cache yet, and cacheStep how often that is looked for. The API server is asked only
// after that, since it can find one by its UID in the list of all alone, which is a megabyte where there are a thousand.
const (
	cacheLag  = 100 * time.Millisecond
	cacheStep = 10 * time.Millisecond
)

// sessionByUID looks in the cache, and asks the API server when the cache does not know the session yet.
func (m *Manager) sessionByUID(ctx context.Context, uid types.UID) (*v1alpha1.Session, error) {
	if uid == "" {
		return nil, nil
	}
	var list v1alpha1.SessionList
	cached := func() error {
		return m.ctrl.GetClient().List(ctx, &list, client.InNamespace(m.cfg.Namespace), client.MatchingFields{uidIndex: string(uid)})
	}
	err := cached()
	for wait := cacheLag; err == nil && len(list.Items) == 0 && wait > 0; wait -= cacheStep {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(cacheStep):
		}
		err = cached()
	}
	if err == nil && len(list.Items) == 0 {
		list.Items, err = m.laptops.fresh.list(ctx, func(ctx context.Context) ([]v1alpha1.Session, error) {
			var all v1alpha1.SessionList
			err := m.ctrl.GetAPIReader().List(ctx, &all, client.InNamespace(m.cfg.Namespace))
			return all.Items, err
		})
	}
	if err != nil {
		return nil, errors.Join(errors.New("list sessions"), err)
	}
	for i := range list.Items {
		if list.Items[i].UID == uid {
			return list.Items[i].DeepCopy(), nil // others may have the list
		}
	}
	return nil, nil
}
