package e2e

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/doppel-dev/doppel/internal/relay/store/storetest"
)

// Environment of the tests.
const (
	envE2E    = "DOPPEL_E2E"        // "1" runs them; anything else skips them with this reason
	envHelper = "DOPPEL_E2E_HELPER" // this test binary is run as a helper in another network namespace
	envNodes  = "DOPPEL_E2E_NODES"  // how many nodes the lab has, default 1
	managerNS = "doppel"
)

// labName is the lab that all tests of this process share; make e2e runs parts of them beside each other.
var labName = cmp.Or(os.Getenv("DOPPEL_E2E_LAB"), "e2e")

func TestMain(m *testing.M) {
	if h := os.Getenv(envHelper); h != "" {
		os.Exit(helper(h, os.Args[1:]))
	}
	code := m.Run()
	storetest.Stop()
	if shared.kubeconfig != "" {
		_ = os.Remove(shared.kubeconfig)
	}
	if shared.up && os.Getenv("DOPPEL_E2E_KEEP") == "" {
		if out, err := exec.Command(shared.bin("lab"), "--name", labName, "down").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "lab down: %v\n%s", err, out)
			code = 1
		}
	}
	os.Exit(code)
}

// cluster is the one lab that all tests share.
type cluster struct {
	once       sync.Once
	up         bool
	err        error
	name       string // of the lab; "": labName
	root       string // of the repository
	kubeconfig string
	core       kubernetes.Interface
}

var shared cluster

// nodes is how many nodes the lab has.
func nodes() int {
	n, err := strconv.Atoi(cmp.Or(os.Getenv(envNodes), "1"))
	if err != nil {
		panic(fmt.Sprint(envNodes, ": ", err))
	}
	return n
}

// nodeName is the name of a node, the first of which is 1.
func (c *cluster) nodeName(i int) string { return fmt.Sprintf("%s-node%d", labName, i) }

func (c *cluster) bin(name string) string { return filepath.Join(c.root, "bin", name) }

// theCluster brings the lab up for the first test that needs it.
func theCluster(t *testing.T) *cluster {
	t.Helper()
	if os.Getenv(envE2E) != "1" {
		t.Skipf("end-to-end tests need the lab: run make test, or make build images and %s=1 go test ./e2e", envE2E)
	}
	if os.Geteuid() != 0 {
		t.Skip("end-to-end tests need root for network namespaces")
	}
	shared.once.Do(func() { shared.err = shared.start() })
	if shared.err != nil {
		t.Fatalf("lab: %v", shared.err)
	}
	return &shared
}

func (c *cluster) start() error {
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	c.root = filepath.Dir(wd)
	c.up = true // also a lab that came up halfway is taken down
	if out, err := c.lab("up", "--nodes", strconv.Itoa(nodes())); err != nil {
		return fmt.Errorf("up: %w\n%s", err, out)
	}
	load := []string{"load"}
	for _, p := range []string{"traffic-manager", "traffic-agent", "colors"} {
		load = append(load, filepath.Join(c.root, "dist", p+".tar"))
	}
	if out, err := c.lab(load...); err != nil {
		return fmt.Errorf("load images (make images): %w\n%s", err, out)
	}
	kc, err := exec.Command(c.bin("lab"), "--name", labName, "kubeconfig").Output()
	if err != nil {
		return err
	}
	cfg, err := clientcmd.RESTConfigFromKubeConfig(kc)
	if err != nil {
		return err
	}
	cfg.QPS, cfg.Burst = 100, 200
	f := filepath.Join(os.TempDir(), fmt.Sprintf("doppel-e2e-%d.kubeconfig", os.Getpid()))
	if err := os.WriteFile(f, kc, 0o600); err != nil {
		return err
	}
	c.kubeconfig = f
	if err := os.Setenv("KUBECONFIG", f); err != nil {
		return err
	}
	c.core, err = kubernetes.NewForConfig(cfg)
	return err
}

// lab runs the lab program and returns everything it printed.
func (c *cluster) lab(args ...string) (string, error) {
	out, err := exec.Command(c.bin("lab"), append([]string{"--name", cmp.Or(c.name, labName)}, args...)...).CombinedOutput()
	return string(out), err
}

// laptop is a network namespace that reaches the API server and nothing else of the cluster.
type laptop struct {
	c    *cluster
	name string
	as   []string // flags of lab laptop exec
	// programs is the directory of doppel's programs on it; "": those of this checkout.
	programs string
}

func newLaptop(t *testing.T, name string) *laptop {
	t.Helper()
	c := theCluster(t)
	if out, err := c.lab("laptop", "add", name); err != nil {
		t.Fatalf("laptop add: %v\n%s", err, out)
	}
	l := &laptop{c: c, name: name}
	eventually(t, 5*time.Second, func() error { // IPv6 duplicate address detection (RFC 4862) changes routes for a second
		if out := l.sh(t, "ip -6 addr show tentative"); out != "" {
			return fmt.Errorf("tentative addresses: %s", out)
		}
		return nil
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the user daemon:\n%s", l.tail("daemon.log"))
			t.Logf("log of the root daemon:\n%s", l.tail("rootd.log"))
			t.Logf("log of the manager:\n%s", managerLog(c))
		}
		noSecrets(t, "the laptop", l.logs())
		for whose, log := range ourLogs(c) {
			noSecrets(t, whose, log)
		}
		if out, err := c.lab("laptop", "rm", name); err != nil {
			t.Errorf("laptop rm: %v\n%s", err, out)
		}
	})
	return l
}

// logs are those of both daemons, and of whoever else has a home on the laptop.
func (l *laptop) logs() string {
	out, err := l.command(context.Background(), "sh", "-c", "cat ~/.local/state/doppel/*.log* ~/../*/.local/state/doppel/*.log* 2>/dev/null").CombinedOutput()
	if len(out) == 0 && err != nil {
		return err.Error()
	}
	return string(out)
}

// aSecret is what stands in no log, whatever is tested: a token (JWT, RFC 7519; or of the relay, but the one of the link that it prints for whoever sets it
// up), a private key (RFC 7468), what a header says of who asks.
var aSecret = regexp.MustCompile(`eyJ[\w-]{10,}\.eyJ[\w-]{10,}|doppel_(invite|web|laptop|api|link|device|code|ticket|visit|oidc)_[A-Z2-7]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?i)\b(bearer|basic) [a-z0-9+/._~-]{16,}`)

// TestNoSecrets: what is looked for would be found.
func TestNoSecrets(t *testing.T) {
	for line, want := range map[string]bool{
		`msg="refused" token=eyJhbGciOiJSUzI1NiIsImtpZCI6IiJ9.eyJhdWQiOlsiZG9wcGVsLmRldiJdfQ.c2ln`: true,
		"doppel_link_ABCDEFGHIJKLMNOPQRSTUVWXYZ":                                                   true,
		"doppel_web_ABCDEFGHIJKLMNOPQRSTUVWXYZ":                                                    true,
		"https://relay.test/setup?token=doppel_setup_ABCDEFGHIJKLMNOPQRSTU":                        false,
		"-----BEGIN EC PRIVATE KEY-----":                                                           true,
		"Authorization: Bearer abcdefghijklmnopqrstuvwxyz":                                         true,
		`msg="not a bearer of news" key=sha256:0123456789abcdef`:                                   false,
	} {
		if got := aSecret.MatchString(line); got != want {
			t.Errorf("%s: %v", line, got)
		}
	}
}

// ourLogs are the whole logs of all that is ours in the cluster.
func ourLogs(c *cluster) map[string]string {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out := map[string]string{}
	pods, err := c.core.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return map[string]string{"the cluster": err.Error()}
	}
	for _, p := range pods.Items {
		for _, con := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			if p.Status.Phase != corev1.PodRunning || !slices.Contains([]string{"traffic-manager", "traffic-agent", "doppel-relay"}, con.Name) {
				continue
			}
			for _, previous := range []bool{false, true} { // of a container that was killed
				if r, err := c.core.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{Container: con.Name, Previous: previous}).Stream(ctx); err == nil {
					out[fmt.Sprintf("%s of pod %s/%s, before its restart: %t", con.Name, p.Namespace, p.Name, previous)] = drain(r)
				}
			}
		}
	}
	return out
}

func noSecrets(t *testing.T, whose, log string) {
	t.Helper()
	for line := range strings.Lines(log) {
		if aSecret.MatchString(line) {
			t.Errorf("a log of %s has a secret: %s", whose, line)
		}
	}
}

func (l *laptop) tail(file string) string {
	out, err := l.command(context.Background(), "sh", "-c", "tail -n 60 ~/.local/state/doppel/"+file).CombinedOutput()
	if err != nil {
		return err.Error()
	}
	return string(out)
}

// command prepares a command on the laptop.
func (l *laptop) command(ctx context.Context, args ...string) *exec.Cmd {
	full := append([]string{"--name", labName, "laptop", "exec"}, l.as...)
	full = append(full, l.name, "--")
	if l.programs != "" {
		full = append(full, "env", "PATH="+l.programs+":"+os.Getenv("PATH"))
	}
	full = append(full, args...)
	cmd := exec.CommandContext(ctx, l.c.bin("lab"), full...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// result is what a command printed and how it ended.
type result struct {
	stdout, stderr string
	code           int
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d\nstdout:\n%s\nstderr:\n%s", r.code, r.stdout, r.stderr)
}

// try runs a command on the laptop, whatever its exit code.
func (l *laptop) try(t *testing.T, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute) // cleanups run commands too
	defer cancel()
	var out, errb bytes.Buffer
	cmd := l.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &errb
	err := cmd.Run()
	r := result{stdout: out.String(), stderr: errb.String()}
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		r.code = ee.ExitCode()
	} else if err != nil {
		t.Fatalf("%s: %v\n%v", strings.Join(args, " "), err, r)
	}
	return r
}

// run is try for commands that must succeed; it returns their standard output.
func (l *laptop) run(t *testing.T, args ...string) string {
	t.Helper()
	r := l.try(t, args...)
	if r.code != 0 {
		t.Fatalf("%s: %v", strings.Join(args, " "), r)
	}
	return r.stdout
}

// sh runs a shell line.
func (l *laptop) sh(t *testing.T, line string) string {
	t.Helper()
	return l.run(t, "sh", "-c", line)
}

// start runs a command in the background until the test ends or stop is called.
func (l *laptop) start(t *testing.T, args ...string) (stop func()) {
	t.Helper()
	cmd := l.command(context.Background(), args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop = func() {
		once.Do(func() {
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait() // ended by our signal
		})
	}
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("%s printed:\n%s", args[0], out.String())
		}
	})
	return stop
}

// eventually polls until ok returns nil; it fails the test when that takes longer than the limit.
func eventually(t *testing.T, limit time.Duration, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %v", limit, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// withManager makes sure that the manager is installed as the chart has it. It stays for the tests that follow: to install and to remove it
// takes longer than most of them.
func (l *laptop) withManager(t *testing.T) {
	t.Helper()
	if !l.c.hasManager(t) {
		l.run(t, "doppel", "helm", "install")
	}
}

// withoutManager makes sure that there is no manager, now and after the test.
func (l *laptop) withoutManager(t *testing.T) {
	t.Helper()
	if l.c.hasManager(t) {
		l.run(t, "doppel", "uninstall", "--everything")
	}
	t.Cleanup(func() { l.try(t, "doppel", "uninstall", "--everything") })
}

func (c *cluster) hasManager(t *testing.T) bool {
	t.Helper()
	_, err := c.core.AppsV1().Deployments(managerNS).Get(t.Context(), "traffic-manager", metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	return err == nil
}

func managerLog(c *cluster) string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return podLogs(ctx, c, managerNS, "app.kubernetes.io/name=traffic-manager", "traffic-manager")
}

// colors runs the sample's data service on the laptop with a colour of its own.
func (l *laptop) colors(t *testing.T, color, addr string) (stop func()) {
	t.Helper()
	stop = l.start(t, l.c.bin("colors"), "-color", color, "-addr", addr, "dataprocessingservice")
	eventually(t, 5*time.Second, func() error {
		if r := l.try(t, "curl", "-s", "-m", "1", addr+"/color"); r.code != 0 {
			return fmt.Errorf("local process: %v", r)
		}
		return nil
	})
	return stop
}

// want fails unless got contains every part.
func want(t *testing.T, got string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(got, p) {
			t.Fatalf("%q is missing in:\n%s", p, got)
		}
	}
}

func drain(r io.ReadCloser) string {
	b, _ := io.ReadAll(r)
	_ = r.Close()
	return string(b)
}
