// Package match owns which HTTP requests an intercept takes: rules over headers, path and method, which of two rules comes first, and
// whether they are in each other's way.
package match

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

const (
	// MaxHeaders, MaxMethods and MaxValue bound a rule.
	MaxHeaders, MaxMethods = 16, 16
	// MaxValue is the longest name, value or expression, in bytes.
	MaxValue = 1024
)

// Op is how a value is compared.
type Op string

// The ways of comparing. A regular expression (RE2 syntax, https://golang.org/s/re2syntax) has to match the whole value, so that "louise" does not take
// what is meant for "marylouise".
const (
	Equal  Op = "equal"
	Prefix Op = "prefix"
	Regexp Op = "regexp"
)

// Text is a condition on one value.
type Text struct {
	Op    Op     `json:"op"`
	Value string `json:"value"`
}

// Header is a condition on a header field. It holds if one of the field's lines has such a value.
type Header struct {
	// Name is compared without regard to case (RFC 9110, section 5.1). "Host" is the authority of an HTTP/2 request as well.
	Name string `json:"name"`
	Text
}

// Rule is what a request must be like: all conditions hold. The zero value takes every request.
type Rule struct {
	Headers []Header `json:"headers,omitempty"`
	// Path is the target's path as it was sent: not decoded, not cleaned, without the query.
	Path *Text `json:"path,omitempty"`
	// Methods are the methods taken, in their own case (RFC 9110, section 9.1); none means all.
	Methods []string `json:"methods,omitempty"`
	// Newer says that it was read, and has conditions that this program does not know. Without them it would take more than it should.
	Newer bool `json:"-"`
}

// UnmarshalJSON reads also rules of later versions.
func (r *Rule) UnmarshalJSON(b []byte) error {
	type plain Rule
	*r = Rule{}
	if err := json.Unmarshal(b, (*plain)(r)); err != nil {
		return err
	}
	known := json.NewDecoder(bytes.NewReader(b))
	known.DisallowUnknownFields()
	r.Newer = known.Decode(&plain{}) != nil
	return nil
}

// ErrNewer is what Compile says of a rule with conditions that it does not know.
var ErrNewer = errors.New("it has conditions that this version of doppel does not know")

// IsZero reports whether the rule takes every request.
func (r Rule) IsZero() bool {
	return len(r.Headers) == 0 && r.Path == nil && len(r.Methods) == 0 && !r.Newer
}

// PreviewHeader marks the requests that come through a preview's domain with the preview's ID.
const PreviewHeader = "x-doppel-intercept-id"

// Preview is the rule that takes the requests of a preview.
func Preview(id string) Rule {
	return Rule{Headers: []Header{{Name: PreviewHeader, Text: Text{Op: Equal, Value: id}}}}
}

// Head is the part of a request that rules look at.
type Head interface {
	Method() string
	// Path is the target's path as it was sent, without the query.
	Path() string
	// Any reports whether is says so of the value of any line of a header field, without the blanks around it. The name is in lower case.
	Any(name string, is func(value string) bool) bool
}

// Matcher is a compiled rule. Use Compile.
type Matcher struct {
	rule    Rule
	headers []headerMatcher
	path    textMatcher
}

type headerMatcher struct {
	name string
	textMatcher
	is   func(string) bool // match
	also []carrier         // of a preview's ID
}

// textMatcher is a compiled Text; the zero value takes everything.
type textMatcher struct {
	Text
	re *regexp.Regexp
}

// Compile checks a rule and prepares it.
func Compile(r Rule) (*Matcher, error) {
	r, err := r.normalized()
	if err != nil {
		return nil, err
	}
	m := &Matcher{}
	for _, h := range r.Headers {
		m.headers = append(m.headers, headerMatcher{name: h.Name, textMatcher: compile(h.Text)})
	}
	m.headers = necessary(m.headers)
	r.Headers = nil
	for i := range m.headers {
		h := &m.headers[i]
		h.is = h.match // made once: Match needs no memory
		if h.isPreview() {
			h.also = carriers(h.Value)
		}
		r.Headers = append(r.Headers, Header{h.name, h.Text})
	}
	m.rule = r
	if r.Path != nil {
		m.path = compile(*r.Path)
	}
	return m, nil
}

// necessary leaves out the conditions that follow from another one on the same header.
func necessary(all []headerMatcher) []headerMatcher {
	out := make([]headerMatcher, 0, len(all))
	for i := range all {
		follows := func(j int) bool {
			return i != j && all[i].name == all[j].name && all[j].implies(&all[i].textMatcher) && (j < i || !all[i].implies(&all[j].textMatcher))
		}
		needed := true
		for j := range all {
			needed = needed && !follows(j)
		}
		if needed {
			out = append(out, all[i])
		}
	}
	return out
}

// Rule returns the rule in its normal form: names in lower case, conditions sorted, none that follows from another.
func (m *Matcher) Rule() Rule { return m.rule }

// Match reports whether the rule takes a request.
func (m *Matcher) Match(h Head) bool { return m.unmet(h) == none }

// What unmet says, if it is not the number of a header's condition.
const (
	none = -1 - iota
	method
	path
)

// unmet is the first condition that a request does not meet.
func (m *Matcher) unmet(h Head) int {
	if len(m.rule.Methods) > 0 && !slices.Contains(m.rule.Methods, h.Method()) {
		return method
	}
	if !m.path.match(h.Path()) {
		return path
	}
	for i := range m.headers {
		if !m.headers[i].in(h) {
			return i
		}
	}
	return none
}

// Unmet is the first condition that a request does not meet, as people read it; "" if the rule takes it.
func (m *Matcher) Unmet(h Head) string {
	switch i := m.unmet(h); i {
	case none:
		return ""
	case method:
		return Rule{Methods: m.rule.Methods}.String()
	case path:
		return Rule{Path: m.rule.Path}.String()
	default:
		return Rule{Headers: m.rule.Headers[i : i+1]}.String()
	}
}

func (t *headerMatcher) in(h Head) bool {
	if h.Any(t.name, t.is) {
		return true
	}
	for i := range t.also {
		if h.Any(t.also[i].name, t.also[i].is) {
			return true
		}
	}
	return false
}

func (t *headerMatcher) isPreview() bool { return t.name == PreviewHeader && t.Op == Equal }

func (t *textMatcher) match(v string) bool {
	switch t.Op {
	case Equal:
		return v == t.Value
	case Prefix:
		return strings.HasPrefix(v, t.Value)
	case Regexp:
		return t.re.MatchString(v)
	}
	return true
}

// whole is an expression that has to match the whole value; its alternatives stay inside.
func whole(expr string) string { return `(?s)\A(?:` + expr + `)\z` }

// compile prepares a Text that is in its normal form.
func compile(t Text) textMatcher {
	m := textMatcher{Text: t}
	if t.Op == Regexp {
		m.re = regexp.MustCompile(whole(t.Value))
	}
	return m
}

// normalized checks r and returns it in its normal form.
func (r Rule) normalized() (Rule, error) {
	var errs []error
	var n Rule
	if r.Newer {
		return Rule{}, ErrNewer
	}
	if len(r.Headers) > MaxHeaders || len(r.Methods) > MaxMethods {
		return Rule{}, fmt.Errorf("a match has at most %d headers and %d methods", MaxHeaders, MaxMethods)
	}
	for _, h := range r.Headers {
		if !isToken(h.Name) {
			errs = append(errs, fmt.Errorf("%q is not the name of a header", h.Name))
			continue
		}
		t, err := h.normalized()
		if err != nil {
			errs = append(errs, fmt.Errorf("header %s: %w", h.Name, err))
		}
		n.Headers = append(n.Headers, Header{Name: strings.ToLower(h.Name), Text: t})
	}
	slices.SortFunc(n.Headers, compareHeaders)
	n.Headers = slices.Compact(n.Headers)
	if r.Path != nil {
		t, err := r.Path.normalized()
		if err == nil && t.Op != Regexp && t.Value != "*" && !strings.HasPrefix(t.Value, "/") && t.Value != "" {
			err = fmt.Errorf("%q does not begin with a slash", t.Value)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("path: %w", err))
		}
		if t.Op != Prefix || t.Value != "" { // the empty prefix is every path
			n.Path = &t
		}
	}
	for _, m := range r.Methods {
		if !isToken(m) {
			errs = append(errs, fmt.Errorf("%q is not a method", m))
		}
		n.Methods = append(n.Methods, m)
	}
	slices.Sort(n.Methods)
	n.Methods = slices.Compact(n.Methods)
	return n, errors.Join(errs...)
}

// normalized checks t. Expressions that are an equality or a prefix in truth become one, so that rules can be compared.
func (t Text) normalized() (Text, error) {
	if len(t.Value) > MaxValue {
		return t, fmt.Errorf("longer than %d bytes", MaxValue)
	}
	switch t.Op {
	case Equal, Prefix:
		return t, t.possible()
	case Regexp:
		if _, err := regexp.Compile(t.Value); err != nil {
			return t, fmt.Errorf("not a regular expression: %w", err)
		}
		if _, err := regexp.Compile(whole(t.Value)); err != nil {
			return t, fmt.Errorf("not a regular expression: %w", err)
		}
		if n := simplify(t); n.Op != Regexp {
			return n, n.possible()
		}
		return t, nil
	}
	return t, fmt.Errorf("%w: comparison %q", ErrNewer, t.Op)
}

// possible refuses an equality or a prefix that is in no request.
func (t Text) possible() error {
	if strings.ContainsFunc(t.Value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
		return fmt.Errorf("%q has a control character, which no request has", t.Value)
	}
	return nil
}

// isToken reports whether s is a token (RFC 9110, section 5.6.2), as names of headers and methods are.
func isToken(s string) bool {
	if s == "" || len(s) > MaxValue {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return true
}
