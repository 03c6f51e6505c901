package subnets

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/osroute"
)

// FuzzCluster: whatever a manager says that its cluster is, what this laptop must not lose stays where it was.
func FuzzCluster(f *testing.F) {
	for _, s := range []string{
		`{"domain":"cluster.local","serviceCIDRs":["10.96.0.0/16"],"podCIDRs":["10.1.0.0/24","10.1.1.0/24"],"nodes":["192.168.1.5"],"services":{"shop":[{"name":"web"},{"name":"db","headless":true}]}}`,
		`{"serviceCIDRs":["0.0.0.0/0","0.0.0.0/1","128.0.0.0/1","127.0.0.0/8","::/0","fe80::/10"],"podCIDRs":["192.168.0.0/16","203.0.113.7/32",""],"nodes":["203.0.113.7","127.0.0.1",""]}`,
		`{"podCIDRs":["192.168.1.1/24","::ffff:10.0.0.0/104"],"nodes":["fe80::1%eth0","::ffff:10.0.0.1"],"services":{"":[{}],".":[{"name":"."}],"com":[{"name":"example"}]}}`,
		`{"serviceCIDRs":["10.0.0.0/8"],"podCIDRs":["10.0.0.0/9","10.128.0.0/9","10.4.0.0/14"]}`,
	} {
		f.Add([]byte(s))
	}
	server, never, lan := netip.MustParseAddr("203.0.113.7"), netip.MustParsePrefix("10.4.0.0/16"), netip.MustParsePrefix("192.168.1.0/24")
	untouchable := []netip.Prefix{netip.PrefixFrom(server, 32), never, lan, netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10")}
	f.Fuzz(func(t *testing.T, text []byte) {
		var info control.Cluster
		if json.Unmarshal(text, &info) != nil || len(info.ServiceCIDRs)+len(info.PodCIDRs)+len(info.Nodes) > 50 {
			return
		}
		plan := Decide(Facts{
			Clusters: []Cluster{{Session: "s", Services: info.ServiceCIDRs, Pods: info.PodCIDRs, Nodes: info.Nodes, Servers: []netip.Addr{server}, NeverProxy: []netip.Prefix{never}}},
			Others:   []osroute.Existing{{Prefix: lan, Link: "eth0"}},
		})
		for _, r := range plan.Routes() {
			if err := osroute.Check(r); err != nil {
				t.Error(err)
			}
			for _, u := range untouchable {
				if r.Overlaps(u) {
					t.Errorf("%v leads %v into the device", r, u)
				}
			}
		}
	})
}
