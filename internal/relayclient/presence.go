package relayclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"reflect"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// How often it is looked whether logins or connections have changed; pauses between attempts to join a relay; and its silence.
const (
	presenceEvery = time.Second
	firstPause    = 500 * time.Millisecond
	lastPause     = 30 * time.Second
	joinTimeout   = 15 * time.Second
	keepAlive     = 10 * time.Second
)

// How long a wish waits for its user, and how many a relay has under way at once.
const (
	permissionWait = 10 * time.Minute
	maxWishes      = 4
)

// Machine is what a relay may see of this machine and ask of it.
type Machine interface {
	// Connections are the connections to clusters that are joined to a relay.
	Connections(relay string) []relayapi.Connection
	Workloads(ctx context.Context, relay string, req relayapi.WorkloadsRequest) (relayapi.Workloads, error)
	// Intercept starts an intercept, and tells how far it is; end ends it, and no other that has its name by then.
	Intercept(ctx context.Context, relay string, w relayapi.Wish, progress func(string)) (end func(context.Context) error, err error)
}

// PresenceConfig is what a Presence needs.
type PresenceConfig struct {
	Logins  func() ([]Login, error)
	Machine Machine
	Host    string
	Dial    func(ctx context.Context, network, addr string) (net.Conn, error) // nil: as usual
	Log     *slog.Logger
}

// Presence keeps this machine known to the relays that its user is logged in at, for as long as it is connected to a cluster of theirs. A relay
// starts nothing here without its user's permission.
type Presence struct {
	cfg PresenceConfig

	mu sync.Mutex
	// guarded by mu
	relays  map[string]*presence // by URL
	changed chan struct{}        // closed when a permission changes
}

// presence is this machine at one relay.
type presence struct {
	p     *Presence
	login Login // as it was when it joined
	end   context.CancelFunc
	done  chan struct{}

	// guarded by Presence.mu
	permission relayapi.Permission
	joined     bool
	problem    string
	wishes     int                                           // under way
	waiting    []relayapi.Wish                               // for permission
	started    map[relayapi.Wish]func(context.Context) error // by the relay, as far as it is known to this connection: what ends them
}

// At is this machine at a relay, for its user.
type At struct {
	URL        string
	Joined     bool
	Problem    string // why it is not joined
	Permission relayapi.Permission
	Waiting    []relayapi.Wish // for permission
}

// NewPresence returns one that Run begins.
func NewPresence(cfg PresenceConfig) *Presence {
	return &Presence{cfg: cfg, relays: map[string]*presence{}, changed: make(chan struct{})}
}

// Run goes on until ctx ends.
func (p *Presence) Run(ctx context.Context) {
	tick := time.NewTicker(presenceEvery)
	defer tick.Stop()
	for {
		p.look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			p.keep(nil)
			return
		}
	}
}

// look joins the relays where this machine is to be, and leaves the others.
func (p *Presence) look(ctx context.Context) {
	logins, err := p.cfg.Logins()
	if err != nil {
		p.cfg.Log.Debug("logins at relays not read", "err", err)
		return // as it was
	}
	wanted := map[string]Login{}
	for _, l := range logins {
		if l.Token != "" && len(p.cfg.Machine.Connections(l.URL)) > 0 {
			wanted[l.URL] = l
		}
	}
	p.keep(wanted)
	p.mu.Lock()
	defer p.mu.Unlock()
	for url, l := range wanted {
		r := p.relays[url]
		if r == nil {
			rctx, end := context.WithCancel(ctx)
			r = &presence{p: p, login: l, end: end, done: make(chan struct{}), permission: l.Permission, started: map[relayapi.Wish]func(context.Context) error{}}
			p.relays[url] = r
			go r.run(rctx)
		}
		if r.permission != l.Permission {
			r.permission = l.Permission
			close(p.changed)
			p.changed = make(chan struct{})
		}
	}
}

// keep leaves the relays that are not wanted, or by another login.
func (p *Presence) keep(wanted map[string]Login) {
	var ended []*presence
	p.mu.Lock()
	for url, r := range p.relays {
		if l, ok := wanted[url]; !ok || l.Token != r.login.Token || l.CA != r.login.CA {
			delete(p.relays, url)
			r.end()
			ended = append(ended, r)
		}
	}
	p.mu.Unlock()
	for _, r := range ended {
		<-r.done
	}
}

// At is what there is to tell of the relays.
func (p *Presence) At() []At {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []At
	for url, r := range p.relays {
		out = append(out, At{url, r.joined, r.problem, r.permission, append([]relayapi.Wish(nil), r.waiting...)})
	}
	return out
}

// asked returns the permission, and what is closed when it changes.
func (r *presence) asked() (relayapi.Permission, <-chan struct{}) {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	return r.permission, r.p.changed
}

// run joins the relay again and again until ctx ends.
func (r *presence) run(ctx context.Context) {
	defer close(r.done)
	pause := firstPause
	for {
		joined, err := r.join(ctx)
		if ctx.Err() != nil {
			return
		}
		if joined {
			pause = firstPause
		}
		r.p.cfg.Log.Warn("not joined to the relay", "url", r.login.URL, "err", err, "retry_in", pause)
		r.set(false, err.Error())
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause/2 + rand.N(pause)):
		}
		pause = min(2*pause, lastPause)
	}
}

func (r *presence) set(joined bool, problem string) {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	r.joined, r.problem = joined, problem
}

// join is one life of the connection; joined says that it came about.
func (r *presence) join(ctx context.Context) (joined bool, err error) {
	c, err := New(r.login)
	if err != nil {
		return false, err
	}
	c.http.Transport.(*http.Transport).DialContext = r.p.cfg.Dial
	jctx, cancel := context.WithTimeout(ctx, joinTimeout)
	conn, err := c.join(jctx)
	cancel()
	if err != nil {
		return false, err
	}
	s, err := mux.New(conn, mux.Config{Initiator: true, KeepAlive: keepAlive, Log: r.p.cfg.Log})
	if err != nil {
		return false, errors.Join(err, conn.Close())
	}
	r.p.cfg.Log.Info("joined the relay", "url", r.login.URL)
	r.set(true, "")
	return true, tunnel.Serve(ctx, s, tunnel.Handlers{Watch: r.watch, Control: r.control, Limit: 2 * maxWishes, Log: r.p.cfg.Log})
}

// control answers what the relay asks. Without permission it learns nothing of the cluster.
func (r *presence) control(ctx context.Context, method string, body []byte) (any, error) {
	if method != relayapi.LaptopWorkloads && method != relayapi.LaptopLeave {
		return nil, &mux.RejectError{Code: wire.CodeDenied, Msg: fmt.Sprintf("unknown call %q", method)}
	}
	if may, _ := r.asked(); may != relayapi.Allowed {
		return nil, &mux.RejectError{Code: wire.CodeDenied, Msg: "the user of this laptop has not allowed that"}
	}
	if method == relayapi.LaptopLeave {
		return struct{}{}, r.leave(ctx, body)
	}
	var req relayapi.WorkloadsRequest
	if err := json.Unmarshal(body, &req); err != nil {
		return nil, err
	}
	return r.p.cfg.Machine.Workloads(ctx, r.login.URL, req)
}

// leave ends an intercept that the relay has started.
func (r *presence) leave(ctx context.Context, body []byte) error {
	var w relayapi.Wish
	if err := json.Unmarshal(body, &w); err != nil {
		return err
	}
	r.p.mu.Lock()
	end := r.started[w]
	r.p.mu.Unlock()
	if end == nil {
		return uerr.New(uerr.NotFound, "", "there is no such intercept that this relay has started")
	}
	r.p.cfg.Log.Info("intercept ended on the relay's page", "url", r.login.URL, "intercept", w.Name())
	err := end(ctx)
	if err == nil || uerr.From(err).Kind == uerr.NotFound {
		r.p.mu.Lock()
		delete(r.started, w)
		r.p.mu.Unlock()
	}
	return err
}

func (r *presence) watch(ctx context.Context, method string, body []byte, send func(any) error) error {
	switch method {
	case relayapi.LaptopState:
		return r.tell(ctx, send)
	case relayapi.LaptopIntercept:
		var w relayapi.Wish
		if err := json.Unmarshal(body, &w); err != nil {
			return err
		}
		return r.grant(ctx, w, send)
	}
	return &mux.RejectError{Code: wire.CodeDenied, Msg: fmt.Sprintf("unknown watch %q", method)}
}

// tell tells the relay of this machine, for as long as it is joined.
func (r *presence) tell(ctx context.Context, send func(any) error) error {
	tick := time.NewTicker(presenceEvery)
	defer tick.Stop()
	var last *relayapi.Laptop
	for {
		may, changed := r.asked()
		now := relayapi.Laptop{Host: r.p.cfg.Host, Product: buildinfo.Version, Permission: may, Connections: r.p.cfg.Machine.Connections(r.login.URL)}
		if last == nil || !reflect.DeepEqual(now, *last) {
			if err := send(now); err != nil {
				return err
			}
			last = &now
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

// grant does what the relay's page wishes for, if the user of this machine allows that.
func (r *presence) grant(ctx context.Context, w relayapi.Wish, send func(any) error) error {
	fail := func(err error) error {
		e := uerr.From(err)
		return send(relayapi.Outcome{State: relayapi.WishFailed, Message: e.Msg, Hint: e.Hint})
	}
	if err := w.Check(); err != nil { // the relay has asked that, too; it may be another than we think
		return fail(uerr.New(uerr.Usage, "", "%s", err.Error()))
	}
	if !r.begin() {
		return fail(uerr.New(uerr.Conflict, "wait for one of them", "this relay has %d wishes under way already", maxWishes))
	}
	defer r.finish()
	if err := r.permit(ctx, w, send); err != nil {
		return fail(err)
	}
	r.p.cfg.Log.Info("intercept asked for on the relay's page", "url", r.login.URL, "intercept", w.Name())
	if err := send(relayapi.Outcome{State: relayapi.WishWorking}); err != nil {
		return err
	}
	end, err := r.p.cfg.Machine.Intercept(ctx, r.login.URL, w, func(step string) {
		_ = send(relayapi.Outcome{State: relayapi.WishWorking, Message: step}) // a relay that has gone ends ctx
	})
	if err != nil {
		return fail(err)
	}
	r.p.mu.Lock()
	r.started[w] = end
	r.p.mu.Unlock()
	return send(relayapi.Outcome{State: relayapi.WishActive})
}

func (r *presence) begin() bool {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	if r.wishes >= maxWishes {
		return false
	}
	r.wishes++
	return true
}

func (r *presence) finish() {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	r.wishes--
}

// permit waits until the user has said whether the relay may.
func (r *presence) permit(ctx context.Context, w relayapi.Wish, send func(any) error) error {
	late := time.NewTimer(permissionWait)
	defer late.Stop()
	told := false
	for {
		may, changed := r.asked()
		switch may {
		case relayapi.Allowed:
			return nil
		case relayapi.Denied:
			return uerr.New(uerr.Denied, "to change that, run on the laptop: doppel relay allow", "the user of the laptop has denied this relay to start intercepts")
		case relayapi.NotAsked:
		}
		if !told {
			told = true
			r.p.mu.Lock()
			r.waiting = append(r.waiting, w)
			r.p.mu.Unlock()
			defer r.served(w)
			if err := send(relayapi.Outcome{State: relayapi.WishWaiting}); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-late.C:
			return uerr.New(uerr.Denied, "run doppel relay allow on the laptop, and try again", "nobody allowed it within %s", permissionWait)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// served takes a wish off the list of those that wait.
func (r *presence) served(w relayapi.Wish) {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	for i, o := range r.waiting {
		if o == w {
			r.waiting = append(r.waiting[:i:i], r.waiting[i+1:]...)
			return
		}
	}
}
