package chart

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admission "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	doppel "github.com/doppel-dev/doppel/charts/doppel"
	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/uerr"
)

var update = flag.Bool("update", false, "write the golden files")

const chartDir = "../../charts/doppel"

// TestEmbedIsComplete compares what is embedded with what is in the directory.
func TestEmbedIsComplete(t *testing.T) {
	list := func(fsys fs.FS) []string {
		var names []string
		err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && !strings.HasSuffix(name, ".go") && name != ".helmignore" {
				names = append(names, name)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(names)
		return names
	}
	if d := cmp.Diff(list(os.DirFS(chartDir)), list(doppel.Files)); d != "" {
		t.Errorf("directory and embedded files differ:\n%s", d)
	}
}

// TestGolden renders the chart with its defaults and with everything set, and compares it with what was reviewed.
func TestGolden(t *testing.T) {
	for name, o := range map[string]Options{
		"defaults":   {},
		"full":       {Namespace: "tools", ValueFiles: []string{"testdata/full-values.yaml"}, Set: []string{"manager.replicas=2"}},
		"namespaced": {Namespace: "tools", ValueFiles: []string{"testdata/namespaced-values.yaml"}},
		"withheld":   {Namespace: "tools", Set: []string{"namespaces={dev}", "admission.policy=false", "admission.webhook=false"}},
	} {
		t.Run(name, func(t *testing.T) {
			files, err := Render(o)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, files)
		})
	}
}

// golden compares what a chart gives with what was reviewed.
func golden(t *testing.T, name string, files map[string]string) {
	t.Helper()
	names := make([]string, 0, len(files))
	for f := range files {
		names = append(names, f)
	}
	slices.Sort(names)
	var b strings.Builder
	for _, f := range names {
		b.WriteString("---\n# " + f + "\n" + strings.TrimSpace(files[f]) + "\n")
	}
	got := strings.ReplaceAll(b.String(), buildinfo.Version, "VERSION")
	file := filepath.Join("testdata", name+".golden.yaml")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("differs from %s (go test ./internal/chart -update writes it):\n%s", file, d)
	}
}

func objects(t *testing.T, o Options) map[string]any {
	t.Helper()
	files, err := Render(o)
	if err != nil {
		t.Fatal(err)
	}
	return decoded(t, files)
}

// decoded decodes manifests strictly: a field that Kubernetes does not know is a failure.
func decoded(t *testing.T, files map[string]string) map[string]any {
	t.Helper()
	objs := map[string]any{}
	for f, text := range files {
		if f == "NOTES.txt" {
			continue
		}
		for _, doc := range strings.Split("\n"+text, "\n---") {
			if strings.TrimSpace(doc) == "" {
				continue
			}
			obj, gvk, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(doc), nil, nil)
			if err != nil {
				t.Fatalf("%s: %v\n%s", f, err, doc)
			}
			if err := yaml.UnmarshalStrict([]byte(doc), obj); err != nil {
				t.Errorf("%s: %v", f, err)
			}
			var meta struct {
				Metadata struct{ Name, Namespace string }
			}
			if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
				t.Fatal(err)
			}
			key := gvk.Kind + " " + meta.Metadata.Namespace + "/" + meta.Metadata.Name
			if _, twice := objs[key]; twice {
				t.Errorf("%s is there twice", key)
			}
			objs[key] = obj
		}
	}
	return objs
}

func get[T any](t *testing.T, objs map[string]any, key string) T {
	t.Helper()
	v, ok := objs[key].(T)
	if !ok {
		t.Fatalf("no %s", key)
	}
	return v
}

func TestObjects(t *testing.T) {
	objs := objects(t, Options{})
	d := get[*appsv1.Deployment](t, objs, "Deployment doppel/traffic-manager")
	c := d.Spec.Template.Spec.Containers[0]
	if want := "ghcr.io/doppel-dev/traffic-manager:" + buildinfo.Version; c.Image != want {
		t.Errorf("image %s, want %s", c.Image, want)
	}
	wantArgs := []string{
		"--namespace=$(POD_NAMESPACE)", "--pod-ip=$(POD_IP)",
		"--agent-image=ghcr.io/doppel-dev/traffic-agent:" + buildinfo.Version, "--renew-interval=10m", "--lost-grace=30s", "--check-reach=true", "--injection=onDemand", "--idle-timeout=0s", "--no-redirect=false", "--no-policy=false", "--no-webhook=false",
	}
	if diff := cmp.Diff(wantArgs, c.Args); diff != "" {
		t.Error(diff)
	}
	ports := map[string]int32{}
	for _, p := range c.Ports {
		ports[p.Name] = p.ContainerPort
	}
	if diff := cmp.Diff(map[string]int32{"api": 10250, "agents": 8082, "metrics": 8081}, ports); diff != "" {
		t.Error(diff)
	}
	// A pod that stands by takes itself out of the Services, and stays its Deployment's; pods of older releases are in them.
	const part = "app.kubernetes.io/part-of"
	if _, ok := d.Spec.Selector.MatchLabels[part]; ok {
		t.Errorf("the Deployment selects its pods by %s", part)
	}
	// The Services' named ports exist in the pod, and their selectors find it.
	for _, name := range []string{"traffic-manager", "agent-injector"} {
		s := get[*corev1.Service](t, objs, "Service doppel/"+name)
		for k, v := range s.Spec.Selector {
			if d.Spec.Template.Labels[k] != v {
				t.Errorf("service %s selects %s=%s, the pod has %q", name, k, v, d.Spec.Template.Labels[k])
			}
		}
		if s.Spec.Selector[part] != "doppel" || d.Spec.Template.Labels["doppel.dev/replica"] != "true" {
			t.Errorf("service %s selects pods that stand by: %v", name, s.Spec.Selector)
		}
		for _, p := range s.Spec.Ports {
			if ports[p.TargetPort.String()] == 0 {
				t.Errorf("service %s: target port %s is not a port of the pod", name, p.TargetPort.String())
			}
		}
	}
	hooks := get[*admission.MutatingWebhookConfiguration](t, objs, "MutatingWebhookConfiguration /doppel-agent-injector-doppel").Webhooks
	if len(hooks) != 2 {
		t.Fatalf("%d webhooks", len(hooks))
	}
	for _, w := range hooks {
		if *w.FailurePolicy != admission.Ignore || *w.TimeoutSeconds != 2 || w.ClientConfig.CABundle != nil {
			t.Errorf("webhook: policy %s, timeout %d, caBundle %q", *w.FailurePolicy, *w.TimeoutSeconds, w.ClientConfig.CABundle)
		}
	}
	if diff := cmp.Diff(hooks[0].ClientConfig, hooks[1].ClientConfig); diff != "" {
		t.Errorf("the question goes another way than pods:\n%s", diff)
	}
	for _, kind := range []string{"sessions", "intercepts"} {
		p := get[*admission.ValidatingAdmissionPolicy](t, objs, "ValidatingAdmissionPolicy /doppel-identity-"+kind)
		if *p.Spec.FailurePolicy != admission.Fail {
			t.Errorf("%s: failure policy %s", p.Name, *p.Spec.FailurePolicy)
		}
		ops := p.Spec.MatchConstraints.ResourceRules[0].Operations
		if diff := cmp.Diff([]admission.OperationType{admission.Create, admission.Update, admission.Delete}, ops); diff != "" {
			t.Errorf("%s: operations %s", p.Name, diff)
		}
		for _, v := range p.Spec.Validations {
			if v.Message == "" || *v.Reason != "Forbidden" {
				t.Errorf("%s: a rule without a message or with another reason than Forbidden: %s", p.Name, v.Expression)
			}
		}
		b := get[*admission.ValidatingAdmissionPolicyBinding](t, objs, "ValidatingAdmissionPolicyBinding /doppel-identity-"+kind)
		if b.Spec.PolicyName != p.Name || !slices.Equal(b.Spec.ValidationActions, []admission.ValidationAction{admission.Deny}) {
			t.Errorf("binding %+v", b.Spec)
		}
	}
	checks := 0
	for part := range 8 {
		p := get[*admission.ValidatingAdmissionPolicy](t, objs, fmt.Sprintf("ValidatingAdmissionPolicy /doppel-reach-%d", part))
		if *p.Spec.FailurePolicy != admission.Fail {
			t.Errorf("%s: failure policy %s", p.Name, *p.Spec.FailurePolicy)
		}
		for i := range v1alpha1.MaxReach {
			for _, v := range p.Spec.Validations {
				checks += strings.Count(v.Expression, fmt.Sprintf("namespace(variables.ns[%d])", i))
			}
		}
		get[*admission.ValidatingAdmissionPolicyBinding](t, objs, "ValidatingAdmissionPolicyBinding /"+p.Name)
	}
	if checks != v1alpha1.MaxReach {
		t.Errorf("%d namespaces of a session's reach are checked, %d may be named", checks, v1alpha1.MaxReach)
	}
	for key := range objects(t, Options{Set: []string{"reach.check=false"}}) {
		if strings.Contains(key, "doppel-reach-") {
			t.Errorf("%s although reach is not checked", key)
		}
	}
	if _, ok := objs["PodDisruptionBudget doppel/traffic-manager"]; ok {
		t.Error("a disruption budget for a single replica would block every node's drain")
	}
}

// TestRights holds the roles to what was agreed: no wildcards, no secrets but its own, nothing of users that lists sessions.
func TestRights(t *testing.T) {
	objs := objects(t, Options{})
	rules := map[string][]rbacv1.PolicyRule{}
	for key, o := range objs {
		switch r := o.(type) {
		case *rbacv1.ClusterRole:
			rules[key] = r.Rules
		case *rbacv1.Role:
			rules[key] = r.Rules
		}
	}
	for key, rr := range rules {
		for _, r := range rr {
			for _, list := range [][]string{r.APIGroups, r.Resources, r.Verbs} {
				if slices.Contains(list, "*") {
					t.Errorf("%s: wildcard in %+v", key, r)
				}
			}
			if slices.Contains(r.Resources, "secrets") && !slices.Equal(r.Verbs, []string{"create"}) && len(r.ResourceNames) == 0 {
				t.Errorf("%s: secrets without a name: %+v", key, r)
			}
			if key == "Role doppel/doppel-connect" && slices.Contains(r.Resources, "sessions") && (slices.Contains(r.Verbs, "list") || slices.Contains(r.Verbs, "watch")) {
				t.Errorf("users may list sessions: %+v", r)
			}
			if slices.Contains(r.Verbs, "revoke") && key != "ClusterRole /doppel-admin" {
				t.Errorf("%s may revoke", key)
			}
		}
	}
}

// Forwarding ports is a right that reaches further than the manager: nobody has it unless it is asked for.
func TestPortForward(t *testing.T) {
	has := func(o Options) (out []string) {
		for key, o := range objects(t, o) {
			r, ok := o.(*rbacv1.Role)
			if ok && slices.ContainsFunc(r.Rules, func(r rbacv1.PolicyRule) bool { return slices.Contains(r.Resources, "pods/portforward") }) {
				out = append(out, key)
			}
		}
		return out
	}
	if got := has(Options{}); got != nil {
		t.Errorf("by default: %v", got)
	}
	if got := has(Options{Set: []string{"clientRbac.portForward=true"}}); !slices.Equal(got, []string{"Role doppel/doppel-connect"}) {
		t.Errorf("asked for: %v", got)
	}
}

func TestReplicas(t *testing.T) {
	objs := objects(t, Options{Set: []string{"manager.replicas=3"}})
	b := get[*policyv1.PodDisruptionBudget](t, objs, "PodDisruptionBudget doppel/traffic-manager")
	if p := b.Spec.UnhealthyPodEvictionPolicy; p == nil || *p != policyv1.AlwaysAllow {
		t.Error("replicas that are not well keep their nodes from being drained")
	}
}

// A namespace may have a name that YAML takes for something else.
func TestOddNamespaces(t *testing.T) {
	objs := objects(t, Options{Namespace: "1234", SetString: []string{"namespaces={5678,true}", "manager.priorityClassName=1e3"}, Set: []string{"manager.replicas=2", "networkPolicy.enabled=true", "clientRbac.create=true,clientRbac.subjects[0].kind=User,clientRbac.subjects[0].name=ada"}})
	get[*appsv1.Deployment](t, objs, "Deployment 1234/traffic-manager")
	get[*rbacv1.Role](t, objs, "Role true/doppel-traffic-manager")
}

// TestDirectService: a kept nodePort is no more, where the type has none.
func TestDirectService(t *testing.T) {
	for kind, want := range map[string]int32{"NodePort": 30443, "LoadBalancer": 30443, "ClusterIP": 0} {
		svc := get[*corev1.Service](t, objects(t, Options{Set: []string{"direct.service=" + kind, "direct.nodePort=30443", "direct.addresses={gw.example:443}"}}), "Service doppel/traffic-manager-direct")
		if got := svc.Spec.Ports[0].NodePort; got != want {
			t.Errorf("%s: nodePort %d, want %d", kind, got, want)
		}
	}
}

// TestNamespaces holds an install for some namespaces to what it may have of the cluster: by name its own webhook, and the policies.
func TestNamespaces(t *testing.T) {
	o := Options{Namespace: "tools", ValueFiles: []string{"testdata/namespaced-values.yaml"}}
	objs := objects(t, o)
	for key, obj := range objs {
		kind, name, _ := strings.Cut(key, " ")
		if ns, _, _ := strings.Cut(name, "/"); !slices.Contains([]string{"", "tools", "dev", "staging"}, ns) {
			t.Errorf("%s is in another namespace", key)
		} else if ns == "" && !strings.HasSuffix(name, "-tools") {
			t.Errorf("%s may be another release's too", key)
		}
		if r, ok := obj.(*rbacv1.ClusterRole); ok {
			for _, rule := range r.Rules {
				if !slices.Equal(rule.ResourceNames, []string{"doppel-agent-injector-tools"}) {
					t.Errorf("%s may %+v in the whole cluster", key, rule)
				}
			}
		}
		if p, ok := obj.(*admission.ValidatingAdmissionPolicy); ok && p.Spec.MatchConstraints.NamespaceSelector == nil {
			// What is in no namespace is the webhooks: of these, what this manager does.
			if c := p.Spec.MatchConditions; len(c) != 1 || c[0].Expression != "request.userInfo.username == 'system:serviceaccount:tools:traffic-manager'" {
				t.Errorf("%s is about other managers' objects too", key)
			}
		}
		_ = kind
	}
	for _, ns := range []string{"dev", "staging"} {
		b := get[*rbacv1.RoleBinding](t, objs, "RoleBinding "+ns+"/doppel-intercept")
		if b.RoleRef.Kind != "Role" || len(b.Subjects) != 1 {
			t.Errorf("%+v", b)
		}
		get[*rbacv1.Role](t, objs, "Role "+ns+"/"+managerRole)
	}

	o.Set = []string{"admission.policy=false", "admission.webhook=false"}
	for key := range objects(t, o) {
		if strings.Contains(key, " /") {
			t.Errorf("%s although the cluster takes nothing", key)
		}
	}
}

func TestScope(t *testing.T) {
	o := Options{Namespace: "tools", Set: []string{"namespaces={dev}", "admission.policy=false", "admission.webhook=false"}}
	vals, err := o.values()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range scopeOf(vals).rights("tools") {
		if a.Namespace != "tools" && a.Namespace != "dev" {
			t.Errorf("an install that brings nothing for the cluster asks for the right to create %s", where(a))
		}
	}
	whole := map[string]bool{}
	for _, a := range scopeOf(nil).rights("tools") {
		if a.Namespace == "" {
			whole[a.Resource] = true
		}
	}
	want := map[string]bool{"clusterroles": true, "clusterrolebindings": true, "validatingadmissionpolicies": true, "mutatingwebhookconfigurations": true}
	if d := cmp.Diff(want, whole); d != "" {
		t.Error(d)
	}
}

func TestBadValues(t *testing.T) {
	for _, c := range []struct {
		set, want string
	}{
		{"image.tga=1", "tga"},
		{"manager.replicas=0", "replicas"},
		{"session.renewInterval=soon", "renewInterval"},
		{"clientRbac.create=true", "subjects"},
		{"namespaces={Dev}", "namespaces"},
		{"nonsense", "nonsense"},
		{"namespaces={doppel}", "own namespace"},
		{`manager.podLabels.app\.kubernetes\.io/part-of=us`, "says which of the traffic-manager's pods the Services lead to"},
		{"admission.policy=false", "list them in namespaces"},
		{"namespaces={dev},clientRbac.aggregate=true", "clientRbac.aggregate"},
		{"namespaces={dev},direct.service=NodePort", "may not look at nodes"},
		{"clientRbac.subjects[0].kind=ServiceAccount,clientRbac.subjects[0].name=x", "namespace"},
	} {
		_, err := Render(Options{Set: []string{c.set}})
		if err == nil || uerr.From(err).Kind != uerr.Usage || !strings.Contains(err.Error(), c.want) {
			t.Errorf("--set %s: %v, want a usage error about %s", c.set, err, c.want)
		}
	}
	if _, err := Render(Options{ValueFiles: []string{"testdata/no-such-file.yaml"}}); uerr.From(err).Kind != uerr.Usage {
		t.Errorf("a values file that does not exist: %v", err)
	}
}

// TestCRDsAreCurrent regenerates the custom resource definitions where controller-gen is at hand.
func TestCRDsAreCurrent(t *testing.T) {
	gen, err := filepath.Abs("../../bin/tools/controller-gen-v0.23.0")
	if err == nil {
		_, err = os.Stat(gen)
	}
	if err != nil {
		t.Skipf("make unit installs controller-gen: %v", err)
	}
	dir := t.TempDir()
	cmd := exec.Command(gen, "crd", "paths=./api/...", "output:crd:dir="+dir)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("controller-gen: %v\n%s", err, out)
	}
	for _, f := range []string{"doppel.dev_sessions.yaml", "doppel.dev_intercepts.yaml"} {
		want, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(chartDir, "crds", f))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Errorf("%s is not what api/ says; run: controller-gen crd paths=./api/... output:crd:dir=charts/doppel/crds\n%s", f, d)
		}
	}
}

// The policy is for whoever asks for it. It lets in to each of the pod's ports whom the port is for.
func TestNetworkPolicy(t *testing.T) {
	const key = "NetworkPolicy doppel/traffic-manager"
	if _, ok := objects(t, Options{})[key]; ok {
		t.Error("by default there is a policy")
	}
	who := func(set ...string) map[string][]networkingv1.NetworkPolicyPeer {
		objs := objects(t, Options{Set: append(set, "networkPolicy.enabled=true", "direct.service=NodePort", "direct.addresses={gw.example:443}")})
		p, d := get[*networkingv1.NetworkPolicy](t, objs, key), get[*appsv1.Deployment](t, objs, "Deployment doppel/traffic-manager")
		for k, v := range p.Spec.PodSelector.MatchLabels {
			if d.Spec.Template.Labels[k] != v {
				t.Errorf("the policy is for %s=%s, the pod has %q", k, v, d.Spec.Template.Labels[k])
			}
		}
		out := map[string][]networkingv1.NetworkPolicyPeer{}
		for _, r := range p.Spec.Ingress {
			for _, port := range r.Ports {
				if !slices.ContainsFunc(d.Spec.Template.Spec.Containers[0].Ports, func(c corev1.ContainerPort) bool { return c.Name == port.Port.String() }) {
					t.Errorf("the pod has no port %s", port.Port)
				}
				out[port.Port.String()] = r.From
			}
		}
		if p.Spec.Egress != nil || len(p.Spec.PolicyTypes) != 1 {
			t.Errorf("what it reaches is limited: %+v", p.Spec)
		}
		return out
	}
	everybody, pods := []networkingv1.NetworkPolicyPeer(nil), []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{}}}
	if d := cmp.Diff(map[string][]networkingv1.NetworkPolicyPeer{"api": everybody, "agents": pods, "direct": everybody}, who()); d != "" {
		t.Error(d)
	}
	some := []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
		{Key: "kubernetes.io/metadata.name", Operator: "In", Values: []string{"dev", "staging"}},
	}}}}
	servers := []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/28"}}}
	if d := cmp.Diff(map[string][]networkingv1.NetworkPolicyPeer{"api": servers, "agents": some, "direct": everybody},
		who("namespaces={dev,staging}", "networkPolicy.apiServers[0].ipBlock.cidr=10.0.0.0/28")); d != "" {
		t.Error(d)
	}
}

// What is looked for where a release's record is lost is all that it may have had.
func TestEverything(t *testing.T) {
	for _, namespaces := range [][]string{nil, {"dev"}} {
		all := objects(t, everything("doppel", namespaces))
		for _, set := range []string{"manager.replicas=2", "networkPolicy.enabled=true", "direct.service=NodePort", "direct.service=LoadBalancer", "clientRbac.create=true"} {
			o := Options{Set: []string{set, "direct.addresses={gw.example:443}", "clientRbac.subjects[0].kind=User", "clientRbac.subjects[0].name=x"}}
			if namespaces != nil {
				o.Set = append(o.Set, "namespaces={dev}")
			}
			for name := range objects(t, o) {
				if _, ok := all[name]; !ok {
					t.Errorf("with %s there is %s, which is not looked for", set, name)
				}
			}
		}
	}
}

// The traffic-manager has no more than a process needs, whatever is asked for.
func TestUnprivileged(t *testing.T) {
	for _, o := range []Options{{}, {ValueFiles: []string{"testdata/full-values.yaml"}}} {
		pod := get[*appsv1.Deployment](t, objects(t, o), "Deployment doppel/traffic-manager").Spec.Template.Spec
		sc := pod.SecurityContext
		if !*sc.RunAsNonRoot || *sc.RunAsUser == 0 || sc.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || pod.HostNetwork || pod.HostPID {
			t.Errorf("%+v", pod)
		}
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			if c := c.SecurityContext; !*c.ReadOnlyRootFilesystem || *c.AllowPrivilegeEscalation || !slices.Equal(c.Capabilities.Drop, []corev1.Capability{"ALL"}) || c.Capabilities.Add != nil || c.Privileged != nil {
				t.Errorf("%+v", c)
			}
		}
		for _, v := range pod.Volumes {
			if v.Secret == nil {
				t.Errorf("volume %+v", v)
			}
		}
	}
}
