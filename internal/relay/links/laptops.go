package links

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// How long a wish may take with all that its person has to say, how many of a laptop are under way at once, how many are remembered, how
// often a laptop is asked for its workloads, and what is taken of what it tells.
const (
	wishTimeout = 20 * time.Minute
	maxWishes   = 4
	keptWishes  = 10
	listEvery   = 10 * time.Second
	endTimeout  = 15 * time.Second // of an intercept

	maxHost        = 64 // bytes
	maxConnections = 16
)

// Laptops are the laptops that are connected.
type Laptops struct {
	log *slog.Logger

	mu sync.Mutex
	// guarded by mu
	all     []*laptop      // the newest come last
	remote  []RemoteLaptop // what other relays hold
	changed chan struct{}  // closed when a laptop comes, goes or has news
}

// laptop is the connection of one laptop.
type laptop struct {
	Laptop
	token string // hash of the token it came with
	mux   *mux.Session
	ctx   context.Context // of the connection
	busy  sync.WaitGroup  // wishes under way

	// guarded by Laptops.mu
	wishes []Asked // the newest first
	listed listed
}

// listed is what a laptop has answered last to a question for workloads: pages are made again and again.
type listed struct {
	req relayapi.WorkloadsRequest
	all relayapi.Workloads
	at  time.Time
}

// Laptop is a laptop that is connected.
type Laptop struct {
	ID     string // the same for the same login
	Person string
	Since  time.Time
	State  relayapi.Laptop
	News   int // goes up with what becomes of wishes
}

// RemoteLaptop is a laptop that another relay holds.
type RemoteLaptop struct {
	Laptop
	// Ask asks that relay, which answers ErrLaptopAway if it does not hold the laptop any more.
	Ask func(ctx context.Context, q Question) (Answer, error)
}

// Question is what is to be known of a laptop of a person, or to be done by it.
type Question struct {
	Person, Laptop string
	Workloads      *relayapi.WorkloadsRequest // list them
	Start          *relayapi.Wish             // an intercept
	End            int                        // the intercept of the wish with this ID; 0: none
}

// Answer is the laptop, with what it was asked for, and the workloads if they are to be listed.
type Answer struct {
	Laptop    Laptop
	Asked     []Asked
	Workloads relayapi.Workloads
}

// Asked is a wish that a laptop was asked for.
type Asked struct {
	relayapi.Wish
	relayapi.Outcome
	ID int
	At time.Time
}

// Open says that more is to come.
func (a Asked) Open() bool {
	return a.State != relayapi.WishActive && a.State != relayapi.WishFailed && a.State != relayapi.WishEnded
}

// ErrNotActive says that there is nothing to end.
var ErrNotActive = errors.New("this intercept is not active, or was not started here")

// ErrBusy says that a laptop has enough to do.
var ErrBusy = errors.New("the laptop has other wishes to look after; wait for one of them")

// NewLaptops returns an empty set.
func NewLaptops(log *slog.Logger) *Laptops { return &Laptops{log: log, changed: make(chan struct{})} }

// Serve is the connection of a person's laptop until it ends or ctx does. One that came before with the same token ends.
func (l *Laptops) Serve(ctx context.Context, person, token string, conn net.Conn) {
	s, err := mux.New(conn, mux.Config{KeepAlive: keepAlive, Log: l.log})
	if err != nil {
		l.log.Error("link not made", "err", err)
		_ = conn.Close()
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	k := &laptop{Laptop: Laptop{ID: secret.Hash(token)[:20], Person: person, Since: time.Now()}, token: token, mux: s, ctx: ctx}
	var before []*laptop
	l.update(func() {
		before = slices.DeleteFunc(slices.Clone(l.all), func(o *laptop) bool { return o.token != token })
		l.all = append(l.all, k)
	})
	for _, o := range before {
		_ = o.mux.CloseWith(wire.CodeGone, "the laptop has joined again")
	}
	l.log.Info("laptop connected", "peer", conn.RemoteAddr().String())
	go func() { // its news, as long as it has some
		defer cancel()
		err := l.watch(ctx, k)
		l.log.Debug("news of a laptop ended", "err", err)
	}()
	err = tunnel.Serve(ctx, s, tunnel.Handlers{}) // a laptop opens nothing
	cancel()
	l.update(func() { l.all = slices.DeleteFunc(l.all, func(o *laptop) bool { return o == k }) })
	k.busy.Wait()
	l.log.Info("laptop gone", "why", err)
}

// watch keeps what a laptop tells of itself.
func (l *Laptops) watch(ctx context.Context, k *laptop) error {
	w, err := tunnel.Watch(ctx, k.mux, relayapi.LaptopState, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	for {
		var st relayapi.Laptop
		if err := w.Next(ctx, &st); err != nil {
			return err
		}
		st.Host, st.Connections = st.Host[:min(len(st.Host), maxHost)], st.Connections[:min(len(st.Connections), maxConnections)] // others see them
		l.update(func() { k.State = st })
	}
}

func (l *Laptops) update(fn func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fn()
	close(l.changed)
	l.changed = make(chan struct{})
}

// Changed is closed at the next news. Get it before looking.
func (l *Laptops) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// Local are the laptops that this relay holds.
func (l *Laptops) Local() []Laptop {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := []Laptop{}
	for _, k := range l.all {
		out = append(out, k.Laptop)
	}
	return out
}

// SetRemote says which laptops other relays hold.
func (l *Laptops) SetRemote(all []RemoteLaptop) { l.update(func() { l.remote = all }) }

// All are the laptops that are connected, here or to another relay. Of several connections of one the newest counts.
func (l *Laptops) All() []Laptop {
	all := l.Local()
	l.mu.Lock()
	for _, r := range l.remote {
		all = append(all, r.Laptop)
	}
	l.mu.Unlock()
	slices.SortStableFunc(all, func(a, b Laptop) int { return b.Since.Compare(a.Since) })
	seen := map[string]bool{}
	return slices.DeleteFunc(all, func(o Laptop) bool {
		before := seen[o.ID]
		seen[o.ID] = true
		return before
	})
}

// Ask asks a laptop of a person, over the newest connection that it has, here or to another relay: another person's is not there.
func (l *Laptops) Ask(ctx context.Context, q Question) (Answer, error) {
	var ways []RemoteLaptop
	l.mu.Lock()
	for _, k := range slices.Backward(l.all) {
		ways = append(ways, RemoteLaptop{k.Laptop, func(ctx context.Context, q Question) (Answer, error) { return l.ask(ctx, k, q) }})
	}
	ways = append(ways, l.remote...)
	l.mu.Unlock()
	slices.SortStableFunc(ways, func(a, b RemoteLaptop) int { return b.Since.Compare(a.Since) })
	for _, w := range ways {
		if w.Person != q.Person || w.ID != q.Laptop {
			continue
		}
		if out, err := w.Ask(ctx, q); !errors.Is(err, ErrLaptopAway) {
			return out, err
		}
	}
	return Answer{}, ErrLaptopAway
}

// AskLocal is Ask for a laptop that this relay holds.
func (l *Laptops) AskLocal(ctx context.Context, q Question) (Answer, error) {
	l.mu.Lock()
	var k *laptop
	for _, o := range l.all {
		if o.Person == q.Person && o.ID == q.Laptop {
			k = o
		}
	}
	l.mu.Unlock()
	if k == nil {
		return Answer{}, ErrLaptopAway
	}
	return l.ask(ctx, k, q)
}

func (l *Laptops) ask(ctx context.Context, k *laptop, q Question) (out Answer, err error) {
	switch {
	case q.Workloads != nil:
		out.Workloads, err = l.workloads(ctx, k, *q.Workloads)
	case q.Start != nil:
		err = l.start(k, *q.Start)
	case q.End != 0:
		err = l.end(ctx, k, q.End)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	out.Laptop, out.Asked = k.Laptop, slices.Clone(k.wishes)
	return out, err
}

// workloads asks a laptop for the workloads of a namespace.
func (l *Laptops) workloads(ctx context.Context, k *laptop, req relayapi.WorkloadsRequest) (out relayapi.Workloads, err error) {
	l.mu.Lock()
	last := k.listed
	l.mu.Unlock()
	if last.req == req && time.Since(last.at) < listEvery {
		return last.all, nil
	}
	if err := tunnel.Control(ctx, k.mux, relayapi.LaptopWorkloads, req, &out); err != nil {
		return out, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	k.listed = listed{req, out, time.Now()}
	return out, nil
}

// start asks a laptop for an intercept. What becomes of it is among what it was asked for.
func (l *Laptops) start(k *laptop, w relayapi.Wish) error {
	var err error
	wish := Asked{Wish: w, Outcome: relayapi.Outcome{State: relayapi.WishSent}, ID: 1, At: time.Now()}
	l.update(func() {
		open := 0
		for _, o := range k.wishes {
			if o.Open() {
				open++
			}
			wish.ID = max(wish.ID, o.ID+1)
		}
		if k.ctx.Err() != nil {
			err = ErrLaptopAway
			return
		}
		if open >= maxWishes {
			err = ErrBusy
			return
		}
		k.wishes = slices.Insert(k.wishes, 0, wish)
		k.wishes = k.wishes[:min(len(k.wishes), keptWishes)]
		k.News++
		k.busy.Go(func() { l.follow(k, wish) })
	})
	return err
}

// end has a laptop end an intercept that was started here. It looks itself whether that is so.
func (l *Laptops) end(ctx context.Context, k *laptop, id int) error {
	l.mu.Lock()
	i := slices.IndexFunc(k.wishes, func(o Asked) bool { return o.ID == id && o.State == relayapi.WishActive })
	var wish relayapi.Wish
	if i >= 0 {
		wish = k.wishes[i].Wish
	}
	l.mu.Unlock()
	if i < 0 {
		return ErrNotActive
	}
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	err := tunnel.Control(ctx, k.mux, relayapi.LaptopLeave, wish, nil)
	outcome := relayapi.Outcome{State: relayapi.WishEnded}
	var re *mux.RejectError
	switch {
	case errors.As(err, &re) && re.Code == wire.CodeNotFound: // it was ended on the laptop
		outcome.Message, err = re.Msg, nil
	case err != nil:
		return err
	}
	l.note(k, id, outcome)
	return err
}

// note keeps what has become of a wish.
func (l *Laptops) note(k *laptop, id int, o relayapi.Outcome) {
	l.update(func() {
		k.News++
		for i := range k.wishes {
			if k.wishes[i].ID == id {
				k.wishes[i].Outcome = o
			}
		}
	})
}

// follow has a wish done and notes what becomes of it.
func (l *Laptops) follow(k *laptop, wish Asked) {
	ctx, cancel := context.WithTimeout(k.ctx, wishTimeout)
	defer cancel()
	w, err := tunnel.Watch(ctx, k.mux, relayapi.LaptopIntercept, wish.Wish)
	if err == nil {
		defer w.Close()
	}
	last := wish.Outcome
	for err == nil {
		var o relayapi.Outcome
		if err = w.Next(ctx, &o); err == nil {
			last = o
			l.note(k, wish.ID, last)
		}
	}
	if o := (Asked{Outcome: last}); o.Open() {
		why := err.Error()
		if errors.Is(err, io.EOF) {
			why = "the laptop has nothing more to say"
		}
		l.note(k, wish.ID, relayapi.Outcome{State: relayapi.WishFailed, Message: why, Hint: "look at the laptop: doppel status"})
	}
}

// Cut ends the connections whose token does not count any more.
func (l *Laptops) Cut(ctx context.Context, counts func(ctx context.Context, token string) bool) {
	l.mu.Lock()
	all := slices.Clone(l.all)
	l.mu.Unlock()
	for _, k := range all {
		if !counts(ctx, k.token) {
			l.log.Info("laptop cut: its login has ended")
			_ = k.mux.CloseWith(wire.CodeDenied, "the login has ended")
		}
	}
}
