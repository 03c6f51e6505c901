package inject

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// The vocabulary of the table: a pod labelled app=web whose container app has http on 8080.

func container(name string, ports ...corev1.ContainerPort) corev1.Container {
	return corev1.Container{Name: name, Ports: ports}
}

func port(name string, n int32) corev1.ContainerPort {
	return corev1.ContainerPort{Name: name, ContainerPort: n}
}

func hostPort(name string, n int32) corev1.ContainerPort {
	return corev1.ContainerPort{Name: name, ContainerPort: n, HostPort: n}
}

func udp(name string, n int32) corev1.ContainerPort {
	return corev1.ContainerPort{Name: name, ContainerPort: n, Protocol: corev1.ProtocolUDP}
}

func pod(cs ...corev1.Container) corev1.PodSpec { return corev1.PodSpec{Containers: cs} }

func withSidecar(s corev1.PodSpec, cs ...corev1.Container) corev1.PodSpec {
	always := corev1.ContainerRestartPolicyAlways
	for _, c := range cs {
		c.RestartPolicy = &always
		s.InitContainers = append(s.InitContainers, c)
	}
	return s
}

func withInit(s corev1.PodSpec, cs ...corev1.Container) corev1.PodSpec {
	s.InitContainers = append(s.InitContainers, cs...)
	return s
}

func service(name string, sp ...corev1.ServicePort) corev1.Service {
	return corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{ClusterIP: "10.96.0.10", Selector: map[string]string{"app": "web"}, Ports: sp},
	}
}

func headless(s corev1.Service) corev1.Service {
	s.Spec.ClusterIP = corev1.ClusterIPNone
	return s
}

func selecting(s corev1.Service, labels map[string]string) corev1.Service {
	s.Spec.Selector = labels
	return s
}

func external(s corev1.Service) corev1.Service {
	s.Spec.Type = corev1.ServiceTypeExternalName
	return s
}

// to is a service port; target is a name, a number, or 0 for the port's own number.
func to(p int32, target any) corev1.ServicePort {
	sp := corev1.ServicePort{Port: p}
	switch t := target.(type) {
	case string:
		sp.TargetPort = intstr.FromString(t)
	case int:
		sp.TargetPort = intstr.FromInt32(int32(t))
	}
	return sp
}

func asUDP(sp corev1.ServicePort) corev1.ServicePort {
	sp.Protocol = corev1.ProtocolUDP
	return sp
}

func services(s ...corev1.Service) []corev1.Service { return s }

func policy(selector map[string]string, ingress, egress []networkingv1.NetworkPolicyPort, peers ...networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicy {
	p := networkingv1.NetworkPolicy{Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: selector}}}
	if ingress != nil {
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{Ports: ingress}}
	}
	if egress != nil {
		p.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{Ports: egress, To: peers}}
	}
	return []networkingv1.NetworkPolicy{p}
}

func polPort(p any, end ...int32) []networkingv1.NetworkPolicyPort {
	out := networkingv1.NetworkPolicyPort{}
	switch p := p.(type) {
	case string:
		v := intstr.FromString(p)
		out.Port = &v
	case int:
		v := intstr.FromInt32(int32(p))
		out.Port = &v
	}
	if len(end) > 0 {
		out.EndPort = &end[0]
	}
	return []networkingv1.NetworkPolicyPort{out}
}

func peer(labels map[string]string) networkingv1.NetworkPolicyPeer {
	return networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: labels}}
}

const (
	byName     = agentcfg.ByName
	byRedirect = agentcfg.ByRedirect
)

var (
	web       = map[string]string{"app": "web"}
	app       = pod(container("app", port("http", 8080)))
	byItsName = services(service("web", to(80, "http")))
)

// supportTable is D8's table of how a port's traffic reaches the agent. docs/support-table.md is written from it.
var supportTable = []struct {
	port, services string // for people
	spec           corev1.PodSpec
	facts          Facts
	way            agentcfg.Way
	why            string
}{
	{"named", "one, by name", app, Facts{Services: byItsName}, byName, ""},
	{"named", "several, all by name", app, Facts{Services: services(service("web", to(80, "http")), service("web2", to(8000, "http"), to(8001, "http")))}, byName, ""},
	{"named", "by number", app, Facts{Services: services(service("web", to(80, 8080)))}, byRedirect, "by its number"},
	{"named", "without a targetPort (the service port's own number)", app, Facts{Services: services(service("web", to(8080, 0)))}, byRedirect, "by its number"},
	{"named", "one by name, one by number", app, Facts{Services: services(service("web", to(80, "http")), service("web2", to(80, 8080)))}, byRedirect, "by its number"},
	{"named", "headless, by name", app, Facts{Services: services(headless(service("web", to(8080, "http"))))}, byRedirect, "headless"},
	{"named", "one by name, one headless", app, Facts{Services: services(service("web", to(80, "http")), headless(service("pods", to(8080, "http"))))}, byRedirect, "headless"},
	{"named", "none", app, Facts{}, byRedirect, "no service"},
	{"named", "one that selects other pods", app, Facts{Services: services(selecting(service("web", to(80, "http")), map[string]string{"app": "other"}))}, byRedirect, "no service"},
	{"named", "one without a selector", app, Facts{Services: services(selecting(service("web", to(80, "http")), nil))}, byRedirect, "no service"},
	{"named", "an ExternalName", app, Facts{Services: services(external(service("web", to(80, "http"))))}, byRedirect, "no service"},
	{"without a name", "by number", pod(container("app", port("", 8080))), Facts{Services: services(service("web", to(80, 8080)))}, byRedirect, "no name"},
	{"declared by no container", "by number", pod(container("app")), Facts{Services: services(service("web", to(80, 8080)))}, byRedirect, "no name"},
	{"named, and a hostPort", "one, by name", pod(container("app", hostPort("http", 8080))), Facts{Services: byItsName}, byRedirect, "hostPort"},
	{"of a native sidecar, named", "one, by name", withSidecar(pod(container("app")), container("proxy", port("http", 8080))), Facts{Services: byItsName}, byName, ""},
	{"of a native sidecar, named", "by number", withSidecar(pod(container("app")), container("proxy", port("http", 8080))), Facts{Services: services(service("web", to(80, 8080)))}, byRedirect, "by its number"},
	{"named; an init container has the name too", "one, by name", withInit(app, container("init", port("http", 1))), Facts{Services: byItsName}, byName, ""},
	{"named; another container has the name too", "one, by name", pod(container("app", port("http", 8080)), container("b", port("http", 9090))), Facts{Services: byItsName}, byRedirect, "same name"},
	{"named; a native sidecar has the name too", "one, by name", withSidecar(app, container("b", port("http", 9090))), Facts{Services: byItsName}, byRedirect, "same name"},
	{"named; a UDP port of another container has the name too", "one, by name", pod(container("app", port("http", 8080)), container("b", udp("http", 9090))), Facts{Services: byItsName}, byRedirect, "same name"},
	{"named, declared twice with two names", "by both names", pod(container("app", port("http", 8080), port("api", 8080))), Facts{Services: services(service("web", to(80, "http")), service("api", to(80, "api")))}, byRedirect, "declared twice"},
	{"named, declared by two containers", "one, by name", pod(container("app", port("http", 8080)), container("b", port("", 8080))), Facts{Services: byItsName}, byRedirect, "declared twice"},
	{"named; the number is also a UDP port's", "one, by name", pod(container("app", port("http", 8080), udp("quic", 8080))), Facts{Services: services(service("web", to(80, "http"), asUDP(to(80, "quic"))))}, byName, ""},
	{"named; a NetworkPolicy allows its number", "one, by name", app, Facts{byItsName, policy(web, polPort(8080), nil)}, byRedirect, "NetworkPolicy"},
	{"named; a NetworkPolicy allows a range around it", "one, by name", app, Facts{byItsName, policy(nil, polPort(8000, 8999), nil)}, byRedirect, "NetworkPolicy"},
	{"named; a client's NetworkPolicy allows its number", "one, by name", app, Facts{byItsName, policy(map[string]string{"app": "client"}, nil, polPort(8080), peer(web))}, byRedirect, "NetworkPolicy"},
	{"named; a client's NetworkPolicy allows its number to everybody", "one, by name", app, Facts{byItsName, policy(map[string]string{"app": "client"}, nil, polPort(8080))}, byRedirect, "NetworkPolicy"},
	{"named; a NetworkPolicy allows its name", "one, by name", app, Facts{byItsName, policy(web, polPort("http"), nil)}, byName, ""},
	{"named; a NetworkPolicy allows another number", "one, by name", app, Facts{byItsName, policy(web, polPort(9090), nil)}, byName, ""},
	{"named; a NetworkPolicy allows all ports", "one, by name", app, Facts{byItsName, policy(web, []networkingv1.NetworkPolicyPort{}, nil)}, byName, ""},
	{"named; a NetworkPolicy of other pods allows its number", "one, by name", app, Facts{byItsName, policy(map[string]string{"app": "other"}, polPort(8080), nil)}, byName, ""},
	{"named; a NetworkPolicy lets clients use its number of other pods", "one, by name", app, Facts{byItsName, policy(nil, nil, polPort(8080), peer(map[string]string{"app": "other"}))}, byName, ""},
}

func TestSupportTable(t *testing.T) {
	var doc strings.Builder
	doc.WriteString("| The container port is | Services lead to it | Way | Why |\n|---|---|---|---|\n")
	for _, row := range supportTable {
		t.Run(row.port+"/"+row.services, func(t *testing.T) {
			var why string
			var got []Taken
			for _, c := range candidates(&row.spec, web, row.facts) {
				if c.ContainerPort == 8080 && c.Protocol == corev1.ProtocolTCP {
					why = c.whyRedirect(&row.spec, web, row.facts.NetworkPolicies)
				}
			}
			for _, p := range Ports(&row.spec, web, row.facts) {
				if p.ContainerPort == 8080 && p.Protocol == corev1.ProtocolTCP {
					got = append(got, p)
				}
			}
			if len(got) != 1 || got[0].Way != row.way {
				t.Fatalf("got %+v, want one by %s", got, row.way)
			}
			if !strings.Contains(why, row.why) || (why == "") != (row.why == "") {
				t.Errorf("because %q, want %q", why, row.why)
			}
			way := map[agentcfg.Way]string{byName: "name", byRedirect: "**redirect**"}[row.way]
			fmt.Fprintf(&doc, "| %s | %s | %s | %s |\n", row.port, row.services, way, why)
		})
	}
	checkDoc(t, "ports", doc.String())
}

const supportDoc = "../../docs/support-table.md"

// checkDoc compares the part of docs/support-table.md between two markers with what the table says, or writes it.
func checkDoc(t *testing.T, part, want string) {
	t.Helper()
	raw, err := os.ReadFile(supportDoc)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "<!-- "+part+" -->\n", "<!-- /"+part+" -->"
	head, rest, ok1 := strings.Cut(string(raw), begin)
	got, tail, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no part %q", supportDoc, part)
	}
	if *update {
		if err := os.WriteFile(supportDoc, []byte(head+begin+want+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (go test ./internal/inject -update writes it) -want +got:\n%s", supportDoc, d)
	}
}

func TestPorts(t *testing.T) {
	sp := func(s string, p int32, n string) ServicePort { return ServicePort{s, p, n} }
	named := func(p corev1.ServicePort, n string) corev1.ServicePort { p.Name = n; return p }
	tests := []struct {
		name string
		spec corev1.PodSpec
		svcs []corev1.Service
		want []Taken
	}{
		{"nothing", pod(container("app")), nil, []Taken{}},
		{"no containers", corev1.PodSpec{}, services(service("web", to(80, 8080))), []Taken{
			{"", 8080, "TCP", "", byRedirect, []ServicePort{sp("web", 80, "")}},
		}},
		{"ordered by number and protocol", pod(container("app", port("b", 2), udp("", 1), port("a", 1))), nil, []Taken{
			{"app", 1, "TCP", "a", byRedirect, nil}, {"app", 1, "UDP", "", byRedirect, nil}, {"app", 2, "TCP", "b", byRedirect, nil},
		}},
		{"all services are told, in order", app, services(service("z", to(80, "http")), service("a", named(to(443, "http"), "tls"), named(to(80, "http"), "plain"))), []Taken{
			{"app", 8080, "TCP", "http", byName, []ServicePort{sp("a", 80, "plain"), sp("a", 443, "tls"), sp("z", 80, "")}},
		}},
		{"a name leads to the first container that has it", pod(container("a", port("x", 1)), container("b", port("http", 2)), container("c", port("http", 3))), byItsName, []Taken{
			{"a", 1, "TCP", "x", byRedirect, nil}, {"b", 2, "TCP", "http", byRedirect, []ServicePort{sp("web", 80, "")}}, {"c", 3, "TCP", "http", byRedirect, nil},
		}},
		{"a name leads to ordinary containers before native sidecars", withSidecar(pod(container("app", port("http", 2))), container("s", port("http", 1))), byItsName, []Taken{
			{"s", 1, "TCP", "http", byRedirect, nil}, {"app", 2, "TCP", "http", byRedirect, []ServicePort{sp("web", 80, "")}},
		}},
		{"a name leads to a port of the same protocol only", pod(container("app", udp("http", 1), port("h", 2))), byItsName, []Taken{
			{"app", 1, "UDP", "http", byRedirect, nil}, {"app", 2, "TCP", "h", byRedirect, nil},
		}},
		{"a name that no container has leads nowhere", pod(container("app", port("web", 8080))), byItsName, []Taken{
			{"app", 8080, "TCP", "web", byRedirect, nil},
		}},
		{"ports of init containers are gone when the pod serves", withInit(pod(container("app")), container("init", port("http", 8080))), byItsName, []Taken{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Ports(&tt.spec, web, Facts{Services: tt.svcs})
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

// The informer's cache lists in random order; the answer is always the same.
func TestPortsOrderOfServices(t *testing.T) {
	svcs := services(service("a", to(80, "http")), service("b", to(81, 8080)), headless(service("c", to(82, "http"))), service("d", to(83, "http")))
	want := Ports(&app, web, Facts{Services: svcs})
	for range 20 {
		rand.Shuffle(len(svcs), func(i, j int) { svcs[i], svcs[j] = svcs[j], svcs[i] })
		if d := cmp.Diff(want, Ports(&app, web, Facts{Services: svcs})); d != "" {
			t.Fatalf("depends on the order of services:\n%s", d)
		}
	}
}

func TestFind(t *testing.T) {
	sp := func(s string, p int32, n string) ServicePort { return ServicePort{s, p, n} }
	one := []Taken{{Container: "app", ContainerPort: 8080, Protocol: "TCP", Name: "http", Services: []ServicePort{sp("web", 80, "web"), sp("web2", 8000, "")}}}
	many := []Taken{
		{Container: "app", ContainerPort: 8080, Protocol: "TCP", Name: "http", Services: []ServicePort{sp("web", 80, "http"), sp("pods", 8080, "")}},
		{Container: "app", ContainerPort: 9090, Protocol: "TCP", Name: "metrics"},
		{Container: "side", ContainerPort: 80, Protocol: "TCP", Name: "admin"},
		{Container: "app", ContainerPort: 53, Protocol: "UDP", Name: "dns", Services: []ServicePort{sp("web", 53, "dns")}},
	}
	twins := []Taken{
		{Container: "a", ContainerPort: 1, Protocol: "TCP", Name: "http"}, {Container: "b", ContainerPort: 2, Protocol: "TCP", Name: "http"},
	}
	// A service's number is a container's number too: the service's is meant.
	crossed := []Taken{
		{Container: "a", ContainerPort: 8080, Protocol: "TCP", Name: "x", Services: []ServicePort{sp("web", 80, "y")}},
		{Container: "b", ContainerPort: 9090, Protocol: "TCP", Name: "y", Services: []ServicePort{sp("web", 8080, "x")}},
	}
	both := []Taken{
		{ContainerPort: 53, Protocol: "TCP", Services: []ServicePort{sp("tcp", 53, "")}}, {ContainerPort: 53, Protocol: "UDP", Services: []ServicePort{sp("udp", 53, "")}},
	}
	tests := []struct {
		name                     string
		ports                    []Taken
		port, service, container string
		want                     uint16
		via                      string // the first SERVICE:PORT of what was meant
		reason, msg              string
	}{
		{"the only port", one, "", "", "", 8080, "web:80", "", ""},
		{"by service port number", one, "8000", "", "", 8080, "web2:8000", "", ""},
		{"by service port name", one, "web", "", "", 8080, "web:80", "", ""},
		{"by container port name", one, "http", "", "", 8080, "web:80", "", ""},
		{"by container port number", one, "8080", "", "", 8080, "web:80", "", ""},
		{"through the second service", one, "", "web2", "", 8080, "web2:8000", "", ""},
		{"the only one behind a service", many, "", "", "", 8080, "web:80", "", ""},
		{"the service's number before the container's", many, "80", "", "", 8080, "web:80", "", ""},
		{"the container's number when the container is named", many, "80", "", "side", 80, ":0", "", ""},
		{"crossed numbers", crossed, "8080", "", "", 9090, "web:8080", "", ""},
		{"crossed names", crossed, "y", "", "", 8080, "web:80", "", ""},
		{"the container decides", twins, "http", "", "b", 2, ":0", "", ""},

		{"a UDP port", many, "dns", "", "", 53, "web:53", "", ""},
		{"the only port is a UDP port", many[3:], "", "", "", 53, "web:53", "", ""},
		{"a number of both protocols is TCP's", both, "53", "", "", 53, "tcp:53", "", ""},
		{"a number of both protocols, UDP wanted", both, "53/udp", "", "", 53, "udp:53", "", ""},
		{"the only one of a protocol", both, "/UDP", "", "", 53, "udp:53", "", ""},

		{"several ports", many, "metrics 80", "", "", 8080, "web:80", "", ""},
		{"one that is there after one that is not", many, "grpc 80", "", "", 0, "", "NoSuchPort", `no port "grpc"; there is 8080 (http) [service web:80] [service pods:8080], 9090 (metrics), 80 (admin), 53/udp (dns) [service web:53]`},
		{"the same one by two names", many, "http metrics 8080", "", "", 0, "", "SamePort", "one port 8080 (http) [service pods:8080], which is named twice"},
		{"two protocols of a number", both, "53 53/udp", "", "", 53, "udp:53", "", ""},

		{"no ports", nil, "", "", "", 0, "", "NoPort", "no port: no service leads to its pods and no container declares one"},
		{"no such protocol", one, "80/sctp", "", "", 0, "", "NoPort", "no port: no service leads to its pods and no container declares one"},
		{"no such name", many, "grpc", "", "", 0, "", "NoSuchPort", `no port "grpc"; there is 8080 (http) [service web:80] [service pods:8080], 9090 (metrics), 80 (admin), 53/udp (dns) [service web:53]`},
		{"no such number", one, "443", "", "", 0, "", "NoSuchPort", `no port "443"; there is 8080 (http) [service web:80] [service web2:8000]`},
		{"several", twins, "", "", "", 0, "", "AmbiguousPort", "several ports: 1 (http), 2 (http)"},
		{"several behind services", crossed, "", "", "", 0, "", "AmbiguousPort", "several ports: 8080 (x) [service web:80], 9090 (y) [service web:8080]"},
		{"several of the name", twins, "http", "", "", 0, "", "AmbiguousPort", `several ports that "http" could mean: 1 (http), 2 (http)`},
		{"no such service", one, "", "api", "", 0, "", "NoSuchService", `no service "api" that leads to its pods; there is 8080 (http) [service web:80] [service web2:8000]`},
		{"no such service at all", nil, "", "api", "", 0, "", "NoSuchService", `no service "api" that leads to its pods; there is none`},
		{"no such container", one, "", "", "db", 0, "", "NoSuchContainer", `no container "db" with such a port; there is 8080 (http) [service web:80] [service web2:8000]`},
		{"the service leads to another container", crossed, "", "web", "c", 0, "", "NoSuchContainer", `no container "c" with such a port; there is 8080 (x) [service web:80], 9090 (y) [service web:8080]`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var names []string
			if tt.port != "" {
				names = strings.Split(tt.port, " ")
			}
			got, err := Find(tt.ports, names, tt.service, tt.container)
			var pe *PortError
			if tt.reason != "" {
				if !errors.As(err, &pe) || pe.Reason != tt.reason || pe.Error() != tt.msg {
					t.Errorf("got %v\nwant %s: %s", err, tt.reason, tt.msg)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			last := got[len(got)-1]
			if via := fmt.Sprintf("%s:%d", last.Via().Service, last.Via().Port); len(got) != max(len(names), 1) || last.ContainerPort != tt.want || via != tt.via {
				t.Errorf("got %v, want as the last one %d via %s", got, tt.want, tt.via)
			}
		})
	}
	// The list that was searched keeps all its services.
	if len(one[0].Services) != 2 || len(many[0].Services) != 2 {
		t.Error("Find changed its argument")
	}
}

func TestFindContainer(t *testing.T) {
	spec := func(names ...string) *corev1.PodSpec {
		s := &corev1.PodSpec{InitContainers: []corev1.Container{{Name: "native"}}}
		for _, n := range names {
			s.Containers = append(s.Containers, corev1.Container{Name: n})
		}
		return s
	}
	ports := []Taken{
		{Container: "a", ContainerPort: 80, Protocol: "TCP", Name: "http", Services: []ServicePort{{"web", 80, ""}}},
		{Container: "b", ContainerPort: 81, Protocol: "TCP", Name: "admin"},
		{Container: "a", ContainerPort: 82, Protocol: "SCTP"},
		{Container: "a", ContainerPort: 83, Protocol: "UDP", Name: "dns"},
	}
	both := []Taken{{Container: "a", ContainerPort: 1, Services: []ServicePort{{"x", 1, ""}}}, {Container: "b", ContainerPort: 2, Services: []ServicePort{{"y", 2, ""}}}}
	for name, tt := range map[string]struct {
		spec      *corev1.PodSpec
		ports     []Taken
		names     []string
		container string
		want      string // container and its ports, or the error
	}{
		"the only one":                    {spec: spec("a"), ports: ports[:1], want: "a [80]"},
		"without ports":                   {spec: spec("worker"), want: "worker []"},
		"the one that services lead to":   {spec: spec("a", "b"), ports: ports, want: "a [80 83]"},
		"by name":                         {spec: spec("a", "b"), ports: ports, container: "b", want: "b [81]"},
		"by a port, which comes first":    {spec: spec("a", "b"), ports: ports, names: []string{"dns"}, want: "a [83 80]"},
		"by name and port":                {spec: spec("a", "b"), ports: ports, container: "a", names: []string{"http"}, want: "a [80 83]"},
		"another one's port":              {spec: spec("a", "b"), ports: ports, container: "b", names: []string{"http"}, want: `NoSuchPort: no port "http"; there is 81 (admin)`},
		"ports of two":                    {spec: spec("a", "b"), ports: ports, names: []string{"http", "admin"}, want: "AmbiguousContainer: ports of several containers among those: 80 (http) [service web:80], 81 (admin)"},
		"services lead to both":           {spec: spec("a", "b"), ports: both, want: "AmbiguousContainer: several containers: a, b"},
		"services lead to none":           {spec: spec("a", "b"), want: "AmbiguousContainer: several containers: a, b"},
		"no such":                         {spec: spec("a", "b"), container: "c", want: `NoSuchContainer: no container "c" that can be replaced; there is a, b`},
		"what runs until the pod is gone": {spec: spec("a"), container: "native", want: `NoSuchContainer: no container "native" that can be replaced; there is a`},
	} {
		container, got, err := FindContainer(tt.spec, tt.ports, tt.names, "", tt.container)
		numbers := []uint16{}
		for _, p := range got {
			numbers = append(numbers, p.ContainerPort)
		}
		out := fmt.Sprintf("%s %v", container, numbers)
		var pe *PortError
		if errors.As(err, &pe) {
			out = pe.Reason + ": " + pe.Msg
		}
		if out != tt.want {
			t.Errorf("%s: %s, want %s", name, out, tt.want)
		}
	}
}

func TestFindApp(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	pod := func(preferred string, names ...string) *corev1.PodTemplateSpec {
		p := &corev1.PodTemplateSpec{Spec: corev1.PodSpec{InitContainers: []corev1.Container{{Name: "init"}, {Name: "native", RestartPolicy: &always}}}}
		p.Annotations = map[string]string{defaultContainerAnnotation: preferred}
		for _, n := range names {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: n})
		}
		return p
	}
	for name, tt := range map[string]struct {
		pod       *corev1.PodTemplateSpec
		container string
		want      string
	}{
		"the only one":        {pod("", "a"), "", "a"},
		"the default one":     {pod("b", "a", "b"), "", "b"},
		"a default that errs": {pod("none", "a", "b"), "", "AmbiguousContainer: several containers: a, b, native"},
		"by name":             {pod("b", "a", "b"), "a", "a"},
		"a native sidecar":    {pod("b", "a", "b"), "native", "native"},
		"none of that name":   {pod("b", "a"), "init", `NoSuchContainer: no container "init"; there is a, native`},
	} {
		got, err := FindApp(tt.pod, tt.container)
		var pe *PortError
		if errors.As(err, &pe) {
			got = pe.Reason + ": " + pe.Msg
		}
		if got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}

func TestAny(t *testing.T) {
	redirect := Taken{ContainerPort: 80, Protocol: "TCP", Way: agentcfg.ByRedirect}
	name := Taken{ContainerPort: 8080, Protocol: "TCP", Way: agentcfg.ByName}
	udp := Taken{ContainerPort: 53, Protocol: "UDP", Way: agentcfg.ByName}
	for _, tt := range []struct {
		ports []Taken
		want  uint16
	}{{[]Taken{udp, redirect, name}, 8080}, {[]Taken{udp, redirect}, 80}} {
		if got, err := Any(tt.ports); err != nil || len(got) != 1 || got[0].ContainerPort != tt.want {
			t.Errorf("%v: ports %v, %v", tt.ports, got, err)
		}
	}
	var pe *PortError
	if _, err := Any([]Taken{udp}); !errors.As(err, &pe) || pe.Reason != "NoPort" {
		t.Errorf("no TCP port: %v", err)
	}
}
