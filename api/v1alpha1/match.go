package v1alpha1

import "github.com/doppel-dev/doppel/internal/match"

// NewHTTPMatch is a rule as it stands on an Intercept, nil for one that takes every request.
func NewHTTPMatch(r match.Rule) *HTTPMatch {
	if r.IsZero() {
		return nil
	}
	m := &HTTPMatch{Methods: r.Methods}
	for _, h := range r.Headers {
		m.Headers = append(m.Headers, HeaderMatch{Name: h.Name, TextMatch: TextMatch{Op: string(h.Op), Value: h.Value}})
	}
	if r.Path != nil {
		m.Path = &TextMatch{Op: string(r.Path.Op), Value: r.Path.Value}
	}
	return m
}

// Rule is the match as a rule, which has not been checked.
func (m *HTTPMatch) Rule() match.Rule {
	if m == nil {
		return match.Rule{}
	}
	r := match.Rule{Methods: m.Methods}
	for _, h := range m.Headers {
		r.Headers = append(r.Headers, match.Header{Name: h.Name, Text: h.rule()})
	}
	if m.Path != nil {
		t := m.Path.rule()
		r.Path = &t
	}
	return r
}

func (t TextMatch) rule() match.Text { return match.Text{Op: match.Op(t.Op), Value: t.Value} }

// Rules are what the intercept takes: a request that one of them takes.
func (s *InterceptSpec) Rules() []match.Rule {
	if s.Preview == nil {
		return []match.Rule{s.HTTP.Rule()}
	}
	rules := []match.Rule{match.Preview(s.Preview.ID)}
	if s.HTTP != nil {
		rules = append(rules, s.HTTP.Rule())
	}
	return rules
}
