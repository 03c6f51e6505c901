package localapi

import (
	"net/netip"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
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
	MethodEnviron   = "environment"
	MethodFiles     = "files" // a stream
	MethodWhy       = "why"
	MethodLogLevel  = "loglevel"
	MethodRelay     = "relay"
	MethodPreview   = "preview"
	MethodStacks    = "stacks"
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
	Env              []string   `json:"env,omitempty" config:"-"`              // of the caller, for the kubeconfig's credential program and the proxy
	AcceptIntercepts bool       `json:"acceptIntercepts,omitempty"`            // claim intercepts that the user has declared in the cluster
	RefuseIntercepts bool       `json:"refuseIntercepts,omitempty" config:"-"` // the user said in so many words that none are to be claimed

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
	// Relays are those that know of this machine.
	Relays []RelayState `json:"relays,omitempty"`
}

// RelayState is a relay that the user is logged in at, and that a connected cluster is joined to.
type RelayState struct {
	URL     string `json:"url"`
	Joined  bool   `json:"joined"`
	Problem string `json:"problem,omitempty"` // why it is not joined
	// Permission is what its user has said of intercepts that are started on its pages: allowed, denied or nothing.
	Permission string   `json:"permission,omitempty"`
	Waiting    []string `json:"waiting,omitempty"` // intercepts that wait for the permission
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

// Transport is the way of the tunnel's connection.
type Transport struct {
	Name   string            `json:"name"`          // direct, service proxy, WebSocket port-forward or SPDY port-forward
	Why    string            `json:"why,omitempty"` // of direct
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

// The modes of an intercept: what its user gets of the ports.
const (
	ModeIntercept = "intercept" // the traffic
	ModeWiretap   = "wiretap"   // a copy of what clients send
	ModeReplace   = "replace"   // the traffic of a container, which does not run meanwhile
	ModeIngest    = "ingest"    // no traffic: the environment and files of a container
)

// InterceptRequest asks for an intercept.
type InterceptRequest struct {
	Choice
	Name      string       `json:"name"`
	Workload  string       `json:"workload,omitempty"` // [KIND/]NAME, default: Name
	Namespace string       `json:"namespace,omitempty"`
	Mode      string       `json:"mode,omitempty"`    // ModeIntercept, the default, or another
	Ports     []string     `json:"ports,omitempty"`   // LOCAL[:REMOTE] each
	Address   string       `json:"address,omitempty"` // where LOCAL is, default 127.0.0.1
	Service   string       `json:"service,omitempty"`
	Container string       `json:"container,omitempty"`
	Match     match.Rule   `json:"match,omitzero"`     // which HTTP requests; zero: all connections
	ToPod     []string     `json:"toPod,omitempty"`    // PORT[/udp] of the pod's loopback that are reached at the same ones here
	LocalTLS  bool         `json:"localTLS,omitempty"` // the local process speaks TLS, the requests that come do not
	Takeover  bool         `json:"takeover,omitempty"` // end intercepts of others that are in the way
	Mount     MountRequest `json:"mount,omitzero"`
	Recreate  bool         `json:"recreate,omitempty"` // replace pods although that interrupts the workload
	// Preview has the requests of a preview taken, besides those of Match; without a match those alone, unless All.
	Preview *Preview      `json:"preview,omitempty"`
	All     bool          `json:"all,omitempty"`
	Timeout time.Duration `json:"timeout,omitempty"`
}

// Preview is a domain of a relay through which an intercept is seen.
type Preview struct {
	ID      string  `json:"id"`
	Ingress Ingress `json:"ingress"`
}

// Ingress is where a preview's requests enter the cluster.
type Ingress struct {
	Host   string `json:"host"` // a service as NAME.NAMESPACE, or another name or address of the cluster
	Port   int32  `json:"port"`
	TLS    bool   `json:"tls,omitempty"`
	L5Host string `json:"l5Host,omitempty"` // Host header and server name in TLS
}

// RelayRequest asks for the relay of a connection, and with Guess for where requests might enter the cluster.
type RelayRequest struct {
	Choice
	Guess     bool   `json:"guess,omitempty"`
	Namespace string `json:"namespace,omitempty"` // "": the connected one
}

// RelayResult is the relay that the cluster's traffic-manager is to join.
type RelayResult struct {
	URL       string    `json:"url,omitempty"` // "": none
	Cluster   string    `json:"cluster,omitempty"`
	Problem   string    `json:"problem,omitempty"` // why it is not joined
	Namespace string    `json:"namespace"`         // the connected one
	Ingresses []Ingress `json:"ingresses,omitempty"`
}

// PreviewRequest gives an intercept that is there a preview: it is made anew, and takes what it took besides.
type PreviewRequest struct {
	Choice
	Name    string  `json:"name"`
	Preview Preview `json:"preview"`
}

// MountRequest says where the files of the app's volumes are to be. Zero: in a directory of the daemon's choice, if they can be mounted.
type MountRequest struct {
	None      bool   `json:"none,omitempty"`
	Point     string `json:"point,omitempty"`     // absolute
	ReadWrite bool   `json:"readWrite,omitempty"` // where the cluster allows it
	Copy      bool   `json:"copy,omitempty"`      // a copy, as they are now, and no mount
}

// Intercept is one intercept, ours or a colleague's.
type Intercept struct {
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"` // of a new one: no other has it
	Namespace string `json:"namespace"`
	Kind      string `json:"kind"`
	Workload  string `json:"workload"`
	Mode      string `json:"mode"`
	Container string `json:"container,omitempty"` // that is replaced or ingested
	State     string `json:"state"`
	Message   string `json:"message,omitempty"`
	// Ports are the container ports taken; before they are known, where their traffic will end.
	Ports []InterceptPort `json:"ports"`
	// Match says which HTTP requests are taken; zero: all connections.
	Match match.Rule `json:"match,omitzero"`
	ToPod []string   `json:"toPod,omitempty"` // PORT[/udp]
	User  string     `json:"user,omitempty"`
	Mine  bool       `json:"mine"`
	Mount *Mount     `json:"mount,omitempty"` // nil: none, or not ours
	// Preview is the ID of the preview whose requests are taken, and All says that all others are taken too, if Match has no condition.
	Preview string `json:"preview,omitempty"`
	All     bool   `json:"all,omitempty"`
	// LocalTLS says that the local process is spoken to in TLS.
	LocalTLS bool `json:"localTLS,omitempty"`
}

// Mount is where the files of an app's volumes are, each at its own path below Point.
type Mount struct {
	Point     string   `json:"point,omitempty"`
	Volumes   []string `json:"volumes"` // paths in the app's container
	ReadWrite bool     `json:"readWrite,omitempty"`
	Copy      bool     `json:"copy,omitempty"`
	LeftOut   string   `json:"leftOut,omitempty"` // what of them could not be copied
	Error     string   `json:"error,omitempty"`   // why they are not there
}

// InterceptPort is one port of an intercept.
type InterceptPort struct {
	Port     uint16 `json:"port,omitempty"`     // the container port; 0: not known yet
	Protocol string `json:"protocol,omitempty"` // TCP or UDP
	Target   string `json:"target,omitempty"`   // where on its user's machine the traffic ends
}

// LeaveRequest ends an intercept. Without Use it is looked for in all connections. With UID it ends that one, and no later one of its name.
type LeaveRequest struct {
	Choice
	Name string `json:"name"`
	UID  string `json:"uid,omitempty"`
}

// EnvironRequest asks for the environment of the container that an intercept is of.
type EnvironRequest struct {
	Choice
	Name string `json:"name"`
}

// FilesRequest asks for a stream to the file server of the container that an intercept is of: SFTP.
type FilesRequest struct {
	Choice
	Name string `json:"name"`
}

// Environ is an app's environment, with what is added for the local process.
type Environ struct {
	Container string            `json:"container"`
	Variables map[string]string `json:"variables"`
	// Incomplete says why the variables that the image gives the app are not among them; "" if they are.
	Incomplete string `json:"incomplete,omitempty"`
}

// WhyRequest asks what is done with the traffic of the ports that an intercept takes.
type WhyRequest struct {
	Choice
	Name    string           `json:"name"`
	Request *control.Request `json:"request,omitempty"` // that the rules are tried on
	Last    int              `json:"last,omitempty"`    // decisions that are wanted
}

// Why is the answer of the agents.
type Why struct {
	Intercept Intercept `json:"intercept"`
	control.Why
}

// LogLevelRequest changes the log level of the daemons.
type LogLevelRequest struct {
	Level string        `json:"level"` // error, warn, info or debug; "" is the one that they were started with
	For   time.Duration `json:"for"`   // 0: until it is changed again
	// Start says that it counts as the level that they were started with: sudo and services pass none on.
	Start bool `json:"start,omitempty"`
}

// StacksRequest asks what the daemon is doing.
type StacksRequest struct {
	Collect bool `json:"collect,omitempty"` // the garbage first, and give its memory back
}

// Stacks are the goroutines of the daemon, those with the same stack together.
type Stacks struct {
	Goroutines int    `json:"goroutines"`
	Text       string `json:"text"`
}

// QuitRequest ends one session, or all, and with Stop both daemons. With IfIdle it ends no session, and no daemon that has one. With UID it
// ends that session, and no later one of its name.
type QuitRequest struct {
	Choice
	UID    string `json:"uid,omitempty"`
	Stop   bool   `json:"stop"`
	IfIdle bool   `json:"ifIdle,omitempty"`
}

// QuitResult says what came of it.
type QuitResult struct {
	Kept bool `json:"kept,omitempty"` // a daemon goes on: it was not idle
}
