package resolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	clusterTimeout    = 2800 * time.Millisecond // the client has its SERVFAIL within 3 s
	maxClusterFlights = 256                     // questions in the tunnel at once
	maxClusterWaiters = 1024                    // clients that wait for them
)

var (
	errBusy        = errors.New("too many queries at once")
	errNameTooLong = errors.New("name too long")
	errClosed      = errors.New("resolver is closed")
)

// clusterHandler answers the cluster's names: from the cache, or by one question to the cluster however many clients ask it.
type clusterHandler struct {
	ask   func(ctx context.Context, query []byte) ([]byte, error)
	cache *cache
	stats *counters
	log   *slog.Logger

	waiters chan struct{}
	failing sync.Map // of sessions, so that the log tells when a cluster's DNS goes and comes, not each query

	ctx    context.Context // of all flights; ends with close
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // the flights

	mu      sync.Mutex
	flights map[flightKey]*flight // guarded by mu
	closed  bool                  // guarded by mu
}

// flightKey keeps a question asked after the names changed from joining a flight that left before.
type flightKey struct {
	cacheKey
	generation uint64
}

// flight is one question on its way; the fields are set before done is closed.
type flight struct {
	done   chan struct{}
	answer *answer
	err    error
}

func newClusterHandler(ask func(context.Context, []byte) ([]byte, error), c *cache, stats *counters, log *slog.Logger) *clusterHandler {
	h := &clusterHandler{
		ask: ask, cache: c, stats: stats, log: log,
		waiters: make(chan struct{}, maxClusterWaiters),
		flights: make(map[flightKey]*flight),
	}
	h.ctx, h.cancel = context.WithCancelCause(context.Background())
	return h
}

// close ends all flights and waits for them.
func (h *clusterHandler) close() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.cancel(errClosed)
	h.wg.Wait()
}

func (h *clusterHandler) serve(ctx context.Context, q *query) ([]byte, error) {
	o, err := q.edns()
	switch {
	case err != nil:
		h.stats.malformed.Add(1)
		return formErr(q.raw), nil
	case o.version != 0:
		return q.badVersion(o), nil
	}
	key := cacheKey{session: q.session, name: q.name, suffix: q.suffix, qtype: q.qtype, do: o.do}
	a, age, ok := h.cache.get(key)
	if ok {
		h.stats.cacheHits.Add(1)
		return a.render(q, o, age)
	}
	a, err = h.wait(ctx, q, flightKey{key, q.generation})
	if errors.Is(err, errNameTooLong) { // so it does not exist
		return q.replyEDNS(dns.RcodeNameError, o, nil), nil
	}
	if err != nil {
		return nil, fmt.Errorf("cluster DNS: %w", err)
	}
	return a.render(q, o, 0)
}

// wait joins the flight of key, or starts it, and waits for its end.
func (h *clusterHandler) wait(ctx context.Context, q *query, key flightKey) (*answer, error) {
	select {
	case h.waiters <- struct{}{}:
		defer func() { <-h.waiters }()
	default:
		return nil, errBusy
	}
	f, err := h.join(q, key)
	if err != nil {
		return nil, err
	}
	select {
	case <-f.done:
		return f.answer, f.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// join returns the flight of key. A flight belongs to the handler, not to the client that was first: that one may go away.
func (h *clusterHandler) join(q *query, key flightKey) (*flight, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if f, ok := h.flights[key]; ok {
		h.stats.joined.Add(1)
		return f, nil
	}
	switch {
	case h.closed:
		return nil, errClosed
	case len(h.flights) >= maxClusterFlights:
		return nil, errBusy
	}
	f := &flight{done: make(chan struct{})}
	h.flights[key] = f
	ctx, cancel := context.WithTimeout(h.ctx, clusterTimeout)
	var once sync.Once
	land := func(a *answer, err error) {
		once.Do(func() {
			f.answer, f.err = a, err
			h.mu.Lock()
			delete(h.flights, key)
			h.mu.Unlock()
			close(f.done)
		})
	}
	// The clients get their SERVFAIL in time also when ask does not return; what ask holds then is its own affair.
	stop := context.AfterFunc(ctx, func() { land(nil, context.Cause(ctx)) })
	h.wg.Go(func() {
		defer cancel()
		defer stop()
		a, err := h.exchange(ctx, q, key.do)
		h.note(q.session, err)
		if err == nil {
			h.cache.put(key.cacheKey, q.service, a, key.generation)
		}
		land(a, err)
	})
	return f, nil
}

// note counts and logs the failures of a session's cluster.
func (h *clusterHandler) note(session string, err error) {
	if err != nil && !errors.Is(err, errNameTooLong) && h.ctx.Err() == nil {
		h.stats.clusterErrors.Add(1)
		if _, known := h.failing.Swap(session, true); !known {
			h.log.Warn("cluster dns failed", "connection", session, "err", err)
		}
	} else if err == nil {
		if _, known := h.failing.LoadAndDelete(session); known {
			h.log.Info("cluster dns answers again", "connection", session)
		}
	}
}

// exchange asks the cluster for q's absolute name and rewrites the answer to the asked one.
func (h *clusterHandler) exchange(ctx context.Context, q *query, do bool) (a *answer, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	h.stats.clusterQueries.Add(1)
	id := uint16(rand.Uint32())
	msg, err := q.fqdnQuery(id, do)
	if err != nil {
		return nil, err
	}
	ask := h.ask
	if q.ask != nil {
		ask = q.ask
	}
	raw, err := ask(ctx, msg)
	if err != nil {
		return nil, err
	}
	asked := query{raw: msg, nameEnd: len(msg) - 4 - 11, qtype: q.qtype, qclass: q.qclass}
	if !asked.isAnswer(raw, id) {
		return nil, errors.New("the answer does not fit the question")
	}
	return rewrite(raw, q)
}

// rewrite turns the cluster's answer about q's absolute name into the answer about the asked one: records of the absolute name
// become records of the asked one; all that they point to (CNAME, SRV, MX, PTR) stays absolute, so a chain goes on from there.
func rewrite(raw []byte, q *query) (*answer, error) {
	var m dns.Msg
	if err := m.Unpack(raw); err != nil {
		return nil, fmt.Errorf("parse answer: %w", err)
	}
	if m.Rcode > 0xf { // the upper bits need an OPT record, which is between us and the cluster
		m.Rcode = dns.RcodeServerFailure
	}
	asked, fqdn := q.name+".", q.fqdn()+"."
	m.Question = []dns.Question{{Name: asked, Qtype: q.qtype, Qclass: q.qclass}}
	renameOwners(m.Answer, fqdn, asked)
	renameOwners(m.Ns, fqdn, asked)
	renameOwners(m.Extra, fqdn, asked)
	if asked != fqdn {
		renameSOA(m.Ns, asked)
	}
	m.Extra = withoutOPT(m.Extra)
	m.Response, m.RecursionAvailable, m.RecursionDesired = true, true, false // RD is each client's own
	m.Authoritative = false                                                  // we are a resolver
	m.Compress = true

	a := &answer{keep: keepFor(&m)}
	var err error
	if a.msg, err = m.Pack(); err != nil {
		return nil, fmt.Errorf("pack answer: %w", err)
	}
	// The library reads records with too little data and writes bytes that nobody can read: such answers end here.
	if err := new(dns.Msg).Unpack(a.msg); err != nil || len(a.msg) > maxMessage || len(a.msg) < q.questionEnd() {
		return nil, errors.Join(errors.New("the answer is malformed"), err)
	}
	err = records(a.msg, q.questionEnd(), func(at int, _ uint16) error {
		a.ttls = append(a.ttls, uint16(at+4))
		return nil
	})
	return a, err
}

func renameOwners(rrs []dns.RR, from, to string) {
	for _, rr := range rrs {
		if h := rr.Header(); strings.EqualFold(h.Name, from) {
			h.Name = to
		}
	}
}

// renameSOA makes the zone of a negative answer an ancestor of the asked name, without which clients do not keep the answer (RFC
// 2308 section 5 wants the SOA of the name's zone). The name itself claims least.
func renameSOA(rrs []dns.RR, asked string) {
	for _, rr := range rrs {
		if h := rr.Header(); h.Rrtype == dns.TypeSOA && !under(trimDots(asked), trimDots(h.Name)) {
			h.Name = asked
		}
	}
}

func withoutOPT(rrs []dns.RR) []dns.RR {
	out := rrs[:0]
	for _, rr := range rrs {
		if rr.Header().Rrtype != dns.TypeOPT {
			out = append(out, rr)
		}
	}
	return out
}

// keepFor says how long m may be kept: the least TTL of its answer, or for a negative one what its SOA says (RFC 2308
// section 5); nothing without a SOA, and nothing of errors and truncated answers.
func keepFor(m *dns.Msg) time.Duration {
	if m.Truncated || (m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError) {
		return 0
	}
	ttl, known := uint32(0), false
	for _, rr := range m.Answer {
		if t := rr.Header().Ttl; !known || t < ttl {
			ttl, known = t, true
		}
	}
	if negative(m) {
		soa := false
		for _, rr := range m.Ns {
			if s, ok := rr.(*dns.SOA); ok {
				soa = true
				if t := min(s.Hdr.Ttl, s.Minttl); !known || t < ttl {
					ttl, known = t, true
				}
			}
		}
		if !soa {
			return 0
		}
	}
	if ttl > 1<<31-1 { // RFC 2181 section 8
		return 0
	}
	return min(time.Duration(ttl)*time.Second, maxCacheTTL)
}

// negative tells NXDOMAIN and NODATA, also at the end of a CNAME chain, from a positive answer.
func negative(m *dns.Msg) bool {
	if m.Rcode == dns.RcodeNameError {
		return true
	}
	qtype := m.Question[0].Qtype
	for _, rr := range m.Answer {
		if t := rr.Header().Rrtype; t == qtype || qtype == dns.TypeANY {
			return false
		}
	}
	return true
}
