// Package agentcfg owns what the injector tells a pod's traffic-agent: which ports to take, how, and where the manager is.
package agentcfg

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Names that the injector, the agent and the manager agree on.
const (
	// EnvConfig carries the configuration as JSON in the agent's environment.
	EnvConfig = "DOPPEL_AGENT_CONFIG"
	// EnvPodName, EnvPodNamespace and EnvPodIP come from the downward API.
	EnvPodName      = "POD_NAME"
	EnvPodNamespace = "POD_NAMESPACE"
	EnvPodIP        = "POD_IP"
	// Annotation is set on every injected pod; its value is the configuration as JSON.
	Annotation = "doppel.dev/agent"
	// AnnotationInject on a pod template has its pods always have an agent, or never. InjectEnabled also lets a pod without a controller be
	// injected.
	AnnotationInject = "doppel.dev/inject"
	InjectEnabled    = "enabled"
	InjectDisabled   = "disabled"
	// AnnotationVolumes on a pod template says what laptops may do with its volumes.
	AnnotationVolumes = "doppel.dev/volumes"
	// AnnotationOriginal is on a pod without owner that was made again for an agent: the pod as it was, as JSON.
	AnnotationOriginal = "doppel.dev/original"
	// LabelStandIn is on pods in which stand-ins take the place of containers.
	LabelStandIn = "doppel.dev/stand-in"
	// AnnotationProbe on a pod that is created as a dry run asks the webhook whether it is there: ProbeAsked becomes ProbeAnswered. On a session
	// it is a question of the manager to itself.
	AnnotationProbe = "doppel.dev/probe"
	ProbeAsked      = "asked"
	ProbeAnswered   = "answered"
	// Container and InitContainer name what is added to the pod.
	Container     = "traffic-agent"
	InitContainer = "doppel-redirect"
	// Audience is the audience of the agent's projected service account token.
	Audience = "doppel.dev"
	// TokenDir is where the token is mounted, TokenFile its path. It is the place of the app's own token: Kubernetes adds that
	// one to every container that has nothing mounted there, and the agent has no business with it.
	TokenDir  = "/var/run/secrets/kubernetes.io/serviceaccount"
	TokenFile = TokenDir + "/token"
	// FirstPort is the first port the agent listens on; ports that the pod uses are skipped.
	FirstPort = 9900
)

// Way is how a port's traffic reaches the agent.
type Way string

// The ways.
const (
	ByName     Way = "name"     // the port's name moved from the app's container to the agent's (no privilege)
	ByRedirect Way = "redirect" // an nftables redirect in the pod's network namespace
)

// Config is what an agent is started with.
type Config struct {
	// Managers are addresses (host:port) of the manager's agents port, tried in order.
	Managers []string `json:"managers"`
	// ManagerKey is the fingerprint that the manager's TLS key must have.
	ManagerKey string `json:"managerKey"`
	// Ports are the ports the agent takes.
	Ports []Port `json:"ports"`
	// HealthPort serves /readyz, AppPath and CallPath.
	HealthPort uint16 `json:"healthPort"`
	// StandIns are the containers that do not run: something that does nothing is in their place.
	StandIns []string `json:"standIns,omitempty"`
	// Apps are the containers whose environment and files the agent shows to laptops.
	Apps []App `json:"apps,omitempty"`
}

// App is a container whose environment and files the agent has.
type App struct {
	Container string `json:"container"`
	// Prefix is before the names of its variables in the agent's environment.
	Prefix  string   `json:"prefix"`
	Volumes []Volume `json:"volumes,omitempty"`
}

// Volume is a volume mount of an app.
type Volume struct {
	Path string `json:"path"` // in the app's container
	Dir  string `json:"dir"`  // in the agent's
	// ReadOnly is how the agent has it.
	ReadOnly bool `json:"readOnly,omitempty"`
}

// Port is one container port the agent stands in front of.
type Port struct {
	Protocol      string `json:"protocol"` // TCP or UDP
	ContainerPort uint16 `json:"containerPort"`
	Container     string `json:"container"`
	AgentPort     uint16 `json:"agentPort"`
	// ProbePort, when not 0, is where probes of a redirected port go: the agent always asks the app there.
	ProbePort uint16 `json:"probePort,omitempty"`
	Way       Way    `json:"way"`
	// Name is the port's name (name takeover only).
	Name string `json:"name,omitempty"`
	// TLS is set for a port whose TLS the agent may end.
	TLS *TLS `json:"tls,omitempty"`
	// Sidecar: the container is a native sidecar, which the kubelet ends after the agent.
	Sidecar bool `json:"sidecar,omitempty"`
}

// CallPath is where the agent's health port takes a connection for the tunnel from a manager that the agent has not found yet.
const CallPath = "/tunnel"

// AppPath is where the agent's health port answers whether the app accepts connections on a container port: 200 or 503.
func AppPath(containerPort uint16) string { return fmt.Sprintf("/app/%d", containerPort) }

// Covers says whether the agent takes the given container port.
func (c *Config) Covers(protocol string, containerPort uint16) bool {
	return slices.ContainsFunc(c.Ports, func(p Port) bool { return p.Protocol == protocol && p.ContainerPort == containerPort })
}

// StandInDrain is how long an agent goes on in front of a stand-in when its pod ends: for as long as clients may still be sent there. So long the
// laptop has to answer them.
const StandInDrain = 5 * time.Second

// StandsIn says whether a stand-in is in the place of the container.
func (c *Config) StandsIn(container string) bool { return slices.Contains(c.StandIns, container) }

// Shows says whether the agent has the container's environment and files.
func (c *Config) Shows(container string) bool {
	return slices.ContainsFunc(c.Apps, func(a App) bool { return a.Container == container })
}

// NeedsRedirect says whether any port needs the nftables redirect.
func (c *Config) NeedsRedirect() bool {
	return slices.ContainsFunc(c.Ports, func(p Port) bool { return p.Way == ByRedirect })
}

// Parse reads and validates a configuration.
func Parse(s string) (*Config, error) {
	var c Config
	if err := json.Unmarshal([]byte(s), &c); err != nil {
		return nil, fmt.Errorf("agent configuration: %w", err)
	}
	return &c, c.Validate()
}

// Validate joins everything that is wrong with c.
func (c *Config) Validate() error {
	var errs []error
	used := map[uint16]bool{}
	claim := func(p uint16) {
		if p == 0 || used[p] {
			errs = append(errs, fmt.Errorf("port %d is zero or used twice", p))
		}
		used[p] = true
	}
	if len(c.Managers) == 0 || c.ManagerKey == "" {
		errs = append(errs, errors.New("managers and managerKey are required"))
	}
	claim(c.HealthPort)
	taken := map[string]bool{}
	for _, p := range c.Ports {
		key := fmt.Sprintf("%s/%d", p.Protocol, p.ContainerPort)
		if taken[key] {
			errs = append(errs, fmt.Errorf("container port %s is taken twice", key))
		}
		taken[key] = true
		claim(p.AgentPort)
		if p.ProbePort != 0 {
			claim(p.ProbePort)
		}
		if p.ContainerPort == 0 || (p.Protocol != "TCP" && p.Protocol != "UDP") || (p.Way != ByName && p.Way != ByRedirect) {
			errs = append(errs, fmt.Errorf("port %+v is not valid", p))
		}
	}
	for _, p := range c.Ports {
		if used[p.ContainerPort] {
			errs = append(errs, fmt.Errorf("port %d is the app's and the agent's", p.ContainerPort))
		}
	}
	return errors.Join(errs...)
}

// String returns the configuration as JSON, the form that Parse reads.
func (c *Config) String() string {
	b, err := json.Marshal(c)
	if err != nil {
		panic(err) // strings and numbers only: cannot fail
	}
	return string(b)
}
