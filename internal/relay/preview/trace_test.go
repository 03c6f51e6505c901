package preview

import (
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCarry(t *testing.T) {
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
	long := strings.Repeat("a", 8100)
	many := strings.TrimSuffix(strings.Repeat("k=v,", 64), ",")
	states := strings.TrimSuffix(strings.Repeat("k=v,", 32), ",")
	for name, tt := range map[string]struct {
		in        string
		head, out http.Header
	}{
		"nowhere":                    {"", http.Header{"Baggage": {"a=b", "c=d"}, "Tracestate": {"x=1, y=2"}}, http.Header{"Baggage": {"a=b", "c=d"}, "Tracestate": {"x=1, y=2"}}},
		"nowhere, a visitor's":       {"", http.Header{"Baggage": {"a=b, x-doppel-intercept-id=evil;p"}, "Tracestate": {"doppel=evil"}}, http.Header{"Baggage": {"a=b"}}},
		"baggage":                    {"baggage", http.Header{}, http.Header{"Baggage": {"x-doppel-intercept-id=ID"}}},
		"baggage beside others":      {"baggage", http.Header{"Baggage": {"a=b;p=1", "c=d,x-doppel-intercept-id=evil"}}, http.Header{"Baggage": {"a=b;p=1,c=d,x-doppel-intercept-id=ID"}}},
		"baggage that is full":       {"baggage", http.Header{"Baggage": {many}}, http.Header{"Baggage": {many}}},
		"baggage that is long":       {"baggage", http.Header{"Baggage": {"k=" + long + strings.Repeat("b", 80)}}, http.Header{"Baggage": {"k=" + long + strings.Repeat("b", 80)}}},
		"tracestate":                 {"tracestate", http.Header{"Traceparent": {parent}, "Tracestate": {"x=1", "y=2"}}, http.Header{"Traceparent": {parent}, "Tracestate": {"doppel=ID,x=1,y=2"}}},
		"tracestate that is full":    {"tracestate", http.Header{"Traceparent": {parent}, "Tracestate": {states}}, http.Header{"Traceparent": {parent}, "Tracestate": {"doppel=ID," + states[4:]}}},
		"tracestate, a visitor's":    {"tracestate", http.Header{"Traceparent": {parent}, "Tracestate": {"doppel=evil,x=1"}}, http.Header{"Traceparent": {parent}, "Tracestate": {"doppel=ID,x=1"}}},
		"tracestate without a trace": {"tracestate", http.Header{"Traceparent": {"no"}, "Tracestate": {"x=1"}}, http.Header{"Traceparent": {"NEW"}, "Tracestate": {"doppel=ID"}}},
	} {
		carry(tt.head, tt.in, "ID")
		if p := tt.head.Get("Traceparent"); p != "" && p != parent && regexp.MustCompile(`^00-[0-9a-f]{32}-[0-9a-f]{16}-01$`).MatchString(p) {
			tt.head.Set("Traceparent", "NEW")
		}
		if diff := cmp.Diff(tt.out, tt.head); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}
