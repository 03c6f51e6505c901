package cluster

import (
	"net"
	"testing"

	"github.com/doppel-dev/doppel/lab/internal/plan"
)

func TestTakes(t *testing.T) {
	l := plan.Lab{Index: 3} // 10.77.3.0/24
	for dst, want := range map[string]bool{
		"0.0.0.0/0":     false,
		"0.0.0.0/1":     false, // a default route in halves
		"10.0.0.0/8":    false, // a VPN
		"10.64.0.0/12":  false,
		"10.77.0.0/16":  true,
		"10.77.3.0/24":  true,
		"10.77.3.7/32":  true,
		"10.77.3.0/28":  true,
		"10.77.4.0/24":  false,
		"172.17.0.0/16": false,
	} {
		_, n, err := net.ParseCIDR(dst)
		if err != nil {
			t.Fatal(err)
		}
		if got := takes(n, l); got != want {
			t.Errorf("%s: %v, want %v", dst, got, want)
		}
	}
	if takes(nil, l) {
		t.Error("a route without a destination is in the way")
	}
}
