package manager

import (
	"net/http"
	"sync/atomic"
	"time"
)

// clock tells the cluster's time, which others have stamped into objects and tokens: this machine's clock may be off, or be set while we run.
type clock struct {
	last atomic.Pointer[moment] // nil: no answer yet, and it is this machine's time
}

// moment is what the cluster's time was at a time of ours. Time that has passed since is monotonic, whatever the clock is set to.
type moment struct{ cluster, at time.Time }

// minSkew is below what the Date header can tell (RFC 9110, section 6.6.1: whole seconds).
const minSkew = 2 * time.Second

// now is the cluster's time.
func (c *clock) now() time.Time {
	r := c.last.Load()
	if r == nil {
		return time.Now()
	}
	return r.cluster.Add(time.Since(r.at))
}

func (c *clock) since(t time.Time) time.Duration { return c.now().Sub(t) }

// within says whether t was less than d ago. What is as far in the future was stamped by yet another clock that is off, and says nothing.
func (c *clock) within(d time.Duration, t time.Time) bool { return c.since(t).Abs() < d }

// see reads the Date header of an answer that came at a moment.
func (c *clock) see(date string, at time.Time) {
	t, err := http.ParseTime(date)
	if err != nil {
		return // an answer of a proxy without a date
	}
	if t.Sub(at).Abs() < minSkew {
		t = at.Round(0)
	}
	c.last.Store(&moment{cluster: t, at: at})
}

// wrap sees every answer of the API server. The leader gets one every leaseRenew, others every leaseLook.
func (c *clock) wrap(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		resp, err := next.RoundTrip(r)
		if err == nil {
			c.see(resp.Header.Get("Date"), time.Now())
		}
		return resp, err
	})
}
