package manager

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// clockOff is the clock of a machine that is ahead of the cluster.
func clockOff(by time.Duration) *clock {
	c := new(clock)
	if by != 0 {
		c.see(time.Now().Add(-by).UTC().Format(http.TimeFormat), time.Now())
	}
	return c
}

// The cluster's time is the last answer's and what has passed since by the monotonic clock, which no jump of the wall clock reaches.
func TestClock(t *testing.T) {
	c := new(clock)
	if got := c.since(time.Now()); got.Abs() > time.Second {
		t.Errorf("before any answer it is off by %v", got)
	}
	ahead := func(by time.Duration) string { return time.Now().Add(by).UTC().Format(http.TimeFormat) }
	for name, tt := range map[string]struct {
		dates func() []string
		off   time.Duration // of the cluster's time from ours
	}{
		"like ours":              {dates: func() []string { return []string{ahead(time.Second)} }},
		"ahead":                  {dates: func() []string { return []string{ahead(3 * time.Hour)} }, off: 3 * time.Hour},
		"behind":                 {dates: func() []string { return []string{ahead(-3 * time.Hour)} }, off: -3 * time.Hour},
		"a date that is none":    {dates: func() []string { return []string{ahead(time.Hour), "yesterday", ""} }, off: time.Hour},
		"ours was off, then set": {dates: func() []string { return []string{ahead(-3 * time.Hour), ahead(0)} }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := new(clock)
				for _, date := range tt.dates() {
					if _, err := c.wrap(answering(date)).RoundTrip(&http.Request{}); err != nil { //nolint:bodyclose // it has none
						t.Fatal(err)
					}
				}
				time.Sleep(10 * time.Minute)
				if got := time.Until(c.now()); got.Round(time.Second) != tt.off {
					t.Errorf("off by %v, want %v", got, tt.off)
				}
			})
		})
	}
	// Go has both in a Time until Round takes the monotonic part.
	if m := clockOff(time.Hour).last.Load(); !strings.Contains(m.at.String(), " m=") || strings.Contains(m.cluster.String(), " m=") {
		t.Errorf("the moment of ours has to be monotonic, the cluster's must not: %+v", m)
	}
}

func answering(date string) http.RoundTripper {
	return roundTripper(func(*http.Request) (*http.Response, error) {
		return &http.Response{Header: http.Header{"Date": {date}}}, nil
	})
}

// A pod whose node's clock is off is not waited for until that time has come.
func TestWithin(t *testing.T) {
	for _, off := range []time.Duration{0, 3 * time.Hour, -3 * time.Hour} {
		c := clockOff(off)
		for ago, want := range map[time.Duration]bool{time.Second: true, -time.Second: true, 3 * time.Second: false, -time.Hour: false, time.Hour: false} {
			if got := c.within(endpointLag, c.now().Add(-ago)); got != want {
				t.Errorf("clock off by %v: %v ago is within %v: %v", off, ago, endpointLag, got)
			}
		}
	}
	if !agentStarted(&corev1.Pod{}).IsZero() {
		t.Error("an agent that does not run has started")
	}
}
