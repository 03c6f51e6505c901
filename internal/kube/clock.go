package kube

import (
	"net/http"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// clock tells the cluster's time. Laptops' clocks are off, and the admission policy compares renewal times with the API server's.
type clock struct {
	skew atomic.Int64 // nanoseconds to add to the local time
}

// minSkew is below what the Date header can tell (RFC 9110, section 6.6.1: whole seconds).
const minSkew = 2 * time.Second

// wrap reads the Date header of every answer that passes.
func (c *clock) wrap(rt http.RoundTripper) http.RoundTripper { return &clockTransport{rt, c} }

// Skew is how far the cluster's clock is ahead of this machine's, as far as the last answer told; below two seconds it is 0.
func (c *Cluster) Skew() time.Duration { return time.Duration(c.clock.skew.Load()) }

// now is the cluster's time as far as it is known.
func (c *clock) now() metav1.MicroTime {
	return metav1.NewMicroTime(time.Now().Add(time.Duration(c.skew.Load())))
}

func (c *clock) see(date string, at time.Time) {
	t, err := http.ParseTime(date)
	if err != nil {
		return // an answer of a proxy without a date
	}
	skew := t.Sub(at)
	if skew.Abs() < minSkew {
		skew = 0
	}
	c.skew.Store(int64(skew))
}

type clockTransport struct {
	next  http.RoundTripper
	clock *clock
}

func (t *clockTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(r)
	if err == nil {
		t.clock.see(resp.Header.Get("Date"), time.Now())
	}
	return resp, err
}

// WrappedRoundTripper lets CloseIdle find the connections.
func (t *clockTransport) WrappedRoundTripper() http.RoundTripper { return t.next }
