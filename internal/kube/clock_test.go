package kube

import (
	"net/http"
	"testing"
	"time"
)

func TestClockFollowsTheClusters(t *testing.T) {
	var c clock
	at := time.Now()
	for _, tt := range []struct {
		name string
		date string
		want time.Duration // added to the local time, give or take the header's second
	}{
		{"an hour ahead", at.Add(time.Hour).UTC().Format(http.TimeFormat), time.Hour},
		{"garbage changes nothing", "yesterday", time.Hour},
		{"ten minutes behind", at.Add(-10 * time.Minute).UTC().Format(http.TimeFormat), -10 * time.Minute},
		{"less than the header can tell", at.Add(time.Second).UTC().Format(http.TimeFormat), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c.see(tt.date, at)
			got := time.Until(c.now().Time)
			if d := got - tt.want; d.Abs() > 2*time.Second {
				t.Errorf("the cluster's clock is taken to be %v ahead, want %v", got, tt.want)
			}
		})
	}
}
