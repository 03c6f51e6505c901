package web

import (
	"context"
	"crypto/sha256"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/doppel-dev/doppel/internal/relay/store"
)

// Attempts to log in: so many at once, and then one each time. What one address may try at one account is a part of what all may try there, so that nobody
// locks others out from one place, nor from a few.
const (
	addressBurst, addressEvery = 10, 6 * time.Second
	pairBurst, pairEvery       = 10, 20 * time.Second
	accountBurst, accountEvery = 20, 3 * time.Second
	maxLimits                  = 100_000
	forgetEvery                = time.Second // those of whom there is nothing to remember
)

// tooMany is what is answered to those who are not let in.
const tooMany = "Too many attempts. Wait a little and try again."

// limiter bounds attempts by a key.
type limiter struct {
	// shared counts for all relays; an error leaves it at this one's count.
	shared func(ctx context.Context, key string, burst int, every time.Duration) (bool, error)
	log    *slog.Logger

	mu sync.Mutex
	// guarded by mu
	byKey  map[[sha256.Size]byte]*rate.Limiter // by a hash: strangers choose the keys
	forgot time.Time
}

// sharedTimeout bounds how long the count of all relays may take.
const sharedTimeout = 2 * time.Second

func newLimiter(s *store.Store, log *slog.Logger) *limiter {
	return &limiter{shared: s.Attempt, log: log, byKey: map[[sha256.Size]byte]*rate.Limiter{}}
}

// allow says whether there may be an attempt now. What one relay alone refuses is not counted for all: strangers do not write into the database as fast as they like.
func (l *limiter) allow(ctx context.Context, key string, burst int, every time.Duration) bool {
	if !l.local(key, burst, every) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, sharedTimeout)
	defer cancel()
	ok, err := l.shared(ctx, key, burst, every)
	if err != nil {
		l.log.Error("attempts of all relays not counted", "err", err)
	}
	return ok || err != nil
}

func (l *limiter) local(key string, burst int, every time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); now.Sub(l.forgot) >= forgetEvery {
		maps.DeleteFunc(l.byKey, func(_ [sha256.Size]byte, r *rate.Limiter) bool { return r.Tokens() >= float64(r.Burst()) }) // full again, they say nothing
		l.forgot = now
	}
	hash := sha256.Sum256([]byte(key))
	r := l.byKey[hash]
	if r == nil {
		if len(l.byKey) >= maxLimits {
			return false
		}
		r = rate.NewLimiter(rate.Every(every), burst)
		l.byKey[hash] = r
	}
	return r.Allow()
}

// login says whether somebody at an address may try to log in as an account now.
func (l *limiter) login(ctx context.Context, address, account string) bool {
	return l.allow(ctx, "address "+address, addressBurst, addressEvery) &&
		l.allow(ctx, "address "+address+" at "+account, pairBurst, pairEvery) &&
		l.allow(ctx, "account "+account, accountBurst, accountEvery)
}

// networkOf is what limits by address are by: whoever has one IPv6 address has the other 2^64 of its network as well.
func networkOf(r *http.Request) string {
	client := clientOf(r)
	a, err := netip.ParseAddr(client)
	if err != nil || a.Is4() || a.Is4In6() {
		return client
	}
	p, err := a.Prefix(64)
	if err != nil {
		return client
	}
	return p.Addr().String()
}
