package web

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"net/http"
	"sync"
	"time"
)

// Streams that say when a page has changed: how often at most, how often one is looked after without a change that this relay knows of (logins and
// publications that end, other relays), how many one person has, and how long a browser may take to hear.
const (
	liveEvery   = time.Second
	liveCheck   = 10 * time.Second
	maxStreams  = 32
	liveTimeout = 10 * time.Second
)

// streams are those that are open.
type streams struct {
	ended chan struct{} // closed by Close

	mu       sync.Mutex
	byPerson map[string]int // guarded by mu
}

// enter notes a stream, if the person has not too many.
func (s *streams) enter(person string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byPerson[person] >= maxStreams {
		return false
	}
	s.byPerson[person]++
	return true
}

func (s *streams) leave(person string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byPerson[person]--; s.byPerson[person] == 0 {
		delete(s.byPerson, person)
	}
}

// Close ends the streams; it is called once.
func (s *Site) Close() { close(s.streams.ended) }

// events says when a page has changed, and nothing of what is on it: the browser gets the page itself again, as anybody who asks for it. It ends when the
// page is not there any more for this login.
func (s *Site) events(w http.ResponseWriter, r *http.Request) {
	m, err := s.login(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	page, err := http.NewRequestWithContext(r.Context(), http.MethodGet, r.FormValue("page"), nil)
	// Previews are the same site to a browser, and their pages would use up what a person may have.
	site := r.Header.Get("Sec-Fetch-Site")
	if m == nil || err != nil || !s.isLive(page) || site != "" && site != "same-origin" {
		http.Error(w, "There is nothing to hear.", http.StatusForbidden)
		return
	}
	if !s.streams.enter(m.ID) {
		http.Error(w, "Too many pages are open.", http.StatusTooManyRequests)
		return
	}
	defer s.streams.leave(m.ID)
	page.Header["Cookie"] = r.Header["Cookie"]
	w.Header().Set("Content-Type", "text/event-stream")
	c := http.NewResponseController(w)
	say := func(what string) bool {
		_ = c.SetWriteDeadline(time.Now().Add(liveTimeout)) // connections here have deadlines
		defer func() { _ = c.SetWriteDeadline(time.Time{}) }()
		_, err := fmt.Fprint(w, what)
		return err == nil && c.Flush() == nil
	}
	news := func() [3]<-chan struct{} {
		return [...]<-chan struct{}{s.cfg.Store.News(), s.cfg.Links.Changed(), s.cfg.Laptops.Changed()}
	}
	s.follow(r.Context(), news, func() ([sha256.Size]byte, bool) { return s.look(page) }, say)
}

// follow says when a page changes, as long as it can be said. However much news there is, it looks, and says something, once in liveEvery at most.
func (s *Site) follow(ctx context.Context, news func() [3]<-chan struct{}, look func() ([sha256.Size]byte, bool), say func(what string) bool) {
	var last [sha256.Size]byte
	for {
		next := news()
		now, ok := look()
		switch {
		case !ok:
			say("data: gone\n\n")
			return
		case now != last: // also at the beginning: the page may have changed since it was sent
			if !say("data: changed\n\n") {
				return
			}
		case !say(":\n\n"):
			return
		}
		last = now
		if !s.pause(ctx, liveEvery, [3]<-chan struct{}{}) || !s.pause(ctx, liveCheck, next) {
			return
		}
	}
}

// isLive says whether a request is for a page that is kept up to date.
func (s *Site) isLive(r *http.Request) bool {
	_, pattern := s.live.Handler(r)
	return pattern != ""
}

// pause waits for a time or for news; false: the stream is over.
func (s *Site) pause(ctx context.Context, d time.Duration, news [3]<-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-news[0]:
	case <-news[1]:
	case <-news[2]:
	case <-t.C:
	case <-ctx.Done():
		return false
	case <-s.streams.ended:
		return false
	}
	return true
}

// look makes a page and returns its hash; false: there is none for this login.
func (s *Site) look(page *http.Request) (sum [sha256.Size]byte, ok bool) {
	h := &hashed{Hash: sha256.New(), header: http.Header{}, status: http.StatusOK}
	s.live.ServeHTTP(h, page)
	h.Sum(sum[:0])
	return sum, h.status == http.StatusOK
}

// hashed is a page of which nothing is kept but its hash.
type hashed struct {
	hash.Hash
	header http.Header
	status int
}

func (h *hashed) Header() http.Header    { return h.header }
func (h *hashed) WriteHeader(status int) { h.status = status }
