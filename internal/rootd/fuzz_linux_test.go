package rootd

import (
	"net/netip"
	"testing"

	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/rootapi"
)

// FuzzRequest takes packets of a peer as far as the decision, before anything is touched: whatever it asks for, no route is one that may
// never be, and none leads excluded addresses or the machine's resolver into the device.
func FuzzRequest(f *testing.F) {
	resolver := netip.MustParseAddr("10.96.5.5")
	existing := []osroute.Existing{{Prefix: netip.MustParsePrefix("10.96.8.0/24"), Link: "eth0"}}
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := rootapi.Decode(p)
		if err != nil || m.Network == nil {
			return
		}
		n := m.Network
		plan, err := osroute.Make(osroute.Want{Routes: n.Routes, Exclude: n.Exclude, Resolvers: []netip.Addr{resolver}}, existing)
		if err != nil {
			return
		}
		if len(plan.Routes) > osroute.MaxRoutes {
			t.Errorf("%d routes", len(plan.Routes))
		}
		for _, r := range plan.Routes {
			if err := osroute.Check(r); err != nil {
				t.Error(err)
			}
			if r.Contains(resolver) {
				t.Errorf("%v leads the resolver into the device", r)
			}
			for _, x := range n.Exclude {
				if r.Overlaps(x) {
					t.Errorf("%v leads excluded %v into the device", r, x)
				}
			}
		}
	})
}
