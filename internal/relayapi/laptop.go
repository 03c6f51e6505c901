package relayapi

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
)

// LaptopPath is where a laptop joins the relay: as a traffic-manager at LinkPath, with the laptop's token.
const LaptopPath = "/laptop"

// Methods of the relay at a laptop.
const (
	// LaptopState is a watch; every message is a whole Laptop.
	LaptopState = "relay/laptop"
	// LaptopWorkloads is a call with a WorkloadsRequest; its answer are Workloads.
	LaptopWorkloads = "relay/workloads"
	// LaptopIntercept is a watch with a Wish; its messages are Outcomes, of which the last one is final.
	LaptopIntercept = "relay/intercept"
	// LaptopLeave is a call with the Wish of an intercept that is active, which ends it.
	LaptopLeave = "relay/leave"
)

// Permission is what a laptop's user has said of a relay that wishes to start intercepts.
type Permission string

// What they say.
const (
	NotAsked Permission = ""
	Allowed  Permission = "allowed"
	Denied   Permission = "denied"
)

// Laptop is what a relay is told of a laptop.
type Laptop struct {
	Host        string       `json:"host"`
	Product     string       `json:"product"`
	Permission  Permission   `json:"permission,omitempty"`
	Connections []Connection `json:"connections"` // to clusters that are joined to this relay
}

// Connection is a laptop's connection to a cluster.
type Connection struct {
	Name      string `json:"name"`    // what its user calls it
	Cluster   string `json:"cluster"` // ID
	Namespace string `json:"namespace"`
}

// WorkloadsRequest asks for the workloads that a laptop's user may list.
type WorkloadsRequest struct {
	Connection string `json:"connection"`
	Namespace  string `json:"namespace"`
}

// Workloads are the workloads of a namespace, as KIND/NAME.
type Workloads struct {
	Workloads []string `json:"workloads"`
}

// Wish is an intercept that a person wishes for on the relay's page. There is nothing in it but what the page offers: no command, no files, no other
// machine.
type Wish struct {
	Connection string `json:"connection"`
	Namespace  string `json:"namespace"`
	Workload   string `json:"workload"`         // [KIND/]NAME
	Port       string `json:"port,omitempty"`   // name or number; empty: the only one
	Local      uint16 `json:"local"`            // on the laptop's loopback
	Header     string `json:"header,omitempty"` // of the requests that are taken; empty: all of them
	Value      string `json:"value,omitempty"`
}

var (
	workloadName = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^([a-zA-Z][a-zA-Z.]{0,62}/)?[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	})
	namespace  = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`) })
	portName   = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9-]{1,15}$`) })
	headerName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile("^[a-zA-Z0-9!#$%&'*+.^_`|~-]{1,128}$") })
)

// Check says what is wrong with a wish, in words for its person. Both ends ask: neither takes the other's word.
func (w Wish) Check() error {
	switch {
	case w.Connection == "" || len(w.Connection) > 253:
		return errors.New("choose a connection of the laptop")
	case !namespace().MatchString(w.Namespace):
		return errors.New("the namespace is none")
	case !workloadName().MatchString(w.Workload):
		return errors.New("the workload is none: write NAME or KIND/NAME")
	case w.Port != "" && !portName().MatchString(w.Port):
		return errors.New("the port is neither a name nor a number")
	case w.Local == 0:
		return errors.New("the port on the laptop is a number from 1 to 65535")
	case w.Header == "" && w.Value != "":
		return errors.New("the header has a value, but no name")
	case w.Header != "" && !headerName().MatchString(w.Header):
		return errors.New("the header's name has other signs than it may")
	case len(w.Value) > 1024 || strings.ContainsFunc(w.Value, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return errors.New("the header's value is too long, or has signs that nobody sees")
	}
	return nil
}

// Name is the workload's name, which the intercept has too.
func (w Wish) Name() string { return w.Workload[strings.Index(w.Workload, "/")+1:] }

// String is the wish for its person.
func (w Wish) String() string {
	s := fmt.Sprintf("%s in %s of %s, to port %d of the laptop", w.Workload, w.Namespace, w.Connection, w.Local)
	if w.Port != "" {
		s = "port " + w.Port + " of " + s
	}
	if w.Header != "" {
		s += fmt.Sprintf(", requests with %s: %s", w.Header, w.Value)
	}
	return s
}

// The states of a wish.
const (
	WishSent    = "sent"
	WishWaiting = "waiting for permission"
	WishWorking = "starting"
	WishActive  = "active"
	WishFailed  = "failed"
	WishEnded   = "ended" // from the page
)

// Outcome is what became of a wish so far.
type Outcome struct {
	State   string `json:"state"`
	Message string `json:"message,omitempty"`
	Hint    string `json:"hint,omitempty"`
}
