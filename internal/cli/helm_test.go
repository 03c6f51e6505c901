//go:build linux

package cli

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/localapi"
)

// bench is a machine with contexts prod and lab of one API server, which answers with objects by path and else with empty lists, and a user
// daemon that is connected.
type bench struct {
	*fakeDaemon
	home, server string

	mu sync.Mutex
	// guarded by mu
	asked []string
}

// kindOf is what an API server has at the end of a path.
var kindOf = map[string]string{
	"deployments": "DeploymentList", "statefulsets": "StatefulSetList", "daemonsets": "DaemonSetList", "replicasets": "ReplicaSetList",
	"pods": "PodList", "intercepts": "InterceptList", "sessions": "SessionList", "selfsubjectreviews": "SelfSubjectReview",
}

func newBench(t *testing.T, objects map[string]any) *bench {
	t.Helper()
	b := &bench{home: atHome(t)}
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		b.asked = append(b.asked, r.Method+" "+r.URL.Path)
		b.mu.Unlock()
		parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
		kind := kindOf[parts[len(parts)-1]]
		if kind == "" {
			http.NotFound(w, r)
			return
		}
		o := map[string]any{}
		text, err := json.Marshal(objects[r.URL.Path])
		if err == nil {
			err = json.Unmarshal(text, &o)
		}
		if err != nil {
			t.Error(err)
		}
		if o == nil {
			o = map[string]any{}
		}
		o["kind"], o["apiVersion"] = kind, strings.Join(parts[1:3], "/")
		if parts[0] == "api" {
			o["apiVersion"] = "v1"
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(o)
	}))
	t.Cleanup(api.Close)
	b.server = api.URL
	b.write(t, "kubeconfig", `{apiVersion: v1, kind: Config, current-context: prod, users: [{name: ada, user: {}}], clusters: [{name: c, cluster: {server: "`+api.URL+`"}}],
contexts: [{name: prod, context: {cluster: c, user: ada}}, {name: lab, context: {cluster: c, user: ada, namespace: base}}]}`)
	t.Setenv("KUBECONFIG", filepath.Join(b.home, "kubeconfig"))
	t.Setenv("DOPPEL_ROOT_SOCKET", filepath.Join(b.home, "rootd.sock"))
	b.fakeDaemon = &fakeDaemon{answers: map[string][]answer{}}
	ln, err := localapi.Listen(filepath.Join(b.home, "doppel", "daemon.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: b.fakeDaemon}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close() })
	return b
}

func (b *bench) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(b.home, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// connected has the user daemon be connected to namespaces of contexts of the API server.
func (b *bench) connected(t *testing.T, sessions ...localapi.Session) {
	t.Helper()
	st := localapi.Status{Version: "1", Connected: len(sessions) > 0}
	for i := range sessions {
		sessions[i].Server = b.server
		if i == 0 {
			st.Session = &sessions[0]
		} else {
			st.Others = append(st.Others, sessions[i])
		}
	}
	text, err := json.Marshal(st)
	if err != nil {
		t.Fatal(err)
	}
	b.answers["status"] = []answer{{Result: text}}
}

// The agent of a workload is looked for where this machine is connected to, whatever the configuration says, and else where that says.
func TestUninstallAgentWhere(t *testing.T) {
	prod, lab := localapi.Session{Context: "prod", Namespace: "shop"}, localapi.Session{Context: "lab", Namespace: "dev"}
	for name, tt := range map[string]struct {
		sessions []localapi.Session
		args     []string
		want     string
	}{
		"connected":             {[]localapi.Session{prod}, nil, "shop"},
		"typed":                 {[]localapi.Session{prod}, []string{"-n", "other"}, "other"},
		"the second connection": {[]localapi.Session{lab, prod}, nil, "shop"},
		"to another":            {[]localapi.Session{lab}, nil, "configured"},
		"not connected":         {nil, nil, "configured"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			b.connected(t, tt.sessions...)
			b.write(t, "doppel/config.yaml", "connect: {namespace: configured}\n")
			code, _, said := doppel(t, append([]string{"uninstall", "--agent", "web"}, tt.args...)...)
			if code != 1 || !strings.Contains(said, `no workload "web" in namespace `+tt.want+"\n") {
				t.Errorf("%d %s", code, said)
			}
		})
	}
	b := newBench(t, nil)
	b.connected(t, prod, localapi.Session{Context: "prod", Namespace: "stage"})
	if code, _, said := doppel(t, "uninstall", "--agent", "web"); code != 2 || !strings.Contains(said, "namespaces shop and stage") {
		t.Errorf("%d %s", code, said)
	}
}

// What is gathered of the cluster is that of the connection, unless flags say otherwise.
func TestGatherLogsWhere(t *testing.T) {
	lab, prod := localapi.Session{Context: "lab", Namespace: "dev", ManagerNamespace: "tools"}, localapi.Session{Context: "prod", Namespace: "shop", ManagerNamespace: "doppel"}
	for name, tt := range map[string]struct {
		sessions       []localapi.Session
		args           []string
		agents, manage string
	}{
		"connected":       {[]localapi.Session{lab, prod}, nil, "dev", "tools"},
		"another context": {[]localapi.Session{lab, prod}, []string{"--context", "prod"}, "shop", "doppel"},
		"typed":           {[]localapi.Session{lab}, []string{"-n", "other", "--manager-namespace", "own"}, "other", "own"},
		"to neither":      {[]localapi.Session{prod}, []string{"--context", "lab"}, "configured", "doppel"},
		"not connected":   {nil, nil, "configured", "doppel"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			b.connected(t, tt.sessions...)
			b.write(t, "doppel/config.yaml", "connect: {namespace: configured}\n")
			code, _, said := doppel(t, append([]string{"gather-logs", "-f", filepath.Join(b.home, "logs.zip")}, tt.args...)...)
			if code != 0 {
				t.Fatalf("%d %s", code, said)
			}
			for _, want := range []string{"/namespaces/" + tt.agents + "/intercepts", "/namespaces/" + tt.manage + "/sessions"} {
				if got := "GET /apis/doppel.dev/v1alpha1" + want; !slices.Contains(b.asked, got) {
					t.Errorf("not %s: %q", got, b.asked)
				}
			}
		})
	}
}

// KIND/NAME names one workload, also where something is in the way of taking its agent out.
func TestUninstallAgentOfAKind(t *testing.T) {
	deployment := appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", UID: "u"}}
	deployment.Spec.Template = corev1.PodTemplateSpec{}
	kept := *deployment.DeepCopy()
	kept.Spec.Template.Annotations = map[string]string{"doppel.dev/inject": "enabled"}
	taken := v1alpha1.Intercept{ObjectMeta: metav1.ObjectMeta{Name: "web-x", Namespace: "shop"}, Spec: v1alpha1.InterceptSpec{Name: "web", User: "eve", Workload: v1alpha1.WorkloadRef{Kind: "Deployment", Name: "web"}}}
	for name, tt := range map[string]struct {
		deployment appsv1.Deployment
		intercepts []v1alpha1.Intercept
		typed      string
		code       int
		want       string
	}{
		"there":       {deployment, nil, "deployment/web", 0, ""},
		"by name":     {deployment, nil, "web", 0, ""},
		"not a kind":  {deployment, nil, "statefulset/web", 1, `no workload "statefulset/web"`},
		"kept":        {kept, nil, "deployment/web", 1, "keeps its traffic-agent"},
		"intercepted": {deployment, []v1alpha1.Intercept{taken}, "Deployment/web", 1, "intercepted by eve"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, map[string]any{
				"/apis/apps/v1/namespaces/shop/deployments":            appsv1.DeploymentList{Items: []appsv1.Deployment{tt.deployment}},
				"/apis/doppel.dev/v1alpha1/namespaces/shop/intercepts": v1alpha1.InterceptList{Items: tt.intercepts},
			})
			b.connected(t)
			code, out, said := doppel(t, "uninstall", "--agent", tt.typed, "-n", "shop")
			if code != tt.code || !strings.Contains(said, tt.want) || code == 0 && out != "Uninstalled\n" {
				t.Errorf("%d %s%s", code, out, said)
			}
		})
	}
}
