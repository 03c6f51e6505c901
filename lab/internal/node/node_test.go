package node

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/lab/internal/plan"
)

func config() Config {
	l := plan.Lab{Name: "lab", Index: 1, Nodes: 2}
	return Config{
		Lab: l, Node: l.Node(2), LabDir: "/state/lab", Dir: "/state/lab/nodes/node2",
		Kube: "/cache/kube", CNI: "/usr/lib/cni", PauseImage: "doppel.lab/pause:1",
	}
}

func TestFiles(t *testing.T) {
	c := config()
	files := c.Files()
	for file, wants := range map[string][]string{
		"resolv.conf":           {"nameserver 10.77.1.1\n"},
		"cni.d/10-lab.conflist": {`"subnet": "10.244.2.0/24"`, `"subnet": "fd10:244:0:2::/64"`, `"ipMasq": false`},
		"containerd.toml":       {`sandbox_image = "doppel.lab/pause:1"`, "restrict_oom_score_adj = true"},
		"kubelet.yaml":          {"cgroupRoot: /doppel-lab-lab/node2", "clusterDNS: [10.96.0.10]", "tlsCertFile: /state/lab/pki/node2.crt", "imagefs.available: 1%}"},
		"proxy.yaml":            {"mode: nftables", "hostnameOverride: lab-node2", "maxPerCore: 0"},
	} {
		content, ok := files[filepath.Join(c.Dir, file)]
		if !ok {
			t.Errorf("%s is missing", file)
		}
		for _, want := range wants {
			if !strings.Contains(content, want) {
				t.Errorf("%s lacks %q:\n%s", file, want, content)
			}
		}
		if strings.Contains(content, "%!") {
			t.Errorf("%s is badly formatted:\n%s", file, content)
		}
	}
	var cni map[string]any
	if err := json.Unmarshal([]byte(c.cni()), &cni); err != nil {
		t.Errorf("CNI configuration: %v", err)
	}
}

// TestSpecHidesWhatItCovers checks that what a node writes goes to its own directories, never to the machine's.
func TestSpecHidesWhatItCovers(t *testing.T) {
	c := config()
	spec := c.Spec()
	for _, dir := range []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/log/pods", "/run/containerd", "/var/lib/cni", "/opt/containerd"} {
		covered := false
		for _, h := range spec.Hide {
			covered = covered || strings.HasPrefix(dir, h+"/")
		}
		if !covered {
			t.Errorf("%s would be the machine's", dir)
		}
	}
	for _, b := range spec.Binds {
		if strings.HasPrefix(b.To, "/var/lib/") && b.To != c.LabDir && !strings.HasPrefix(b.From, c.Dir) {
			t.Errorf("%s shows %s", b.To, b.From)
		}
	}
}

func TestObject(t *testing.T) {
	path, object := config().Object()
	if path != "/api/v1/nodes/lab-node2" || !strings.Contains(object, `podCIDR: "10.244.2.0/24", podCIDRs: ["10.244.2.0/24", "fd10:244:0:2::/64"]`) {
		t.Errorf("%s %s", path, object)
	}
}
