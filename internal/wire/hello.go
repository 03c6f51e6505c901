package wire

import (
	"encoding/json"
	"fmt"
)

// Version is the protocol version this code speaks; both ends must speak the same.
const Version = 1

// Preface is what the dialling end sends before TLS, so that anything that is not a tunnel is recognised at once.
const Preface = "DOPPEL1\n"

// Roles of the ends of a tunnel.
const (
	RoleLaptop  = "laptop"
	RoleAgent   = "agent"
	RoleManager = "manager"
)

// Hello is the first call on every tunnel: who dials, and with what right.
type Hello struct {
	Version   int    `json:"version"`             // protocol version; 0 is filled in by the tunnel package
	Product   string `json:"product,omitempty"`   // program and release, for logs
	Role      string `json:"role"`                // RoleLaptop, RoleAgent or RoleManager
	Session   string `json:"session,omitempty"`   // laptop: UID of its Session
	Token     string `json:"token,omitempty"`     // agent: its projected service account token
	Pod       string `json:"pod,omitempty"`       // agent: its pod
	Namespace string `json:"namespace,omitempty"` // agent: its namespace
	Workload  string `json:"workload,omitempty"`  // agent: the workload, kind/name
	// Resume: the dialling end can resume; nil if it cannot.
	Resume *Resume `json:"resume,omitempty"`
}

// Resume names a session of the mux that outlives its connections.
type Resume struct {
	Mux      string `json:"mux,omitempty"`      // Hello: the one that is to go on; empty: none. Answer: the one that this connection carries
	Received uint64 `json:"received,omitempty"` // how many of its bytes the sender has received
	Seconds  int    `json:"seconds,omitempty"`  // answer: how long it is kept without a connection
}

// HelloReply is the answer to a Hello that was authorised.
type HelloReply struct {
	Version int             `json:"version"`
	Product string          `json:"product,omitempty"`
	Manager string          `json:"manager,omitempty"` // name of the answering replica
	Session string          `json:"session,omitempty"` // UID of the session that was joined
	Info    json.RawMessage `json:"info,omitempty"`    // free form: what the role needs to know
	Resume  *Resume         `json:"resume,omitempty"`  // nil: the session ends with its connection
}

// MarshalHelloReply encodes the answer to a Hello.
func MarshalHelloReply(r HelloReply) ([]byte, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode hello reply: %w", err)
	}
	return b, nil
}

// ParseHelloReply reads the answer to a Hello. Unknown fields are ignored.
func ParseHelloReply(p []byte) (HelloReply, error) {
	var r HelloReply
	if err := json.Unmarshal(p, &r); err != nil {
		return HelloReply{}, violation("hello reply: %v", err)
	}
	return r, nil
}
