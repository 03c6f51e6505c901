package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// managerName is the fixed name of the manager's ConfigMap and Service.
const managerName = "traffic-manager"

// DefaultManagerNamespace is where the manager is when nobody says otherwise.
const DefaultManagerNamespace = "doppel"

// ManagerFlag is what a hint's command needs behind it for the manager in a namespace: the flag, or nothing.
func ManagerFlag(ns string) string {
	if ns == DefaultManagerNamespace {
		return ""
	}
	return " --manager-namespace " + ns
}

// ErrNoManager means that no traffic-manager is installed in the namespace that was asked for.
var ErrNoManager = errors.New("no traffic-manager")

// ManagerInfo is what a manager publishes about itself.
type ManagerInfo struct {
	Key      string // fingerprint of its tunnel key
	Version  string
	Protocol int  // version of the tunnel protocol it speaks
	ReachAll bool // it lets every session get to the whole cluster
	Pod      string
	Direct   []string // HOST:PORT where it is reached without the API server

	Namespaces      []string // those that it is for; none: the whole cluster
	NoWebhook       bool     // it gives pods no agents
	EnabledOnly     bool     // it gives agents only to pods that are annotated doppel.dev/inject: enabled
	ReachNamespaces bool     // it lets every session get to all of these, whatever its user may
}

// Manager reads the manager's ConfigMap.
func (c *Cluster) Manager(ctx context.Context, ns string) (ManagerInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cm, err := configMaps.get(ctx, c, ns, managerName)
	if apierrors.IsNotFound(err) {
		return ManagerInfo{}, uerr.Wrap(ErrNoManager, uerr.NoManager, "install it with: doppel helm install"+ManagerFlag(ns), "no traffic-manager in namespace %s", ns)
	}
	if apierrors.IsForbidden(err) {
		return ManagerInfo{}, uerr.Wrap(err, uerr.Denied, c.lettingIn(ns), "you may not use doppel in namespace %s", ns)
	}
	if err != nil {
		return ManagerInfo{}, c.explain(err, "look for the traffic-manager in namespace "+ns)
	}
	if cm.Data["key"] == "" {
		return ManagerInfo{}, uerr.New(uerr.Cluster, fmt.Sprintf("look at it with: kubectl -n %s get pods", ns), "the traffic-manager in namespace %s has not started yet", ns)
	}
	protocol, err := strconv.Atoi(cm.Data["protocol"])
	if err != nil {
		return ManagerInfo{}, uerr.Wrap(err, uerr.Cluster, "install it again with: doppel helm upgrade"+ManagerFlag(ns), "ConfigMap %s/%s", ns, managerName)
	}
	return ManagerInfo{
		Key: cm.Data["key"], Version: cm.Data["version"], Protocol: protocol, ReachAll: cm.Data["reach"] == "all", Pod: cm.Data["pod"],
		Namespaces: listed(cm.Data, "namespaces"), ReachNamespaces: cm.Data["reach"] == "namespaces", NoWebhook: cm.Data["webhook"] == "none",
		EnabledOnly: cm.Data["injection"] == "enabledOnly", Direct: listed(cm.Data, "direct"),
	}, nil
}

// lettingIn is what an administrator runs for this user. Bindings of their own: an upgrade with clientRbac.subjects would replace the list of those who are in.
func (c *Cluster) lettingIn(managerNS string) string {
	// What a path of the API has no place for is no name of an object.
	who := strings.NewReplacer("/", "-", "%", "-").Replace(c.user)
	bind := func(ns, kind, role string) string {
		return fmt.Sprintf("kubectl -n %s create rolebinding %s --%s=%s --user=%s", ns, uerr.ShellQuote(role+"-"+who), kind, role, uerr.ShellQuote(c.user))
	}
	return "once doppel is installed (doppel helm install), an administrator lets you in with: " + bind(managerNS, "role", "doppel-connect") + " && " +
		bind(c.Namespace, "clusterrole", "doppel-intercept") + " (--role=doppel-intercept if it was installed for some namespaces only)"
}

func explainUpgrade(e *tunnel.UpgradeError, ns string) error {
	switch e.Status {
	case http.StatusForbidden, http.StatusUnauthorized:
		return uerr.Wrap(e, uerr.Denied, fmt.Sprintf("you need the right to get services/proxy of http:%s:api in namespace %s", managerName, ns), "the API server does not let you through to the traffic-manager")
	case http.StatusNotFound:
		return uerr.Wrap(e, uerr.Cluster, "install it with: doppel helm install"+ManagerFlag(ns), "no service %s in namespace %s", managerName, ns)
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout:
		return uerr.Wrap(e, uerr.Cluster, fmt.Sprintf("look at it with: kubectl -n %s get pods", ns), "the traffic-manager is not running")
	case http.StatusOK, http.StatusUpgradeRequired:
		return uerr.Wrap(e, uerr.Cluster, "a proxy between here and the API server may strip the Upgrade header", "the way to the traffic-manager does not carry HTTP upgrades")
	}
	return uerr.Wrap(e, uerr.Cluster, "", "reach the traffic-manager")
}

// create creates an object of ours. The API server would drop fields that its resource types do not have yet, and an intercept of which a
// condition was dropped takes more than it should: it is to refuse them.
func create[T, L any](ctx context.Context, c *Cluster, r resource[T, L], ns string, o *T) (*T, error) {
	return r.create(ctx, c, ns, o, "fieldValidation", metav1.FieldValidationStrict)
}

// CreateSession creates the session object, renewed now by the cluster's clock, and returns it with its UID.
func (c *Cluster) CreateSession(ctx context.Context, ns string, spec v1alpha1.SessionSpec) (*v1alpha1.Session, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	spec.RenewTime = c.clock.now()
	s := &v1alpha1.Session{ObjectMeta: metav1.ObjectMeta{GenerateName: "session-", Namespace: ns}, Spec: spec}
	out, err := create(ctx, c, sessions, ns, s)
	if apierrors.IsNotFound(err) {
		return nil, uerr.Wrap(ErrNoManager, uerr.NoManager, "install it with: doppel helm install"+ManagerFlag(ns), "the cluster does not know doppel's resources")
	}
	return out, c.explain(err, "create a session")
}

// RenewSession moves the session's renewal time.
func (c *Cluster) RenewSession(ctx context.Context, s *v1alpha1.Session) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	patch := fmt.Sprintf(`{"metadata":{"uid":%q},"spec":{"renewTime":%q}}`, s.UID, c.clock.now().UTC().Format(metav1.RFC3339Micro))
	return c.explain(sessions.patch(ctx, c, s.Namespace, s.Name, patch), "renew the session")
}

// DeleteSession deletes the session; one that is gone already is no error.
func (c *Cluster) DeleteSession(ctx context.Context, s *v1alpha1.Session) error {
	return remove(ctx, c, sessions, s.Namespace, s.Name, s.UID, "end the session")
}

// CreateIntercept creates the intercept object in the workload's namespace.
func (c *Cluster) CreateIntercept(ctx context.Context, ns string, spec v1alpha1.InterceptSpec) (*v1alpha1.Intercept, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	in := &v1alpha1.Intercept{ObjectMeta: metav1.ObjectMeta{GenerateName: spec.Workload.Name + "-", Namespace: ns}, Spec: spec}
	out, err := create(ctx, c, intercepts, ns, in)
	if apierrors.IsNotFound(err) {
		return nil, uerr.Wrap(err, uerr.NotFound, "look at the namespaces with: kubectl get ns", "no namespace %s", ns)
	}
	return out, c.explain(err, "create an intercept in namespace "+ns)
}

// Intercept reads an intercept.
func (c *Cluster) Intercept(ctx context.Context, ns, name string) (*v1alpha1.Intercept, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	out, err := intercepts.get(ctx, c, ns, name)
	return out, c.explain(err, "read intercept "+name)
}

// DeleteIntercept deletes an intercept; one that is gone already is no error.
func (c *Cluster) DeleteIntercept(ctx context.Context, in *v1alpha1.Intercept) error {
	return remove(ctx, c, intercepts, in.Namespace, in.Name, in.UID, "remove the intercept")
}

// Intercepts lists the intercepts of a namespace, or of all for "".
func (c *Cluster) Intercepts(ctx context.Context, ns string) ([]v1alpha1.Intercept, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list, err := intercepts.list(ctx, c, ns, "")
	return list.Items, c.explain(err, "list intercepts")
}

// Sessions lists the sessions; only administrators may.
func (c *Cluster) Sessions(ctx context.Context, managerNS string) ([]v1alpha1.Session, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list, err := sessions.list(ctx, c, managerNS, "")
	return list.Items, c.explain(err, "list sessions")
}

func remove[T, L any](ctx context.Context, c *Cluster, r resource[T, L], ns, name string, uid types.UID, doing string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err := r.remove(ctx, c, ns, name, uid)
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // conflict: the name belongs to another object by now
		return nil
	}
	return c.explain(err, doing)
}
