package inject

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

var update = flag.Bool("update", false, "write testdata/*.out.yaml and docs/support-table.md")

// fixture is one testdata/*.in.yaml: a pod, the objects around it, and the ports to take.
type fixture struct {
	pod   corev1.Pod
	facts Facts
	take  []string
	apps  []string
	out   []string // containers that are not to run
}

func readFixture(t *testing.T, file string) fixture {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var f fixture
	for _, line := range strings.Split(string(raw), "\n") {
		if s, ok := strings.CutPrefix(line, "# take: "); ok {
			f.take = strings.Split(s, ",")
		}
		if s, ok := strings.CutPrefix(line, "# apps: "); ok {
			f.apps = strings.Split(s, ",")
		}
		if s, ok := strings.CutPrefix(line, "# stand-in: "); ok {
			f.out = strings.Split(s, ",")
		}
	}
	for _, doc := range bytes.Split(raw, []byte("\n---\n")) {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal(doc, &kind); err != nil {
			t.Fatal(err)
		}
		var o any
		switch kind.Kind {
		case "Pod":
			o = &f.pod
		case "Service":
			f.facts.Services = append(f.facts.Services, corev1.Service{})
			o = &f.facts.Services[len(f.facts.Services)-1]
		case "NetworkPolicy":
			f.facts.NetworkPolicies = append(f.facts.NetworkPolicies, networkingv1.NetworkPolicy{})
			o = &f.facts.NetworkPolicies[len(f.facts.NetworkPolicies)-1]
		default:
			t.Fatalf("%s: unexpected kind %q", file, kind.Kind)
		}
		if err := yaml.UnmarshalStrict(doc, o); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
	return f
}

// config is what the manager would give for the fixture.
func (f *fixture) config(t *testing.T) Config {
	t.Helper()
	cfg := Config{
		Image: "ghcr.io/doppel-dev/traffic-agent:0.0.0", PullPolicy: corev1.PullIfNotPresent, LogLevel: "info",
		Managers: []string{"10.96.0.1:8082"}, ManagerKey: "sha256:key", StandIns: f.out, Apps: f.apps,
	}
	cfg.Others = Ports(&f.pod.Spec, f.pod.Labels, f.facts)
	var err error
	if cfg.Ports, err = Find(cfg.Others, f.take, "", ""); err != nil {
		t.Fatal(err)
	}
	for _, p := range cfg.Ports {
		cfg.Others = slices.DeleteFunc(cfg.Others, func(o Taken) bool { return o.ContainerPort == p.ContainerPort && o.Protocol == p.Protocol })
	}
	return cfg
}

func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(files) < 15 {
		t.Fatalf("%d golden files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".in.yaml"), func(t *testing.T) {
			f := readFixture(t, file)
			before := f.pod.DeepCopy()
			cfg := f.config(t)
			out, err := Pod(&f.pod, cfg)
			var got []byte
			if err != nil {
				got = []byte("error: " + err.Error() + "\n")
			} else if got, err = yaml.Marshal(out); err != nil {
				t.Fatal(err)
			}
			compareFile(t, strings.Replace(file, ".in.", ".out.", 1), got)
			if d := cmp.Diff(before, &f.pod); d != "" {
				t.Errorf("the pod that was given was changed:\n%s", d)
			}
			if out == nil {
				return
			}
			again, err := Pod(out, cfg)
			if err != nil {
				t.Fatalf("injected twice: %v", err)
			}
			if d := cmp.Diff(out, again); d != "" {
				t.Errorf("injecting twice changes something:\n%s", d)
			}
			if !Injected(before) {
				checkInjected(t, before, out, cfg)
			}
		})
	}
}

// compareFile compares with a golden file, or writes it.
func compareFile(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (go test ./internal/inject -update writes it)", err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got):\n%s", file, d)
	}
}

// checkInjected holds what is true of every injected pod.
func checkInjected(t *testing.T, before, out *corev1.Pod, cfg Config) {
	t.Helper()
	ac, err := agentcfg.Parse(out.Annotations[agentcfg.Annotation])
	if err != nil {
		t.Fatalf("the agent would not accept its configuration: %v", err)
	}
	for _, p := range cfg.Ports {
		if !ac.Covers(string(p.Protocol), p.ContainerPort) {
			t.Errorf("port %d is not taken", p.ContainerPort)
		}
	}
	for _, p := range ac.Ports {
		if p.Way != agentcfg.ByName {
			continue
		}
		// A service that names the port now leads to the agent.
		sp := corev1.ServicePort{Protocol: corev1.Protocol(p.Protocol)}
		sp.TargetPort.Type, sp.TargetPort.StrVal = 1, p.Name
		if n, ok := target(&out.Spec, sp); !ok || n != int32(p.AgentPort) {
			t.Errorf("name %s leads to %d, not to the agent's %d", p.Name, n, p.AgentPort)
		}
	}
	names := map[string]bool{}
	for _, c := range slices.Concat(out.Spec.Containers, out.Spec.InitContainers) {
		if names[c.Name] {
			t.Errorf("two containers %s", c.Name)
		}
		names[c.Name] = true
	}
	if n := len(out.Spec.Containers) - len(before.Spec.Containers); n != 1 {
		t.Errorf("%d containers more", n)
	}
}

func TestPodErrors(t *testing.T) {
	_, err := Pod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{agentcfg.AnnotationInject: "false"}}}, Config{})
	if !errors.Is(err, ErrForbidden) {
		t.Errorf("got %v, want ErrForbidden", err)
	}
	if _, err = Pod(&corev1.Pod{}, Config{}); err == nil || err.Error() != "no ports to take" {
		t.Errorf("got %v", err)
	}
}

// An annotation that was copied into a template does not pass for an agent.
func TestAnnotationAloneIsNoAgent(t *testing.T) {
	f := readFixture(t, "testdata/name-takeover.in.yaml")
	f.pod.Annotations = map[string]string{agentcfg.Annotation: "{}"}
	out, err := Pod(&f.pod, f.config(t))
	if err != nil || !Injected(out) {
		t.Errorf("not injected: %v", err)
	}
}

func TestAgentResources(t *testing.T) {
	limits := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1"), corev1.ResourceMemory: resource.MustParse("100Mi")}
	for name, want := range map[string]corev1.ResourceRequirements{"none": {}, "limits, for a quota": {Limits: limits}} {
		f := readFixture(t, "testdata/redirect.in.yaml")
		cfg := f.config(t)
		cfg.Resources = &want
		out, err := Pod(&f.pod, cfg)
		if err != nil {
			t.Fatal(err)
		}
		ours := 0
		for _, c := range slices.Concat(out.Spec.InitContainers, out.Spec.Containers) {
			if c.Name == agentcfg.Container || c.Name == agentcfg.InitContainer {
				ours++
				if !equality.Semantic.DeepEqual(c.Resources, want) {
					t.Errorf("%s: container %s has resources %v", name, c.Name, c.Resources)
				}
			}
		}
		if ours != 2 {
			t.Errorf("%s: %d containers of ours", name, ours)
		}
	}
}

// What a privileged container mounts for others too, the agent and a stand-in only see: the API server lets no container without privilege do more.
func TestMountPropagation(t *testing.T) {
	for _, tt := range []struct{ app, agent *corev1.MountPropagationMode }{
		{nil, nil},
		{new(corev1.MountPropagationNone), new(corev1.MountPropagationNone)},
		{new(corev1.MountPropagationHostToContainer), new(corev1.MountPropagationHostToContainer)},
		{new(corev1.MountPropagationBidirectional), new(corev1.MountPropagationHostToContainer)},
	} {
		for _, standIns := range [][]string{nil, {"app"}} {
			pod := &corev1.Pod{Spec: corev1.PodSpec{
				Containers: []corev1.Container{{
					Name: "app", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}, SecurityContext: &corev1.SecurityContext{Privileged: new(true)},
					VolumeMounts: []corev1.VolumeMount{{Name: "v", MountPath: "/v", MountPropagation: tt.app}},
				}},
				Volumes: []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/v"}}}},
			}}
			out, err := Pod(pod, Config{Image: "agent", Managers: []string{"m:1"}, ManagerKey: "k", Ports: Ports(&pod.Spec, nil, Facts{}), Apps: []string{"app"}, StandIns: standIns})
			if err != nil {
				t.Fatal(err)
			}
			seen := 0
			for _, c := range out.Spec.Containers {
				want := tt.agent
				if c.Name == "app" && standIns == nil {
					want = tt.app
				}
				for _, m := range c.VolumeMounts {
					if m.Name != "v" {
						continue
					}
					seen++
					if !cmp.Equal(m.MountPropagation, want) {
						t.Errorf("stand-ins %v, container %s: %s", standIns, c.Name, cmp.Diff(want, m.MountPropagation))
					}
				}
			}
			if seen != 2 {
				t.Errorf("%d mounts of the volume", seen)
			}
		}
	}
}
