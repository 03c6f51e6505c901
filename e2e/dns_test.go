package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestDNS is what a laptop looks up, in a namespace that is named like a top-level domain.
func TestDNS(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "dev")
	other := c.namespace(t, "dns-other")
	c.dnsObjects(t, ns, other)
	l := newLaptop(t, "resolver")
	before := l.sh(t, "cat /etc/resolv.conf")
	direct := l.lookups(t, "outside.test", 2000) // as it is without doppel

	l.run(t, "doppel", "connect", "-n", ns)
	want(t, l.run(t, "doppel", "status"), "DNS        : nftables (programs here ask the resolvers of resolv.conf), other names from")
	web := c.address(t, ns, "web")
	reverse := strings.Split(web, ".")
	slices.Reverse(reverse)
	const full = ".dev.svc.cluster.local"
	for _, tt := range []struct{ question, want string }{
		{"web A", web},
		{"web.dev A", web},
		{"web.dev.svc A", web},
		{"web" + full + " A", web},
		{"web" + full + " A +tcp", web},
		{"web" + full + " A +noedns", web},
		{"web" + full + " A +bufsize=4096 +dnssec", web},
		{"_http._tcp.web" + full + " SRV", "0 100 80 web" + full + "."},
		{"_http._tcp.web SRV", "0 100 80 web" + full + "."},
		{strings.Join(reverse, ".") + ".in-addr.arpa PTR", "web" + full + "."},
		{"db.dev A", "10.244.77.1\n10.244.77.2"},
		{"db-0.db.dev A", "10.244.77.1"},
		{"db-1.db.dev.svc A", "10.244.77.2"},
		{"db-1.db" + full + " A", "10.244.77.2"},
		{"_http._tcp.db.dev SRV", "0 50 80 db-0.db" + full + ".\n0 50 80 db-1.db" + full + "."},
		{"outside CNAME", "www.example.com."},
		{"dns-version.cluster.local TXT", `"1.1.0"`},
		{"kubernetes.default A", "10.96.0.1"},
		{"api.dns-other A", c.address(t, other, "api")},
	} {
		if got := l.dig(t, tt.question); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.question, got, tt.want)
		}
	}
	for question, parts := range map[string][]string{ // negative answers say for how long (RFC 2308)
		"nothing" + full + " A": {"NXDOMAIN", "SOA"},
		"web" + full + " AAAA":  {"NOERROR", "ANSWER: 0", "SOA"},
		"web" + full + " MX":    {"NOERROR", "ANSWER: 0", "SOA"},
	} {
		want(t, l.sh(t, "dig +noall +comments +authority "+question), parts...)
	}
	for name, want := range map[string]bool{"something.dev": true, "web.dev": true, "nothing.dev": false, "www.example.com": true, "api": false} {
		if got := l.dig(t, name+" A") != ""; got != want {
			t.Errorf("%s resolves: %v, want %v", name, got, want)
		}
	}

	rows := []lookupRow{
		{"direct, without doppel", direct},
		{"outside, through doppel", l.lookups(t, "outside.test", 2000)},
		{"cluster, cached", l.lookups(t, "web.dev", 2000)},
		{"cluster, not cached", l.lookups(t, "n%d"+full, 1000)},
	}
	for _, r := range rows {
		t.Logf("%-24s %6.0f lookups/s  p50 %v  p99 %v  (1 client; against direct: rate %.2f, p50 %.2f)", r.name, r.PerSecond, r.P50, r.P99,
			r.PerSecond/direct.PerSecond, float64(r.P50)/float64(direct.P50))
	}

	// another network: its resolver has a link-local address, as routers announce them (the lab's has none, so only names of the cluster are
	// answered; internal/rootd has one that answers the others)
	l.sh(t, "cp /etc/resolv.conf /run/resolv.conf; echo nameserver "+l.routerLinkLocal(t)+" >/etc/resolv.conf")
	eventually(t, 10*time.Second, func() error {
		if r := l.try(t, "timeout", "2", "getent", "ahostsv4", "web.dev"); !strings.HasPrefix(r.stdout, web+" ") {
			return fmt.Errorf("web.dev with the resolver %s: %v", l.server(t), r)
		}
		return nil
	})
	l.sh(t, "cp /run/resolv.conf /etc/resolv.conf")
	eventually(t, 10*time.Second, func() error {
		if got := l.dig(t, "web.dev A"); got != web {
			return fmt.Errorf("back in the first network web.dev is %q", got)
		}
		return nil
	})

	l.run(t, "sh", "-c", "kill -STOP $(pgrep -f '[d]oppel daemon')")
	stopped := time.Now()
	eventually(t, 10*time.Second, func() error {
		if got := l.dig(t, "outside.test A"); got == "" {
			return fmt.Errorf("outside names do not resolve while the user daemon hangs")
		}
		return nil
	})
	t.Logf("user daemon stopped: outside names resolve again after %v", time.Since(stopped).Round(10*time.Millisecond))
	l.run(t, "sh", "-c", "kill -CONT $(pgrep -f '[d]oppel daemon')")
	eventually(t, 10*time.Second, func() error {
		if got := l.dig(t, "web.dev A"); got != web {
			return fmt.Errorf("the cluster's names do not come back: %q", got)
		}
		return nil
	})

	want(t, l.try(t, "doppel", "connect", "-n", ns, "--mapped-namespaces", "dev").stderr, "connected already with other DNS options")
	l.run(t, "doppel", "quit")
	l.run(t, "doppel", "connect", "-n", ns, "--mapped-namespaces", "dev", "--exclude-suffixes", "db.dev",
		"--dns-mapping", "shop.example.com=web.dev,printer=192.0.2.9,site=www.example.com")
	for question, want := range map[string]string{
		"web A":                             web,
		"api.dns-other A":                   "",
		"db.dev A":                          "",
		"db.dev.svc A":                      "10.244.77.1\n10.244.77.2", // another name, that is not excluded
		"shop.example.com A":                "web.dev.\n" + web,
		"printer A":                         "192.0.2.9",
		"www.example.com A":                 l.dig(t, "example.com A"),
		"api.dns-other.svc.cluster.local A": "",
	} {
		if got := l.dig(t, question); got != want {
			t.Errorf("with options: %s: %q, want %q", question, got, want)
		}
	}
	if got := l.dig(t, "site A"); !strings.HasPrefix(got, "www.example.com.\n") {
		t.Errorf("a mapping to a name outside: %q", got)
	}
	l.run(t, "doppel", "quit", "-s")
	if after := l.sh(t, "cat /etc/resolv.conf"); after != before {
		t.Errorf("resolv.conf was edited:\n%s", after)
	}
}

// TestDNSResolved is a laptop whose programs ask the real systemd-resolved, over DNS and through nss-resolve.
func TestDNSResolved(t *testing.T) {
	c := theCluster(t)
	resolved := filepath.Join(c.root, "bin", "tools", "resolved")
	if _, err := os.Stat(resolved); err != nil {
		resolved = "/"
	}
	if _, err := os.Stat(filepath.Join(resolved, "lib/systemd/systemd-resolved")); err != nil {
		t.Skipf("systemd-resolved is missing: run make deps (%v)", err)
	}
	ns := c.namespace(t, "dns-resolved")
	c.service(t, ns, "web", corev1.ServiceSpec{})
	l := newLaptop(t, "resolved")
	l.sh(t, `grep -q ^systemd-resolve: /etc/passwd || { echo systemd-resolve:x:991:991::/:/bin/false >>/etc/passwd; echo systemd-resolve:x:991: >>/etc/group; }
		mkdir -p /run/dbus /run/systemd/resolve; chown systemd-resolve: /run/systemd/resolve
		echo 'hosts: files resolve [!UNAVAIL=return] dns' >/etc/nsswitch.conf
		printf %s '`+openBus+`' >/run/bus.conf`)
	server := l.server(t)
	link := strings.TrimSpace(l.sh(t, "ip -o -4 route show default | sed 's/.* dev //; s/ .*//'"))
	lib := filepath.Join(resolved, "usr/lib/x86_64-linux-gnu")
	libs := "LD_LIBRARY_PATH=" + lib + ":" + filepath.Join(lib, "systemd")
	l.start(t, "dbus-daemon", "--config-file=/run/bus.conf", "--nofork", "--nopidfile", "--nosyslog")
	eventually(t, 5*time.Second, func() error { return l.ok(t, "test -S /run/dbus/system_bus_socket") })
	l.start(t, "env", libs, filepath.Join(resolved, "lib/systemd/systemd-resolved"))
	resolvectl := libs + " " + filepath.Join(resolved, "usr/bin/resolvectl")
	eventually(t, 10*time.Second, func() error { return l.ok(t, resolvectl+" dns "+link+" "+server) })
	l.sh(t, "ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf")

	outside, dev := l.dig(t, "outside.test A"), l.dig(t, "something.dev A")
	l.run(t, "doppel", "connect", "-n", ns)
	want(t, l.run(t, "doppel", "status"), "DNS        : systemd-resolved (programs here ask systemd-resolved), other names from "+server)
	web := c.address(t, ns, "web")
	for question, want := range map[string]string{
		"web." + ns + " A": web, "web." + ns + ".svc.cluster.local A": web, "nothing." + ns + ".svc.cluster.local A": "", "something.dev A": dev, "outside.test A": outside,
	} {
		if got := l.dig(t, question); got != want {
			t.Errorf("%s: %q, want %q", question, got, want)
		}
	}
	for _, name := range []string{"web", "web." + ns, "web." + ns + ".svc.cluster.local"} { // nss-resolve
		if got := l.try(t, "sh", "-c", libs+" getent ahostsv4 "+name); !strings.HasPrefix(got.stdout, web+" ") {
			t.Errorf("getent %s: %v, want %s", name, got, web)
		}
	}
	c.service(t, ns, "late", corev1.ServiceSpec{}) // while connected
	late := c.address(t, ns, "late")
	eventually(t, 10*time.Second, func() error {
		if got := l.dig(t, "late."+ns+" A"); got != late {
			return fmt.Errorf("late.%s: %q, want %q", ns, got, late)
		}
		return nil
	})
	l.sh(t, "kill -STOP $(pgrep -f '[d]oppel daemon')")
	if got := l.dig(t, "outside.test A"); got != outside || got == "" { // at once: such names never come our way
		t.Errorf("with a user daemon that hangs, outside.test: %q, want %q", got, outside)
	}
	l.sh(t, "kill -9 $(pgrep -f '[d]oppel daemon') $(pgrep -f '[d]oppel-rootd')")
	eventually(t, 5*time.Second, func() error {
		if out := l.sh(t, resolvectl+" domain"); strings.Contains(out, "cluster.local") || strings.Contains(out, "doppel") {
			return fmt.Errorf("systemd-resolved still knows:\n%s", out)
		}
		return nil
	})
}

// openBus is a bus on which everybody may do everything: the laptop's own.
const openBus = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth><policy context="default">
<allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_destination="*"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
</policy></busconfig>`

// ok is nil if a shell line succeeds.
func (l *laptop) ok(t *testing.T, line string) error {
	t.Helper()
	if r := l.try(t, "sh", "-c", line); r.code != 0 {
		return fmt.Errorf("%s: %v", line, r)
	}
	return nil
}

// routerLinkLocal is the router's link-local address with its link, from its hardware address (RFC 4291, appendix A).
func (l *laptop) routerLinkLocal(t *testing.T) string {
	t.Helper()
	gw, link, mac := "", "", ""
	if _, err := fmt.Sscan(l.sh(t, "ip -o -4 route show default | sed 's/.* via //; s/ dev / /'"), &gw, &link); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(l.sh(t, "ip neigh show "+gw+" dev "+link+" | sed 's/.* lladdr //'"), &mac); err != nil {
		t.Fatal(err)
	}
	hw, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("fe80::%x:%xff:fe%02x:%x%%%s", int(hw[0]^2)<<8|int(hw[1]), hw[2], hw[3], int(hw[4])<<8|int(hw[5]), link)
}

// server is the first resolver that the laptop has.
func (l *laptop) server(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(l.sh(t, "awk '/^nameserver/ {print $2; exit}' /etc/resolv.conf"))
}

// service makes a service with port 80, unless spec names others.
func (c *cluster) service(t *testing.T, ns, name string, spec corev1.ServiceSpec) {
	t.Helper()
	if len(spec.Ports) == 0 {
		spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80}}
	}
	_, err := c.core.CoreV1().Services(ns).Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// address is a service's address.
func (c *cluster) address(t *testing.T, ns, service string) string {
	t.Helper()
	addr, _, _ := strings.Cut(c.clusterIP(t, ns, service), ":")
	return addr
}

// dig returns the short answers to a question, sorted.
func (l *laptop) dig(t *testing.T, question string) string {
	t.Helper()
	out := strings.Split(strings.TrimSpace(l.try(t, "sh", "-c", "dig +short +time=1 +tries=1 "+question).stdout), "\n")
	if strings.HasPrefix(out[0], ";;") { // no server could be reached
		return ""
	}
	if !strings.HasSuffix(out[0], ".") || strings.Contains(out[0], " ") { // a chain of CNAMEs keeps its order
		slices.Sort(out)
	}
	return strings.Join(out, "\n")
}

// dnsObjects makes services of each kind; the pods of the headless one are addresses with host names, as a StatefulSet's have.
func (c *cluster) dnsObjects(t *testing.T, ns, other string) {
	t.Helper()
	c.service(t, ns, "web", corev1.ServiceSpec{})
	c.service(t, ns, "db", corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone})
	c.service(t, ns, "outside", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "www.example.com"})
	c.service(t, other, "api", corev1.ServiceSpec{})
	name, port, proto, ready := "http", int32(80), corev1.ProtocolTCP, true
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "db-1", Labels: map[string]string{discoveryv1.LabelServiceName: "db"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &proto}},
	}
	for i, host := range []string{"db-0", "db-1"} {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{fmt.Sprintf("10.244.77.%d", i+1)}, Hostname: &host, Conditions: discoveryv1.EndpointConditions{Ready: &ready},
		})
	}
	if _, err := c.core.DiscoveryV1().EndpointSlices(ns).Create(t.Context(), slice, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// lookupRow is a line of the report.
type lookupRow struct {
	name string
	lookupResult
}

// lookupResult is what one client measured.
type lookupResult struct {
	PerSecond float64
	P50, P99  time.Duration
	Errors    int
}

// lookups has the laptop look a name up n times; %d in it makes each another one.
func (l *laptop) lookups(t *testing.T, name string, n int) lookupResult {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	server := l.server(t)
	var r lookupResult
	if err := json.Unmarshal([]byte(l.run(t, "env", envHelper+"=lookups", self, server+":53", name, strconv.Itoa(n), "1")), &r); err != nil {
		t.Fatal(err)
	}
	if r.Errors > n/50 { // one datagram or the other may be lost where everybody builds
		t.Errorf("%d of %d lookups of %s failed", r.Errors, n, name)
	}
	return r
}

// lookups is the helper of that name: SERVER NAME COUNT CLIENTS.
func lookups(args []string) int {
	n, _ := strconv.Atoi(args[2])
	clients, _ := strconv.Atoi(args[3])
	took := make([]time.Duration, n)
	var next, failed atomic.Int64
	var wg sync.WaitGroup
	began := time.Now()
	for range clients {
		wg.Go(func() {
			conn, err := dns.DialTimeout("udp", args[0], time.Second)
			if err != nil {
				failed.Add(1)
				return
			}
			defer conn.Close()
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				name := strings.ReplaceAll(args[1], "%d", strconv.FormatInt(i, 10))
				q := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA)
				start := time.Now()
				_ = conn.SetDeadline(start.Add(2 * time.Second))
				err := conn.WriteMsg(q)
				if err == nil {
					_, err = conn.ReadMsg()
				}
				if err != nil {
					failed.Add(1)
				}
				took[i] = time.Since(start)
			}
		})
	}
	wg.Wait()
	all := time.Since(began)
	slices.Sort(took)
	r := lookupResult{PerSecond: float64(n) / all.Seconds(), P50: took[n/2], P99: took[n*99/100], Errors: int(failed.Load())}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return 1
	}
	return 0
}
