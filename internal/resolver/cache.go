package resolver

import (
	"container/list"
	"encoding/binary"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	maxCacheEntries = 8192
	maxCacheBytes   = 4 << 20
	maxCacheTTL     = time.Hour // the cluster's real TTLs are seconds; this bounds what a broken server can do
	entryOverhead   = 256       // a guess at what an entry costs beside its bytes
)

// answer is the cluster's answer in the form it is kept: packed, owner names rewritten, the question in lower case, without an
// OPT record. It is never changed; render makes the client's own copy.
type answer struct {
	msg  []byte
	ttls []uint16      // where the TTLs stand in msg
	keep time.Duration // how long it may be kept; 0: not at all
}

// render returns a as the answer to q, age after the cluster gave it.
func (a *answer) render(q *query, o opt, age time.Duration) ([]byte, error) {
	msg := append(make([]byte, 0, len(a.msg)+11), a.msg...)
	copy(msg, q.raw[:2])
	msg[2] |= q.raw[2] & flagRD
	copy(msg[headerLen:], q.raw[headerLen:q.nameEnd]) // the case the client asked in, also for the names that point here
	if secs := uint32(age / time.Second); secs > 0 {
		for _, at := range a.ttls {
			ttl := binary.BigEndian.Uint32(msg[at:])
			binary.BigEndian.PutUint32(msg[at:], ttl-min(ttl, secs))
		}
	}
	if o.present {
		msg = appendOPT(msg, o, 0, nil)
	}
	if limit := q.limit(o); len(msg) > limit {
		return truncate(msg, limit)
	}
	return msg, nil
}

// truncate drops records until msg fits, and sets TC: the client asks again by TCP (RFC 2181 section 9).
func truncate(msg []byte, limit int) ([]byte, error) {
	var m dns.Msg
	if err := m.Unpack(msg); err != nil {
		return nil, err
	}
	m.Truncate(limit)
	return m.Pack()
}

// cacheKey is the question as asked and what it was taken for: "web" and "web.default" have answers with different owner names,
// and "web" is another service after the namespace changed.
type cacheKey struct {
	session string
	name    string // lower case
	suffix  string
	qtype   uint16
	do      bool
}

type cacheEntry struct {
	key     cacheKey
	answer  *answer
	stored  time.Time
	service string // "svc.ns", "" if the name is no service's
}

func (e *cacheEntry) cost() int {
	return len(e.answer.msg) + 2*len(e.answer.ttls) + len(e.key.name) + len(e.key.suffix) + entryOverhead
}

// cache keeps the cluster's answers, positive and negative, as long as their TTLs say; the least recently used go first. Outside
// names are not kept: a laptop with VPNs that come and go behaves exactly as it did without us.
type cache struct {
	maxEntries, maxBytes int

	mu sync.Mutex
	// guarded by mu
	entries map[cacheKey]*list.Element // of *cacheEntry
	recent  list.List                  // most recently used first
	bytes   int
	version uint64 // counts invalidations
}

func newCache(maxEntries, maxBytes int) *cache {
	return &cache{maxEntries: maxEntries, maxBytes: maxBytes, entries: make(map[cacheKey]*list.Element)}
}

// get returns the answer and its age.
func (c *cache) get(key cacheKey) (*answer, time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.entries[key]
	if !ok {
		return nil, 0, false
	}
	e := el.Value.(*cacheEntry)
	age := time.Since(e.stored)
	if age >= e.answer.keep {
		c.removeLocked(el)
		return nil, 0, false
	}
	c.recent.MoveToFront(el)
	return e.answer, age, true
}

// generation is what put wants back, taken before the names are looked at and the question is sent.
func (c *cache) generation() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.version
}

// put keeps an answer, unless the names changed since generation was taken: it may be from before.
func (c *cache) put(key cacheKey, service string, a *answer, generation uint64) {
	if a.keep <= 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if generation != c.version {
		return
	}
	if el, ok := c.entries[key]; ok {
		c.removeLocked(el)
	}
	e := &cacheEntry{key: key, answer: a, stored: time.Now(), service: service}
	c.entries[key] = c.recent.PushFront(e)
	c.bytes += e.cost()
	for len(c.entries) > c.maxEntries || c.bytes > c.maxBytes {
		c.removeLocked(c.recent.Back())
	}
}

// invalidate drops what a change of names may have made wrong: the answers of the services that came, went or changed, and
// those that belong to no service (reverse lookups: addresses are given away again).
func (c *cache) invalidate(old, now directory) {
	if len(old) != len(now) {
		c.flush()
		return
	}
	changed := map[string]map[string]bool{} // the services of each session
	for i := range now {
		services, all := changes(old[i], now[i])
		if all {
			c.flush()
			return
		}
		if len(services) > 0 {
			changed[now[i].session] = services
		}
	}
	if len(changed) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version++
	for el := c.recent.Front(); el != nil; {
		next := el.Next()
		if e := el.Value.(*cacheEntry); changed[e.key.session] != nil && (e.service == "" || changed[e.key.session][e.service]) {
			c.removeLocked(el)
		}
		el = next
	}
}

func (c *cache) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version++
	clear(c.entries)
	c.recent.Init()
	c.bytes = 0
}

func (c *cache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries)
}

func (c *cache) removeLocked(el *list.Element) {
	e := c.recent.Remove(el).(*cacheEntry)
	delete(c.entries, e.key)
	c.bytes -= e.cost()
}
