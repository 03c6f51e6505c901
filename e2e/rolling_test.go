package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// rate is how many requests a rateHelper begins in a second.
const rate = 200

// rateHelper begins rate requests in a second, whether or not earlier ones have been answered, every other one on a connection of its own and
// the rest on kept ones, and prints an answer a line, until its standard input ends.
func rateHelper(url string) int {
	ended := stdinEnds()
	clients := []*http.Client{
		{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 32}},
		{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}},
	}
	var mu sync.Mutex
	enc := json.NewEncoder(os.Stdout)
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(time.Second / rate)
	for i := 0; ; i++ {
		select {
		case <-ended:
			return 0
		case <-tick.C:
		}
		wg.Go(func() {
			a := ask(clients[i%2], url)
			mu.Lock()
			defer mu.Unlock()
			_ = enc.Encode(a) // an answer that is missing is missed by who reads them
		})
	}
}

// TestRolling takes two replicas that drain, and gives them back, under load: nobody sees an error, on the way in and on the way out.
func TestRolling(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "rolling")
	c.sample(t, ns)
	const app = "dataprocessingservice"
	patch := []byte(`{"spec":{"replicas":2,"strategy":{"rollingUpdate":{"maxUnavailable":0}}}}`)
	ok(c.core.AppsV1().Deployments(ns).Patch(t.Context(), app, types.MergePatchType, patch, metav1.PatchOptions{}))(t)
	c.available(t, ns, app)
	l := newLaptop(t, "roller")
	l.withManager(t)
	l.run(t, "doppel", "connect", "-n", ns)
	l.colors(t, "blue", "127.0.0.1:3000")
	load := c.begin(t, "rate", "http://"+c.clusterIP(t, ns, app)+"/color")
	for _, tt := range []struct {
		name  string
		args  []string
		after string // what answers from then on, also on connections that are kept
	}{
		{"in, with a rolling restart", []string{"intercept", app, "-p", "3000"}, "blue"},
		{"out", []string{"leave", app}, "green"},
		{"in, with agents", []string{"intercept", app, "-p", "3000"}, "blue"},
		{"out again", []string{"leave", app}, "green"},
		{"in by request", []string{"intercept", app, "-p", "3000", "--http-match=x-user=louise"}, "green"},
		{"out by request", []string{"leave", app}, "green"},
		{"without agents", []string{"uninstall", "--agent", app}, "green"},
	} {
		load.more(t, rate)
		from, began := load.count(), time.Now()
		l.run(t, append([]string{"doppel"}, tt.args...)...)
		took := time.Since(began)
		eventually(t, 15*time.Second, func() error { // a laptop that is too slow to take a connection is asked again after 2 s
			load.more(t, rate)
			if got := bodies(load.since(load.count() - rate)); len(got) != 1 || got[fmt.Sprintf("%q", tt.after)] == 0 {
				return fmt.Errorf("%s: the last second's answers: %v", tt.name, got)
			}
			return nil
		})
		got := load.since(from)
		t.Logf("%s: %d requests, said after %s, slowest %s: %v", tt.name, len(got), took.Round(time.Millisecond), slowest(got).Round(time.Millisecond), bodies(got))
	}
	eventually(t, time.Minute, func() error { // the last old pods end under load
		if pods, agents := c.agentsOf(t, ns, app); agents > 0 || len(pods) != 2 {
			return fmt.Errorf("%d of the pods %v have an agent", agents, pods)
		}
		return nil
	})
	all := load.stop()
	for _, a := range all {
		if a.Err != "" || a.Status != http.StatusOK {
			t.Errorf("%s: %d %s after %s", a.Start.Format(time.StampMilli), a.Status, a.Err, a.Took)
		}
	}
	took := make([]time.Duration, 0, len(all))
	for _, a := range all {
		took = append(took, a.Took)
	}
	slices.Sort(took)
	t.Logf("%d requests in all, p50 %s, p99 %s, slowest %s", len(all), took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
	l.run(t, "doppel", "quit", "-s")
}

func slowest(as []answer) time.Duration {
	var d time.Duration
	for _, a := range as {
		d = max(d, a.Took)
	}
	return d
}
