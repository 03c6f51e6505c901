package match

import (
	"fmt"
	"strings"
)

// ParseHeader reads a condition on a header as people type it: NAME=VALUE, NAME^=PREFIX or NAME~=REGEXP.
func ParseHeader(s string) (Header, error) {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return Header{}, fmt.Errorf("%q: want NAME=VALUE, NAME^=PREFIX or NAME~=REGEXP", s)
	}
	op := Equal
	switch name[len(name)-1] { // both are allowed in names (RFC 9110, section 5.6.2), and no header ends with one
	case '^':
		op, name = Prefix, name[:len(name)-1]
	case '~':
		op, name = Regexp, name[:len(name)-1]
	}
	return checked(Header{Name: name, Text: Text{op, value}})
}

// ParseHeaderRegexp reads NAME=REGEXP.
func ParseHeaderRegexp(s string) (Header, error) {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return Header{}, fmt.Errorf("%q: want NAME=REGEXP", s)
	}
	return checked(Header{Name: name, Text: Text{Regexp, value}})
}

func checked(h Header) (Header, error) {
	_, err := Compile(Rule{Headers: []Header{h}})
	return h, err
}

// Lines describe the rule for people, one condition a line; none for a rule that takes every request.
func (r Rule) Lines() []string {
	var out []string
	for _, h := range r.Headers {
		out = append(out, fmt.Sprintf("header(%q) %s", h.Name, h.Text))
	}
	if r.Path != nil {
		out = append(out, "path "+r.Path.String())
	}
	if len(r.Methods) > 0 {
		out = append(out, "method in ("+strings.Join(r.Methods, ", ")+")")
	}
	return out
}

// String is the rule on one line.
func (r Rule) String() string {
	if r.IsZero() {
		return "all requests"
	}
	return strings.Join(r.Lines(), " and ")
}

// String is the condition as it stands behind the name of a value.
func (t Text) String() string {
	switch t.Op {
	case Prefix:
		return fmt.Sprintf("^= %q", t.Value)
	case Regexp:
		return fmt.Sprintf("~= regexp(%q)", t.Value)
	case Equal:
	}
	return fmt.Sprintf("== %q", t.Value)
}
