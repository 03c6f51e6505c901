package userd

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// A wish becomes an intercept to this machine's loopback, without files, and takes nothing from anybody.
func TestWished(t *testing.T) {
	got := wished(relayapi.Wish{Connection: "prod", Namespace: "shop", Workload: "deployment/web", Port: "http", Local: 3000, Header: "x-user", Value: "ann"})
	want := localapi.InterceptRequest{
		Name: "web", Workload: "deployment/web", Namespace: "shop", Address: "127.0.0.1", Ports: []string{"3000:http"}, Mount: localapi.MountRequest{None: true},
		Match: match.Rule{Headers: []match.Header{{Name: "x-user", Text: match.Text{Op: match.Equal, Value: "ann"}}}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	got = wished(relayapi.Wish{Connection: "prod", Namespace: "shop", Workload: "web", Local: 3000})
	if diff := cmp.Diff(localapi.InterceptRequest{Name: "web", Workload: "web", Namespace: "shop", Address: "127.0.0.1", Ports: []string{"3000"}, Mount: localapi.MountRequest{None: true}}, got); diff != "" {
		t.Error(diff)
	}
}
