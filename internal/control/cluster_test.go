package control

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Whoever has what was and gets what is new has what is, and what was is as it was.
func TestClusterChanges(t *testing.T) {
	prefix := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}
	web, db := []Service{{Name: "web"}}, []Service{{Name: "db", Headless: true}}
	states := []Cluster{
		{},
		{Domain: "cluster.test", Services: map[string][]Service{}},
		{Domain: "cluster.test", Services: map[string][]Service{"shop": web, "empty": {}}},
		{Domain: "cluster.test", Services: map[string][]Service{"shop": {{Name: "web", Headless: true}}, "empty": {}}},
		{Domain: "cluster.test", Services: map[string][]Service{"shop": {}, "data": db}, PodCIDRs: prefix},
		{Domain: "cluster.test", Services: map[string][]Service{"shop": {}, "data": db}, Nodes: []netip.Addr{prefix[0].Addr()}},
	}
	compare := []cmp.Option{cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}, netip.AddrPort{})}
	for i, old := range states {
		for j, now := range states[1:] {
			t.Run(fmt.Sprintf("%d to %d", i, j+1), func(t *testing.T) {
				before, _ := json.Marshal(old)
				news, changed := now.Since(old)
				if changed != (i != j+1) {
					t.Errorf("changed: %v", changed)
				}
				text, err := json.Marshal(news)
				if err != nil {
					t.Fatal(err)
				}
				var heard Cluster
				if err := json.Unmarshal(text, &heard); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(now, heard.After(old), compare...); diff != "" {
					t.Errorf("after %s: %s", text, diff)
				}
				if after, _ := json.Marshal(old); string(after) != string(before) {
					t.Errorf("%s became %s", before, after)
				}
			})
		}
	}
	if _, ok := states[2].Since(states[2]); ok {
		t.Error("nothing is something")
	}
}

// One more service among 10,000.
func BenchmarkSince(b *testing.B) {
	old := Cluster{Services: map[string][]Service{}}
	for n := range 5000 {
		old.Services[fmt.Sprintf("team-%d", n)] = []Service{{Name: "web-0"}, {Name: "web-1"}}
	}
	now := Cluster{Partial: true, Services: map[string][]Service{"team-7": {{Name: "api"}}}}.After(old)
	b.ReportAllocs()
	for b.Loop() {
		if news, _ := now.Since(old); len(news.Services) != 1 {
			b.Fatal(news)
		}
	}
}
