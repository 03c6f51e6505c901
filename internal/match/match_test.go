package match

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// head is a request of a test.
type head struct {
	method, path string
	fields       [][2]string // names in lower case
}

func (h head) Method() string { return h.method }
func (h head) Path() string   { return h.path }

func (h head) Any(name string, is func(string) bool) bool {
	return slices.ContainsFunc(h.fields, func(f [2]string) bool { return f[0] == name && is(f[1]) })
}

func get(path string, fields ...string) head {
	h := head{method: "GET", path: path}
	for _, f := range fields {
		k, v, _ := strings.Cut(f, "=")
		h.fields = append(h.fields, [2]string{k, v})
	}
	return h
}

// rule makes a rule of headers as people type them, "path" and "method" among them.
func rule(t testing.TB, conds ...string) *Matcher {
	t.Helper()
	var r Rule
	for _, c := range conds {
		if v, ok := strings.CutPrefix(c, "method="); ok {
			r.Methods = append(r.Methods, strings.Split(v, ",")...)
			continue
		}
		h, err := ParseHeader(c)
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "path" {
			r.Path = &h.Text
			continue
		}
		r.Headers = append(r.Headers, h)
	}
	m, err := Compile(r)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// A rule of a later version, read without what is not known of it, would take more than it should.
func TestNewer(t *testing.T) {
	for text, newer := range map[string]bool{
		`{}`: false,
		`{"headers":[{"name":"a","op":"equal","value":"b"}],"path":{"op":"prefix","value":"/"},"methods":["GET"]}`: false,
		`{"cookies":["a"]}`: true,
		`{"path":{"op":"prefix","value":"/","fold":true}}`: true,
		`{"path":{"op":"suffix","value":"/x"}}`:            true,
	} {
		var r Rule
		if err := json.Unmarshal([]byte(text), &r); err != nil {
			t.Fatal(err)
		}
		if _, err := Compile(r); errors.Is(err, ErrNewer) != newer || newer && r.IsZero() {
			t.Errorf("%s: %v, zero: %v", text, err, r.IsZero())
		}
	}
}

func TestMatch(t *testing.T) {
	for _, tc := range []struct {
		rule []string
		yes  []head
		no   []head
	}{
		{nil, []head{get("/"), get("*")}, nil},
		{[]string{"X-Id=louise"}, []head{get("/", "x-id=louise"), get("/", "x-id=other", "x-id=louise")}, []head{get("/"), get("/", "x-id=Louise"), get("/", "x-id=louise2"), get("/", "x-id="), get("/", "x-id2=louise")}},
		{[]string{"x-id~=louise"}, []head{get("/", "x-id=louise")}, []head{get("/", "x-id=marylouise"), get("/", "x-id=louise2")}},
		{[]string{"x-id~=lou|mary"}, []head{get("/", "x-id=lou"), get("/", "x-id=mary")}, []head{get("/", "x-id=louise"), get("/", "x-id=xmary")}},
		{[]string{"x-id~=(?i)LOUISE"}, []head{get("/", "x-id=louise")}, []head{get("/", "x-id=louis")}},
		{[]string{"baggage~=.*user=lou.*"}, []head{get("/", "baggage=a=1,user=louise;x=2")}, []head{get("/", "baggage=user=mary")}},
		{[]string{"x-id^=lou"}, []head{get("/", "x-id=louise"), get("/", "x-id=lou")}, []head{get("/", "x-id=lo")}},
		{[]string{"x-a=1", "x-b=2"}, []head{get("/", "x-a=1", "x-b=2")}, []head{get("/", "x-a=1"), get("/", "x-b=2")}},
		{[]string{"x-a^=1", "x-a~=.*9"}, []head{get("/", "x-a=19")}, []head{get("/", "x-a=1"), get("/", "x-a=29")}},
		{[]string{"path=/api"}, []head{get("/api")}, []head{get("/api/"), get("/API"), get("/")}},
		{[]string{"path^=/api/"}, []head{get("/api/"), get("/api/x")}, []head{get("/api")}},
		{[]string{"path~=/v[12]/.*"}, []head{get("/v1/x"), get("/v2/")}, []head{get("/v3/"), get("/x/v1/")}},
		{[]string{"method=POST,PUT"}, []head{{method: "PUT", path: "/"}}, []head{get("/"), {method: "put", path: "/"}}},
		{[]string{"path^=/a", "method=GET", "x=y"}, []head{get("/ab", "x=y")}, []head{get("/ab"), get("/b", "x=y"), {method: "HEAD", path: "/ab", fields: [][2]string{{"x", "y"}}}}},
	} {
		m := rule(t, tc.rule...)
		for _, h := range tc.yes {
			if !m.Match(h) {
				t.Errorf("%v does not take %v", tc.rule, h)
			}
		}
		for _, h := range tc.no {
			if m.Match(h) {
				t.Errorf("%v takes %v", tc.rule, h)
			}
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	long := strings.Repeat("x", MaxValue+1)
	for name, r := range map[string]Rule{
		"header name":    {Headers: []Header{{Name: "x y", Text: Text{Equal, "1"}}}},
		"no header name": {Headers: []Header{{Text: Text{Equal, "1"}}}},
		"operator":       {Headers: []Header{{Name: "x", Text: Text{"like", "1"}}}},
		"expression":     {Headers: []Header{{Name: "x", Text: Text{Regexp, "("}}}},
		"break out":      {Headers: []Header{{Name: "x", Text: Text{Regexp, "a)|(b"}}}},
		"line end":       {Headers: []Header{{Name: "x", Text: Text{Equal, "a\r\nb: c"}}}},
		"long":           {Headers: []Header{{Name: "x", Text: Text{Equal, long}}}},
		"huge":           {Headers: []Header{{Name: "x", Text: Text{Regexp, "(x{500}){500}"}}}},
		"many":           {Headers: make([]Header, MaxHeaders+1)},
		"relative path":  {Path: &Text{Equal, "api"}},
		"method":         {Methods: []string{"GET /"}},
	} {
		if m, err := Compile(r); err == nil {
			t.Errorf("%s: accepted as %v", name, m.Rule())
		}
	}
}

func TestNormalForm(t *testing.T) {
	for _, tc := range []struct{ give, want []string }{
		{[]string{"X-B=2", "x-a=1", "x-b=2"}, []string{"x-a=1", "x-b=2"}},
		{[]string{"x~=^lou$"}, []string{"x=lou"}},
		{[]string{"x~=lou"}, []string{"x=lou"}},
		{[]string{"x~=(lou)"}, []string{"x=lou"}},
		{[]string{"x~=lou.*"}, []string{"x^=lou"}},
		{[]string{"x~=^lou.*$"}, []string{"x^=lou"}},
		{[]string{"x~=.*"}, []string{"x^="}},
		{[]string{"x~="}, []string{"x="}},
		{[]string{"x~=(?i)lou"}, []string{"x~=(?i)lou"}},
		{[]string{"x~=lou.+"}, []string{"x~=lou.+"}},
		{[]string{"x^=lou", "x^=louise", "x~=lou.*"}, []string{"x^=louise"}},
		{[]string{"x^=lou", "x=louise"}, []string{"x=louise"}},
		{[]string{"path~=.*"}, nil},
		{[]string{"method=PUT,GET,PUT"}, []string{"method=GET,PUT"}},
	} {
		if d := cmp.Diff(rule(t, tc.want...).Rule(), rule(t, tc.give...).Rule()); d != "" {
			t.Errorf("%v (-want +got):\n%s", tc.give, d)
		}
	}
}

func TestCompare(t *testing.T) {
	for _, tc := range []struct {
		a, b []string
		want Relation
	}{
		{nil, nil, Same},
		{[]string{"x=1"}, nil, Within},
		{nil, []string{"path=/"}, Contains},
		{[]string{"x=1"}, []string{"X~=^1$"}, Same},
		{[]string{"x=1"}, []string{"x=2"}, Disjoint},
		{[]string{"x=1"}, []string{"y=2"}, Overlap}, // a request may have both
		{[]string{"x=1", "y=2"}, []string{"y=2"}, Within},
		{[]string{"x=1", "path^=/a"}, []string{"x=1", "path^=/b"}, Disjoint},
		{[]string{"x=1", "path^=/a"}, []string{"x=1", "path^=/ab"}, Contains},
		{[]string{"x=1", "path^=/a"}, []string{"path^=/ab"}, Overlap},
		{[]string{"x=louise"}, []string{"x~=l.+e"}, Within},
		{[]string{"x=louise"}, []string{"x~=m.+e"}, Disjoint},
		{[]string{"x~=l.+e"}, []string{"x~=m.+e"}, Disjoint},
		{[]string{"x~=l.+e"}, []string{"x~=la+e?"}, Overlap}, // "lae" is taken by both
		{[]string{"x~=l[0-9]+"}, []string{"x~=l[a-z]+"}, Unknown},
		{[]string{"x~=lou[0-9]+"}, []string{"x^=lou"}, Within},
		{[]string{"x~=a+"}, []string{"x^=b"}, Disjoint},
		{[]string{"x~=(a|b)c"}, []string{"x^=b"}, Unknown},
		{[]string{"method=GET"}, []string{"method=POST"}, Disjoint},
		{[]string{"method=GET"}, []string{"method=POST,GET"}, Within},
		{[]string{"method=GET,PUT"}, []string{"method=POST,GET"}, Overlap},
		{[]string{"method=GET"}, []string{"x=1"}, Overlap},
		{[]string{"x=1", "method=GET"}, []string{"x=2", "y~=[0-9]"}, Disjoint},
	} {
		a, b := rule(t, tc.a...), rule(t, tc.b...)
		if got := Compare(a, b); got != tc.want {
			t.Errorf("%v to %v: %v, want %v", tc.a, tc.b, got, tc.want)
		}
		back := map[Relation]Relation{Within: Contains, Contains: Within}
		want, ok := back[tc.want]
		if !ok {
			want = tc.want
		}
		if got := Compare(b, a); got != want {
			t.Errorf("%v to %v: %v, want %v", tc.b, tc.a, got, want)
		}
	}
}

// What is a preview's goes to the preview, whatever else it has, and two previews are never in each other's way.
func TestPreview(t *testing.T) {
	compile := func(r Rule) *Matcher {
		m, err := Compile(r)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	one, two := compile(Preview("one")), compile(Preview("two"))
	if Conflict(one, two) || !Conflict(one, one) {
		t.Error("previews are told apart by their ID alone")
	}
	for _, conditions := range [][]string{nil, {"x=1"}, {"x=1", "y=2", "path=/", "method=GET"}, {PreviewHeader + "^=o"}} {
		other := rule(t, conditions...)
		if Conflict(one, other) || Conflict(other, one) || Order(one, other) >= 0 || Order(other, one) <= 0 {
			t.Errorf("%v: the preview does not come first, or is in the way", conditions)
		}
	}
	if !Conflict(rule(t, "x=1"), rule(t, "y=2")) || Conflict(rule(t, "x=1"), rule(t, "x=2")) || Conflict(rule(t, "x=1"), rule(t)) {
		t.Error("overlaps")
	}
}

// pool has few values, so that random rules and requests meet often.
var (
	poolNames  = []string{"x", "y"}
	poolValues = []string{"", "a", "ab", "abc", "b", "bc", "a1", "a22"}
	poolExprs  = []string{"a.*", "a+", "a|b", "(ab|b)c?", "[ab]+", "a[0-9]+", ".*b", "ab?", ".+", "(?i)AB", "a.+", ".*c$"}
	poolPaths  = []string{"/", "/a", "/ab", "/a/b", "/b"}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func randomText(r *rand.Rand, values []string) Text {
	switch r.IntN(3) {
	case 0:
		return Text{Equal, pick(r, values)}
	case 1:
		return Text{Prefix, pick(r, values)}
	}
	return Text{Regexp, pick(r, poolExprs)}
}

func randomRule(r *rand.Rand) Rule {
	var out Rule
	for range r.IntN(4) {
		out.Headers = append(out.Headers, Header{pick(r, poolNames), randomText(r, poolValues)})
	}
	if r.IntN(3) == 0 {
		t := randomText(r, poolPaths)
		if t.Op == Regexp {
			t.Value = "/" + t.Value
		}
		out.Path = &t
	}
	if r.IntN(3) == 0 {
		out.Methods = []string{pick(r, []string{"GET", "PUT"})}
	}
	return out
}

// universe is every request with one value a header of the pool, and without the header.
func universe() []head {
	var out []head
	for _, m := range []string{"GET", "PUT", "HEAD"} {
		for _, p := range poolPaths {
			for _, x := range append([]string{"-"}, poolValues...) {
				for _, y := range append([]string{"-"}, poolValues...) {
					h := head{method: m, path: p}
					for n, v := range map[string]string{"x": x, "y": y} {
						if v != "-" {
							h.fields = append(h.fields, [2]string{n, v})
						}
					}
					out = append(out, h)
				}
			}
		}
	}
	return out
}

// TestRelationsHold compares what Compare and Order say of random rules with what the rules do.
func TestRelationsHold(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	all := universe()
	seen := map[Relation]int{}
	for range 3000 {
		ra, rb := randomRule(r), randomRule(r)
		a, err := Compile(ra)
		if err != nil {
			t.Fatal(err)
		}
		b, err := Compile(rb)
		if err != nil {
			t.Fatal(err)
		}
		rel := Compare(a, b)
		seen[rel]++
		switch o := Order(a, b); {
		case rel == Within && o >= 0, rel == Contains && o <= 0:
			t.Fatalf("order %d of %v and %v, which are %d", o, ra, rb, rel)
		case o != -Order(b, a):
			t.Fatalf("no order of %v and %v", ra, rb)
		}
		for _, h := range all {
			ma, mb := a.Match(h), b.Match(h)
			if rel == Same && ma != mb || rel == Within && ma && !mb || rel == Contains && mb && !ma || rel == Disjoint && ma && mb {
				t.Fatalf("%v and %v are said to be %d, but of %v: %v %v", ra, rb, rel, h, ma, mb)
			}
		}
	}
	for rel := Unknown; rel <= Overlap; rel++ {
		if seen[rel] < 5 {
			t.Errorf("relation %d came up %d times only", rel, seen[rel])
		}
	}
}

// TestOverlapHasWitness checks that what is called an overlap is one.
func TestOverlapHasWitness(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	n := 0
	for range 3000 {
		a, errA := Compile(randomRule(r))
		b, errB := Compile(randomRule(r))
		if errA != nil || errB != nil {
			t.Fatal(errA, errB)
		}
		if Compare(a, b) != Overlap {
			continue
		}
		n++
		if !slices.ContainsFunc(witnesses(a, b), func(h head) bool { return a.Match(h) && b.Match(h) }) {
			t.Fatalf("%v and %v are said to overlap, and no request shows it", a.Rule(), b.Rule())
		}
	}
	if n == 0 {
		t.Error("no overlap came up")
	}
}

// witnesses are requests made of the examples of both rules.
func witnesses(a, b *Matcher) []head {
	out := []head{{}}
	extend := func(fn func(head, string) head, ts []*textMatcher) {
		if len(ts) == 0 {
			return
		}
		var next []head
		for _, h := range out {
			for _, t := range ts {
				v, _ := t.example()
				next = append(next, fn(h, v))
			}
		}
		out = next
	}
	var paths []*textMatcher
	byName := map[string][]*textMatcher{}
	methods := []string{"GET"}
	for _, m := range []*Matcher{a, b} {
		if m.rule.Path != nil {
			paths = append(paths, &m.path)
		}
		for i := range m.headers {
			byName[m.headers[i].name] = append(byName[m.headers[i].name], &m.headers[i].textMatcher)
		}
		methods = append(methods, m.rule.Methods...)
	}
	extend(func(h head, v string) head { h.path = v; return h }, paths)
	for name, ts := range byName {
		extend(func(h head, v string) head {
			h.fields = append(slices.Clone(h.fields), [2]string{name, v})
			return h
		}, ts)
	}
	var all []head
	for _, h := range out {
		for _, m := range methods {
			h.method = m
			all = append(all, h)
		}
	}
	return all
}

func TestLines(t *testing.T) {
	m := rule(t, "Blog-Demo-Id~=lou[a-z]+", "x=1", "path^=/api", "method=GET,POST")
	want := []string{`header("blog-demo-id") ~= regexp("lou[a-z]+")`, `header("x") == "1"`, `path ^= "/api"`, `method in (GET, POST)`}
	if d := cmp.Diff(want, m.Rule().Lines()); d != "" {
		t.Error(d)
	}
	if got := (Rule{}).String(); got != "all requests" {
		t.Error(got)
	}
}

func TestParseHeaderRefuses(t *testing.T) {
	for _, s := range []string{"", "x", "=1", "x y=1", "x~=("} {
		if h, err := ParseHeader(s); err == nil {
			t.Errorf("%q: %v", s, h)
		}
	}
	if _, err := ParseHeaderRegexp("x"); err == nil {
		t.Error("no value")
	}
	h, err := ParseHeaderRegexp("blog-demo-id=louise")
	if err != nil || h != (Header{"blog-demo-id", Text{Regexp, "louise"}}) {
		t.Errorf("%v %v", h, err)
	}
}

func FuzzCompile(f *testing.F) {
	f.Add("x", "regexp", "a|b", "/api", "GET")
	f.Add("x-id", "prefix", "lou", "/", "")
	f.Add("x", "equal", "", "*", "PUT")
	f.Fuzz(func(t *testing.T, name, op, value, path, method string) {
		r := Rule{Headers: []Header{{name, Text{Op(op), value}}}, Path: &Text{Prefix, path}}
		if method != "" {
			r.Methods = []string{method}
		}
		m, err := Compile(r)
		if err != nil {
			return
		}
		again, err := Compile(m.Rule())
		if err != nil {
			t.Fatalf("the normal form %v is refused: %v", m.Rule(), err)
		}
		if d := cmp.Diff(m.Rule(), again.Rule()); d != "" {
			t.Fatalf("the normal form is not normal: %s", d)
		}
		if rel := Compare(m, again); rel != Same {
			t.Fatalf("a rule is %d to itself", rel)
		}
		if v, ok := m.headers[0].example(); ok && !m.headers[0].match(v) {
			t.Fatalf("%q is no example of %v", v, m.Rule())
		}
	})
}

func BenchmarkMatch(b *testing.B) {
	m := rule(b, "blog-demo-id~=lou[a-z]+", "path^=/api/")
	h := get("/api/v1/things", "accept=*/*", "user-agent=curl/8", "blog-demo-id=louise")
	b.ReportAllocs()
	for b.Loop() {
		if !m.Match(h) {
			b.Fatal(fmt.Sprint(h))
		}
	}
}

// Unmet names the first condition that a request does not meet, and nothing where Match is content.
func TestUnmet(t *testing.T) {
	m := rule(t, "method=GET,PUT", "path^=/api", "x-user=lou", "x-team~=a|b")
	for _, tt := range []struct {
		head head
		want string
	}{
		{get("/api/x", "x-user=lou", "x-team=b"), ""},
		{head{method: "POST", path: "/"}, "method in (GET, PUT)"},
		{get("/", "x-user=lou", "x-team=b"), `path ^= "/api"`},
		{get("/api", "x-user=may", "x-team=a"), `header("x-user") == "lou"`},
		{get("/api", "x-user=lou"), `header("x-team") ~= regexp("a|b")`},
	} {
		if got := m.Unmet(tt.head); got != tt.want || m.Match(tt.head) != (got == "") {
			t.Errorf("%v: %q, want %q", tt.head, got, tt.want)
		}
	}
}
