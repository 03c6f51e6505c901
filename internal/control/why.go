package control

import (
	"net/netip"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/match"
)

// MaxDecisions is how many decisions an agent remembers of each port.
const MaxDecisions = 128

// AskWhy asks what is done with the traffic of the ports that an intercept takes. The laptop names its intercept, the manager the ports.
type AskWhy struct {
	Intercept string `json:"intercept,omitempty"` // UID
	Ports     []Port `json:"ports,omitempty"`
	// Request is one that the rules are tried on; nil: none is.
	Request *Request `json:"request,omitempty"`
	// Last is how many decisions are asked for.
	Last int `json:"last,omitempty"`
}

// Request is what rules see of an HTTP request. It is a match.Head.
type Request struct {
	Verb   string   `json:"method"`
	Target string   `json:"path"` // without the query
	Fields []Header `json:"headers,omitempty"`
}

// Header is one line of a request's header.
type Header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Method implements match.Head.
func (r *Request) Method() string { return r.Verb }

// Path implements match.Head.
func (r *Request) Path() string { return r.Target }

// Any implements match.Head.
func (r *Request) Any(name string, is func(string) bool) bool {
	for _, f := range r.Fields {
		if strings.EqualFold(f.Name, name) && is(strings.TrimSpace(f.Value)) {
			return true
		}
	}
	return false
}

// Why is what agents do with the traffic of some ports, and what they have done.
type Why struct {
	Ports []PortRules `json:"ports"`
	// Decisions are the last ones, the newest at the end.
	Decisions []Decision `json:"decisions,omitempty"`
	// Pods are those whose agents have answered, and Silent those whose have not.
	Pods   []string `json:"pods,omitempty"`
	Silent []string `json:"silent,omitempty"`
	// Differing are the pods that have other rules than the first of Pods.
	Differing []string `json:"differing,omitempty"`
}

// PortRules are the rules of one port as its agent tries them, from the first on.
type PortRules struct {
	Port  Port   `json:"port"`
	Rules []Rule `json:"rules"`
	// Taker is the intercept (UID) that the request in question goes to; "": the app.
	Taker string `json:"taker,omitempty"`
}

// Rule is one rule of an intercept or a wiretap.
type Rule struct {
	Intercept string     `json:"intercept"` // UID
	Match     match.Rule `json:"match,omitzero"`
	Wiretap   bool       `json:"wiretap,omitempty"`
	// Away says that its laptop does not answer: what would be its is the app's.
	Away bool `json:"away,omitempty"`
	// Unmet is the first condition that the request in question does not meet; "": it meets all, or there is no such request.
	Unmet string `json:"unmet,omitempty"`

	// The manager adds whose it is.
	User  string    `json:"user,omitempty"`
	Name  string    `json:"name,omitempty"`
	Since time.Time `json:"since,omitzero"`
	Mine  bool      `json:"mine,omitempty"` // the session's that asks
}

// Decision is where one connection or request has gone.
type Decision struct {
	At     time.Time      `json:"at"`
	Pod    string         `json:"pod,omitempty"`
	Port   Port           `json:"port"`
	Client netip.AddrPort `json:"client"`
	// Method and Path are those of an HTTP request; a decision without them is about a connection, or a UDP client's datagrams.
	Method string `json:"method,omitempty"`
	Path   string `json:"path,omitempty"`
	// Taker is the intercept (UID) whose laptop has got it; "": the app has.
	Taker string `json:"taker,omitempty"`
	// Why the app has got what an intercept was to have, or what no rule could be tried on.
	Why string `json:"why,omitempty"`
}
