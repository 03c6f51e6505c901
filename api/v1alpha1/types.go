package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:metadata:annotations="doppel.dev/schema=1"
// +kubebuilder:printcolumn:name="User",type=string,JSONPath=`.spec.user`
// +kubebuilder:printcolumn:name="Client",type=string,JSONPath=`.spec.client`
// +kubebuilder:printcolumn:name="State",type=string,JSONPath=`.status.state`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`

// Session is one laptop in one cluster. The laptop creates it in the manager's namespace with the user's own credentials;
// the admission policy ties it to that user. Everything refers to a session by its UID.
type Session struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   SessionSpec   `json:"spec"`
	Status SessionStatus `json:"status,omitempty"`
}

// SessionSpec is written by the laptop; all of it but RenewTime is immutable.
type SessionSpec struct {
	// User is the creator's name as the API server sees it (request.userInfo.username); the policy enforces it.
	User string `json:"user"`
	// Key is the fingerprint of the laptop's tunnel key: "sha256:" and the base64url SHA-256 of its SPKI.
	Key string `json:"key"`
	// Namespace is the namespace the laptop is connected to (single-label names are looked up there).
	Namespace string `json:"namespace,omitempty"`
	// Reach is what the laptop may reach through the manager. The admission policy checks it against its creator's rights, at creation
	// and at each renewal.
	Reach Reach `json:"reach,omitempty"`
	// AcceptIntercepts lets the session claim intercepts that its user has declared without naming a session.
	AcceptIntercepts bool `json:"acceptIntercepts,omitempty"`
	// Client describes the laptop for people: product and version, host name.
	Client string `json:"client,omitempty"`
	// RenewTime is set at creation and renewed by the laptop; two missed renewals end the session.
	RenewTime metav1.MicroTime `json:"renewTime"`
}

// MaxReach is how many namespaces a session can name. It is what the chart's policies have room for: the API server allows an expression
// two checks of rights, and a policy 28 in all.
const MaxReach = 208

// ReachAll in Reach.Namespaces, alone, stands for the whole cluster and whatever lies beyond it.
const ReachAll = "*"

// Reach is a part of a cluster's network.
type Reach struct {
	// Namespaces are those whose pods and services are wanted, for which their user needs the right to connect to
	// networks.doppel.dev. "*" alone is the whole cluster and whatever lies beyond, and needs that right in the whole cluster.
	// +kubebuilder:validation:MaxItems=208
	Namespaces []string `json:"namespaces,omitempty"`
	// Outside is what belongs to no namespace: nodes, addresses and names beyond the cluster. It needs the right to connect to
	// outside.doppel.dev.
	Outside bool `json:"outside,omitempty"`
}

// SessionState says where a session stands.
type SessionState string

// The states of a session.
const (
	SessionPending   SessionState = "Pending"   // created, no tunnel yet
	SessionConnected SessionState = "Connected" // the manager holds its tunnel
	SessionLost      SessionState = "Lost"      // the tunnel is gone; ends 30 s later unless it comes back
)

// SessionStatus is written by the managers alone.
type SessionStatus struct {
	State SessionState `json:"state,omitempty"`
	// Address is the agents' port of the manager replica that holds the tunnel, host:port.
	Address string `json:"address,omitempty"`
	// Since is when State was entered.
	Since   metav1.Time `json:"since,omitempty"`
	Message string      `json:"message,omitempty"`
}

// +kubebuilder:object:root=true

// SessionList is a list of sessions.
type SessionList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Session `json:"items"`
}

// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:metadata:annotations="doppel.dev/schema=1"
// +kubebuilder:printcolumn:name="Kind",type=string,JSONPath=`.spec.workload.kind`
// +kubebuilder:printcolumn:name="Workload",type=string,JSONPath=`.spec.workload.name`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Ports",type=string,JSONPath=`.status.taken`
// +kubebuilder:printcolumn:name="User",type=string,JSONPath=`.spec.user`
// +kubebuilder:printcolumn:name="State",type=string,JSONPath=`.status.state`
// +kubebuilder:printcolumn:name="Message",type=string,JSONPath=`.status.message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Agents",type=integer,JSONPath=`.status.agents`,priority=1
// +kubebuilder:printcolumn:name="Requests",type=string,JSONPath=`.status.requests`,priority=1

// Intercept sends traffic of one workload to the laptop of one session. It stands in the workload's namespace.
type Intercept struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   InterceptSpec   `json:"spec"`
	Status InterceptStatus `json:"status,omitempty"`
}

// InterceptSpec is written by the laptop and immutable.
type InterceptSpec struct {
	// User is the creator's name; the policy enforces it.
	User string `json:"user"`
	// Session is the UID of the session the traffic goes to; the manager checks that it has the same user. Empty: a session of that user
	// which accepts intercepts claims this one.
	Session string `json:"session,omitempty"`
	// Name is what the user calls the intercept.
	Name string `json:"name"`
	// Workload is what is intercepted.
	Workload WorkloadRef `json:"workload"`
	// Mode is what is wanted of the workload. Intercept, the default: its ports' traffic. Wiretap: a copy of what clients send there.
	// Replace: one container's traffic, and that this container does not run meanwhile.
	// Ingest: none of its traffic, but one container's environment and files. Egress: none of that, but that its agents connect for the
	// session, out of its pods.
	// +kubebuilder:validation:Enum=Intercept;Wiretap;Replace;Ingest;Egress
	// +kubebuilder:default=Intercept
	Mode InterceptMode `json:"mode,omitempty"`
	// Ports are the ports wanted; all of them are taken, or none. Empty: the workload's only port. A Replace takes all other ports of the
	// container besides, as if they were here without a target.
	// +kubebuilder:validation:MaxItems=16
	Ports []WantedPort `json:"ports,omitempty"`
	// Service narrows the ports to one service where several select the workload.
	Service string `json:"service,omitempty"`
	// Container narrows the ports to one container. For a Replace it is the one that shall not run, for an Ingest the one whose environment
	// and files are wanted.
	Container string `json:"container,omitempty"`
	// Recreate accepts that the workload is interrupted while its pods are replaced, where that cannot be done otherwise.
	Recreate bool `json:"recreate,omitempty"`
	// ToPod are ports on the loopback of the workload's pods that the laptop may reach.
	// +kubebuilder:validation:MaxItems=32
	ToPod []PodPort `json:"toPod,omitempty"`
	// Takeover ends intercepts of others that are in the way. Its creator needs the right to takeover intercepts.
	Takeover bool `json:"takeover,omitempty"`
	// HTTP narrows the intercept to HTTP requests that match; without it all connections are taken, or with Preview none but the preview's.
	HTTP *HTTPMatch `json:"http,omitempty"`
	// Preview has the requests taken that come through a preview's domain, besides those of HTTP.
	Preview *Preview `json:"preview,omitempty"`
}

// Preview is a domain of a relay through which an intercept is seen.
type Preview struct {
	// ID is the value of the header x-doppel-intercept-id in the preview's requests. The relay has made it.
	// +kubebuilder:validation:Pattern=`^[a-z0-9]{16,64}$`
	ID string `json:"id"`
	// Ingress is where the preview's requests enter the cluster. The relay has no say in it.
	Ingress Ingress `json:"ingress"`
}

// Ingress is a service that the traffic-manager sends a preview's requests to. It has to be within the reach of the session.
type Ingress struct {
	// Host is a service as NAME.NAMESPACE, or another name or address that the cluster knows.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Host string `json:"host"`
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port"`
	// TLS has the requests sent by TLS. The certificate is not verified.
	TLS bool `json:"tls,omitempty"`
	// L5Host is the server name in TLS; default: Host.
	// +kubebuilder:validation:MaxLength=253
	L5Host string `json:"l5Host,omitempty"`
}

// WantedPort is a port of the workload and where on the laptop its traffic ends.
type WantedPort struct {
	// Port is a service port's or container port's name or number, with /tcp or /udp behind it where that matters. Empty: the workload's
	// only port.
	// +kubebuilder:validation:MaxLength=80
	Port string `json:"port,omitempty"`
	// Target is an address of the laptop and a port. Empty: 127.0.0.1 and the container port's number.
	// +kubebuilder:validation:MaxLength=80
	Target string `json:"target,omitempty"`
}

// PodPort is a port of a pod.
type PodPort struct {
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port"`
	// +kubebuilder:validation:Enum=TCP;UDP
	// +kubebuilder:default=TCP
	Protocol string `json:"protocol,omitempty"`
}

// HTTPMatch is what an HTTP request must be like: all conditions hold.
type HTTPMatch struct {
	// Headers are conditions on header fields.
	// +kubebuilder:validation:MaxItems=16
	Headers []HeaderMatch `json:"headers,omitempty"`
	// Path is a condition on the target's path as it was sent, without the query.
	Path *TextMatch `json:"path,omitempty"`
	// Methods are the methods taken; none means all.
	// +kubebuilder:validation:MaxItems=16
	Methods []string `json:"methods,omitempty"`
}

// HeaderMatch is a condition on a header field. It holds if one of the field's lines has such a value.
type HeaderMatch struct {
	// Name is compared without regard to case.
	Name      string `json:"name"`
	TextMatch `json:",inline"`
}

// TextMatch is a condition on one value.
type TextMatch struct {
	// Op is how the value is compared; a regular expression (RE2 syntax) has to match all of it.
	// +kubebuilder:validation:Enum=equal;prefix;regexp
	Op string `json:"op"`
	// +kubebuilder:validation:MaxLength=1024
	Value string `json:"value"`
}

// WorkloadRef names a workload in the same namespace.
type WorkloadRef struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

// Holder is the UID of the session that an intercept's traffic goes to, or "".
func (in *Intercept) Holder() string {
	if in.Spec.Session != "" {
		return in.Spec.Session
	}
	return in.Status.Session
}

// InterceptMode is what is wanted of a workload.
type InterceptMode string

// The modes; empty means Intercept.
const (
	ModeIntercept InterceptMode = "Intercept"
	ModeWiretap   InterceptMode = "Wiretap"
	ModeReplace   InterceptMode = "Replace"
	ModeIngest    InterceptMode = "Ingest"
	ModeEgress    InterceptMode = "Egress"
)

// InterceptState says where an intercept stands.
type InterceptState string

// The states of an intercept.
const (
	InterceptPending InterceptState = "Pending" // accepted; agents are being installed, or, with the reason Interrupted, some are away
	InterceptActive  InterceptState = "Active"  // every ready pod of the workload has an agent that knows the intercept
	InterceptFailed  InterceptState = "Failed"  // will not become active; Message says why
)

// InterceptStatus is written by the managers alone.
type InterceptStatus struct {
	State   InterceptState `json:"state,omitempty"`
	Reason  string         `json:"reason,omitempty"`  // CamelCase, for programs
	Message string         `json:"message,omitempty"` // one sentence, for people
	// Ports are the container ports taken: those of the spec in its order, then the others of a container that is replaced.
	Ports []InterceptedPort `json:"ports,omitempty"`
	// Taken and Requests say in words which container ports are taken and which HTTP requests of them, for the table of kubectl, which shows no more
	// than the first element of a list.
	Taken    string `json:"taken,omitempty"`
	Requests string `json:"requests,omitempty"`
	// Container is the container whose ports are taken.
	Container string `json:"container,omitempty"`
	// Session is the UID of the session that has claimed the intercept, if its spec names none.
	Session string `json:"session,omitempty"`
	// Agents counts the pods whose agent serves the intercept.
	Agents int32 `json:"agents,omitempty"`
	// Replace is the pod that has to be deleted (a pod without a controller: and made again) before the intercept can go on. The laptop does
	// that with its user's rights.
	Replace *PodRef `json:"replace,omitempty"`
}

// PodRef names one pod.
type PodRef struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// InterceptedPort is one container port with how traffic reaches the agent.
type InterceptedPort struct {
	Protocol      string `json:"protocol"` // TCP or UDP
	ContainerPort int32  `json:"containerPort"`
	ServicePort   int32  `json:"servicePort,omitempty"`
	Service       string `json:"service,omitempty"`
	// Way is "name" (name takeover) or "redirect" (nftables).
	Way string `json:"way,omitempty"`
}

// +kubebuilder:object:root=true

// InterceptList is a list of intercepts.
type InterceptList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Intercept `json:"items"`
}
