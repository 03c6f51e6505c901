package main

import (
	"bytes"
	"context"
	_ "embed" // the manifests
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

//go:embed world.yaml
var manifests string

// The laptops. Each stands for one way to the cluster, so that all are there at once and take turns.
const (
	viaProxy   = "alice" // doppel, through the API server's service proxy
	viaForward = "bob"   // doppel, through a port-forward
	viaDirect  = "carol" // doppel, past the API server
	viaNothing = "dave"  // no doppel: kubectl, and the bare way
	connects   = "erin"  // connects and quits

	onNode = "node" // the server there
)

// noDirect keeps a laptop from the manager's direct address, so that its tunnel stays with the API server.
const noDirect = "table inet bench { chain output { type filter hook output priority filter; tcp dport 30443 reject with tcp reset; }; }"

// apps are the workloads, with their annotations.
var apps = map[string]string{
	"server": "", "splice": "", "fresh": "",
	"agent": "doppel.dev/inject: enabled", "matched": "doppel.dev/inject: enabled", "taken": "doppel.dev/inject: enabled",
}

// world is the lab with all that is measured.
type world struct {
	lab     string
	root    string // of the repository
	dir     string // for files that laptops share
	pod     string // address of the server's pod
	node    string // the node's, which a laptop reaches without anything of the cluster
	cluster map[string]string
	ends    []func() // in order of their beginning
}

// stop ends what runs.
func (w *world) stop() {
	for i := range w.ends {
		w.ends[len(w.ends)-1-i]()
	}
	w.ends = nil
}

func (w *world) bin(name string) string { return filepath.Join(w.root, "bin", name) }

// on is a command in a laptop's network, or, for "", in the node's.
func (w *world) on(ctx context.Context, place string, args ...string) *exec.Cmd {
	full := []string{"--name", w.lab, "node", "exec", "--"}
	if place != "" {
		full = []string{"--name", w.lab, "laptop", "exec", place, "--"}
	}
	cmd := exec.CommandContext(ctx, w.bin("lab"), append(full, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// output runs a command and returns what it printed; what it said beside that is in the error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, out, errs.Bytes())
	}
	return out, nil
}

func (w *world) do(ctx context.Context, place string, args ...string) error {
	_, err := output(w.on(ctx, place, args...))
	return err
}

func (w *world) runLab(ctx context.Context, args ...string) error {
	_, err := output(exec.CommandContext(ctx, w.bin("lab"), append([]string{"--name", w.lab}, args...)...))
	return err
}

// kubectl runs kubectl as administrator.
func (w *world) kubectl(ctx context.Context, in string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, w.bin("tools/kubectl-v1.34.4"), append([]string{"--kubeconfig", filepath.Join(w.dir, "kubeconfig")}, args...)...)
	cmd.Stdin = strings.NewReader(in)
	return output(cmd)
}

// start runs a command until the world stops, and returns when it has printed a line with ready in it.
func (w *world) start(ctx context.Context, place, ready string, args ...string) error {
	cmd := w.on(context.WithoutCancel(ctx), place, args...)
	r, out := io.Pipe()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); _ = out.Close(); close(ended) }()
	w.ends = append(w.ends, func() { _ = cmd.Process.Signal(os.Interrupt); <-ended })
	seen := make(chan string, 1)
	go func() {
		said := ""
		b := make([]byte, 4<<10)
		for found := false; ; {
			n, err := r.Read(b)
			if !found {
				if said += string(b[:n]); strings.Contains(said, ready) || err != nil {
					found = true
					seen <- said
				}
			}
			if err != nil {
				return
			}
		}
	}()
	select {
	case said := <-seen:
		if !strings.Contains(said, ready) {
			return fmt.Errorf("%s: %s", strings.Join(args, " "), said)
		}
		return nil
	case <-time.After(30 * time.Second):
		return fmt.Errorf("%s: not ready after 30 s", strings.Join(args, " "))
	case <-ctx.Done():
		return ctx.Err()
	}
}

// setUp starts the lab and everything that stays.
func (w *world) setUp(ctx context.Context) error {
	image := filepath.Join(w.root, "dist/bench.tar")
	for _, args := range [][]string{
		{"up"},
		{"image", "build", "--binary", w.bin("bench"), "--name", "doppel.lab/bench:1", "-o", image},
		{"load", filepath.Join(w.root, "dist/traffic-manager.tar"), filepath.Join(w.root, "dist/traffic-agent.tar"), image},
	} {
		if err := w.runLab(ctx, args...); err != nil {
			return err
		}
	}
	for _, l := range []string{viaProxy, viaForward, viaDirect, viaNothing, connects} {
		_ = w.runLab(ctx, "laptop", "rm", l) // of an earlier run
		if err := w.runLab(ctx, "laptop", "add", l); err != nil {
			return err
		}
		if l == viaDirect {
			continue
		}
		if err := w.do(ctx, l, "nft", noDirect); err != nil {
			return err
		}
	}
	kubeconfig, err := output(exec.CommandContext(ctx, w.bin("lab"), "--name", w.lab, "kubeconfig"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(w.dir, "kubeconfig"), kubeconfig, 0o600); err != nil {
		return err
	}
	if err := w.writeRaw(ctx); err != nil {
		return err
	}
	doppel := w.bin("doppel")
	if err := w.do(ctx, viaProxy, doppel, "helm", "install", "--set", "direct.service=NodePort,direct.nodePort=30443"); err != nil {
		if err := w.do(ctx, viaProxy, doppel, "helm", "upgrade"); err != nil { // it is there from an earlier run
			return err
		}
	}
	if err := w.do(ctx, viaProxy, doppel, "connect"); err != nil {
		return err
	}
	if err := w.connectDirect(ctx); err != nil {
		return err
	}
	if err := w.deploy(ctx); err != nil {
		return err
	}
	return w.serveLaptops(ctx)
}

// deploy makes the workloads and learns their addresses.
func (w *world) deploy(ctx context.Context) error {
	ns, each, _ := strings.Cut(manifests, "---\n")
	all := ns
	for name, annotations := range apps {
		all += "---\n" + strings.NewReplacer("NAME", name, "ANNOTATIONS", annotations).Replace(each)
	}
	if _, err := w.kubectl(ctx, all, "apply", "-f", "-"); err != nil {
		return err
	}
	// A bare proxy in the agent's place: the service leads to a second container.
	patch := `{"spec":{"template":{"spec":{"containers":[{"name":"proxy","image":"doppel.lab/bench:1","imagePullPolicy":"Never","args":["splice",":7103","127.0.0.1:7003"]}]}}}}`
	if _, err := w.kubectl(ctx, "", "-n", "bench", "patch", "deployment", "splice", "-p", patch); err != nil {
		return err
	}
	if _, err := w.kubectl(ctx, "", "-n", "bench", "patch", "service", "splice", "--type=json", "-p", `[{"op":"replace","path":"/spec/ports/0/targetPort","value":7103}]`); err != nil {
		return err
	}
	w.cluster = map[string]string{}
	for name := range apps {
		if _, err := w.kubectl(ctx, "", "-n", "bench", "rollout", "status", "deployment", name, "--timeout=60s"); err != nil {
			return err
		}
		ip, err := w.kubectl(ctx, "", "-n", "bench", "get", "service", name, "-o", "jsonpath={.spec.clusterIP}")
		if err != nil {
			return err
		}
		w.cluster[name] = string(ip)
	}
	pod, err := w.kubectl(ctx, "", "-n", "bench", "get", "pods", "-l", "app=server", "-o", "jsonpath={.items[0].status.podIP}")
	if err != nil {
		return err
	}
	node, err := w.kubectl(ctx, "", "get", "nodes", "-o", "jsonpath={.items[0].status.addresses[0].address}")
	w.pod, w.node = string(pod), string(node)
	return err
}

// serveLaptops starts what runs on laptops beside doppel, and the intercepts.
func (w *world) serveLaptops(ctx context.Context) error {
	if err := w.start(ctx, viaProxy, "serving", w.bin("bench"), "serve", "laptop"); err != nil {
		return err
	}
	if err := w.start(ctx, "", "serving", w.bin("bench"), "serve", onNode); err != nil {
		return err
	}
	doppel := w.bin("doppel")
	for _, args := range [][]string{
		{doppel, "intercept", "matched", "-n", "bench", "-p", "7003:7003", "--http-match=x-bench=laptop", "--mount=false", "--address", "127.0.0.2"},
		{doppel, "intercept", "taken", "-n", "bench", "-p", "7003:7003", "-p", "7000:7000", "-p", "7001:7001", "-p", "7002:7002", "--mount=false", "--address", "127.0.0.3"},
	} {
		if err := w.do(ctx, viaProxy, args...); err != nil {
			return err
		}
	}
	return w.start(ctx, viaNothing, ":7003", w.bin("tools/kubectl-v1.34.4"), "-n", "bench", "port-forward", "deployment/server", "7000", "7001", "7002", "7003")
}

// connectDirect connects a laptop past the API server, and waits until its tunnel has changed over.
func (w *world) connectDirect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	doppel := w.bin("doppel")
	for { // the manager may not have found its address when we connect
		if err := w.do(ctx, viaDirect, doppel, "connect"); err != nil {
			return err
		}
		for range 5 {
			out, err := output(w.on(ctx, viaDirect, doppel, "status"))
			if err != nil {
				return err
			}
			if bytes.Contains(out, []byte("Transport  : direct")) {
				return nil
			}
			time.Sleep(time.Second)
		}
		if err := w.do(ctx, viaDirect, doppel, "quit"); err != nil {
			return err
		}
	}
}

// connectForward connects a laptop by a port-forward: what the API server sends to the manager itself is dropped meanwhile, as by a private
// cluster's firewall.
func (w *world) connectForward(ctx context.Context) error {
	manager, err := w.kubectl(ctx, "", "-n", "doppel", "get", "pods", "-l", "app.kubernetes.io/name=traffic-manager", "-o", "jsonpath={.items[0].status.podIP}")
	if err != nil {
		return err
	}
	doppel := w.bin("doppel")
	_ = w.do(ctx, viaForward, doppel, "quit") // it may not be connected
	rules := "table ip bench { chain output { type filter hook output priority filter; ip daddr " + string(manager) + " tcp dport 10250 ct state new drop; }; }"
	if err := w.do(ctx, "", "nft", rules); err != nil {
		return err
	}
	err = w.do(ctx, viaForward, doppel, "connect")
	err = errors.Join(err, w.do(context.WithoutCancel(ctx), "", "nft", "delete", "table", "ip", "bench"))
	if err != nil {
		return err
	}
	out, err := output(w.on(ctx, viaForward, doppel, "status"))
	if err == nil && !bytes.Contains(out, []byte("port-forward")) {
		err = fmt.Errorf("not by a port-forward:\n%s", out)
	}
	return err
}

// writeRaw writes down how to go through the API server without doppel.
func (w *world) writeRaw(ctx context.Context) error {
	text, err := w.kubectl(ctx, "", "config", "view", "--raw", "--minify", "-o", "json")
	if err != nil {
		return err
	}
	var c struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
		Users []struct {
			User struct {
				Cert []byte `json:"client-certificate-data"`
				Key  []byte `json:"client-key-data"`
			}
		}
	}
	if err := json.Unmarshal(text, &c); err != nil {
		return err
	}
	way := rawWay{
		Server: strings.TrimPrefix(c.Clusters[0].Cluster.Server, "https://"), CA: c.Clusters[0].Cluster.CA,
		Cert: c.Users[0].User.Cert, Key: c.Users[0].User.Key, Path: "/api/v1/namespaces/bench/services/http:server:raw/proxy",
	}
	b, err := json.Marshal(way)
	if err != nil {
		return err
	}
	return os.WriteFile(w.rawFile(), b, 0o600)
}

func (w *world) rawFile() string { return filepath.Join(w.dir, "raw.json") }
