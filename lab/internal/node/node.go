// Package node says what a node of the cluster is made of: its namespaces, its files and its servers.
package node

import (
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/pki"
	"github.com/doppel-dev/doppel/lab/internal/plan"
)

// Paths inside a node, the usual ones where programs have them compiled in.
const (
	Kube           = "/run/lab/kube"
	cniPrograms    = "/run/lab/cni"
	containerdSock = "/run/containerd/containerd.sock"
)

// Config is what a node depends on.
type Config struct {
	Lab  plan.Lab
	Node plan.Node
	// LabDir is the lab's directory, at the same path inside and outside; Dir is the node's own below it.
	LabDir, Dir string
	// Kube is the multi-call program and CNI the directory of the CNI plugins, as the machine sees them.
	Kube, CNI string
	// PauseImage is the name of the image that holds pods' namespaces.
	PauseImage string
}

// Dirs are the directories that must exist before the node's namespaces are made.
func (c Config) Dirs() []string {
	return []string{
		filepath.Join(c.Dir, "kubelet"), filepath.Join(c.Dir, "containerd"), filepath.Join(c.Dir, "log"), filepath.Join(c.Dir, "cni.d"),
	}
}

// Cgroup is the node's control group.
func (c Config) Cgroup() string { return c.Lab.Cgroup() + "/" + c.Node.Short }

// Spec is what the node's holder sets up: a machine's view in which the places where Kubernetes writes are the node's.
func (c Config) Spec() ns.Spec {
	return ns.Spec{
		Hostname: c.Node.Name,
		Hide:     []string{"/run", "/var/lib", "/var/log", "/opt"},
		Binds: []ns.Bind{
			{From: c.LabDir, To: c.LabDir},
			{From: filepath.Join(c.Dir, "kubelet"), To: "/var/lib/kubelet"},
			{From: filepath.Join(c.Dir, "containerd"), To: "/var/lib/containerd"},
			{From: filepath.Join(c.Dir, "log"), To: "/var/log"},
			{From: c.Kube, To: Kube},
			{From: c.CNI, To: cniPrograms},
		},
		Shared: true,
		Shadow: shadowedSettings(),
	}
}

// shadowedSettings are kernel settings of the whole machine that kubelet wants so and would otherwise change.
func shadowedSettings() map[string]string {
	return map[string]string{
		"/proc/sys/vm/overcommit_memory":      "1",
		"/proc/sys/vm/panic_on_oom":           "0",
		"/proc/sys/kernel/panic":              "10",
		"/proc/sys/kernel/panic_on_oops":      "1",
		"/proc/sys/kernel/keys/root_maxkeys":  "1000000",
		"/proc/sys/kernel/keys/root_maxbytes": "25000000",
	}
}

// Identity is the certificate of the node's kubelet, as client and as server.
func Identity(n plan.Node) pki.Identity {
	return pki.Identity{
		User: "system:node:" + n.Name, Groups: []string{"system:nodes"},
		DNS: []string{n.Name}, IPs: []netip.Addr{n.IP, n.IP6, netip.MustParseAddr("127.0.0.1")},
	}
}

// Object is the node's API object. The lab makes it before kubelet does, to choose the pods' subnet itself.
func (c Config) Object() (path, yaml string) {
	return "/api/v1/nodes/" + c.Node.Name, fmt.Sprintf(
		`{apiVersion: v1, kind: Node, metadata: {name: %q}, spec: {podCIDR: %[2]q, podCIDRs: [%[2]q, %[3]q]}}`, c.Node.Name, c.Node.PodCIDR, c.Node.PodCIDR6)
}

// Containerd is the command line of the container runtime.
func (c Config) Containerd() []string {
	return []string{"containerd", "--config", filepath.Join(c.Dir, "containerd.toml")}
}

// Kubelet is the command line of kubelet.
func (c Config) Kubelet() []string {
	return []string{
		Kube, "kubelet", "--config=" + filepath.Join(c.Dir, "kubelet.yaml"),
		"--kubeconfig=" + filepath.Join(c.LabDir, "pki", c.Node.Short+".conf"),
		"--hostname-override=" + c.Node.Name, "--node-ip=" + c.Node.IP.String() + "," + c.Node.IP6.String(),
	}
}

// Proxy is the command line of kube-proxy. It goes before everything else on this machine (sched(7), also about /proc/self/autogroup): on a node of its own
// it is not kept from its work, and here its rules would be two seconds late with eight busy processes.
func (c Config) Proxy() []string {
	first := `echo -10 2>/dev/null >/proc/self/autogroup; exec nice -n -10 "$@"`
	return []string{"sh", "-c", first, "sh", Kube, "kube-proxy", "--config=" + filepath.Join(c.Dir, "proxy.yaml")}
}

// Import is the command line that reads an image archive from standard input.
func Import() []string {
	return []string{"ctr", "--namespace=k8s.io", "images", "import", "--snapshotter=overlayfs", "-"}
}

// Ping is a command line that succeeds once the container runtime answers.
func Ping() []string { return []string{"ctr", "--namespace=k8s.io", "images", "list", "--quiet"} }
