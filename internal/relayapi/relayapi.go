// Package relayapi owns what relay, traffic-manager and laptop say to each other: paths, headers and JSON bodies.
package relayapi

import (
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// LinkPath is where a traffic-manager joins the relay: an HTTP Upgrade as to a tunnel, with the cluster's token as bearer. What follows are the
// frames of a tunnel's session (docs/protocol.md, section 9), in which the manager has dialled.
const LinkPath = "/link"

// RelayPreviews is a watch of the relay at a manager, with a Welcome; every message is a whole ClusterState.
const RelayPreviews = "relay/previews"

// Welcome tells a manager which cluster the relay knows it as.
type Welcome struct {
	Cluster string `json:"cluster"` // ID
}

// ClusterState is what the relay is told of a cluster.
type ClusterState struct {
	Product  string        `json:"product"`
	Previews []LivePreview `json:"previews"`
	Sessions int           `json:"sessions"` // laptops that are connected
}

// LivePreview is a preview whose intercept is there.
type LivePreview struct {
	ID     string `json:"id"`
	Laptop bool   `json:"laptop"` // it is connected
}

// Paths of the relay's API for laptops: POST with JSON and, but for those that log in, the laptop's token as bearer.
const (
	PathLogin          = "/api/v1/login"
	PathDevice         = "/api/v1/device"
	PathDeviceLogin    = "/api/v1/device/login"
	PathLogout         = "/api/v1/logout"
	PathWho            = "/api/v1/who"
	PathAddToken       = "/api/v1/tokens/create"
	PathListTokens     = "/api/v1/tokens/list"
	PathDeleteToken    = "/api/v1/tokens/delete"
	PathAddCluster     = "/api/v1/clusters/add"
	PathCreatePreview  = "/api/v1/previews/create"
	PathListPreviews   = "/api/v1/previews/list"
	PathPublishPreview = "/api/v1/previews/publish"
	PathDeletePreview  = "/api/v1/previews/delete"
	PathSharePreview   = "/api/v1/previews/share"
)

// PathAuthorize is where a browser says that a laptop may log in. Its query has port, the laptop's listener on 127.0.0.1 that gets the
// code; challenge, the base64url SHA-256 of the verifier (RFC 7636, section 4.2); state, which comes back with the code; and host, the
// laptop's name.
const PathAuthorize = "/authorize"

// LoginRequest exchanges the code that the browser brought.
type LoginRequest struct {
	Code     string `json:"code"`
	Verifier string `json:"verifier"`
}

// PathConfirm is where a person says that a machine without a browser may log in. Its query has code, which that machine shows as well.
const PathConfirm = "/device"

// DeviceRequest begins the login of a machine whose user has a browser elsewhere (the device flow of RFC 8628).
type DeviceRequest struct {
	Host string `json:"host"` // the machine's name
}

// DeviceResult is what the machine's user is told, and what the machine asks with.
type DeviceResult struct {
	Device string        `json:"device"` // the machine's secret
	Code   string        `json:"code"`   // which people compare, and may type at URL
	URL    string        `json:"url"`    // the page, with the code
	For    time.Duration `json:"for"`    // how long it waits for the person
	Every  time.Duration `json:"every"`  // how often the machine may ask
}

// DeviceLoginRequest asks whether the person has decided.
type DeviceLoginRequest struct {
	Device string `json:"device"`
}

// LoginResult is a laptop's login. Without a token, nobody has decided yet.
type LoginResult struct {
	Token   string    `json:"token"`
	Expires time.Time `json:"expires"`
	Who     Who       `json:"who"`
}

// Who is the person that a token belongs to.
type Who struct {
	Email string   `json:"email"`
	Name  string   `json:"name"`
	Teams []string `json:"teams"`
}

// AddTokenRequest makes a token with which a program acts as the person.
type AddTokenRequest struct {
	Name string        `json:"name"`
	For  time.Duration `json:"for"` // how long it counts, at most MaxTokenLife
}

// MaxTokenLife is how long an API token may count.
const MaxTokenLife = 366 * 24 * time.Hour

// Token is a token with which a program acts as a person.
type Token struct {
	Name    string     `json:"name"`
	Token   string     `json:"token,omitempty"` // when it is made, and never again
	Created time.Time  `json:"created"`
	Expires time.Time  `json:"expires"`
	Used    *time.Time `json:"used,omitempty"` // to the minute; nil: never
}

// TokenList is a list of a person's tokens.
type TokenList struct {
	Tokens []Token `json:"tokens"`
}

// DeleteTokenRequest names one of the person's tokens.
type DeleteTokenRequest struct {
	Name string `json:"name"`
}

// AddClusterRequest makes a cluster known.
type AddClusterRequest struct {
	Name string `json:"name"`
	Team string `json:"team,omitempty"` // default: the person's only one
}

// AddClusterResult has the token with which its traffic-manager joins; it is not kept.
type AddClusterResult struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	Token string `json:"token"`
}

// SecretCommand is a line for a shell that gives a traffic-manager in a namespace the token with which it joins, in place of one that it has; ca is the PEM
// of the relay's own authority, or "".
func SecretCommand(namespace, token, ca string) string {
	var from string
	if ca = strings.TrimSpace(ca); ca != "" {
		from = " --from-literal=ca.crt=" + uerr.ShellQuote(ca)
	}
	// create alone refuses a Secret that is there.
	return "kubectl create secret generic doppel-relay --namespace=" + namespace + " --from-literal=token=" + token + from +
		" --dry-run=client -o yaml | kubectl apply -f -"
}

// CreatePreviewRequest asks for a domain. The intercept then names the preview by its ID.
type CreatePreviewRequest struct {
	Cluster   string `json:"cluster"` // ID, as the traffic-manager has it
	Name      string `json:"name"`    // of the intercept
	Namespace string `json:"namespace"`
	Workload  string `json:"workload"`
	// Authority is the Host header that the cluster's ingress expects; empty: that of the preview.
	Authority string `json:"authority,omitempty"`
	// Propagate is the header of tracing that carries the preview's ID as well: match.Baggage, match.TraceState or none.
	Propagate string `json:"propagate,omitempty"`
}

// Preview is a domain under which an intercept is seen.
type Preview struct {
	// ID is the value of the header match.PreviewHeader. It is not a part of the URL: whoever knows that one shall not be able to get around the
	// relay through an ingress that is public.
	ID        string     `json:"id,omitempty"` // only for its owner
	URL       string     `json:"url"`
	Host      string     `json:"host"` // its label
	Name      string     `json:"name"`
	Cluster   string     `json:"cluster"` // name
	Namespace string     `json:"namespace"`
	Workload  string     `json:"workload"`
	Owner     string     `json:"owner"`
	Mine      bool       `json:"mine"`
	State     string     `json:"state"` // active, laptop away, not intercepted, cluster away
	Public    bool       `json:"public"`
	Expires   *time.Time `json:"expires,omitempty"` // when it is no longer public
	Password  bool       `json:"password,omitempty"`
	Shared    []string   `json:"shared,omitempty"` // e-mail addresses
	Created   time.Time  `json:"created"`
	New       bool       `json:"new,omitempty"` // it was made by this call
}

// PreviewList is a list of previews.
type PreviewList struct {
	Previews []Preview `json:"previews"`
}

// PublishRequest makes a preview public, or not.
type PublishRequest struct {
	Preview  string        `json:"preview"` // label, URL or name of the intercept
	Public   bool          `json:"public"`
	For      time.Duration `json:"for,omitempty"`      // 0: until it is unpublished
	Password string        `json:"password,omitempty"` // empty: the one that it has stays
	// NoPassword takes the password away that it has.
	NoPassword bool `json:"noPassword,omitempty"`
}

// ShareRequest lets the person with an e-mail address see a preview, or no longer.
type ShareRequest struct {
	Preview string `json:"preview"`
	Email   string `json:"email"`
	Remove  bool   `json:"remove,omitempty"`
}

// PreviewRequest names one preview.
type PreviewRequest struct {
	Preview string `json:"preview"`
}

// Label is the first label of a preview's domain, from what a person called it: a URL, a domain or the label itself.
func Label(s string) string {
	if _, rest, ok := strings.Cut(s, "://"); ok {
		s = rest
	}
	s, _, _ = strings.Cut(s, "/")
	s, _, _ = strings.Cut(s, ".")
	return strings.ToLower(s)
}

// Problem is the body of an answer that is no success.
type Problem struct {
	Error string `json:"error"`
}
