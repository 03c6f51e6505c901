package localapi

import (
	"net/netip"
	"time"

	"github.com/doppel-dev/doppel/internal/match"
)

// Methods of the user daemon.
const (
	MethodConnect   = "connect"
	MethodStatus    = "status"
	MethodQuit      = "quit"
	MethodList      = "list"
	MethodIntercept = "intercept"
	MethodLeave     = "leave"
	MethodLogLevel  = "loglevel"
)

// Empty is a request or result without content.
type Empty struct{}

// ConnectRequest asks for a session.
type ConnectRequest struct {
	// Name is what the connection is called; default: the context's name. With a name that no other has, it is made beside the others.
	Name             string     `json:"name,omitempty"`
	Kubeconfig       string     `json:"kubeconfig,omitempty"`
	Context          string     `json:"context,omitempty"`
	Namespace        string     `json:"namespace,omitempty"`
	ManagerNamespace string     `json:"managerNamespace,omitempty"`
	As               string     `json:"as,omitempty"`       // user to impersonate
	AsGroups         []string   `json:"asGroups,omitempty"` // and groups
	DNS              DNSOptions `json:"dns,omitzero"`
	AcceptIntercepts bool       `json:"acceptIntercepts,omitempty"` // claim intercepts that the user has declared in the cluster

	Network NetworkOptions `json:"network,omitzero"`
}

// NetworkOptions are what the user wants of the session's subnets beyond those of the cluster. Subnets have no host bits.
type NetworkOptions struct {
	// AlsoProxy are reached through the cluster as well; NeverProxy never are. Between the two the longer prefix decides.
	AlsoProxy  []netip.Prefix `json:"alsoProxy,omitempty"`
	NeverProxy []netip.Prefix `json:"neverProxy,omitempty"`
	// AllowConflicting are subnets that the cluster may have although this machine has a route for them.
	AllowConflicting []netip.Prefix `json:"allowConflictingSubnets,omitempty"`
	// VNAT are subnets that get virtual addresses, conflict or not; "service", "pods", "also" and "all" stand for all of a kind.
	VNAT []string `json:"vnat,omitempty"`
	// ProxyVia are SUBNET=WORKLOAD: flows to the subnet (or service, pods, also, all) leave from the workload's pods.
	ProxyVia []string `json:"proxyVia,omitempty"`
	// VirtualSubnet is where virtual addresses are taken from first; default: class E.
	VirtualSubnet netip.Prefix `json:"virtualSubnet,omitzero"`
}

// ConnectResult is the session that was found or made.
type ConnectResult struct {
	Status  Status        `json:"status"`
	Reused  bool          `json:"reused"` // the daemon was connected like this already
	Elapsed time.Duration `json:"elapsed"`
}

// Status is what the user daemon knows.
type Status struct {
	Version   string      `json:"version"`
	PID       int         `json:"pid"`
	LogFile   string      `json:"logFile"`
	Connected bool        `json:"connected"`
	Ended     string      `json:"ended,omitempty"`   // why the last session ended, if not by quit
	Session   *Session    `json:"session,omitempty"` // the one asked for, else the first
	Others    []Session   `json:"others,omitempty"`  // the other connections, in the order in which they were made
	Root      *RootStatus `json:"root,omitempty"`
}

// Session is one laptop in one cluster, for people and programs to read.
type Session struct {
	Connection       string      `json:"connection,omitempty"` // what the user calls it
	Context          string      `json:"context"`
	Namespace        string      `json:"namespace"`
	Server           string      `json:"server"`
	User             string      `json:"user"`
	Name             string      `json:"name"`
	UID              string      `json:"uid"`
	ManagerNamespace string      `json:"managerNamespace"`
	ManagerVersion   string      `json:"managerVersion"`
	Tunnel           string      `json:"tunnel"`              // up, or why it is down
	LatencyMS        float64     `json:"latencyMS,omitempty"` // a ping through the tunnel and back; 0 while there is none
	Transport        Transport   `json:"transport"`
	Reach            Reach       `json:"reach"`
	Flows            *Flows      `json:"flows,omitempty"`
	Problems         []string    `json:"problems,omitempty"`
	Subnets          []Subnet    `json:"subnets,omitempty"`
	Intercepts       []Intercept `json:"intercepts"`
}

// Transport is the way of the tunnel's connection through the API server.
type Transport struct {
	Name   string            `json:"name"` // service proxy, WebSocket port-forward or SPDY port-forward
	Failed []FailedTransport `json:"failed,omitempty"`
}

// FailedTransport is a better transport, and why it is not used.
type FailedTransport struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Reach is what a session gets to: "*" stands for the whole cluster and whatever lies beyond.
type Reach struct {
	Namespaces []string `json:"namespaces"`
	Outside    bool     `json:"outside,omitempty"` // nodes, addresses and names beyond the cluster
}

// Flows counts what went through the tunnels of all connections since the first connect; up is from the laptop to the cluster.
type Flows struct {
	TCPOpen   int    `json:"tcpOpen"`
	UDPOpen   int    `json:"udpOpen"`
	Total     uint64 `json:"total"` // TCP and UDP, open or ended
	UpBytes   uint64 `json:"upBytes"`
	DownBytes uint64 `json:"downBytes"`

	DNSQueries uint64 `json:"dnsQueries"` // that programs of the laptop asked
	DNSCluster uint64 `json:"dnsCluster"` // of these for the cluster's names
	DNSCached  uint64 `json:"dnsCached"`  // answered from the cache
	DNSFailed  uint64 `json:"dnsFailed"`
}

// Subnet is one subnet of a session with what became of it on this machine.
type Subnet struct {
	Kind    string       `json:"kind"`             // service, pod, node, also-proxy or proxy-via
	Real    netip.Prefix `json:"real"`             // its addresses in the cluster
	Virtual netip.Prefix `json:"virtual,omitzero"` // its addresses on this machine, if mapped
	Way     string       `json:"way"`              // routed, mapped, direct (this machine reaches it without doppel) or kept out
	Why     string       `json:"why,omitempty"`
	// Workload is whose pods flows leave from, if not from the traffic-manager's.
	Workload string `json:"workload,omitempty"`
}

// RootStatus is what the root daemon has set on this machine.
type RootStatus struct {
	Interface string         `json:"interface"`
	Routes    []netip.Prefix `json:"routes"`
	DNS       string         `json:"dns"`       // how DNS is captured: systemd-resolved, nftables, routed or none
	DNSReason string         `json:"dnsReason"` // why this way
	Resolvers []string       `json:"resolvers"` // who answers everything else
}

// Choice chooses a connection by its name, or by a regular expression that one name alone matches; empty: the only one.
type Choice struct {
	Use string `json:"use,omitempty"`
}

// StatusRequest asks for one connection, or for all.
type StatusRequest struct {
	Choice
}

// ListRequest asks for the workloads of a namespace; empty is the connected one.
type ListRequest struct {
	Choice
	Namespace     string `json:"namespace,omitempty"`
	AllNamespaces bool   `json:"allNamespaces,omitempty"`
}

// ListResult is what can be or is intercepted.
type ListResult struct {
	Namespace string     `json:"namespace"`
	Workloads []Workload `json:"workloads"`
}

// Workload is one line of doppel list.
type Workload struct {
	Name       string      `json:"name"`
	Namespace  string      `json:"namespace"`
	Kind       string      `json:"kind"`
	Agent      bool        `json:"agent"`
	NotReady   string      `json:"notReady,omitempty"`
	Intercepts []Intercept `json:"intercepts,omitempty"`
}

// InterceptRequest asks for an intercept.
type InterceptRequest struct {
	Choice
	Name      string        `json:"name"`
	Workload  string        `json:"workload,omitempty"` // [KIND/]NAME, default: Name
	Namespace string        `json:"namespace,omitempty"`
	Port      string        `json:"port"`              // LOCAL[:REMOTE]
	Address   string        `json:"address,omitempty"` // where LOCAL is, default 127.0.0.1
	Service   string        `json:"service,omitempty"`
	Container string        `json:"container,omitempty"`
	Match     match.Rule    `json:"match,omitzero"`     // which HTTP requests; zero: all connections
	ToPod     []int32       `json:"toPod,omitempty"`    // TCP ports of the pod's loopback that are reached at the same ones here
	Takeover  bool          `json:"takeover,omitempty"` // end intercepts of others that are in the way
	Recreate  bool          `json:"recreate,omitempty"` // replace pods although that interrupts the workload
	Timeout   time.Duration `json:"timeout,omitempty"`
}

// Intercept is one intercept, ours or a colleague's.
type Intercept struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Kind      string `json:"kind"`
	Workload  string `json:"workload"`
	State     string `json:"state"`
	Message   string `json:"message,omitempty"`
	Port      uint16 `json:"port"`
	Protocol  string `json:"protocol,omitempty"` // TCP or UDP
	// Match says which HTTP requests are taken; zero: all connections.
	Match  match.Rule `json:"match,omitzero"`
	Target string     `json:"target,omitempty"`
	ToPod  []int32    `json:"toPod,omitempty"`
	User   string     `json:"user,omitempty"`
	Mine   bool       `json:"mine"`
}

// LeaveRequest ends an intercept. Without Use it is looked for in all connections.
type LeaveRequest struct {
	Choice
	Name string `json:"name"`
}

// LogLevelRequest changes the log level of the daemons.
type LogLevelRequest struct {
	Level string        `json:"level"` // error, warn, info or debug; "" is the one that they were started with
	For   time.Duration `json:"for"`   // 0: until it is changed again
}

// QuitRequest ends one session, or all, and with Stop both daemons.
type QuitRequest struct {
	Choice
	Stop bool `json:"stop"`
}
