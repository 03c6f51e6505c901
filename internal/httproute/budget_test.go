package httproute

import (
	"bufio"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/doppel-dev/doppel/internal/flow"
)

// TestStore moves bytes at random, by peers that take all that they may: what all of them store is bounded, no byte of a window is lost, and all of the budget comes back.
func TestStore(t *testing.T) {
	const peers, limit = 5, 6 << 20
	rnd := rand.New(rand.NewPCG(1, 2))
	b := NewBudget(limit)
	var accounts [peers]account
	var stores [peers]store
	var may [peers]int // what the peer may send
	for i := range stores {
		accounts[i] = account{budget: b, wake: func() {}}
		stores[i] = store{account: &accounts[i], room: ownWindow}
		may[i] = ownWindow
	}
	most := 0
	for range 100_000 {
		i := rnd.IntN(peers)
		s := &stores[i]
		if rnd.IntN(100) < 52 {
			n := min(may[i], 1+rnd.IntN(100_000))
			grant, err := s.arrived(n)
			if err != nil {
				t.Fatal(err)
			}
			may[i] += grant - n
		} else {
			may[i] += s.passed(min(s.stored, rnd.IntN(100_000)))
		}
		may[i] += s.more()
		all := 0
		for j, s := range stores {
			all += s.stored
			if s.room > connWindow || s.stored+s.untold+may[j] != s.room {
				t.Fatalf("%+v, and the peer may send %d", s, may[j])
			}
		}
		if most = max(most, all); all > limit+peers*ownWindow {
			t.Fatalf("%d bytes are stored", all)
		}
	}
	if most < limit {
		t.Errorf("no more than %d bytes were stored", most)
	}
	for i := range stores {
		s := &stores[i]
		if _, err := s.arrived(may[i] + 1); err == nil {
			t.Error("more than was granted is taken")
		}
		s.passed(1)
		for s.stored > 0 && rnd.IntN(10) > 0 {
			s.passed(min(s.stored, ownWindow/8))
		}
		if !s.lose() {
			s.passed(s.stored)
		}
		s.passed(s.stored)
		if accounts[i].taken != 0 {
			t.Errorf("%d bytes are still taken", accounts[i].taken)
		}
	}
	over := store{account: &accounts[0], room: ownWindow, stored: ownWindow}
	accounts[0].end()
	if over.more() != 0 || len(b.queued) != 0 { // it was woken up when its connection was ending
		t.Error("who has ended takes more, or waits for it")
	}
	if left := b.left; left != limit {
		t.Errorf("%d of %d are left", left, limit)
	}
}

// eager is an app that answers each request with size bytes as its windows allow it, and counts them.
func eager(t *testing.T, size int, sent *atomic.Int64) string {
	return rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		fr := http2.NewFramer(c, r)
		if readRequest(fr, r) != nil {
			return
		}
		window := ownWindow // readRequest has read that it is
		var asked []uint32  // who has not got all
		left := size
		ask := func(id uint32) {
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: listOf(":status", "200"), EndHeaders: true})
			asked = append(asked, id)
		}
		ask(1)
		for {
			for len(asked) > 0 && window > 0 {
				n := min(window, left, 16<<10)
				fr.WriteData(asked[0], n == left, make([]byte, n))
				sent.Add(int64(n))
				window -= n
				if left -= n; left == 0 {
					asked, left = asked[1:], size
				}
			}
			f, err := fr.ReadFrame()
			switch f := f.(type) {
			case *http2.HeadersFrame:
				ask(f.StreamID)
			case *http2.WindowUpdateFrame:
				if f.StreamID == 0 {
					window += int(f.Increment)
				}
			}
			if err != nil {
				return
			}
		}
	})
}

// settles returns n when it has not changed for a while.
func settles(n *atomic.Int64) int64 {
	for last, same := n.Load(), 0; ; {
		time.Sleep(10 * time.Millisecond)
		if now := n.Load(); now != last {
			last, same = now, 0
		} else if same++; same == 20 {
			return now
		}
	}
}

// TestHTTP2Budget has clients ask for much and read nothing: what is stored for all of them is bounded, each has memory of its own, and what one
// gives back is there for the others.
func TestHTTP2Budget(t *testing.T) {
	const limit, size = 4 << 20, streamWindow
	w := newWorld(t)
	w.bound(limit)
	var first, second atomic.Int64
	w.at(App, eager(t, size, &first))
	a := w.narrow(1)
	for i := range uint32(40) {
		a.request(2*i+1, "GET")
	}
	if n := settles(&first); n != limit+ownWindow {
		t.Errorf("%d bytes were taken of the first, want %d", n, limit+ownWindow)
	}
	w.at(App, eager(t, size, &second))
	b := w.narrow(1)
	for i := range uint32(40) {
		b.request(2*i+1, "GET")
	}
	if n := settles(&second); n != ownWindow {
		t.Errorf("%d bytes were taken of the second, want %d", n, ownWindow)
	}
	a.Close()
	<-w.ends
	for i := 0; i < 500 && second.Load() != limit+ownWindow; i++ {
		time.Sleep(10 * time.Millisecond)
	}
	if n := second.Load(); n != limit+ownWindow {
		t.Errorf("then %d, want %d", n, limit+ownWindow)
	}
	b.fr.WriteWindowUpdate(0, 1<<30)
	for i := range uint32(40) {
		b.fr.WriteWindowUpdate(2*i+1, 1<<20)
	}
	got, ended := 0, 0
	b.next("the end of all", func(f http2.Frame) bool {
		if d, ok := f.(*http2.DataFrame); ok {
			got += len(d.Data())
			if d.StreamEnded() {
				ended++
			}
		}
		return ended == 40
	})
	if got != 40*size {
		t.Errorf("%d bytes came of %d", got, 40*size)
	}
	b.Close()
	<-w.ends
	if left := w.budget().left; left != limit {
		t.Errorf("%d bytes of %d are left", left, limit)
	}
}

// TestHTTP2BudgetOfLost has origins end again and again behind answers that nobody reads. What is kept of them is bounded.
func TestHTTP2BudgetOfLost(t *testing.T) {
	const limit, each = 4 << 20, 1 << 20
	w := newWorld(t)
	w.bound(limit)
	app, _ := h2Server(t, "app")
	w.at(App, app)
	w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		fr := http2.NewFramer(c, r)
		if readRequest(fr, r) != nil {
			return
		}
		for i := range uint32(each / streamWindow) {
			for i > 0 {
				f, err := fr.ReadFrame()
				if err != nil {
					return
				}
				if f.Header().StreamID == 2*i+1 {
					break
				}
			}
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: listOf(":status", "200"), EndHeaders: true})
			for n := streamWindow; n > 0; n -= 16 << 10 {
				fr.WriteData(2*i+1, n == 16<<10, make([]byte, 16<<10))
			}
		}
		c.CloseWrite()
		io.Copy(io.Discard, r)
	}))
	ends := make(chan struct{}, 8)
	w.wrap = func(s flow.Stream) flow.Stream { return told{s, func() { ends <- struct{}{} }} }
	c := w.narrow(0)
	id, kept, lost := uint32(1), 0, 0
	over := map[uint32]bool{}
	for range 8 {
		for range each / streamWindow {
			c.request(id, "GET")
			id += 2
		}
		for range each / streamWindow {
			c.next("an answer", func(f http2.Frame) bool {
				if f.Header().Type == http2.FrameRSTStream {
					over[f.Header().StreamID] = true
					lost++
				}
				return f.Header().Type == http2.FrameHeaders
			})
		}
		<-ends
	}
	c.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	c.fr.WriteWindowUpdate(0, 1<<30)
	c.next("the end of all", func(f http2.Frame) bool {
		switch f := f.(type) {
		case *http2.DataFrame:
			kept += len(f.Data())
			over[f.StreamID] = over[f.StreamID] || f.StreamEnded()
		case *http2.RSTStreamFrame:
			over[f.StreamID] = true
			lost++
		}
		return len(over) == int(id)/2 && !hasFalse(over)
	})
	if kept > limit+2*each || kept < limit || lost == 0 {
		t.Errorf("%d bytes were kept, %d answers lost", kept, lost)
	}
}

func hasFalse(m map[uint32]bool) bool {
	for _, v := range m {
		if !v {
			return true
		}
	}
	return false
}

// TestHTTP2ConnectionWindow has a client send more than the connection's window, and less than those of its streams: it is told of its error.
func TestHTTP2ConnectionWindow(t *testing.T) {
	w := newWorld(t)
	w.bound(0)
	w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		if readRequest(http2.NewFramer(c, r), r, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) == nil {
			io.Copy(io.Discard, r)
		}
	}))
	c := w.narrow(1)
	fr := http2.NewFramer(io.Discard, c.r)
	go func() {
		for i := range uint32(2 * ownWindow / streamWindow) {
			c.request(2*i+1, "POST")
			for n := 0; n < streamWindow; n += 16 << 10 {
				if c.fr.WriteData(2*i+1, false, make([]byte, 16<<10)) != nil {
					return
				}
			}
		}
	}()
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("no error was told: %v", err)
		}
		if f, ok := f.(*http2.GoAwayFrame); ok {
			if f.ErrCode != http2.ErrCodeFlowControl {
				t.Errorf("%v", f)
			}
			return
		}
	}
}
