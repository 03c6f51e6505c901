package match

import (
	"cmp"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
)

// Relation is how the requests that two rules take lie to each other.
type Relation int

// The relations of rule a to rule b.
const (
	Unknown  Relation = iota // nothing could be proved
	Disjoint                 // no request is taken by both
	Same                     // each takes what the other does
	Within                   // b takes all that a takes, and more: a is the more specific one
	Contains                 // the reverse
	Overlap                  // some request is taken by both, and each takes others that the other does not, as far as can be proved
)

// Compare says how the requests of a lie to those of b. It treats a header as having one value, as people do: a request that sends a
// field twice may be taken by two rules that are Disjoint here, and then goes to the first in Order.
func Compare(a, b *Matcher) Relation {
	within, contains := a.implies(b), b.implies(a)
	switch {
	case within && contains:
		return Same
	case within:
		return Within
	case contains:
		return Contains
	}
	return a.meet(b)
}

// Conflict reports whether two intercepts of one port must not have these rules at once: it would not be plain who gets a request. The
// requests of a preview are the preview's, whatever else they have: that is the link that somebody follows.
func Conflict(a, b *Matcher) bool {
	if a.marked() != b.marked() {
		return false
	}
	r := Compare(a, b)
	return r == Same || r == Overlap
}

// marked says that the rule takes requests of one preview only.
func (m *Matcher) marked() bool {
	return slices.ContainsFunc(m.headers, func(h headerMatcher) bool { return h.isPreview() })
}

// Order compares two rules for the order in which they are tried: those of previews first, then the more specific one. Rules that differ have an order, so that every agent
// uses the same. If Compare says Within, Order is negative.
func Order(a, b *Matcher) int {
	return cmp.Or(
		-cmp.Compare(bit(a.marked()), bit(b.marked())),
		-cmp.Compare(a.conditions(), b.conditions()),
		-cmp.Compare(a.count(Equal), b.count(Equal)),
		-cmp.Compare(a.count(Regexp), b.count(Regexp)),
		-cmp.Compare(a.length(), b.length()),
		cmp.Compare(len(a.rule.Methods), len(b.rule.Methods)),
		slices.CompareFunc(a.rule.Headers, b.rule.Headers, compareHeaders),
		compareText(a.path.Text, b.path.Text),
		slices.Compare(a.rule.Methods, b.rule.Methods),
	)
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// texts yields the conditions on values.
func (m *Matcher) texts(yield func(Text) bool) {
	for i := range m.headers {
		if !yield(m.headers[i].Text) {
			return
		}
	}
	if m.rule.Path != nil {
		yield(m.path.Text)
	}
}

// conditions counts what the rule asks of a request: each header once, path, method.
func (m *Matcher) conditions() int {
	n := 0
	for i := range m.headers {
		if i == 0 || m.headers[i].name != m.headers[i-1].name {
			n++
		}
	}
	if m.rule.Path != nil {
		n++
	}
	if len(m.rule.Methods) > 0 {
		n++
	}
	return n
}

func (m *Matcher) count(op Op) int {
	n := 0
	for t := range m.texts {
		if t.Op == op {
			n++
		}
	}
	return n
}

// length sums up the prefixes: the longer ones are the more specific ones.
func (m *Matcher) length() int {
	n := 0
	for t := range m.texts {
		if t.Op == Prefix {
			n += len(t.Value)
		}
	}
	return n
}

// implies reports whether it can be proved that b takes all that a takes: each condition of b follows from one of a on the same thing.
func (a *Matcher) implies(b *Matcher) bool {
	if len(b.rule.Methods) > 0 {
		if len(a.rule.Methods) == 0 {
			return false
		}
		for _, m := range a.rule.Methods {
			if !slices.Contains(b.rule.Methods, m) {
				return false
			}
		}
	}
	if b.rule.Path != nil && (a.rule.Path == nil || !a.path.implies(&b.path)) {
		return false
	}
	for i := range b.headers {
		if !slices.ContainsFunc(a.headers, func(h headerMatcher) bool {
			return h.name == b.headers[i].name && h.implies(&b.headers[i].textMatcher)
		}) {
			return false
		}
	}
	return true
}

// implies reports whether every value that t takes is taken by u, as far as can be proved.
func (t *textMatcher) implies(u *textMatcher) bool {
	switch {
	case t.Text == u.Text:
		return true
	case t.Op == Equal:
		return u.match(t.Value)
	case t.Op == Prefix:
		return u.Op == Prefix && strings.HasPrefix(t.Value, u.Value)
	case t.Op == Regexp && u.Op == Prefix:
		return strings.HasPrefix(literalPrefix(t.Value), u.Value)
	}
	return false
}

// meet decides between Disjoint, Overlap and Unknown.
func (a *Matcher) meet(b *Matcher) Relation {
	rel := Overlap
	worse := func(r Relation) {
		if r == Disjoint || rel == Overlap {
			rel = r
		}
	}
	if len(a.rule.Methods) > 0 && len(b.rule.Methods) > 0 && !slices.ContainsFunc(a.rule.Methods, func(m string) bool { return slices.Contains(b.rule.Methods, m) }) {
		return Disjoint
	}
	var paths []*textMatcher
	for _, m := range []*Matcher{a, b} {
		if m.rule.Path != nil {
			paths = append(paths, &m.path)
		}
	}
	worse(meetTexts(paths))
	byName := map[string][]*textMatcher{}
	for _, m := range []*Matcher{a, b} {
		for i := range m.headers {
			byName[m.headers[i].name] = append(byName[m.headers[i].name], &m.headers[i].textMatcher)
		}
	}
	for _, ts := range byName {
		if rel == Disjoint {
			break
		}
		worse(meetTexts(ts))
	}
	return rel
}

// meetTexts says whether one value can satisfy all conditions: Overlap if one was found, Disjoint if there is none, else Unknown.
func meetTexts(ts []*textMatcher) Relation {
	for _, t := range ts {
		if v, ok := t.example(); ok && takenByAll(ts, v) {
			return Overlap
		}
	}
	if len(ts) == 0 {
		return Overlap
	}
	for i, t := range ts {
		for _, u := range ts[i+1:] {
			if t.excludes(u) || u.excludes(t) {
				return Disjoint
			}
		}
	}
	return Unknown
}

func takenByAll(ts []*textMatcher, v string) bool {
	return !slices.ContainsFunc(ts, func(t *textMatcher) bool { return !t.match(v) })
}

// excludes reports whether no value that t takes is taken by u, as far as can be proved from t's side.
func (t *textMatcher) excludes(u *textMatcher) bool {
	switch {
	case t.Op == Equal:
		return !u.match(t.Value)
	case t.Op == Prefix && u.Op == Prefix:
		return !strings.HasPrefix(t.Value, u.Value) && !strings.HasPrefix(u.Value, t.Value)
	case t.Op == Prefix && u.Op == Regexp:
		return apart(t.Value, literalPrefix(u.Value))
	case t.Op == Regexp && u.Op == Regexp:
		return apart(literalPrefix(t.Value), literalPrefix(u.Value))
	}
	return false
}

// apart reports whether nothing begins with both.
func apart(a, b string) bool { return !strings.HasPrefix(a, b) && !strings.HasPrefix(b, a) }

// example returns a value that t takes, if one is easily found.
func (t *textMatcher) example() (string, bool) {
	if t.Op != Regexp {
		return t.Value, true
	}
	re, err := syntax.Parse(t.Value, syntax.Perl)
	if err != nil {
		return "", false
	}
	var b strings.Builder
	if !exemplify(&b, re, 0) {
		return "", false
	}
	return b.String(), t.re.MatchString(b.String()) // assertions inside may not hold
}

// exampleMax bounds an example and the depth of the search for it.
const exampleMax = 4 * MaxValue

// exemplify appends something that re matches.
func exemplify(b *strings.Builder, re *syntax.Regexp, depth int) bool {
	if depth > 100 || b.Len() > exampleMax {
		return false
	}
	times := func(n int) bool {
		for range n {
			if !exemplify(b, re.Sub[0], depth+1) {
				return false
			}
		}
		return true
	}
	switch re.Op {
	case syntax.OpLiteral:
		for _, r := range re.Rune {
			b.WriteRune(r)
		}
		return true
	case syntax.OpCharClass:
		if len(re.Rune) == 0 {
			return false
		}
		r := re.Rune[0]
		for i := 0; i+1 < len(re.Rune); i += 2 { // rather one that a request may have
			if re.Rune[i] <= 'a' && 'a' <= re.Rune[i+1] {
				r = 'a'
			} else if r < ' ' && re.Rune[i+1] >= '0' {
				r = max(re.Rune[i], '0')
			}
		}
		b.WriteRune(r)
		return true
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		b.WriteByte('a')
		return true
	case syntax.OpCapture:
		return times(1)
	case syntax.OpPlus:
		return times(1)
	case syntax.OpRepeat:
		return times(re.Min)
	case syntax.OpStar, syntax.OpQuest, syntax.OpEmptyMatch, syntax.OpBeginLine, syntax.OpEndLine, syntax.OpBeginText, syntax.OpEndText, syntax.OpWordBoundary, syntax.OpNoWordBoundary:
		return true
	case syntax.OpAlternate:
		return exemplify(b, re.Sub[0], depth+1)
	case syntax.OpNoMatch:
	case syntax.OpConcat:
		for _, s := range re.Sub {
			if !exemplify(b, s, depth+1) {
				return false
			}
		}
		return true
	}
	return false
}

// literalPrefix is what every value that the expression takes begins with.
func literalPrefix(expr string) string {
	p, _ := regexp.MustCompile(expr).LiteralPrefix() // checked before
	return p
}

// simplify turns an expression that is an equality or a prefix in truth into one.
func simplify(t Text) Text {
	re, err := syntax.Parse(t.Value, syntax.Perl)
	if err != nil {
		return t
	}
	subs := flatten(re)
	lit, rest := "", subs
	if len(rest) > 0 && rest[0].Op == syntax.OpBeginText {
		rest = rest[1:]
	}
	if len(rest) > 0 && rest[0].Op == syntax.OpLiteral && rest[0].Flags&syntax.FoldCase == 0 {
		lit, rest = string(rest[0].Rune), rest[1:]
	}
	if len(rest) == 1 && rest[0].Op == syntax.OpEndText || len(rest) == 0 {
		return Text{Equal, lit}
	}
	if rest[0].Op == syntax.OpStar && (rest[0].Sub[0].Op == syntax.OpAnyChar || rest[0].Sub[0].Op == syntax.OpAnyCharNotNL) &&
		(len(rest) == 1 || len(rest) == 2 && rest[1].Op == syntax.OpEndText) {
		return Text{Prefix, lit}
	}
	return t
}

// flatten lists the parts of a concatenation, looking through groups.
func flatten(re *syntax.Regexp) []*syntax.Regexp {
	switch re.Op {
	case syntax.OpConcat:
		var out []*syntax.Regexp
		for _, s := range re.Sub {
			out = append(out, flatten(s)...)
		}
		return out
	case syntax.OpCapture:
		return flatten(re.Sub[0])
	case syntax.OpEmptyMatch:
		return nil
	default:
		return []*syntax.Regexp{re}
	}
}

func compareHeaders(a, b Header) int {
	return cmp.Or(cmp.Compare(a.Name, b.Name), compareText(a.Text, b.Text))
}

func compareText(a, b Text) int {
	return cmp.Or(cmp.Compare(a.Op, b.Op), cmp.Compare(a.Value, b.Value))
}
