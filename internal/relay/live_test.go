package relay

import (
	"bufio"
	"context"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// stream is what a page's script hears.
type stream struct {
	w     *world
	lines chan string // closed at its end
}

// listen opens a stream for a page.
func (b *browser) listen(page string, header ...string) (*stream, int) {
	b.w.t.Helper()
	return b.listenFor(b.w.t.Context(), page, header...)
}

// listenFor is listen until ctx ends.
func (b *browser) listenFor(ctx context.Context, page string, header ...string) (*stream, int) {
	w := b.w
	w.t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+domain+"/events?page="+url.QueryEscape(page), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	c := b.Client
	c.Timeout = 0
	resp, err := c.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { resp.Body.Close() })
	s := &stream{w, make(chan string, 100)}
	go func() {
		defer close(s.lines)
		for r := bufio.NewReader(resp.Body); ; {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			if line != "\n" && line != ":\n" { // the latter says that nothing has changed
				s.lines <- line
			}
		}
	}()
	return s, resp.StatusCode
}

// hears waits for what is said next.
func (s *stream) hears(want string) {
	s.w.t.Helper()
	select {
	case got := <-s.lines:
		if got != want {
			s.w.t.Fatalf("heard %q, want %q", got, want)
		}
	case <-time.After(5 * time.Second): // liveCheck is later: these are told at once
		s.w.t.Fatalf("%q: not within 5 s", want)
	}
}

const changed, gone, ended = "data: changed\n", "data: gone\n", ""

// Pages are told what changes on them, whoever changes it, and of nothing else.
func TestLive(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	bob := w.member("bob@example.com", w.team(), store.Member)
	l := ann.login()
	c := l.cluster("prod", echo)
	p := l.preview(c, "web")
	open := func(b *browser, page string) *stream {
		t.Helper()
		s, status := b.listen(page)
		if status != http.StatusOK {
			t.Fatalf("%s: %d", page, status)
		}
		s.hears(changed)
		return s
	}
	w.until("the news of the cluster", func() bool {
		st, _ := w.relay.links.State(c.id)
		return st.Product != ""
	})
	all, page, others, cluster, people := open(ann, "/"), open(ann, "/previews/"+p.Host), open(bob, "/previews/"+p.Host), open(ann, "/clusters/"+c.id), open(ann, "/people")

	ann.visit(p.URL)
	page.hears(changed)
	l.preview(c, "api")
	all.hears(changed)
	l.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
	for _, s := range []*stream{all, page} {
		s.hears(changed)
	}
	others.hears(changed)
	_ = c.mux.Close()
	for _, s := range []*stream{all, page, others, cluster} {
		s.hears(changed)
	}
	ann.submit("/people/invite", url.Values{"team": {w.team()}, "role": {"member"}})
	people.hears(changed)
	for _, s := range []*stream{all, page, others, cluster, people} { // once for each change of that page, and for nothing else
		select {
		case line := <-s.lines:
			t.Errorf("heard %q, of nothing", line)
		default:
		}
	}

	// A right that ends, ends the stream.
	l.must(relayapi.PathDeletePreview, relayapi.PreviewRequest{Preview: p.Host}, nil)
	page.hears(gone)
	page.hears(ended)
	ann.submit("/logout", nil)
	for _, s := range []*stream{cluster, people} {
		s.hears(gone)
		s.hears(ended)
	}
}

func TestAttackLive(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	p := ann.login().preview(ann.login().cluster("prod", echo), "web")
	oli, _ := w.others()
	for name, c := range map[string]struct {
		who    *browser
		page   string
		header []string
		status int
	}{
		"a stranger":               {w.browser(), "/", nil, 403},
		"a page of a preview":      {ann, "/", []string{"Sec-Fetch-Site", "same-site"}, 403},
		"another site":             {ann, "/", []string{"Sec-Fetch-Site", "cross-site"}, 403},
		"a stream of streams":      {ann, "/events?page=/", nil, 403},
		"what is no page":          {ann, "/static/style.css", nil, 403},
		"no page at all":           {ann, "%zz", nil, 403},
		"another team's preview":   {oli, "/previews/" + p.Host, nil, 200},
		"a preview that is not":    {oli, "/previews/none", nil, 200},
		"a page of another origin": {ann, "https://example.com/people", nil, 200},
	} {
		s, status := c.who.listen(c.page, c.header...)
		if status != c.status {
			t.Errorf("%s: %d, want %d", name, status, c.status)
		}
		if c.who == oli { // there is nothing to tell the two apart
			s.hears(gone)
			s.hears(ended)
		}
	}
	// One person has so many and no more; others are not kept from theirs.
	var last int
	for range 33 {
		_, last = ann.listen("/")
	}
	if last != http.StatusTooManyRequests {
		t.Errorf("one more than may be: %d", last)
	}
	if _, status := oli.listen("/"); status != http.StatusOK {
		t.Errorf("another person: %d", status)
	}
	// The relay's end waits for none of them.
	start := time.Now()
	w.stop()
	if d := time.Since(start); d > time.Second {
		t.Errorf("the end took %v", d)
	}
}
