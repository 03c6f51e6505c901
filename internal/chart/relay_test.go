package chart

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/doppel-dev/doppel/internal/buildinfo"
)

// relayChart is the chart of the relay, which no program embeds.
func relayChart(t *testing.T, o Options) (map[string]string, error) {
	t.Helper()
	ch, err := loader.Load("../../charts/doppel-relay")
	if err != nil {
		t.Fatal(err)
	}
	if ch.Metadata.Version != buildinfo.Version || ch.Metadata.AppVersion != buildinfo.Version {
		t.Errorf("the chart is %s of %s, the programs %s", ch.Metadata.Version, ch.Metadata.AppVersion, buildinfo.Version)
	}
	vals, err := o.values()
	if err != nil {
		t.Fatal(err)
	}
	return render(ch, vals, "relay")
}

var relayURL = []string{"url=https://preview.example.com"}

func TestRelayGolden(t *testing.T) {
	for name, o := range map[string]Options{
		"relay-defaults": {Set: relayURL},
		"relay-full":     {ValueFiles: []string{"testdata/relay-values.yaml"}},
		"relay-several":  {Set: append(slices.Clone(relayURL), "replicas=2", "database.secretName=relay-db", "tls.secretName=preview-cert")},
		"relay-acme": {Set: append(slices.Clone(relayURL), "tls.acme.dns=ns1.example.com:5353", "tls.acme.tsigSecretName=preview-tsig", "tls.acme.ca=https://ca.example.com:9000/acme/acme/directory",
			"tls.acme.caSecretName=ca", "tls.acme.email=admin@example.com")},
	} {
		t.Run(name, func(t *testing.T) {
			files, err := relayChart(t, o)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, files)
		})
	}
}

func TestRelayObjects(t *testing.T) {
	files, err := relayChart(t, Options{Set: relayURL})
	if err != nil {
		t.Fatal(err)
	}
	objs := decoded(t, files)
	if got := slices.Sorted(maps.Keys(objs)); !slices.Equal(got, []string{"NetworkPolicy relay/doppel-relay", "PersistentVolumeClaim relay/data-doppel-relay-0", "Service relay/doppel-relay", "StatefulSet relay/doppel-relay"}) {
		t.Errorf("%q", got)
	}
	s := get[*appsv1.StatefulSet](t, objs, "StatefulSet relay/doppel-relay")
	pod := s.Spec.Template.Spec
	c := pod.Containers[0]
	if !*pod.SecurityContext.RunAsNonRoot || *pod.AutomountServiceAccountToken || !*c.SecurityContext.ReadOnlyRootFilesystem || *c.SecurityContext.AllowPrivilegeEscalation ||
		!slices.Equal(c.SecurityContext.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("%+v %+v", pod.SecurityContext, c.SecurityContext)
	}
	ports := map[string]int32{}
	for _, p := range c.Ports {
		ports[p.Name] = p.ContainerPort
	}
	if diff := cmp.Diff(map[string]int32{"https": 8443, "health": 8080}, ports); diff != "" {
		t.Error(diff)
	}
	svc := get[*corev1.Service](t, objs, "Service relay/doppel-relay")
	for k, v := range svc.Spec.Selector {
		if s.Spec.Template.Labels[k] != v {
			t.Errorf("the service selects %s=%s, the pod has %q", k, v, s.Spec.Template.Labels[k])
		}
	}
	if len(svc.Spec.Ports) != 1 || svc.Spec.Ports[0].TargetPort.String() != "https" {
		t.Errorf("more than the port with TLS is public: %+v", svc.Spec.Ports)
	}
	// The plain port is for nobody, and the relay opens no connections but to DNS.
	p := get[*networkingv1.NetworkPolicy](t, objs, "NetworkPolicy relay/doppel-relay")
	if len(p.Spec.PolicyTypes) != 2 || len(p.Spec.Ingress) != 1 || p.Spec.Ingress[0].Ports[0].Port.String() != "https" || len(p.Spec.Egress) != 1 || p.Spec.Egress[0].Ports[0].Port.IntValue() != 53 {
		t.Errorf("%+v", p.Spec)
	}
}

// TestRelayGrows: of a StatefulSet Kubernetes lets nothing but its pods and their number change, which has to be enough whatever the values become.
func TestRelayGrows(t *testing.T) {
	several := []string{"replicas=3", "database.secretName=relay-db", "tls.secretName=preview-cert"}
	var was appsv1.StatefulSetSpec
	for i, set := range [][]string{nil, several, {"storage.persistent=false"}, {"storage.existingClaim=theirs", "storage.size=2Gi"}} {
		files, err := relayChart(t, Options{Set: append(slices.Clone(relayURL), set...)})
		if err != nil {
			t.Fatal(err)
		}
		objs := decoded(t, files)
		spec := get[*appsv1.StatefulSet](t, objs, "StatefulSet relay/doppel-relay").Spec
		claim := ""
		for _, v := range spec.Template.Spec.Volumes {
			if v.PersistentVolumeClaim != nil {
				claim = v.PersistentVolumeClaim.ClaimName
			}
		}
		_, made := objs["PersistentVolumeClaim relay/data-doppel-relay-0"]
		if want := []string{"data-doppel-relay-0", "", "", "theirs"}[i]; claim != want || made != (i == 0) {
			t.Errorf("%v: claim %q, want %q; made %v", set, claim, want, made)
		}
		spec.Template, spec.Replicas = corev1.PodTemplateSpec{}, nil
		if i == 0 {
			was = spec
		} else if diff := cmp.Diff(was, spec); diff != "" {
			t.Errorf("%v: Kubernetes refuses the change: %s", set, diff)
		}
	}
}

// Values are text, whatever YAML would make of them, and ports that are not there open nothing.
func TestRelayOddValues(t *testing.T) {
	files, err := relayChart(t, Options{Set: append(slices.Clone(relayURL), "oidc.issuer=https://id.example.com", "oidc.secretName=s", "oidc.clientID=a: b", "oidc.name=Acme: SSO", "oidc.team=crew #2",
		"replicas=2", "database.secretName=relay-db", "tls.secretName=preview-cert"), Values: map[string]any{"networkPolicy": map[string]any{"databasePorts": []any{}}}})
	if err != nil {
		t.Fatal(err)
	}
	objs := decoded(t, files)
	args := get[*appsv1.StatefulSet](t, objs, "StatefulSet relay/doppel-relay").Spec.Template.Spec.Containers[0].Args
	for _, want := range []string{"-oidc-client=a: b", "-oidc-name=Acme: SSO", "-oidc-team=crew #2", "-url=https://preview.example.com"} {
		if !slices.Contains(args, want) {
			t.Errorf("no %q in %q", want, args)
		}
	}
	for _, r := range get[*networkingv1.NetworkPolicy](t, objs, "NetworkPolicy relay/doppel-relay").Spec.Egress {
		if len(r.Ports) == 0 {
			t.Errorf("a rule for all ports: %+v", r)
		}
	}
}

func TestRelayRefuses(t *testing.T) {
	for set, want := range map[string]string{
		"keepVisits=1h":              "url",
		"keepVisits=0h":              "keepVisits",
		"keepVisits=0m0.0s":          "keepVisits",
		"url=http://x.example":       "url",
		"url=https://10.0.0.1":       "url",
		"oidc.issuer=https://i.test": "issuer and clientID go together",
		"tls.acme.tsigSecretName=k":  "tls.acme.dns",
		"tls.acme.dns=ns1 x":         "acme/dns",
		"ingres.enabled=true":        "ingres",
		"replicas=2":                 "share (database.secretName)",
		"database.secretName=db":     "tls.secretName",
		"service.type=ExternalName":  "service/type",
		"tls.secretName=Not_A_Name":  "tls/secretName",
	} {
		o := Options{Set: []string{set}}
		if !strings.HasPrefix(set, "url") && set != "keepVisits=1h" {
			o.Set = append(slices.Clone(relayURL), set)
		}
		if _, err := relayChart(t, o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", set, err, want)
		}
	}
}
