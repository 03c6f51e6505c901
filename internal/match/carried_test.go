package match

import (
	"slices"
	"testing"
)

type carrying map[string][]string

func (c carrying) Method() string { return "GET" }
func (c carrying) Path() string   { return "/" }

func (c carrying) Any(name string, is func(string) bool) bool {
	return slices.ContainsFunc(c[name], is)
}

// The requests of a preview are known by what tracing passes on as well, and by nothing else.
func TestCarried(t *testing.T) {
	m, err := Compile(Preview("abc"))
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		head carrying
		want bool
	}{
		"header":                   {carrying{PreviewHeader: {"abc"}}, true},
		"baggage":                  {carrying{"baggage": {"x-doppel-intercept-id=abc"}}, true},
		"baggage among others":     {carrying{"baggage": {"user=ann;ttl=1", "a=b , x-doppel-intercept-id = abc ; p=1,c=d"}}, true},
		"tracestate":               {carrying{"tracestate": {"other=1,doppel=abc"}}, true},
		"another's ID":             {carrying{"baggage": {"x-doppel-intercept-id=abcd"}, "tracestate": {"doppel=ab"}}, false},
		"the other header's key":   {carrying{"baggage": {"doppel=abc"}, "tracestate": {"x-doppel-intercept-id=abc"}}, false},
		"a key's end":              {carrying{"baggage": {"y-x-doppel-intercept-id=abc"}, "tracestate": {"x@doppel=abc"}}, false},
		"in a property":            {carrying{"baggage": {"a=b;x-doppel-intercept-id=abc"}}, false},
		"no member":                {carrying{"baggage": {"abc", "", ",,=", "x-doppel-intercept-id"}}, false},
		"another header":           {carrying{"x-baggage": {"x-doppel-intercept-id=abc"}}, false},
		"another ID in the header": {carrying{PreviewHeader: {"z"}, "tracestate": {"doppel=abc"}}, true},
	} {
		if got := m.Match(tt.head); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	// Only an ID is looked for there, and not what a rule of a user's own says of the header.
	m, err = Compile(Rule{Headers: []Header{{Name: PreviewHeader, Text: Text{Op: Prefix, Value: "a"}}}})
	if err != nil {
		t.Fatal(err)
	}
	if m.Match(carrying{"baggage": {"x-doppel-intercept-id=abc"}}) {
		t.Error("a prefix")
	}
}
