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
	// LaptopCluster is a watch of a laptop at the manager; every message is a whole Cluster.
	LaptopCluster = "laptop/cluster"
	// LaptopIntercepts is a watch of a laptop at the manager; every message is the whole list of the session's intercepts.
	LaptopIntercepts = "laptop/intercepts"
)

// Table is what an agent does with its ports: all intercepts that concern its workload.
type Table struct {
	Generation uint64 `json:"generation"`
	// LogLevel is what the agent shall log: error, warn, info or debug; "" is what it was started with.
	LogLevel string       `json:"logLevel,omitempty"`
	Items    []TableEntry `json:"items"`
	// Egress are the intercepts (UIDs) for whose laptops the agent connects.
	Egress []string `json:"egress,omitempty"`
}

// TableEntry sends one container port's connections, or some of its requests, to the laptop of one intercept.
type TableEntry struct {
	Intercept     string `json:"intercept"` // UID
	Protocol      string `json:"protocol"`
	ContainerPort uint16 `json:"containerPort"`
	// Match narrows it to HTTP requests; the zero value takes all connections that no other entry of the port takes.
	Match match.Rule `json:"match,omitzero"`
}

// Cluster is what a laptop has to know of the cluster's network and names.
type Cluster struct {
	Domain       string               `json:"domain"`
	ServiceCIDRs []netip.Prefix       `json:"serviceCIDRs"`
	PodCIDRs     []netip.Prefix       `json:"podCIDRs"`
	Nodes        []netip.Addr         `json:"nodes,omitempty"` // but for those where the API server is
	Services     map[string][]Service `json:"services"`        // by namespace; a namespace without services has an empty list

	// ManagerService and ManagerPod are where the manager answers /attach inside the cluster: a laptop that gets there without its tunnel is
	// in the cluster's network already.
	ManagerService netip.AddrPort `json:"managerService,omitzero"`
	ManagerPod     netip.AddrPort `json:"managerPod,omitzero"`
}

// Service is a service's name and whether it is headless.
type Service struct {
	Name     string `json:"name"`
	Headless bool   `json:"headless,omitempty"`
}

// Intercepts is the state of a session's intercepts as the manager sees it.
type Intercepts struct {
	Items []Intercept `json:"items"`
	// Problems are what is wrong with the manager itself, one sentence each.
	Problems []string `json:"problems,omitempty"`
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
	Port      uint16 `json:"port"`
	Protocol  string `json:"protocol,omitempty"` // of Port
	// Declared says that the laptop has claimed the intercept, which somebody made without it.
	Declared bool `json:"declared,omitempty"`
	// Replace is the pod (name and UID) that the laptop is to replace: see InterceptStatus.
	Replace    string `json:"replace,omitempty"`
	ReplaceUID string `json:"replaceUID,omitempty"`
}
