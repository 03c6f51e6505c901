package v1alpha1

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/doppel-dev/doppel/internal/match"
)

func TestHTTPMatchKeepsRule(t *testing.T) {
	for _, r := range []match.Rule{
		{},
		{Headers: []match.Header{{Name: "X-Id", Text: match.Text{Op: match.Regexp, Value: "lou.*"}}, {Name: "a", Text: match.Text{Op: match.Equal}}}},
		{Path: &match.Text{Op: match.Prefix, Value: "/api"}, Methods: []string{"GET", "PUT"}},
	} {
		if d := cmp.Diff(r, NewHTTPMatch(r).Rule()); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
	if NewHTTPMatch(match.Rule{}) != nil {
		t.Error("a rule that takes everything is no match")
	}
}
