package inject

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// TestRandomPods holds, for pods of all shapes, that services lead to the agent for taken ports and to the app for all others,
// that every probe asks the app, and that injecting twice changes nothing.
func TestRandomPods(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		p, f := randomPod(r)
		cfg := Config{Managers: []string{"m:1"}, ManagerKey: "k"}
		for _, x := range Ports(&p.Spec, p.Labels, f) {
			if r.IntN(2) == 0 {
				cfg.Ports = append(cfg.Ports, x)
			} else {
				cfg.Others = append(cfg.Others, x)
			}
		}
		if len(cfg.Ports) == 0 {
			continue
		}
		out, err := Pod(p, cfg)
		if err != nil {
			if earlyLiveness(&p.Spec, cfg.Ports) == nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			continue
		}
		again, err := Pod(out, cfg)
		if err != nil || !cmp.Equal(out, again) {
			t.Fatalf("seed %d: injecting twice: %v %s", seed, err, cmp.Diff(out, again))
		}
		checkInjected(t, p, out, cfg)
		ac, err := agentcfg.Parse(out.Annotations[agentcfg.Annotation])
		if err != nil {
			t.Fatal(err)
		}
		checkServices(t, p, out, f, ac)
		checkProbes(t, p, out, ac)
		if t.Failed() {
			b, _ := yaml.Marshal(p)
			t.Fatalf("seed %d: %s\nports %+v", seed, b, cfg.Ports)
		}
	}
}

func randomPod(r *rand.Rand) (*corev1.Pod, Facts) {
	names := []string{"", "http", "grpc", "admin"}
	always := corev1.ContainerRestartPolicyAlways
	pick := func() intstr.IntOrString {
		if r.IntN(3) == 0 {
			return intstr.FromString(names[1+r.IntN(3)])
		}
		return intstr.FromInt32(int32(9898 + r.IntN(6)))
	}
	probe := func() *corev1.Probe {
		switch r.IntN(6) {
		case 0:
			return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/p", Port: pick()}}}
		case 1:
			return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: pick()}}}
		case 2:
			return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: int32(9898 + r.IntN(6))}}}
		case 3:
			return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Host: "192.0.2.1", Port: pick()}}}
		}
		return nil
	}
	p := &corev1.Pod{}
	p.Labels = map[string]string{"app": "web"}
	for i := range 1 + r.IntN(4) {
		c := corev1.Container{Name: fmt.Sprintf("c%d", i), LivenessProbe: probe(), ReadinessProbe: probe(), StartupProbe: probe()}
		used := map[string]bool{"": false}
		for range r.IntN(4) {
			cp := corev1.ContainerPort{Name: names[r.IntN(4)], ContainerPort: int32(9898 + r.IntN(6))}
			if used[cp.Name] { // names are unique in a container
				cp.Name = ""
			}
			used[cp.Name] = cp.Name != ""
			if r.IntN(5) == 0 {
				cp.Protocol = corev1.ProtocolUDP
			}
			c.Ports = append(c.Ports, cp)
		}
		if r.IntN(4) == 0 {
			c.Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: pick()}}, PreStop: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: pick()}}}
		}
		switch {
		case i == 0 || r.IntN(3) > 0:
			p.Spec.Containers = append(p.Spec.Containers, c)
		case r.IntN(2) == 0:
			c.RestartPolicy = &always
			fallthrough
		default:
			if c.RestartPolicy == nil {
				c.LivenessProbe, c.ReadinessProbe, c.StartupProbe, c.Lifecycle = nil, nil, nil, nil
			}
			p.Spec.InitContainers = append(p.Spec.InitContainers, c)
		}
	}
	var f Facts
	for i := range r.IntN(3) {
		s := service(fmt.Sprintf("s%d", i))
		for range 1 + r.IntN(2) {
			sp := corev1.ServicePort{Port: int32(9898 + r.IntN(6)), TargetPort: pick()}
			if r.IntN(5) == 0 {
				sp.Protocol = corev1.ProtocolUDP
			}
			s.Spec.Ports = append(s.Spec.Ports, sp)
		}
		if r.IntN(5) == 0 {
			s.Spec.ClusterIP = corev1.ClusterIPNone
		}
		f.Services = append(f.Services, s)
	}
	return p, f
}

// checkServices follows every service port before and after the injection.
func checkServices(t *testing.T, before, after *corev1.Pod, f Facts, ac *agentcfg.Config) {
	t.Helper()
	for _, s := range f.Services {
		for _, sp := range s.Spec.Ports {
			was, ok := target(&before.Spec, sp)
			if !ok {
				continue
			}
			is, ok := target(&after.Spec, sp)
			for _, p := range ac.Ports { // the redirect in the pod
				if p.Way == agentcfg.ByRedirect && is == int32(p.ContainerPort) && p.Protocol == string(proto(sp.Protocol)) {
					is = int32(p.AgentPort)
				}
			}
			want := was
			for _, p := range ac.Ports {
				if was == int32(p.ContainerPort) && p.Protocol == string(proto(sp.Protocol)) {
					want = int32(p.AgentPort)
				}
			}
			if !ok || is != want {
				t.Errorf("service %s port %d: led to %d, leads to %d, want %d", s.Name, sp.Port, was, is, want)
			}
		}
	}
}

// checkProbes says that every probe and hook that went to a port of the app still asks the app.
func checkProbes(t *testing.T, before, after *corev1.Pod, ac *agentcfg.Config) {
	t.Helper()
	resolve := func(c *corev1.Container, p intstr.IntOrString) int32 {
		if p.Type == intstr.Int {
			return p.IntVal
		}
		i := slices.IndexFunc(c.Ports, func(cp corev1.ContainerPort) bool { return cp.Name == p.StrVal })
		if i < 0 {
			return -1
		}
		return c.Ports[i].ContainerPort
	}
	reached := func(n int32, path string) int32 { // which port of the app a probe of pod port n asks
		for _, p := range ac.Ports {
			switch {
			case n == int32(p.ProbePort) && p.ProbePort != 0, n == int32(ac.HealthPort) && path == agentcfg.AppPath(p.ContainerPort):
				return int32(p.ContainerPort)
			case p.Way == agentcfg.ByRedirect && p.Protocol == string(corev1.ProtocolTCP) && n == int32(p.ContainerPort):
				return -2 // the laptop may answer
			}
		}
		return n
	}
	type probe struct {
		what    string
		port    int32
		path    string
		atStart bool // of a native sidecar: before there is a redirect or an agent
	}
	list := func(p *corev1.Pod) []probe {
		var out []probe
		for _, c := range servers(&p.Spec) {
			if c.Name == agentcfg.Container {
				continue
			}
			add := func(what string, h corev1.ProbeHandler) {
				b := probe{what: c.Name + " " + what, atStart: sidecar(c) && (what == "startup" || what == "postStart")}
				switch {
				case h.HTTPGet != nil && h.HTTPGet.Host == "":
					b.port, b.path = resolve(c, h.HTTPGet.Port), h.HTTPGet.Path
				case h.TCPSocket != nil && h.TCPSocket.Host == "":
					b.port = resolve(c, h.TCPSocket.Port)
				case h.GRPC != nil:
					b.port = h.GRPC.Port
				}
				out = append(out, b)
			}
			for i, pr := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
				if pr != nil {
					add([]string{"liveness", "readiness", "startup"}[i], pr.ProbeHandler)
				}
			}
			if c.Lifecycle != nil {
				add("postStart", corev1.ProbeHandler{HTTPGet: c.Lifecycle.PostStart.HTTPGet})
				add("preStop", corev1.ProbeHandler{HTTPGet: c.Lifecycle.PreStop.HTTPGet})
			}
		}
		return out
	}
	was, is := list(before), list(after)
	if len(was) != len(is) {
		t.Fatalf("%d probes, were %d", len(is), len(was))
	}
	for i := range was {
		got := is[i].port
		if !is[i].atStart {
			got = reached(is[i].port, is[i].path)
		}
		if was[i].port > 0 && got != was[i].port {
			t.Errorf("%s: asked %d, goes to %d%s and asks %d", was[i].what, was[i].port, is[i].port, is[i].path, got)
		}
	}
}
