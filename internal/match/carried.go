package match

import "strings"

// What an app that traces passes on with what it asks others for can carry a preview's ID, where the app does not pass on PreviewHeader: a member of the
// header baggage (W3C Baggage) with BaggageKey, or of tracestate (W3C Trace Context, section 3.3) with TraceStateKey.
const (
	Baggage       = "baggage"
	BaggageKey    = PreviewHeader
	TraceState    = "tracestate"
	TraceStateKey = "doppel"
)

// carrier is a header in which a preview's ID may be as well, and what says so of one of its lines.
type carrier struct {
	name string
	is   func(line string) bool
}

// carriers are those of a preview's ID.
func carriers(id string) []carrier {
	member := func(key string) func(string) bool {
		return func(line string) bool {
			for member := range strings.SplitSeq(line, ",") {
				if k, v, ok := Member(member); ok && k == key && v == id {
					return true
				}
			}
			return false
		}
	}
	return []carrier{{Baggage, member(BaggageKey)}, {TraceState, member(TraceStateKey)}}
}

// Member is a member of such a list: its key, and its value without properties.
func Member(s string) (key, value string, ok bool) {
	s, _, _ = strings.Cut(s, ";")
	key, value, ok = strings.Cut(s, "=")
	return strings.Trim(key, " \t"), strings.Trim(value, " \t"), ok
}
