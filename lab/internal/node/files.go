package node

import (
	"fmt"
	"path/filepath"

	"github.com/doppel-dev/doppel/lab/internal/plan"
)

// Files are the configuration files of the node, by path.
func (c Config) Files() map[string]string {
	return map[string]string{
		filepath.Join(c.Dir, "resolv.conf"):              "nameserver " + c.Lab.Gateway().String() + "\n",
		filepath.Join(c.Dir, "cni.d", "10-lab.conflist"): c.cni(),
		filepath.Join(c.Dir, "containerd.toml"):          c.containerd(),
		filepath.Join(c.Dir, "kubelet.yaml"):             c.kubelet(),
		filepath.Join(c.Dir, "proxy.yaml"):               c.proxy(),
	}
}

// cni wires each pod to its node by a link of its own. All traffic between pods is routed, so kube-proxy's rules see
// it in both directions without br_netfilter. The first two plugins switch duplicate address detection off before the
// link is made: it would delay every pod by up to two seconds (RFC 4862, section 5.4.2), and nobody else is on the link.
func (c Config) cni() string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "lab",
  "plugins": [
    {"type": "loopback"},
    {"type": "tuning", "sysctl": {"net.ipv6.conf.default.accept_dad": "0"}},
    {
      "type": "ptp",
      "ipMasq": false,
      "ipam": {
        "type": "host-local",
        "dataDir": "/run/cni/ipam",
        "ranges": [[{"subnet": %q}], [{"subnet": %q}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, c.Node.PodCIDR, c.Node.PodCIDR6)
}

// restrict_oom_score_adj: without CAP_SYS_RESOURCE runc may not lower scores and dies with "can't get final child's
// PID from pipe".
func (c Config) containerd() string {
	return fmt.Sprintf(`version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  enable_selinux = false
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, containerdSock, c.PauseImage, cniPrograms, filepath.Join(c.Dir, "cni.d"))
}

// failCgroupV1: machines with version 1 groups still run this line of Kubernetes. crashLoopBackOff: what is killed again and again is started again
// at once, as it is the first time (KEP-4603); tests are what kills it.
func (c Config) kubelet() string {
	pki := filepath.Join(c.LabDir, "pki")
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %[1]s/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: %[1]s/%[2]s.crt
tlsPrivateKeyFile: %[1]s/%[2]s.key
containerRuntimeEndpoint: unix://%[3]s
cgroupDriver: cgroupfs
cgroupRoot: /%[4]s
cgroupsPerQOS: true
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
makeIPTablesUtilChains: false
oomScoreAdj: 0
clusterDNS: [%[5]s]
clusterDomain: %[6]s
resolvConf: %[7]s/resolv.conf
volumePluginDir: /var/lib/kubelet/volume-plugins
evictionHard: {memory.available: 100Mi, nodefs.available: 1%%, imagefs.available: 1%%}
imageGCHighThresholdPercent: 100
serializeImagePulls: false
kubeAPIQPS: 500
kubeAPIBurst: 500
shutdownGracePeriod: 0s
featureGates: {KubeletCrashLoopBackOffMax: true}
crashLoopBackOff: {maxContainerRestartPeriod: 1s}
`, pki, c.Node.Short, containerdSock, c.Cgroup(), plan.ClusterDNS, plan.ClusterDomain, c.Dir)
}

// conntrack: its limits cannot be written from a network namespace, so nothing is to be changed.
func (c Config) proxy() string {
	return fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: "%s,%s"
hostnameOverride: %s
oomScoreAdj: 0
clientConnection: {kubeconfig: %s/pki/proxy.conf}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
nftables: {minSyncPeriod: 100ms, syncPeriod: 30s}
`, plan.PodCIDR, plan.PodCIDR6, c.Node.Name, c.LabDir)
}
