package relay

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/relayapi"
)

// A preview's ID is in the header of tracing that its owner has chosen, and in no other.
func TestPropagate(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	c := ann.cluster("prod", func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(rw, r.Header.Get("Baggage")+"|"+r.Header.Get("Tracestate"))
	})
	create := relayapi.CreatePreviewRequest{Cluster: c.id, Name: "web", Namespace: "shop", Workload: "web"}
	for how, want := range map[string]string{"": "|", "baggage": "x-doppel-intercept-id=%|", "tracestate": "|doppel=%"} {
		var p relayapi.Preview
		create.Propagate = how
		ann.must(relayapi.PathCreatePreview, create, &p)
		ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: p.Host, Public: true}, nil)
		want = strings.Replace(want, "%", p.ID, 1)
		if got := w.browser().visit(p.URL); got.body != want {
			t.Errorf("%q: %q, want %q", how, got.body, want)
		}
	}
	create.Propagate = "cookie"
	if status := ann.call(relayapi.PathCreatePreview, create, nil); status != http.StatusBadRequest {
		t.Errorf("%d", status)
	}
}
