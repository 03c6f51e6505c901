// Package peers owns the relays that share a database: who is there, which clusters and laptops each holds, and the connections between them.
//
// Each relay has a row in the database with its address, the hash of a key that it makes when it starts, and what it knows of its clusters and laptops. A preview
// whose cluster hangs on another relay is reached through that one, and so is a laptop: over TLS in which both ends show the keys of their rows, so that nobody is a relay who cannot
// write into the database, and reading it is not enough.
package peers

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relay/links"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// Times of the relays among each other.
const (
	beat         = 2 * time.Second        // how often a relay says that it is there
	silence      = 10 * time.Second       // without which it is not there
	forget       = time.Minute            // when its row is removed by others
	settle       = 20 * time.Millisecond  // that news of clusters are gathered
	dialTimeout  = 3 * time.Second        // to another relay, with the handshake
	keepAlive    = 3 * time.Second        // of a connection to another relay; after three misses it is dead
	lookAgain    = 200 * time.Millisecond // between looks for a key that nobody knows
	leaveTimeout = time.Second            // to take one's row away
)

// maxStrangers bounds the connections whose other end has not shown its key yet.
const maxStrangers = 64

// laptopMethod is a call with a links.Question about a laptop that the other relay holds; its answer is a links.Answer.
const laptopMethod = "relays/laptop"

// away is the message of a refusal by a relay that does not hold the link any more.
const away = "the link is not here"

// Config is what Peers need.
type Config struct {
	Store   *store.Store
	Links   *links.Links
	Laptops *links.Laptops
	Address string // HOST:PORT at which the others reach this relay
	Log     *slog.Logger
}

// Peers are the relays that share the database, as one of them sees them.
type Peers struct {
	cfg  Config
	id   string
	cert tls.Certificate
	key  string // hash of the certificate's key

	mu sync.Mutex
	// guarded by mu
	known  map[string]*peer // by ID
	looked time.Time        // for a key that nobody knew
}

// peer is another relay.
type peer struct {
	turn chan struct{} // held by who makes a connection

	row  store.Relay // guarded by Peers.mu
	seen time.Time   // as above: when its beat went up last, by this machine's clock: nobody else's counts

	mu sync.Mutex
	// guarded by mu
	session *mux.Session // nil: there was none yet
}

// New makes the relay's key.
func New(cfg Config) (*Peers, error) {
	if _, _, err := net.SplitHostPort(cfg.Address); err != nil {
		return nil, fmt.Errorf("address for other relays: %w", err)
	}
	p := &Peers{cfg: cfg, id: secret.ID(), known: map[string]*peer{}}
	var err error
	p.cert, p.key, err = newKey()
	return p, err
}

// Run says that the relay is there, looks for the others and takes their connections on l, until ctx ends.
func (p *Peers) Run(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	wg.Go(func() { p.accept(ctx, l) })
	err := p.watch(ctx)
	_ = l.Close()
	wg.Wait()
	ectx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	for _, o := range p.note(nil, time.Now()) {
		o.close()
	}
	return errors.Join(err, p.cfg.Store.RemoveRelay(ectx, p.id))
}

// watch keeps this relay's row and what is known of the others up to date.
func (p *Peers) watch(ctx context.Context) error {
	tick := time.NewTicker(beat)
	defer tick.Stop()
	row := store.Relay{ID: p.id, Address: p.cfg.Address, Key: p.key}
	for {
		relays, clusters, laptops := p.cfg.Store.RelaysChanged(), p.cfg.Links.Changed(), p.cfg.Laptops.Changed()
		if err := p.put(ctx, &row); err != nil && ctx.Err() == nil {
			p.cfg.Log.Error("the other relays were not told", "err", err)
		}
		if err := p.look(ctx); err != nil && ctx.Err() == nil {
			p.cfg.Log.Error("the other relays are not known", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-relays:
		case <-clusters:
		case <-laptops:
		case <-tick.C:
		}
		select { // what happens at once is told at once
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
	}
}

// put writes this relay's row.
func (p *Peers) put(ctx context.Context, row *store.Relay) error {
	ctx, cancel := context.WithTimeout(ctx, store.Patience)
	defer cancel()
	clusters, err := json.Marshal(p.cfg.Links.Local())
	laptops, err2 := json.Marshal(p.cfg.Laptops.Local())
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	next := *row
	next.Links, next.Laptops, next.Beat = string(clusters), string(laptops), row.Beat+1
	if err = p.cfg.Store.PutRelay(ctx, next, next.Links != row.Links || next.Laptops != row.Laptops); err == nil {
		*row = next
	}
	return err
}

// look reads the others' rows.
func (p *Peers) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, store.Patience)
	defer cancel()
	rows, err := p.cfg.Store.Relays(ctx)
	if err != nil {
		return err
	}
	for _, o := range p.note(rows, time.Now()) {
		o.close()
		p.cfg.Log.Info("another relay is gone", "addr", o.row.Address)
		if err := p.cfg.Store.RemoveRelay(ctx, o.row.ID); err != nil {
			return err
		}
	}
	return nil
}

// note takes in what the rows say, and returns the relays that are gone for good.
func (p *Peers) note(rows []store.Relay, now time.Time) []*peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	there := map[string]bool{}
	clusters, laptops := false, false // there is news of them
	for _, row := range rows {
		if row.ID == p.id {
			continue
		}
		there[row.ID] = true
		o := p.known[row.ID]
		if o == nil {
			o = &peer{row: row, seen: now, turn: make(chan struct{}, 1)}
			p.known[row.ID], clusters, laptops = o, true, true
			p.cfg.Log.Info("another relay", "addr", row.Address)
		}
		clusters, laptops = clusters || o.row.Links != row.Links, laptops || o.row.Laptops != row.Laptops
		if o.row.Beat != row.Beat {
			if now.Sub(o.seen) >= silence {
				clusters, laptops = true, true
			}
			o.seen = now
		}
		o.row = row
	}
	var gone []*peer
	for id, o := range p.known {
		silent := now.Sub(o.seen)
		if !there[id] || silent >= forget {
			gone = append(gone, o)
			delete(p.known, id)
		}
		if !there[id] || silent >= silence {
			clusters, laptops = true, true
		}
	}
	if clusters {
		p.cfg.Links.SetRemote(p.remoteLocked(now))
	}
	if laptops {
		p.cfg.Laptops.SetRemote(p.laptopsLocked(now))
	}
	return gone
}

// remoteLocked are the links that the relays hold which are there.
func (p *Peers) remoteLocked(now time.Time) []links.Remote {
	var all []links.Remote
	for _, o := range p.known {
		if now.Sub(o.seen) >= silence {
			continue
		}
		held := map[string]links.State{}
		if err := json.Unmarshal([]byte(o.row.Links), &held); err != nil {
			p.cfg.Log.Error("another relay's clusters are not known", "addr", o.row.Address, "err", err)
			continue
		}
		for cluster, st := range held {
			all = append(all, links.Remote{Cluster: cluster, State: st, Dial: func(ctx context.Context, h wire.PreviewHeader) (*mux.Stream, string, error) {
				h.ID += "." + cluster
				return p.dial(ctx, o, h)
			}})
		}
	}
	return all
}

// laptopsLocked are the laptops that the relays hold which are there.
func (p *Peers) laptopsLocked(now time.Time) []links.RemoteLaptop {
	var all []links.RemoteLaptop
	for _, o := range p.known {
		if now.Sub(o.seen) >= silence {
			continue
		}
		var held []links.Laptop
		if err := json.Unmarshal([]byte(o.row.Laptops), &held); err != nil {
			p.cfg.Log.Error("another relay's laptops are not known", "addr", o.row.Address, "err", err)
			continue
		}
		for _, l := range held {
			all = append(all, links.RemoteLaptop{Laptop: l, Ask: func(ctx context.Context, q links.Question) (links.Answer, error) { return p.ask(ctx, o, q) }})
		}
	}
	return all
}

// errors that are known on both ends go by their text.
var known = []error{links.ErrLaptopAway, links.ErrBusy, links.ErrNotActive}

// ask asks a laptop that another relay holds. A relay that cannot be reached does not hold any.
func (p *Peers) ask(ctx context.Context, o *peer, q links.Question) (out links.Answer, err error) {
	s, err := p.session(ctx, o)
	if err != nil {
		p.cfg.Log.Debug("another relay is not reached", "err", err)
		return out, links.ErrLaptopAway
	}
	err = tunnel.Control(ctx, s, laptopMethod, q, &out)
	var re *mux.RejectError
	if errors.As(err, &re) {
		for _, k := range known {
			if re.Msg == k.Error() {
				return out, k
			}
		}
	}
	return out, err
}

// answer is what another relay is told of a laptop that this one holds.
func (p *Peers) answer(ctx context.Context, method string, body []byte) (any, error) {
	var q links.Question
	if method != laptopMethod {
		return nil, &mux.RejectError{Code: wire.CodeDenied, Msg: fmt.Sprintf("unknown call %q", method)}
	}
	if err := json.Unmarshal(body, &q); err != nil {
		return nil, err
	}
	return p.cfg.Laptops.AskLocal(ctx, q)
}

// dial opens a connection to a preview through another relay.
func (p *Peers) dial(ctx context.Context, o *peer, h wire.PreviewHeader) (st *mux.Stream, proto string, err error) {
	s, err := p.session(ctx, o)
	if err != nil {
		return nil, "", err
	}
	st, reply, err := s.Open(ctx, wire.AppendPreview(nil, h))
	var re *mux.RejectError
	if errors.As(err, &re) && re.Msg == away {
		return nil, "", links.ErrAway
	}
	return st, string(reply), err
}

// session is the connection to another relay, which is made when it is needed first.
func (p *Peers) session(ctx context.Context, o *peer) (*mux.Session, error) {
	if s := o.alive(); s != nil {
		return s, nil
	}
	p.mu.Lock()
	address, key := o.row.Address, o.row.Key
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	select { // one connection is made at a time
	case o.turn <- struct{}{}:
		defer func() { <-o.turn }()
	case <-ctx.Done():
		return nil, fmt.Errorf("relay at %s: %w", address, context.Cause(ctx))
	}
	if s := o.alive(); s != nil {
		return s, nil
	}
	d := tls.Dialer{Config: config(p.cert, func(k string) bool { return secret.Equal(k, key) })}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("relay at %s: %w", address, err)
	}
	s, err := mux.New(conn, mux.Config{Initiator: true, KeepAlive: keepAlive, Log: p.cfg.Log})
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.session = s
	return s, nil
}

// alive is the connection to the relay, if there is one; nil: there is none.
func (o *peer) alive() *mux.Session {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.session != nil {
		select {
		case <-o.session.Done():
			o.session = nil
		default:
		}
	}
	return o.session
}

func (o *peer) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.session != nil {
		_ = o.session.Close()
	}
}

// accept takes the connections of the other relays.
func (p *Peers) accept(ctx context.Context, l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	strangers := make(chan struct{}, maxStrangers)
	for {
		conn, err := lifecycle.Accept(l.Accept)
		if err != nil {
			return
		}
		select {
		case strangers <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		wg.Go(func() {
			t, err := p.greet(ctx, conn)
			<-strangers
			if err != nil {
				p.cfg.Log.Info("no relay of ours", "peer", conn.RemoteAddr().String(), "err", err)
				return
			}
			p.serve(ctx, t)
		})
	}
}

// greet sees that the other end is a relay that shares the database.
func (p *Peers) greet(ctx context.Context, conn net.Conn) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	t := tls.Server(conn, config(p.cert, func(key string) bool { return p.knows(ctx, key) }))
	if err := t.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return t, nil
}

// knows says whether a key is that of a relay which is there. It may have come just now.
func (p *Peers) knows(ctx context.Context, key string) bool {
	has := func() (found, look bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		now := time.Now()
		for _, o := range p.known {
			if now.Sub(o.seen) < silence && secret.Equal(o.row.Key, key) {
				return true, false
			}
		}
		if now.Sub(p.looked) < lookAgain { // strangers must not have the database asked each time
			return false, false
		}
		p.looked = now
		return false, true
	}
	found, look := has()
	if look && p.look(ctx) == nil {
		found, _ = has()
	}
	return found
}

// serve opens connections to previews of the clusters that this relay holds, asks the laptops that it holds, and does nothing else.
func (p *Peers) serve(ctx context.Context, conn net.Conn) {
	s, err := mux.New(conn, mux.Config{KeepAlive: keepAlive, Log: p.cfg.Log})
	if err != nil {
		_ = conn.Close()
		return
	}
	_ = tunnel.Serve(ctx, s, tunnel.Handlers{Control: p.answer, Preview: func(r *mux.Request, h wire.PreviewHeader) {
		preview, cluster, _ := strings.Cut(h.ID, ".")
		st, proto, err := p.cfg.Links.DialLocal(ctx, cluster, wire.PreviewHeader{ID: preview, HTTP2: h.HTTP2})
		var re *mux.RejectError
		switch {
		case errors.As(err, &re):
			_ = r.Reject(re.Code, re.Msg)
		case err != nil:
			_ = r.Reject(wire.CodeUnreachable, away)
		default:
			in, err := r.Accept([]byte(proto))
			if err != nil {
				st.Reset()
				return
			}
			_, _, _ = flow.Relay(in, st) // both ends are told of what goes wrong
		}
	}})
}
