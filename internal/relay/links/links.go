// Package links owns the connections of traffic-managers to the relay: which clusters are there, and streams to what they show.
package links

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// ErrAway says that the cluster's traffic-manager is not connected.
var ErrAway = errors.New("the cluster is not connected")

// keepAlive is how often a silent link is asked for a sign of life; after three misses it is dead.
const keepAlive = 10 * time.Second

// Links are the links that this relay holds.
type Links struct {
	log *slog.Logger

	mu sync.Mutex
	// guarded by mu
	all     []*link       // the newest come last
	remote  []Remote      // what other relays hold
	changed chan struct{} // closed when a link comes, goes or has news
}

// Remote is a link that another relay holds.
type Remote struct {
	Cluster string
	State   State
	// Dial opens a connection to the ingress of a preview through that relay, which answers ErrAway if it does not hold the link any more.
	Dial Dial
}

// Dial opens a connection to the ingress of a preview. With HTTP2 it says what TLS has agreed on with that; "": there is no TLS.
type Dial func(ctx context.Context, h wire.PreviewHeader) (st *mux.Stream, proto string, err error)

// link is the connection of one traffic-manager.
type link struct {
	cluster string
	token   string // hash of the token it came with
	mux     *mux.Session
	since   time.Time

	state *relayapi.ClusterState // guarded by Links.mu; nil: it has not told yet
}

// State is what is known of a cluster that is connected.
type State struct {
	relayapi.ClusterState
	Since time.Time
}

// New returns an empty set.
func New(log *slog.Logger) *Links { return &Links{log: log, changed: make(chan struct{})} }

// Serve is the link of a cluster over conn until it ends or ctx does.
func (l *Links) Serve(ctx context.Context, cluster, token string, conn net.Conn) {
	s, err := mux.New(conn, mux.Config{KeepAlive: keepAlive, Log: l.log})
	if err != nil {
		l.log.Error("link not made", "err", err)
		_ = conn.Close()
		return
	}
	k := &link{cluster: cluster, token: token, mux: s, since: time.Now()}
	l.update(func() { l.all = append(l.all, k) })
	l.log.Info("cluster connected", "cluster_id", cluster, "peer", conn.RemoteAddr().String())
	ctx, cancel := context.WithCancel(ctx)
	go func() { // news of the cluster, as long as it has some
		defer cancel()
		err := l.watch(ctx, k)
		l.log.Debug("news of a cluster ended", "cluster_id", cluster, "err", err)
	}()
	err = tunnel.Serve(ctx, s, tunnel.Handlers{}) // a manager opens nothing
	cancel()
	l.update(func() { l.all = slices.DeleteFunc(l.all, func(o *link) bool { return o == k }) })
	l.log.Info("cluster gone", "cluster_id", cluster, "why", err)
}

// watch keeps what the cluster tells of itself.
func (l *Links) watch(ctx context.Context, k *link) error {
	w, err := tunnel.Watch(ctx, k.mux, relayapi.RelayPreviews, relayapi.Welcome{Cluster: k.cluster})
	if err != nil {
		return err
	}
	defer w.Close()
	for {
		var st relayapi.ClusterState
		if err := w.Next(ctx, &st); err != nil {
			return err
		}
		l.update(func() { k.state = &st })
	}
}

func (l *Links) update(fn func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fn()
	close(l.changed)
	l.changed = make(chan struct{})
}

// Changed is closed at the next news. Get it before looking.
func (l *Links) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// State says what a cluster has told last, and whether it is connected.
func (l *Links) State(cluster string) (State, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var newest State
	found := false
	for _, k := range l.all {
		if st := k.told(); k.cluster == cluster && (!found || st.Since.After(newest.Since)) {
			newest, found = st, true
		}
	}
	for _, r := range l.remote {
		if r.Cluster == cluster && (!found || r.State.Since.After(newest.Since)) {
			newest, found = r.State, true
		}
	}
	return newest, found
}

// told is what the link's cluster has told last. Links.mu is held.
func (k *link) told() State {
	st := State{Since: k.since}
	if k.state != nil {
		st.ClusterState = *k.state
	}
	return st
}

// Local are the states of the clusters whose links this relay holds.
func (l *Links) Local() map[string]State {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]State{}
	for _, k := range l.all { // the newest come last
		out[k.cluster] = k.told()
	}
	return out
}

// SetRemote says which links other relays hold.
func (l *Links) SetRemote(all []Remote) { l.update(func() { l.remote = all }) }

// ErrLaptopAway says that the laptop which a preview shows is not connected.
var ErrLaptopAway = errors.New("the laptop is not connected")

// Away says why a preview shows nothing, as far as its cluster has told.
func (l *Links) Away(cluster, preview string) error {
	st, ok := l.State(cluster)
	if !ok {
		return ErrAway
	}
	for _, p := range st.Previews {
		if p.ID == preview && !p.Laptop {
			return ErrLaptopAway
		}
	}
	return nil
}

// Dial opens a connection to the ingress of a preview, whose address only the cluster knows, over the newest link that there is, here or at another
// relay. What the cluster refuses is a *mux.RejectError. If HTTP/2 is asked for, the protocol is what TLS has agreed on with the ingress: h2 or
// http/1.1, or "" where there is no TLS.
func (l *Links) Dial(ctx context.Context, cluster, preview string, http2 bool) (_ net.Conn, proto string, err error) {
	type way struct {
		since time.Time
		dial  Dial
	}
	var ways []way
	l.mu.Lock()
	for _, k := range slices.Backward(l.all) {
		if k.cluster == cluster {
			ways = append(ways, way{k.since, k.dial})
		}
	}
	for _, r := range l.remote {
		if r.Cluster == cluster {
			ways = append(ways, way{r.State.Since, r.Dial})
		}
	}
	l.mu.Unlock()
	slices.SortStableFunc(ways, func(a, b way) int { return b.since.Compare(a.since) })
	for _, w := range ways {
		st, proto, err := w.dial(ctx, wire.PreviewHeader{ID: preview, HTTP2: http2})
		var re *mux.RejectError
		if http2 && errors.As(err, &re) && re.Code == wire.CodeProtocol { // an older manager or relay does not know that wish
			proto = "http/1.1"
			st, _, err = w.dial(ctx, wire.PreviewHeader{ID: preview})
		}
		if err == nil {
			return st, proto, nil
		}
		if errors.As(err, &re) || ctx.Err() != nil { // the cluster has answered, or there is no time left
			return nil, "", err
		}
		l.log.Debug("link not usable", "cluster_id", cluster, "err", err)
	}
	return nil, "", ErrAway
}

// DialLocal is Dial over the newest link that this relay holds.
func (l *Links) DialLocal(ctx context.Context, cluster string, h wire.PreviewHeader) (st *mux.Stream, proto string, err error) {
	l.mu.Lock()
	var k *link
	for _, o := range slices.Backward(l.all) {
		if o.cluster == cluster {
			k = o
			break
		}
	}
	l.mu.Unlock()
	if k == nil {
		return nil, "", ErrAway
	}
	return k.dial(ctx, h)
}

func (k *link) dial(ctx context.Context, h wire.PreviewHeader) (st *mux.Stream, proto string, err error) {
	st, reply, err := k.mux.Open(ctx, wire.AppendPreview(nil, h))
	return st, string(reply), err
}

// Cut ends the links whose token does not count any more.
func (l *Links) Cut(ctx context.Context, counts func(ctx context.Context, token string) bool) {
	l.mu.Lock()
	all := slices.Clone(l.all)
	l.mu.Unlock()
	for _, k := range all {
		if !counts(ctx, k.token) {
			l.log.Info("link cut: its token was revoked", "cluster_id", k.cluster)
			_ = k.mux.CloseWith(wire.CodeDenied, "the cluster's token was revoked")
		}
	}
}

// Len counts the links.
func (l *Links) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.all)
}
