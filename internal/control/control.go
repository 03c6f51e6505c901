// Package control owns the control messages between laptop, manager and agent: method names and JSON bodies.
package control

import (
	"net/netip"

	"github.com/doppel-dev/doppel/internal/match"
)

// Methods of control calls and watches; the sender's role is the first word.
const (
	// ManagerIntercepts is called by the manager at an agent with the whole table; the answer is the acknowledgement.
	ManagerIntercepts = "manager/intercepts"
	// ManagerEnvironment is called by the manager at an agent: AskEnvironment, Environment.
	ManagerEnvironment = "manager/environment"
	// ManagerCanary is called by the manager at an agent with a Canary.
	ManagerCanary = "manager/canary"
	// ManagerCanaryUDP is the same for datagrams, which an older agent would have taken for its app.
	ManagerCanaryUDP = "manager/canary-udp"
	// ManagerWhy is called by the manager at an agent: AskWhy, Why.
	ManagerWhy = "manager/why"
	// LaptopWhy is called by a laptop at the manager: AskWhy, Why.
	LaptopWhy = "laptop/why"
	// LaptopEnvironment is called by a laptop at the manager: AskEnvironment, Environment.
	LaptopEnvironment = "laptop/environment"
	// AgentNote is called by an agent at the manager with a Note.
	AgentNote = "agent/note"
	// LaptopCluster is a watch of a laptop at the manager: AskCluster; the first message is a whole Cluster, as are all unless changes were asked for.
	LaptopCluster = "laptop/cluster"
	// LaptopIntercepts is a watch of a laptop at the manager; every message is the whole list of the session's intercepts.
	LaptopIntercepts = "laptop/intercepts"
)

// SessionDeleted is what a laptop is told, with code gone, whose Session object somebody deleted: it may have another one, without the intercepts.
const SessionDeleted = "the session was deleted"

// Table is what an agent does with its ports: all intercepts that concern its workload.
type Table struct {
	Generation uint64 `json:"generation"`
	// LogLevel is what the agent shall log: error, warn, info or debug; "" is what it was started with.
	LogLevel string       `json:"logLevel,omitempty"`
	Items    []TableEntry `json:"items"`
	// Away are the intercepts (UIDs) whose laptops do not answer at the moment: what would be theirs is the app's, also on connections that they have taken.
	Away []string `json:"away,omitempty"`
	// Egress are the intercepts (UIDs) for whose laptops the agent connects.
	Egress []string `json:"egress,omitempty"`
	// Shown are the intercepts whose laptops get the environment and the files of a container.
	Shown []Shown `json:"shown,omitempty"`
}

// Canary announces a connection that the manager is about to make to a port. The agent that gets it says the nonce on it, and closes it.
// By UDP it is datagrams from that address, and each is answered with the nonce.
type Canary struct {
	Port   Port           `json:"port"`
	Source netip.AddrPort `json:"source"`
	Nonce  string         `json:"nonce"`
}

// Shown is an intercept (UID) and the container that its laptop sees.
type Shown struct {
	Intercept string `json:"intercept"`
	Container string `json:"container"`
}

// AskEnvironment asks for what a container has: the laptop names its intercept, the manager the container.
type AskEnvironment struct {
	Intercept string `json:"intercept,omitempty"` // UID
	Container string `json:"container,omitempty"`
}

// Environment is what the process of a container has, but for what its image gives it.
type Environment struct {
	Container string            `json:"container"`
	Pod       string            `json:"pod,omitempty"` // whose agent has answered, by name
	Variables map[string]string `json:"variables"`
	Volumes   []Volume          `json:"volumes,omitempty"`
	// Hidden are variables that are kept from laptops, by name. Only the manager says them, to laptops, which may find them elsewhere.
	Hidden []string `json:"hidden,omitempty"`
}

// Volume is a volume mount that the agent serves as files.
type Volume struct {
	Path     string `json:"path"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// TableEntry sends one container port's connections, or some of its requests, or copies of them, to the laptop of one intercept.
type TableEntry struct {
	Intercept     string `json:"intercept"` // UID
	Protocol      string `json:"protocol"`
	ContainerPort uint16 `json:"containerPort"`
	// Wiretap leaves the answers to whoever gives them without it: the laptop gets a copy.
	Wiretap bool `json:"wiretap,omitempty"`
	// Match narrows it to HTTP requests; the zero value takes all connections that no other entry of the port takes.
	Match match.Rule `json:"match,omitzero"`
}

// Note is something about a port that its intercepts' users should know, for as long as the agent's tunnel lives.
type Note struct {
	Port Port   `json:"port"`
	Text string `json:"text"`
}

// Port is one container port.
type Port struct {
	Protocol string `json:"protocol"` // TCP or UDP
	Number   uint16 `json:"number"`
}

// Intercepts is the state of a session's intercepts as the manager sees it.
type Intercepts struct {
	Items []Intercept `json:"items"`
	// Problems are what is wrong with the manager itself, one sentence each.
	Problems []string `json:"problems,omitempty"`
	Relay    *Relay   `json:"relay,omitempty"` // nil: the manager is to join none
}

// Relay is where the cluster's previews are seen.
type Relay struct {
	URL     string `json:"url"`
	Cluster string `json:"cluster,omitempty"` // what the relay knows the cluster as
	Problem string `json:"problem,omitempty"` // why it is not joined
}

// StateEnding is the state of an intercept that has no object any more, until its agents know, and until the app that it replaced is back.
const StateEnding = "Ending"

// Host is a name with an address of its own.
type Host struct {
	Name string     `json:"name"`
	Addr netip.Addr `json:"addr"`
}

// Intercept is the state of one intercept.
type Intercept struct {
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"` // object name
	State     string `json:"state"`
	Reason    string `json:"reason,omitempty"`
	Message   string `json:"message,omitempty"`
	Agents    int32  `json:"agents"`
	Kind      string `json:"kind"`
	Workload  string `json:"workload"`
	// Ports are the container ports taken: those of the object's spec.ports in its order, then those that nobody named.
	Ports     []Port `json:"ports,omitempty"`
	Container string `json:"container,omitempty"`
	// Declared says that the laptop has claimed the intercept, which somebody made without it.
	Declared bool `json:"declared,omitempty"`
	// Replace is the pod (name and UID) that the laptop is to replace: see InterceptStatus.
	Replace    string `json:"replace,omitempty"`
	ReplaceUID string `json:"replaceUID,omitempty"`
	// Hosts are the names that the pods' own hosts file has: hostAliases of the workload. The laptop knows them while the intercept is active.
	Hosts []Host `json:"hosts,omitempty"`
	// OwnDNS says that the pods do not ask the cluster's DNS as others do: while the intercept is active its agent is asked before it.
	OwnDNS bool `json:"ownDNS,omitempty"`
}
