package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// forwardHelper hands connections on: "tcp 127.0.0.1:7443 unix /path" accepts at the first and dials the second. Two of them, with a unix
// socket between, lead from one network namespace into another.
func forwardHelper(spec string) int {
	f := strings.Fields(spec)
	l, err := net.Listen(f[0], f[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("listening")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = l.Close()
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			return 0
		}
		go func() {
			defer c.Close()
			up, err := net.Dial(f[2], f[3])
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(up, c); _ = up.Close() }()
			_, _ = io.Copy(c, up)
		}()
	}
}

// anotherCluster is a second lab, until the test ends. Its subnets are those of the first. It has a node without API server.
func anotherCluster(t *testing.T, c *cluster) *cluster {
	t.Helper()
	o := &cluster{name: labName + "-b", root: c.root}
	t.Cleanup(func() {
		if out, err := o.lab("down"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	load := []string{"load"}
	for _, p := range []string{"traffic-manager", "traffic-agent", "colors"} {
		load = append(load, filepath.Join(c.root, "dist", p+".tar"))
	}
	for _, args := range [][]string{{"up", "--nodes", "2"}, load} {
		if out, err := o.lab(args...); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	kc, err := o.lab("kubeconfig")
	if err != nil {
		t.Fatal(err)
	}
	o.kubeconfig = filepath.Join(t.TempDir(), "config")
	cfg, cerr := clientcmd.RESTConfigFromKubeConfig([]byte(kc))
	if err := errors.Join(cerr, os.WriteFile(o.kubeconfig, []byte(kc), 0o600)); err != nil {
		t.Fatal(err)
	}
	if o.core, err = kubernetes.NewForConfig(cfg); err != nil {
		t.Fatal(err)
	}
	return o
}

// TestSeveral is a laptop in two clusters at once, whose subnets are the same.
func TestSeveral(t *testing.T) {
	c := theCluster(t)
	other := anotherCluster(t, c)
	ns := c.namespace(t, "several")
	c.sample(t, ns)
	other.namespace(t, ns)
	b, err := os.ReadFile(filepath.Join(c.root, "examples", "colors", "k8s.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range strings.Split(string(b), "\n---") { // the same service, and one that the first cluster has not
		if strings.Contains(doc, "name: dataprocessingservice") {
			other.apply(t, ns, []byte(doc))
			doc = strings.ReplaceAll(doc, "dataprocessingservice", "elsewhere")
			other.apply(t, ns, []byte(strings.ReplaceAll(doc, "5s, elsewhere", "5s, dataprocessingservice"))) // what the program is to be
		}
	}
	other.available(t, ns, "elsewhere")
	l := newLaptop(t, "both")
	l.withManager(t)
	first := "lab-" + labName

	// The laptop reaches the second API server at an address of its own.
	socket := filepath.Join(t.TempDir(), "api.sock")
	cfg := ok(clientcmd.LoadFromFile(other.kubeconfig))(t)
	kube := cfg.Clusters[cfg.Contexts[cfg.CurrentContext].Cluster]
	server := strings.TrimPrefix(kube.Server, "https://")
	here := func(ctx context.Context, args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, args[0], args[1:]...)
	}
	startLines(t, here, "forward", "unix "+socket+" tcp "+server)
	startLines(t, l.command, "forward", "tcp 127.0.0.1:7443 unix "+socket)
	kube.TLSServerName, kube.Server = strings.Split(server, ":")[0], "https://127.0.0.1:7443"
	file := filepath.Join(t.TempDir(), "other")
	if err := clientcmd.WriteToFile(*cfg, file); err != nil {
		t.Fatal(err)
	}
	connect := []string{"doppel", "connect", "--kubeconfig", file, "-n", ns}

	l.run(t, "doppel", "connect", "-n", ns)
	r := l.try(t, connect...)
	if r.code != 1 || !strings.Contains(r.stderr, "connected already to context "+first) || !strings.Contains(r.stderr, "--name") {
		t.Fatalf("a second cluster without a name: %v", r)
	}
	began := time.Now()
	r = l.try(t, append(connect, "--name", "second")...)
	if r.code != 0 {
		t.Fatalf("%v", r)
	}
	t.Logf("second connect, with the manager's installation: %v", time.Since(began).Round(time.Millisecond))
	want(t, r.stderr, "10.96.0.0/16 is 240.", "overlaps 10.96.0.0/16 of connection "+first)

	color := func(host string) string {
		t.Helper()
		return strings.TrimSpace(l.run(t, "curl", "-s", "-m", "5", host+":3000/color"))
	}
	elsewhere := strings.Split(other.clusterIP(t, ns, "elsewhere"), ":")[0]
	t.Run("names and addresses", func(t *testing.T) {
		for _, name := range []string{"elsewhere", "elsewhere." + ns, "elsewhere." + ns + ".svc", "elsewhere." + ns + ".svc.cluster.local"} {
			want(t, color(name), "green")
			a := netip.MustParseAddr(strings.Fields(l.run(t, "getent", "ahostsv4", name))[0])
			if !netip.MustParsePrefix("240.0.0.0/5").Contains(a) {
				t.Errorf("%s is %v, an address of the first cluster's", name, a)
			}
		}
		ip := strings.Split(c.clusterIP(t, ns, "dataprocessingservice"), ":")[0]
		want(t, l.run(t, "getent", "ahostsv4", "dataprocessingservice."+ns), ip) // in both: the first
		want(t, color(ip), "green")
		want(t, l.run(t, "dig", "+short", "-x", strings.Fields(l.run(t, "getent", "ahostsv4", "elsewhere."+ns))[0]), "elsewhere."+ns+".svc.cluster.local.")
		if r := l.try(t, "curl", "-s", "-m", "3", elsewhere+":3000/color"); r.code == 0 {
			t.Errorf("%s is the second cluster's address: %v", elsewhere, r)
		}
	})
	t.Run("nodes", func(t *testing.T) {
		nodes := ok(other.core.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{}))(t)
		routed := 0
		for _, n := range nodes.Items {
			for _, a := range n.Status.Addresses {
				switch {
				case a.Type != corev1.NodeInternalIP:
				case strings.HasPrefix(server, a.Address+":"): // left to the way that the laptop has, which is none
					if out := l.run(t, "ip", "route", "get", a.Address); strings.Contains(out, "doppel0") {
						t.Errorf("the API server's node: %s", out)
					}
				case netip.MustParseAddr(a.Address).Is4():
					routed++
					l.run(t, "ping", "-c", "1", "-W", "3", a.Address)
					want(t, l.run(t, "curl", "-sk", "-m", "5", "https://"+net.JoinHostPort(a.Address, "10250")+"/"), "404") // its kubelet
				}
			}
		}
		if routed != 1 {
			t.Errorf("%d nodes without API server", routed)
		}
	})
	t.Run("commands", func(t *testing.T) {
		r := l.try(t, "doppel", "list")
		if r.code != 2 || !strings.Contains(r.stderr, "there are several connections: "+first+", second") || !strings.Contains(r.stderr, "--use") {
			t.Errorf("%v", r)
		}
		want(t, l.run(t, "doppel", "list", "--use", "sec"), "elsewhere")
		want(t, l.run(t, "doppel", "status"), "Connected as "+first+" to context", "Connected as second to context", "All connections")
		want(t, l.run(t, "doppel", "routes"), "Connection "+first, "Connection second", "mapped")
		var st struct{ Others []struct{ Connection string } }
		if err := json.Unmarshal([]byte(l.run(t, "doppel", "status", "-o", "json")), &st); err != nil || len(st.Others) != 1 || st.Others[0].Connection != "second" {
			t.Errorf("%+v, %v", st, err)
		}
		l.colors(t, "blue", "127.0.0.1:3000")
		l.run(t, "doppel", "intercept", "elsewhere", "-p", "3000", "--use", "second")
		if err := other.is(t, elsewhere+":3000", "blue"); err != nil {
			t.Error(err)
		}
		l.run(t, "doppel", "leave", "elsewhere") // there is one of that name only
		eventually(t, 5*time.Second, func() error { return other.is(t, elsewhere+":3000", "green") })
	})
	t.Run("one ends", func(t *testing.T) {
		l.run(t, "doppel", "quit", "--use", "second")
		if r := l.try(t, "getent", "hosts", "elsewhere."+ns); r.code == 0 {
			t.Errorf("a name of the cluster that was left: %v", r)
		}
		want(t, color("dataprocessingservice"), "green")
		want(t, l.run(t, "doppel", "status"), "Connected to context "+first)
		l.run(t, append(connect, "--name", "second")...)
		l.run(t, "doppel", "quit", "--use", "^"+first+"$")
		want(t, color("elsewhere"), "green")
		want(t, l.run(t, "getent", "ahostsv4", "elsewhere"), "240.") // as applications know it
		l.run(t, append(connect, "--name", "third", "--also-proxy", "192.0.2.0/24")...)
		l.run(t, "doppel", "quit")
		want(t, l.run(t, "doppel", "status"), "Not connected")
	})
	l.run(t, "doppel", "quit", "-s")
}
