package preview

import (
	"net/http"
	"slices"
	"testing"
)

// An app may clear what is its own, and not the cookies of the domain: the visitor's login is among them.
func TestClearSiteData(t *testing.T) {
	for _, tt := range []struct{ from, want []string }{
		{nil, nil},
		{[]string{`"cache"`}, []string{`"cache"`}},
		{[]string{`"cookies"`}, nil},
		{[]string{`"cache","cookies" , "storage"`}, []string{`"cache", "storage"`}},
		{[]string{`"*"`}, []string{`"cache", "storage", "executionContexts"`}},
		{[]string{`"Cookies"`, `"cookies";x`, `"clientHints"`}, []string{`"clientHints"`}},
	} {
		resp := &http.Response{Header: http.Header{}}
		for _, line := range tt.from {
			resp.Header.Add("Clear-Site-Data", line)
		}
		if err := clean(resp); err != nil || !slices.Equal(resp.Header.Values("Clear-Site-Data"), tt.want) {
			t.Errorf("%q: %q, %v", tt.from, resp.Header.Values("Clear-Site-Data"), err)
		}
	}
}
