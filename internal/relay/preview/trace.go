package preview

import (
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"regexp"
	"strings"

	"github.com/doppel-dev/doppel/internal/match"
)

// What a list in a header may have: of W3C Baggage, section 3.3.2, and of W3C Trace Context, section 3.3.1.3.
const (
	maxBaggage      = 64
	maxBaggageBytes = 8192
	maxTraceState   = 32
)

// traceParent is a header of version 00, which later ones begin with (W3C Trace Context, section 3.2).
var traceParent = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?$`)

// carry puts a preview's ID into a header that apps with tracing pass on, beside what is there; what visitors have put there in our name goes.
func carry(h http.Header, in, id string) {
	baggage, ours := without(h, match.Baggage, match.BaggageKey)
	if ours || in == match.Baggage {
		put(h, match.Baggage, baggage)
	}
	state, ours := without(h, match.TraceState, match.TraceStateKey)
	if ours || in == match.TraceState {
		put(h, match.TraceState, state)
	}
	switch in {
	case match.Baggage:
		all := append(baggage, match.BaggageKey+"="+id)
		if len(all) <= maxBaggage && len(strings.Join(all, ",")) <= maxBaggageBytes { // others' go first: what is full stays as it is
			put(h, match.Baggage, all)
		}
	case match.TraceState:
		// Newest first; the oldest goes where there are too many. Without traceparent nobody reads it, so that a trace begins here, which is to be seen.
		put(h, match.TraceState, append([]string{match.TraceStateKey + "=" + id}, state[:min(len(state), maxTraceState-1)]...))
		if !traceParent.MatchString(h.Get("Traceparent")) {
			b := make([]byte, 24)
			_, _ = rand.Read(b) // never fails
			h.Set("Traceparent", "00-"+hex.EncodeToString(b[:16])+"-"+hex.EncodeToString(b[16:])+"-01")
			put(h, match.TraceState, []string{match.TraceStateKey + "=" + id}) // what belongs to no trace is dropped by everybody
		}
	}
}

// without are the members of a list without those that have a key; had says that there were such.
func without(h http.Header, name, key string) (members []string, had bool) {
	for _, line := range h.Values(name) {
		for member := range strings.SplitSeq(line, ",") {
			member = strings.Trim(member, " \t")
			k, _, _ := match.Member(member)
			switch {
			case k == key:
				had = true
			case member != "":
				members = append(members, member)
			}
		}
	}
	return members, had
}

func put(h http.Header, name string, members []string) {
	h.Del(name)
	if len(members) > 0 {
		h.Set(name, strings.Join(members, ","))
	}
}
