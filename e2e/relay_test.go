package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	helmcli "helm.sh/helm/v4/pkg/cli"
	helmkube "helm.sh/helm/v4/pkg/kube"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"

	_ "github.com/doppel-dev/doppel/internal/relay/store" // has the driver of PostgreSQL
	"github.com/doppel-dev/doppel/internal/relay/store/storetest"
)

// relayURL is where the lab's network outside the cluster has a relay.
const relayURL = "https://relay.test"

// relay is a relay, and the way there for browsers of this process.
type relay struct {
	t     *testing.T
	c     *cluster
	ca    string // file of its authority
	addr  string // of the lab's router, where relay.test leads
	roots *x509.CertPool
	setup string // the link that makes the first account

	restart, kill func()
}

func newRelay(t *testing.T, start func(r *relay) (ca []byte)) *relay {
	t.Helper()
	c := theCluster(t)
	cfg, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	api, err := url.Parse(cfg.Host)
	if err != nil {
		t.Fatal(err)
	}
	host := api.Hostname()
	r := &relay{t: t, c: c, ca: filepath.Join(t.TempDir(), "ca.pem"), addr: host[:strings.LastIndex(host, ".")] + ".1:443", roots: x509.NewCertPool()}
	pem := start(r)
	if !r.roots.AppendCertsFromPEM(pem) {
		t.Fatalf("no authority: %s", pem)
	}
	if err := os.WriteFile(r.ca, pem, 0o600); err != nil {
		t.Fatal(err)
	}
	return r
}

// setupRE is the link that makes the first account, behind the time of its line if that is told.
var setupRE = regexp.MustCompile(`(?m)^(?:\S+ )?(` + relayURL + `/setup\S+)`)

// outside runs the relay outside the cluster, on a machine without Kubernetes.
func outside(r *relay) (ca []byte) {
	t, data := r.t, r.t.TempDir()
	t.Helper()
	var cmd *exec.Cmd
	var log bytes.Buffer
	run := func() (out io.Reader) {
		cmd = exec.Command(r.c.bin("lab"), "--name", labName, "outside", "exec", "--", r.c.bin("doppel-relay"), "-url", relayURL, "-data", data)
		pipe, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return pipe
	}
	end := func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait() // by our signal
	}
	lines := bufio.NewScanner(run())
	t.Cleanup(func() {
		end()
		if t.Failed() {
			t.Logf("log of the relay:\n%s", log.String())
		}
		noSecrets(t, "the relay", log.String())
	})
	r.restart = func() { end(); run() }
	r.kill = func() {
		line := "kill -9 $(pgrep -f '^[^ ]*doppel-relay .*" + data + "')"
		if out, err := r.c.lab("outside", "exec", "--", "sh", "-c", line); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	for r.setup == "" && lines.Scan() {
		if said := setupRE.FindStringSubmatch(lines.Text()); said != nil {
			r.setup = said[1]
		}
	}
	if r.setup == "" {
		t.Fatalf("the relay printed no link:\n%s", log.String())
	}
	ca, err := os.ReadFile(filepath.Join(data, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// inCluster installs the relay's chart, with Helm, in a namespace of its own. What would be a load balancer is this process: it passes TCP on from where
// relay.test leads to the chart's Service.
func inCluster(r *relay) (ca []byte) {
	const ns, pod = "relay", "doppel-relay-0"
	t, c, ctx := r.t, r.c, r.t.Context()
	t.Helper()
	c.namespace(t, ns)
	c.node(t, "sh", "-c", "rm -rf /var/lib/relay && mkdir -m 0770 /var/lib/relay && chown 0:65532 /var/lib/relay") // as a volume with fsGroup is given
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "relay"}, Spec: corev1.PersistentVolumeSpec{
		Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		PersistentVolumeSource:        corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/var/lib/relay"}},
		PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain, ClaimRef: &corev1.ObjectReference{Namespace: ns, Name: "data-" + pod},
	}}
	if _, err := c.core.CoreV1().PersistentVolumes().Create(ctx, pv, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.core.CoreV1().PersistentVolumes().Delete(context.Background(), pv.Name, metav1.DeleteOptions{})
	}) // the lab may go

	r.install(ns, map[string]any{"storage": map[string]any{"storageClass": "-"}}, pod)
	pods := c.core.CoreV1().Pods(ns)
	r.restart = func() {
		t.Helper()
		old, err := pods.Get(ctx, pod, metav1.GetOptions{})
		if err == nil {
			err = pods.Delete(ctx, pod, metav1.DeleteOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, func() error {
			p, err := pods.Get(ctx, pod, metav1.GetOptions{})
			if err == nil && p.UID == old.UID {
				err = errors.New("the old pod is there")
			}
			return err
		})
	}
	c.balance(t, c.clusterIP(t, ns, "doppel-relay"))
	return []byte(c.execPod(t, ns, pod, "/doppel-relay", "-print-ca"))
}

// install installs the relay's chart, with Helm, and finds the link in the log of one of its pods, of which there are some.
func (r *relay) install(ns string, values map[string]any, pods ...string) {
	t, c := r.t, r.c
	t.Helper()
	if out, err := c.lab("load", filepath.Join(c.root, "dist", "doppel-relay.tar")); err != nil {
		t.Fatalf("load image (make images): %v\n%s", err, out)
	}
	settings := helmcli.New()
	settings.SetNamespace(ns)
	helm := action.NewConfiguration()
	if err := helm.Init(settings.RESTClientGetter(), ns, "secret"); err != nil {
		t.Fatal(err)
	}
	ch, err := loader.Load(filepath.Join(c.root, "charts", "doppel-relay"))
	if err != nil {
		t.Fatal(err)
	}
	in := action.NewInstall(helm)
	in.ReleaseName, in.Namespace, in.Timeout, in.WaitStrategy = "preview", ns, time.Minute, helmkube.StatusWatcherStrategy
	values["url"], values["service"], values["image"] = relayURL, map[string]any{"type": "ClusterIP"}, map[string]any{"pullPolicy": "Never"}
	if _, err := in.RunWithContext(t.Context(), ch, values); err != nil {
		t.Fatalf("install the chart: %v", err)
	}
	for _, pod := range pods {
		logs := func() string {
			b, err := c.core.CoreV1().Pods(ns).GetLogs(pod, &corev1.PodLogOptions{Timestamps: true}).DoRaw(context.Background())
			return fmt.Sprintf("%s%v", b, err)
		}
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("log of %s:\n%s", pod, logs())
			}
		})
		if said := setupRE.FindStringSubmatch(logs()); said != nil {
			r.setup = said[1] // each of them counts
		}
	}
	if r.setup == "" {
		t.Fatal("the relay printed no link")
	}
}

// balance passes connections on from port 443 of the network outside the cluster to an address in it.
func (c *cluster) balance(t *testing.T, to string) {
	t.Helper()
	dial := c.dialer(t)
	c.pass(t, ":443", func(ctx context.Context) (net.Conn, error) { return dial(ctx, "tcp", to) })
}

// pass passes connections on from a port of the network outside the cluster.
func (c *cluster) pass(t *testing.T, from string, dial func(context.Context) (net.Conn, error)) {
	t.Helper()
	out, err := c.lab("outside", "exec", "--", "readlink", "/proc/self/ns/net")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var l net.Listener
	if err := inNS(c.openNS(t, strings.TrimSpace(out)), func() (err error) {
		l, err = net.Listen("tcp", from)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				far, err := dial(context.Background())
				if err != nil {
					return
				}
				go func() {
					_, _ = io.Copy(far, conn)
					_ = far.Close()
				}()
				_, _ = io.Copy(conn, far)
			}()
		}
	}()
}

// execPod runs a command in a pod and returns its standard output.
func (c *cluster) execPod(t *testing.T, ns, pod string, command ...string) string {
	t.Helper()
	cfg, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	req := c.core.CoreV1().RESTClient().Get().Resource("pods").Namespace(ns).Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	x, err := remotecommand.NewWebSocketExecutor(cfg, http.MethodGet, req.URL().String())
	if err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	if err := x.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdout: &out, Stderr: &errOut}); err != nil {
		t.Fatalf("in pod %s: %q: %v %s", pod, command, err, errOut.String())
	}
	return out.String()
}

// browser is a person's browser.
type browser struct {
	r *relay
	http.Client
}

func (r *relay) browser() *browser {
	r.t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		r.t.Fatal(err)
	}
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: r.roots},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, r.addr)
		},
	}
	b := &browser{r, http.Client{Jar: jar, Transport: tr, Timeout: 15 * time.Second}}
	r.t.Cleanup(tr.CloseIdleConnections)
	return b
}

// shown is what a browser got, and where redirects have led it.
type shown struct {
	at, status, body string
	from             string // who answered: the probe's header
}

// page opens a page, or with a form sends it there.
func (b *browser) page(to string, form url.Values) shown {
	b.r.t.Helper()
	p, err := b.try(to, form)
	if err != nil {
		b.r.t.Fatalf("%s: %v", to, err)
	}
	return p
}

func (b *browser) try(to string, form url.Values) (shown, error) {
	b.r.t.Helper()
	method, body := http.MethodGet, ""
	if form != nil {
		method, body = http.MethodPost, form.Encode()
	}
	req, err := http.NewRequest(method, to, strings.NewReader(body))
	if err != nil {
		b.r.t.Fatal(err)
	}
	req.Header = http.Header{"Accept": {"text/html"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"document"}, "Sec-Fetch-Site": {"none"}}
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Sec-Fetch-Site", "same-origin")
	}
	resp, err := b.Do(req) //nolint:bodyclose // drain does
	if err != nil {
		return shown{}, err
	}
	return shown{resp.Request.URL.String(), resp.Status, drain(resp.Body), resp.Header.Get("X-Name")}, nil
}

// sees waits until a browser sees something at an address.
func (b *browser) sees(what string, within time.Duration, to, part string) {
	b.r.t.Helper()
	eventually(b.r.t, within, func() error {
		p, err := b.try(to, nil)
		if err == nil && !strings.Contains(p.body, part) {
			err = fmt.Errorf("%s: %q is missing in %+v", what, part, p)
		}
		return err
	})
}

// TestPreview is the story of a preview: a relay in the cluster, an account, a laptop that logs in, a cluster that joins, and a link through which the laptop's
// version of a service is seen, in blue, while everybody else sees the cluster's own, in green.
func TestPreview(t *testing.T) {
	r := newRelay(t, inCluster)
	c := r.c
	ns := c.namespace(t, "preview")
	c.sample(t, ns)
	l := newLaptop(t, "louise")
	l.withManager(t)
	l.run(t, "doppel", "connect", "-n", ns)

	// the first account, and a laptop that is logged in by its browser
	louise := r.account()
	r.login(l, louise)
	want(t, l.run(t, "doppel", "status"), "logged in at "+relayURL+" as louise@example.com")
	if res := l.try(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--preview-url"); res.code == 0 || !strings.Contains(res.stderr, "the cluster has no relay") {
		t.Fatalf("a preview without a relay: %v", res)
	}

	// the cluster joins
	r.join(l)
	web, data := c.clusterIP(t, ns, "verylargejavaservice"), c.clusterIP(t, ns, "dataprocessingservice")
	l.colors(t, "blue", "127.0.0.1:3000")
	if res := l.try(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--preview-url"); res.code != 2 || !strings.Contains(res.stderr, "--ingress-host") {
		t.Fatalf("nobody has said where requests enter the cluster: %v", res)
	}
	out := l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--preview-url", "--ingress-host", "verylargejavaservice."+ns, "--ingress-port", "8080")
	want(t, out, "ACTIVE", "the requests of its preview", "Seen by        : the members of your team")
	link := regexp.MustCompile(`https://\S+`).FindString(out)

	louise.sees("the link", 5*time.Second, link+"color", "blue")
	louise.sees("the page", 5*time.Second, link, "blue")
	for _, addr := range []string{web, data} {
		if got := c.color(t, addr); got != "green" {
			t.Errorf("everybody else sees %s", got)
		}
	}

	// who may see
	stranger := r.browser()
	stranger.sees("a stranger", 0, link+"color", "Log in")
	want(t, l.run(t, "doppel", "preview", "publish", "dataprocessingservice", "--for", "1h"), "everybody who has the link")
	stranger.sees("a stranger, published", time.Second, link+"color", "blue")
	want(t, l.run(t, "doppel", "preview", "unpublish", link), "the members of your team")
	stranger.sees("a stranger, unpublished", time.Second, link+"color", "Log in")

	// the same link for the same intercept, also for one that takes all
	want(t, l.run(t, "doppel", "leave", "dataprocessingservice"), "Left")
	louise.sees("the link of nothing", time.Second, link+"color", "Nobody intercepts")
	want(t, l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000"), "all TCP connections", link, "the members of your team")
	louise.sees("the link that nobody has asked for", 5*time.Second, link+"color", "blue")
	for _, addr := range []string{web, data} {
		if got := c.color(t, addr); got != "blue" {
			t.Errorf("an intercept of all with a link gives %s", got)
		}
	}
	want(t, l.run(t, "doppel", "leave", "dataprocessingservice"), "Left")
	if out := l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--preview-url=false"); strings.Contains(out, "https://") {
		t.Errorf("a link that was forbidden: %s", out)
	}
	want(t, l.run(t, "doppel", "preview", "create", "dataprocessingservice"), link)
	louise.sees("the link, again", 5*time.Second, link+"color", "blue")
	if got := c.color(t, web); got != "blue" {
		t.Errorf("an intercept of all that got a preview gives %s", got)
	}
	want(t, l.run(t, "doppel", "preview", "list"), link, "active")

	// an intercept from the relay's page, which the laptop does when its user has allowed that
	want(t, l.run(t, "doppel", "leave", "dataprocessingservice"), "Left")
	r.fromPage(l, louise, ns)
	louise.sees("the link, of an intercept from the page", 5*time.Second, link+"color", "Nobody intercepts")
	if got := c.color(t, web); got != "blue" {
		t.Errorf("the intercept from the page gives %s", got)
	}
	l.run(t, "doppel", "preview", "create", "dataprocessingservice")
	louise.sees("the link, once more", 5*time.Second, link+"color", "blue")

	// a relay that starts again has forgotten nothing
	want(t, l.run(t, "doppel", "preview", "publish", "dataprocessingservice"), "everybody who has the link")
	away := r.outage(link + "color")
	start := time.Now()
	r.restart()
	t.Logf("a new pod after %.1f s", time.Since(start).Seconds())
	louise.sees("the link, after the relay's restart", 30*time.Second, link+"color", "blue")
	t.Logf("the relay's restart took %.1f s, the preview was away for %.1f s", time.Since(start).Seconds(), away().Seconds())

	r.services(l, louise, ns)

	// a laptop that is gone is not the cluster's version
	l.run(t, "doppel", "quit", "-s")
	louise.sees("the link of a laptop that is gone", 3*time.Second, link+"color", "Nobody intercepts")
	l.run(t, "doppel", "preview", "delete", "dataprocessingservice")
	louise.sees("a deleted link", time.Second, link+"color", "Not found")
}

// fromPage starts an intercept on the relay's page.
func (r *relay) fromPage(l *laptop, b *browser, ns string) {
	t := r.t
	t.Helper()
	b.sees("the laptop", 5*time.Second, relayURL, "Start an intercept")
	page := relayURL + regexp.MustCompile(`/laptops/[\w-]+`).FindString(b.page(relayURL, nil).body)
	name := regexp.MustCompile(`<option[^>]*>([^<]+)</option>`).FindStringSubmatch(b.page(page, nil).body)[1]
	b.page(page+"/intercept", url.Values{"connection": {name}, "namespace": {ns}, "workload": {"dataprocessingservice"}, "local": {"3000"}})
	b.sees("that it waits", 3*time.Second, page, "Waiting for your permission")
	want(t, l.run(t, "doppel", "status"), "is asked on its pages to intercept dataprocessingservice in "+ns, "doppel relay allow "+relayURL)
	if got := l.run(t, "doppel", "list"); strings.Contains(got, "ACTIVE") {
		t.Fatalf("it did not wait: %s", got)
	}
	want(t, l.run(t, "doppel", "relay", "allow"), relayURL+" may start intercepts")
	b.sees("that it is active", 20*time.Second, page, "doppel leave dataprocessingservice")
	b.sees("the workloads to choose from", 5*time.Second, page, `<option value="Deployment/verylargejavaservice">`)
	want(t, l.run(t, "doppel", "list"), "dataprocessingservice", "127.0.0.1:3000")
}

// replicas installs the relay's chart with two replicas, which share a PostgreSQL outside the cluster and a certificate.
func replicas(r *relay) (ca []byte) {
	const ns = "relays"
	t, c := r.t, r.c
	t.Helper()
	c.namespace(t, ns)
	db, err := url.Parse(storetest.Postgres(t))
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(db.Query().Get("host"), ".s.PGSQL.5432")
	c.pass(t, ":5432", func(context.Context) (net.Conn, error) { return net.Dial("unix", socket) })
	host, _, _ := net.SplitHostPort(r.addr)
	_, cert := selfSigned(t, "relay.test", "*.relay.test")
	for name, data := range map[string]map[string][]byte{
		"database":    {"url": fmt.Appendf(nil, "postgres://postgres@%s:5432%s?sslmode=disable", host, db.Path)},
		"certificate": cert,
	} {
		if _, err := c.core.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	r.install(ns, map[string]any{
		"replicas": 2, "database": map[string]any{"secretName": "database"}, "tls": map[string]any{"secretName": "certificate"},
	}, "doppel-relay-0", "doppel-relay-1")
	c.balance(t, c.clusterIP(t, ns, "doppel-relay"))
	return cert["tls.crt"]
}

// TestRelayReplicas has two relays behind one Service: previews and pages work through either, also when one of them is killed.
func TestRelayReplicas(t *testing.T) {
	r := newRelay(t, replicas)
	c := r.c
	ns := c.namespace(t, "replicas")
	c.sample(t, ns)
	l := newLaptop(t, "rosa")
	l.withManager(t)
	l.run(t, "doppel", "connect", "-n", ns)
	person := r.account()
	r.login(l, person)
	r.join(l)
	l.colors(t, "blue", "127.0.0.1:3000")
	link := regexp.MustCompile(`https://\S+`).FindString(
		l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--preview-url", "--ingress-host", "verylargejavaservice."+ns, "--ingress-port", "8080"))
	l.run(t, "doppel", "preview", "publish", "dataprocessingservice")

	pods := c.core.CoreV1().Pods("relays")
	at := func(pod string) *browser { // past the load balancer
		p, err := pods.Get(t.Context(), pod, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		b, dial := r.browser(), c.dialer(t)
		b.Jar = person.Jar
		b.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dial(ctx, network, net.JoinHostPort(p.Status.PodIP, "8443"))
		}
		return b
	}
	const one, two = "doppel-relay-0", "doppel-relay-1"
	for _, pod := range []string{one, two} {
		b := at(pod)
		b.sees("the link at "+pod, 5*time.Second, link+"color", "blue")
		b.sees("the laptop at "+pod, 5*time.Second, relayURL, "Start an intercept")
	}
	l.run(t, "doppel", "leave", "dataprocessingservice")
	r.fromPage(l, at(one), ns)
	page := relayURL + regexp.MustCompile(`/laptops/[\w-]+`).FindString(person.page(relayURL, nil).body)
	wish := regexp.MustCompile(`name="wish" value="(\d+)"`).FindStringSubmatch(at(two).page(page, nil).body)
	if wish == nil {
		t.Fatal("the other relay's page has no button to end it")
	}
	want(t, at(two).page(page+"/end", url.Values{"wish": wish[1:]}).body, ">ended<")
	if got := l.run(t, "doppel", "list"); strings.Contains(got, "127.0.0.1:3000") {
		t.Errorf("it was not ended: %s", got)
	}
	l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--preview-url")
	person.sees("the link", 5*time.Second, link+"color", "blue")

	// One of them is drained, then killed, which had the link of the cluster or not.
	for name, grace := range map[string]*int64{"ended": nil, "killed": new(int64)} {
		for _, pod := range []string{one, two} {
			old, err := pods.Get(t.Context(), pod, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			away := r.outage(link + "color")
			if err := pods.Delete(t.Context(), pod, metav1.DeleteOptions{GracePeriodSeconds: grace}); err != nil {
				t.Fatal(err)
			}
			eventually(t, 30*time.Second, func() error {
				p, err := pods.Get(t.Context(), pod, metav1.GetOptions{})
				if err == nil && (p.UID == old.UID || !ready(p)) {
					err = errors.New("not there again")
				}
				return err
			})
			person.sees("the link, after "+pod+" was "+name, 10*time.Second, link+"color", "blue")
			t.Logf("%s was %s: the preview was away for %.1f s at most", pod, name, away().Seconds())
		}
	}
	l.run(t, "doppel", "quit", "-s")
}

// outage asks for a link over and over, until its end is asked for; it is the longest time in which there was no right answer.
func (r *relay) outage(link string) (longest func() time.Duration) {
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan time.Duration, 1)
	go func() {
		var most time.Duration
		good := time.Now()
		for ctx.Err() == nil {
			b := r.browser() // each time a connection of its own
			b.Timeout = 2 * time.Second
			p, err := b.try(link, nil)
			b.CloseIdleConnections()
			if err == nil && strings.Contains(p.body, "blue") {
				most, good = max(most, time.Since(good)), time.Now()
			}
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
		done <- max(most, time.Since(good))
	}()
	return func() time.Duration { cancel(); return <-done }
}

// ready says whether a pod is ready.
func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// TestRelayOutside has the relay on a machine without Kubernetes, and a program in the place of a person's login.
func TestRelayOutside(t *testing.T) {
	r := newRelay(t, outside)
	ns := r.c.namespace(t, "outside")
	r.c.sample(t, ns)
	l := newLaptop(t, "oscar")
	l.withManager(t)
	l.run(t, "doppel", "connect", "-n", ns)
	person := r.account()
	r.login(l, person)
	r.join(l)
	var token struct{ Token string }
	if err := json.Unmarshal([]byte(l.run(t, "doppel", "relay", "token", "create", "ci", "--expires", "1h", "-o", "json")), &token); err != nil {
		t.Fatal(err)
	}
	want(t, l.run(t, "doppel", "logout"), "Logged out")
	program := func(args ...string) []string {
		return append([]string{"env", "DOPPEL_RELAY=" + relayURL, "DOPPEL_RELAY_CA_FILE=" + r.ca, "DOPPEL_RELAY_TOKEN=" + token.Token}, args...)
	}
	l.colors(t, "blue", "127.0.0.1:3000")
	out := l.run(t, program("doppel", "intercept", "dataprocessingservice", "-p", "3000", "--preview-url", "--ingress-host", "verylargejavaservice."+ns, "--ingress-port", "8080")...)
	link := regexp.MustCompile(`https://\S+`).FindString(out)
	person.sees("the link", 5*time.Second, link+"color", "blue")
	want(t, l.run(t, program("doppel", "status")...), "louise@example.com at "+relayURL+", by DOPPEL_RELAY_TOKEN")
	r.restart()
	person.sees("the link, after the relay's restart", 10*time.Second, link+"color", "blue")
	want(t, l.run(t, program("doppel", "preview", "delete", "dataprocessingservice")...), "Deleted")
	l.run(t, "doppel", "quit", "-s")
}

// account makes the first account, an admin's.
func (r *relay) account() *browser {
	r.t.Helper()
	b := r.browser()
	setup, err := url.Parse(r.setup)
	if err != nil {
		r.t.Fatal(err)
	}
	account := url.Values{"token": setup.Query()["token"], "email": {"louise@example.com"}, "team": {"crew"}, "password": {"correct horse battery"}}
	want(r.t, b.page(relayURL+"/setup", account).body, "louise@example.com")
	return b
}

// login has a laptop logged in by a person's browser.
func (r *relay) login(l *laptop, b *browser) {
	t := r.t
	t.Helper()
	cmd := l.command(t.Context(), "doppel", "login", relayURL, "--ca-file", r.ca, "--no-browser")
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(said)
	page := ""
	for page == "" && lines.Scan() {
		if s := strings.TrimSpace(lines.Text()); strings.HasPrefix(s, relayURL) {
			page = s
		}
	}
	u, err := url.Parse(page)
	if err != nil || page == "" {
		t.Fatalf("no page: %q %v", page, err)
	}
	want(t, b.page(page, nil).body, u.Query().Get("code"), l.name)
	want(t, b.page(relayURL+u.Path, url.Values{"code": u.Query()["code"], "allow": {"yes"}}).body, "is being logged in")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("login: %v\n%s", err, out.String())
	}
	want(t, out.String(), "Login successful: louise@example.com")
}

// join has the cluster's traffic-manager join the relay, as its administrator does.
func (r *relay) join(l *laptop) {
	t := r.t
	t.Helper()
	var added struct{ Token string }
	if err := json.Unmarshal([]byte(l.run(t, "doppel", "relay", "add-cluster", "lab", "-o", "json")), &added); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(r.ca)
	if err != nil {
		t.Fatal(err)
	}
	secrets := r.c.core.CoreV1().Secrets(managerNS)
	if err := secrets.Delete(t.Context(), "doppel-relay", metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) { // of a run before
		t.Fatal(err)
	}
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "doppel-relay"}, Data: map[string][]byte{"token": []byte(added.Token), "ca.crt": pem}}
	if _, err := secrets.Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	l.run(t, "doppel", "helm", "upgrade", "--set", "relay.url="+relayURL)
	t.Cleanup(func() { l.try(t, "doppel", "helm", "upgrade", "--reset-values") })
	eventually(t, 10*time.Second, func() error { // the manager before, which has no relay, keeps its laptops until the new one is in its place
		pods, err := r.c.core.CoreV1().Pods(managerNS).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=traffic-manager"})
		if err != nil {
			return err
		}
		if len(pods.Items) != 1 {
			return fmt.Errorf("there are %d pods of the manager", len(pods.Items))
		}
		if s := l.try(t, "doppel", "status"); !strings.Contains(s.stdout, ": up (") {
			return errors.New(s.stdout)
		}
		return nil
	})
}
