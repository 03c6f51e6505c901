package agent

import (
	"bytes"
	"context"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/httproute"
	"github.com/doppel-dev/doppel/internal/match"
)

// Copies for wiretaps never hold up what they are copies of: they have these bounds, beyond which a copy is given up.
const (
	// copyQueue is how many bytes of a connection may be on their way to a wiretap's laptop.
	copyQueue = 256 << 10
	// copyBudget bounds the same for all copies of a pod together.
	copyBudget = 16 << 20
	// maxCopies bounds the connections and requests of a pod that are copied at once.
	maxCopies = 1024
	// copyLinger is how long a copy may go on after its original has ended: the local process may be held by a debugger.
	copyLinger = 30 * time.Second
)

// bytesCopy is the copy of a connection, or of its requests, for one wiretap. It is written to at once and sent on from a queue.
type bytesCopy struct {
	all *copies

	mu   sync.Mutex
	cond sync.Cond // something below has changed
	// guarded by mu:
	queue bytes.Buffer
	held  int // bytes that have been written and not sent
	ended bool
	fin   bool // the end is to be told
	up    bool // given up
	over  bool // the laptop has ended its side
	to    flow.Stream
	late  *time.Timer
}

// copies is what all copies of a pod have together.
type copies struct {
	count atomic.Int64
	bytes atomic.Int64 // on their way
}

// begin begins a copy for a laptop, without waiting for it. It ends with any of the contexts.
func (a *copies) begin(ctx, intercept context.Context, open func(context.Context) (flow.Stream, error)) *bytesCopy {
	c := &bytesCopy{all: a}
	c.cond.L = &c.mu
	if a.count.Add(1) > maxCopies {
		a.count.Add(-1)
		c.up = true
		return c
	}
	go func() {
		defer a.count.Add(-1)
		defer context.AfterFunc(ctx, c.giveUp)()
		defer context.AfterFunc(intercept, c.giveUp)()
		c.run(ctx, open)
	}()
	return c
}

// Write takes more bytes, unless they are too many by now.
func (c *bytesCopy) Write(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.up || c.ended:
	case c.held+len(p) > copyQueue:
		c.giveUpLocked()
	case c.all.bytes.Add(int64(len(p))) > copyBudget:
		c.all.bytes.Add(-int64(len(p)))
		c.giveUpLocked()
	default:
		c.queue.Write(p)
		c.held += len(p)
		c.cond.Broadcast()
	}
}

// lives says that what is written goes somewhere.
func (c *bytesCopy) lives() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.up && !c.ended
}

// answers says that the local process may answer another request on it.
func (c *bytesCopy) answers() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.up && !c.ended && !c.over
}

// end says that nothing more comes. fin passes that on; else the laptop's process ends it, which knows where the request does.
func (c *bytesCopy) end(fin bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended && !c.up {
		c.ended, c.fin = true, fin
		c.late = time.AfterFunc(copyLinger, c.giveUp)
		c.cond.Broadcast()
	}
}

func (c *bytesCopy) giveUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.giveUpLocked()
}

func (c *bytesCopy) giveUpLocked() {
	if c.up {
		return
	}
	c.up = true
	c.all.bytes.Add(-int64(c.held))
	c.held, c.queue = 0, bytes.Buffer{}
	if c.to != nil {
		c.to.Reset()
	}
	c.cond.Broadcast()
}

// run sends what is written, until the copy has ended or is given up.
func (c *bytesCopy) run(ctx context.Context, open func(context.Context) (flow.Stream, error)) {
	to, err := open(ctx)
	if err != nil {
		c.giveUp()
		return
	}
	c.mu.Lock()
	if c.to = to; c.up {
		to.Reset()
	}
	c.mu.Unlock()
	dropped := make(chan struct{})
	go func() { // the answers
		defer close(dropped)
		_, err := io.Copy(io.Discard, to)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.over = true; err != nil {
			c.giveUpLocked()
		}
	}()
	c.send(to)
	<-dropped
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.late != nil {
		c.late.Stop()
	}
	if !c.up {
		_ = to.Close()
	}
}

// send writes the queue to the laptop.
func (c *bytesCopy) send(to flow.Stream) {
	var out bytes.Buffer
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.up {
		switch {
		case c.queue.Len() > 0:
			out, c.queue = c.queue, out
			c.mu.Unlock()
			_, err := to.Write(out.Bytes())
			c.mu.Lock()
			if err != nil {
				c.giveUpLocked()
			}
			if !c.up {
				c.held -= out.Len()
				c.all.bytes.Add(-int64(out.Len()))
			}
			out.Reset()
		case c.ended:
			if c.fin {
				_ = to.CloseWrite()
			}
			return
		default:
			c.cond.Wait()
		}
	}
}

// tapped is the stream of a client whose bytes go to wiretaps as well, until end.
func (p *port) tapped(ctx context.Context, a *Agent, c *net.TCPConn, taps []engagement) (client flow.Stream, end func()) {
	w := watchers{}
	for _, e := range taps {
		w = append(w, p.copyFor(ctx, a, c, e))
	}
	return flow.Tee(flow.FromTCP(c), &w), func() { w.Ended(net.ErrClosed) }
}

// copyFor begins a copy of a connection for a wiretap.
func (p *port) copyFor(ctx context.Context, a *Agent, c *net.TCPConn, e engagement) *bytesCopy {
	return a.copies.begin(ctx, e.ctx, func(ctx context.Context) (flow.Stream, error) { return p.offer(ctx, a, c, e) })
}

// watchers are the copies of a connection that are still made.
type watchers []*bytesCopy

// Seen implements flow.Watcher.
func (w *watchers) Seen(p []byte) bool {
	for _, c := range *w {
		c.Write(p)
	}
	*w = slices.DeleteFunc(*w, func(c *bytesCopy) bool { return !c.lives() })
	return len(*w) > 0
}

// Ended implements flow.Watcher. A client's reset is passed on as such.
func (w *watchers) Ended(err error) {
	for _, c := range *w {
		if err != nil {
			c.giveUp()
		} else {
			c.end(true)
		}
	}
	*w = nil
}

// requestCopies are the copies of the requests on one connection of a client.
type requestCopies struct {
	begin func(engagement) *bytesCopy

	mu sync.Mutex
	// guarded by mu:
	byTap map[string]*bytesCopy // by wiretap: connections that its requests of HTTP/1 follow each other on
}

// of is the copy of a request for those of the wiretaps that it matches.
func (r *requestCopies) of(taps []engagement, h match.Head, alone bool) httproute.Copy {
	var to requestCopy
	for _, e := range taps {
		if e.whole() || !e.match.Match(h) {
			continue
		}
		if alone {
			to = append(to, copyOfRequest{r.begin(e), true})
			continue
		}
		r.mu.Lock()
		c := r.byTap[e.intercept]
		if c == nil || !c.answers() { // the local process has ended it, or it was given up: the next request is another try
			if c != nil {
				c.end(true)
			}
			c = r.begin(e)
			r.byTap[e.intercept] = c
		}
		r.mu.Unlock()
		to = append(to, copyOfRequest{c, false})
	}
	if to == nil {
		return nil
	}
	return to
}

// end ends the connections of requests that followed each other.
func (r *requestCopies) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.byTap {
		c.end(true)
	}
}

// requestCopy is one request on its way to some wiretaps.
type requestCopy []copyOfRequest

type copyOfRequest struct {
	*bytesCopy
	alone bool
}

// Write implements httproute.Copy.
func (r requestCopy) Write(p []byte) {
	for _, c := range r {
		c.bytesCopy.Write(p)
	}
}

// End implements httproute.Copy.
func (r requestCopy) End(whole bool) {
	for _, c := range r {
		switch {
		case !whole:
			c.giveUp()
		case c.alone:
			c.end(false)
		}
	}
}
