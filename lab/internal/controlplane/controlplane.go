// Package controlplane says how the servers of the control plane are started.
package controlplane

import (
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/doppel-dev/doppel/lab/internal/pki"
	"github.com/doppel-dev/doppel/lab/internal/plan"
)

// Config is what the command lines depend on.
type Config struct {
	Lab plan.Lab
	// Kube is the multi-call program, PKI and Data are directories, all as seen on the first node.
	Kube, PKI, Data string
}

// Identities are the certificates of the control plane and its users, by file name.
func Identities(l plan.Lab) map[string]pki.Identity {
	api := l.Node(1).IP
	return map[string]pki.Identity{
		"apiserver": {
			User: "kube-apiserver",
			DNS: []string{
				"kubernetes", "kubernetes.default", "kubernetes.default.svc",
				"kubernetes.default.svc." + plan.ClusterDomain, "localhost",
			},
			IPs: []netip.Addr{api, plan.KubernetesI, netip.MustParseAddr("127.0.0.1")},
		},
		"admin":       {User: "admin", Groups: []string{"system:masters"}},
		"developer":   {User: "developer", Groups: []string{"developers"}},
		"kcm":         {User: "system:kube-controller-manager"},
		"scheduler":   {User: "system:kube-scheduler"},
		"proxy":       {User: "system:kube-proxy"},
		"front-proxy": {User: "front-proxy-client"},
	}
}

func (c Config) pki(name string) string { return filepath.Join(c.PKI, name) }

// services are the subnets of services; the first is a service's when it asks for none.
func services() string { return plan.ServiceCIDR.String() + "," + plan.ServiceCIDR6.String() }

// Etcd is the command line of the store.
func (c Config) Etcd() []string {
	return []string{c.Kube, "etcd", "--data-dir=" + c.Data}
}

// APIServer is the command line of the API server.
func (c Config) APIServer() []string {
	return []string{
		c.Kube, "kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379",
		"--bind-address=0.0.0.0",
		fmt.Sprintf("--secure-port=%d", plan.APIPort),
		"--advertise-address=" + c.Lab.Node(1).IP.String(),
		"--service-cluster-ip-range=" + services(),
		"--allow-privileged=true",
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement", // the second one as on OpenShift
		"--tls-cert-file=" + c.pki("apiserver.crt"),
		"--tls-private-key-file=" + c.pki("apiserver.key"),
		"--client-ca-file=" + c.pki("ca.crt"),
		"--service-account-key-file=" + c.pki("sa.pub"),
		"--service-account-signing-key-file=" + c.pki("sa.key"),
		"--service-account-issuer=https://kubernetes.default.svc." + plan.ClusterDomain,
		// Nodes have no names in any DNS.
		"--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate=" + c.pki("admin.crt"),
		"--kubelet-client-key=" + c.pki("admin.key"),
		"--kubelet-certificate-authority=" + c.pki("ca.crt"),
		"--requestheader-client-ca-file=" + c.pki("ca.crt"),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + c.pki("front-proxy.crt"),
		"--proxy-client-key-file=" + c.pki("front-proxy.key"),
	}
}

// ControllerManager is the command line of the controllers.
func (c Config) ControllerManager() []string {
	return []string{
		c.Kube, "kube-controller-manager",
		"--kubeconfig=" + c.pki("kcm.conf"),
		"--authentication-kubeconfig=" + c.pki("kcm.conf"),
		"--authorization-kubeconfig=" + c.pki("kcm.conf"),
		"--root-ca-file=" + c.pki("ca.crt"),
		"--service-account-private-key-file=" + c.pki("sa.key"),
		"--use-service-account-credentials=true",
		"--cluster-signing-cert-file=" + c.pki("ca.crt"),
		"--cluster-signing-key-file=" + c.pki("ca.key"),
		"--allocate-node-cidrs=true",
		"--cluster-cidr=" + plan.PodCIDR.String() + "," + plan.PodCIDR6.String(),
		"--service-cluster-ip-range=" + services(),
		"--leader-elect=false",
		// The default of 20 requests a second delays the start of the controllers by several seconds.
		"--kube-api-qps=1000",
		"--kube-api-burst=1000",
	}
}

// Scheduler is the command line of the scheduler.
func (c Config) Scheduler() []string {
	return []string{
		c.Kube, "kube-scheduler",
		"--kubeconfig=" + c.pki("scheduler.conf"),
		"--authentication-kubeconfig=" + c.pki("scheduler.conf"),
		"--authorization-kubeconfig=" + c.pki("scheduler.conf"),
		"--leader-elect=false",
	}
}
