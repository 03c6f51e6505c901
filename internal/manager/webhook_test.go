package manager

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/inject"
)

// A pod as the ReplicaSet controller creates it, with a field that our API types do not know.
const rawPod = `{"kind":"Pod","apiVersion":"v1","metadata":{"generateName":"web-","labels":{"app":"web"},"futureMeta":{"a":1},
	"ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"web-rs","uid":"web-rs","controller":true}]},
	"spec":{"futureSpec":["x"],"containers":[{"name":"app","image":"web:1","futureContainer":true,"ports":[{"name":"http","containerPort":8080}]}]}}`

// annotated is that pod with an annotation for its agent.
func annotated(inject string) string {
	return strings.Replace(rawPod, `"labels"`, `"annotations":{"doppel.dev/inject":"`+inject+`"},"labels"`, 1)
}

func (w *world) admit(raw string) *admissionv1.AdmissionResponse {
	w.t.Helper()
	var kind metav1.GroupVersionKind
	if err := json.Unmarshal([]byte(raw), &kind); err != nil {
		w.t.Fatal(err)
	}
	review := admissionv1.AdmissionReview{Request: &admissionv1.AdmissionRequest{UID: "r", Kind: kind, Namespace: "shop", Object: runtime.RawExtension{Raw: []byte(raw)}}}
	review.SetGroupVersionKind(schema.GroupVersionKind{Group: "admission.k8s.io", Version: "v1", Kind: "AdmissionReview"})
	body, err := json.Marshal(review)
	if err != nil {
		w.t.Fatal(err)
	}
	req := httptest.NewRequest("POST", "/inject", bytes.NewReader(body))
	req.Header.Set("Content-Type", "application/json")
	rec := httptest.NewRecorder()
	w.injectWebhook().ServeHTTP(rec, req)
	var out admissionv1.AdmissionReview
	if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil {
		w.t.Fatalf("%v: %s", err, rec.Body)
	}
	if out.Response == nil || !out.Response.Allowed {
		w.t.Fatalf("the pod was not let through: %s", rec.Body)
	}
	return out.Response
}

func webService() *corev1.Service {
	return &corev1.Service{ObjectMeta: meta("shop", "web"), Spec: corev1.ServiceSpec{
		ClusterIP: "10.96.1.1", Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromString("http")}},
	}}
}

func TestWebhook(t *testing.T) {
	rs := &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "web-rs"), "Deployment", "web")}
	engage := func(w *world) {
		w.engaged.set(engagement{UID: "in-1", Session: "s", Workload: web, Ports: tcp(8080)})
	}
	for name, tt := range map[string]struct {
		change   func(*world)
		raw      string
		injected bool
		warning  string
	}{
		"intercepted":         {change: engage, raw: rawPod, injected: true},
		"nothing intercepted": {change: func(*world) {}, raw: rawPod},
		"another workload of the namespace": {change: func(w *world) {
			w.engaged.set(engagement{UID: "in-1", Workload: workloadKey{"shop", "Deployment", "db"}, Ports: tcp(8080)})
		}, raw: rawPod},
		"a port that the pod does not have": {change: func(w *world) {
			w.engaged.set(engagement{UID: "in-1", Workload: web, Ports: tcp(9999)})
		}, raw: rawPod, warning: "no ports to take"},
		"forbidden":            {change: engage, raw: annotated("false"), warning: "forbids it"},
		"always":               {change: func(*world) {}, raw: annotated("enabled"), injected: true},
		"made again by doppel": {change: func(*world) {}, raw: strings.Replace(annotated("enabled"), `{"doppel`, `{"doppel.dev/original":"{}","doppel`, 1)},
		"always, without a port that its namespace lets it take": {change: func(w *world) {
			s := webService()
			s.Spec.Ports[0].TargetPort = intstr.FromInt32(8080) // has to be redirected
			w.delete(webService())
			w.create(s)
			w.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}}})
		}, raw: annotated("enabled"), warning: "no ports to take"},
		"always, without a port that an agent may take": {change: func(w *world) {
			s := webService()
			s.Spec.Ports[0].TargetPort = intstr.FromInt32(8080) // has to be redirected
			w.delete(webService())
			w.create(s)
			w.cfg.NoRedirect = true
		}, raw: annotated("enabled"), warning: "no ports to take"},
		"forbidden by the other word": {change: engage, raw: annotated("disabled"), warning: "forbids it"},
		"not a pod":                   {change: engage, raw: `{"spec":"x"}`},
		"its ReplicaSet is gone":      {change: engage, raw: strings.ReplaceAll(rawPod, "web-rs", "gone"), warning: "owner of pod"},
		"the API server is away": {change: func(w *world) {
			engage(w)
			w.fail = func(string, runtime.Object) error { return errors.New("etcd is away") }
		}, raw: rawPod, warning: "etcd is away"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, rs.DeepCopy(), webService())
			tt.change(w)
			r := w.admit(tt.raw)
			if (len(r.Patch) > 0) != tt.injected {
				t.Errorf("patch %s", r.Patch)
			}
			if got := strings.Join(r.Warnings, ""); (got == "") != (tt.warning == "") || !strings.Contains(got, tt.warning) {
				t.Errorf("warning %q, want %q", got, tt.warning)
			}
		})
	}
}

// The patch adds the agent and leaves everything else as it came, also what we do not know. Called again it is empty.
func TestWebhookPatch(t *testing.T) {
	w := newWorld(t, &appsv1.ReplicaSet{ObjectMeta: owned(meta("shop", "web-rs"), "Deployment", "web")}, webService())
	w.engaged.set(engagement{UID: "in-1", Session: "s", Workload: web, Ports: tcp(8080)})
	patch, err := jsonpatch.DecodePatch(w.admit(rawPod).Patch)
	if err != nil {
		t.Fatal(err)
	}
	out, err := patch.Apply([]byte(rawPod))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"futureMeta":{"a":1}`, `"futureSpec":["x"]`, `"futureContainer":true`} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%s was lost: %s", want, out)
		}
	}
	if bytes.Contains(out, []byte(`"namespace":"shop"`)) {
		t.Error("the patch writes the namespace")
	}
	var pod corev1.Pod
	if err := json.Unmarshal(out, &pod); err != nil {
		t.Fatal(err)
	}
	cfg, err := agentcfg.Parse(pod.Annotations[agentcfg.Annotation])
	if err != nil || !inject.Injected(&pod) || !cfg.Covers("TCP", 8080) || cfg.ManagerKey != w.identity.Fingerprint() || len(cfg.Managers) != 2 {
		t.Errorf("%v, %+v", err, cfg)
	}
	if r := w.admit(string(out)); len(r.Patch) > 2 { // "[]"
		t.Errorf("a second call patches %s", r.Patch)
	}
}

// A question reaches us by the webhook, and only one that was asked counts.
func TestQuestions(t *testing.T) {
	w := newWorld(t)
	w.questions.open.Store("is anybody there", false)
	for _, text := range []string{"something else", "", "is anybody there"} {
		if r := w.admit(`{"kind":"Session","metadata":{"annotations":{"doppel.dev/probe":"` + text + `"}}}`); r.Patch != nil {
			t.Errorf("patch %s", r.Patch)
		}
		if asked, _ := w.questions.open.Load("is anybody there"); asked != (text == "is anybody there") {
			t.Errorf("after %q: %v", text, asked)
		}
	}
	w.questions.open.Range(func(k, _ any) bool {
		if k != "is anybody there" {
			t.Errorf("a stranger's question %v is remembered", k)
		}
		return true
	})
	w.admit(`{"kind":"Session","metadata":[]}`)
}
