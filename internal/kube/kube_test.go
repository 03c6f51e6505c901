package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"),
		goleak.IgnoreTopFunction("internal/poll.runtime_pollWait"), // client-go's cached transports keep idle connections
		goleak.IgnoreTopFunction("net/http.(*persistConn).writeLoop"))
}

// wantError checks a user's error: kind, words, and the words of the hint ("" is no hint).
func wantError(t *testing.T, err error, kind uerr.Kind, msg, hint string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s %q", kind, msg)
	}
	e := uerr.From(err)
	if e.Kind != kind || !strings.Contains(e.Msg, msg) || !strings.Contains(e.Hint, hint) || (e.Hint == "") != (hint == "") {
		t.Errorf("got %s %q, hint %q\nwant %s %q, hint %q", e.Kind, e.Msg, e.Hint, kind, msg, hint)
	}
}

const twoContexts = `apiVersion: v1
kind: Config
current-context: %s
clusters: [{name: c, cluster: {server: %q}}]
users: [{name: u, user: {token: secret}}]
contexts: [{name: prod, context: {cluster: c, user: u, namespace: shop}}, {name: dev, context: {cluster: c, user: u}}]
`

func kubeconfig(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestLoad(t *testing.T) {
	file := kubeconfig(t, fmt.Sprintf(twoContexts, "prod", "https://k8s.example:6443"))
	t.Setenv("KUBECONFIG", file)
	for name, tt := range map[string]struct {
		o                  Options
		context, namespace string
	}{
		"as kubectl would":      {Options{}, "prod", "shop"},
		"another context":       {Options{Context: "dev"}, "dev", "default"},
		"another namespace":     {Options{Namespace: "data"}, "prod", "data"},
		"a file":                {Options{Kubeconfig: file}, "prod", "shop"},
		"a list of files":       {Options{Kubeconfig: "/nonexistent" + string(os.PathListSeparator) + file, Context: "dev", Namespace: "x"}, "dev", "x"},
		"a file beats the rest": {Options{Kubeconfig: file, Context: "prod"}, "prod", "shop"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Load(tt.o)
			if err != nil {
				t.Fatal(err)
			}
			if c.Context != tt.context || c.Namespace != tt.namespace || c.Server != "https://k8s.example:6443" {
				t.Errorf("%s, %s, %s", c.Context, c.Namespace, c.Server)
			}
			if cfg := c.RESTConfig(); cfg.BearerToken != "secret" || !strings.HasPrefix(cfg.UserAgent, "doppel/") || c.ClientConfig() == nil {
				t.Errorf("%+v", cfg)
			}
		})
	}
}

func TestLoadErrors(t *testing.T) {
	valid := fmt.Sprintf(twoContexts, "prod", "https://k8s.example")
	for name, tt := range map[string]struct {
		text      string // of the kubeconfig; "" is no file
		o         Options
		msg, hint string
	}{
		"no file":            {"", Options{}, "no kubeconfig: none of ", "set KUBECONFIG"},
		"empty file":         {"{}", Options{}, "has a context", "set KUBECONFIG"},
		"not YAML":           {"a: [", Options{}, "cannot read the kubeconfig", "check the file"},
		"no current context": {fmt.Sprintf(twoContexts, `""`, "x"), Options{}, "the kubeconfig has no current context", "choose one with --context"},
		"unknown context":    {valid, Options{Context: "stage"}, `no context "stage" in the kubeconfig`, "it has: dev, prod"},
		"stale current":      {fmt.Sprintf(twoContexts, "old", "x"), Options{}, `no context "old" in the kubeconfig`, "it has: dev, prod"},
		"no such cluster":    {strings.Replace(valid, "cluster: c,", "cluster: other,", 1), Options{}, `context "prod" cannot be used`, "kubectl config view"},
		"bad server":         {fmt.Sprintf(twoContexts, "prod", "https://[::1"), Options{}, `context "prod" cannot be used`, "kubectl config view"},
		"missing CA file":    {strings.Replace(valid, "server:", "certificate-authority: /nonexistent/ca.crt, server:", 1), Options{}, "/nonexistent/ca.crt", "kubectl config view"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("KUBECONFIG", "/nonexistent/config")
			t.Setenv("KUBERNETES_SERVICE_HOST", "")
			if tt.text != "" {
				t.Setenv("KUBECONFIG", kubeconfig(t, tt.text))
			}
			_, err := Load(tt.o)
			wantError(t, err, uerr.Usage, tt.msg, tt.hint)
		})
	}
}

// apiServer answers what a test says, and keeps the requests.
type apiServer struct {
	*httptest.Server
	c *Cluster

	mu sync.Mutex
	// guarded by mu
	requests []string // METHOD PATH BODY
}

// newAPIServer answers "METHOD PATH" with objects or errors; what is not named is a 404.
func newAPIServer(t *testing.T, answers map[string]any) *apiServer {
	t.Helper()
	s := &apiServer{}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		s.mu.Lock()
		s.requests = append(s.requests, fmt.Sprintf("%s %s %s", r.Method, r.URL.Path, body))
		s.mu.Unlock()
		answer, ok := answers[r.Method+" "+r.URL.Path]
		if !ok {
			answer = apierrors.NewNotFound(schema.GroupResource{Resource: "things"}, r.URL.Path)
		}
		if fn, ok := answer.(func() any); ok {
			answer = fn()
		}
		if h, ok := answer.(http.HandlerFunc); ok {
			h(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if e, ok := answer.(*apierrors.StatusError); ok {
			w.WriteHeader(int(e.ErrStatus.Code))
			st := e.ErrStatus
			st.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
			answer = st
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	s.c = load(t, s.URL)
	return s
}

func load(t *testing.T, url string) *Cluster {
	t.Helper()
	c, err := Load(Options{Kubeconfig: kubeconfig(t, fmt.Sprintf(twoContexts, "prod", url))})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// saw returns the bodies of the requests to "METHOD PATH".
func (s *apiServer) saw(what string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, r := range s.requests {
		if rest, ok := strings.CutPrefix(r, what+" "); ok {
			out = append(out, rest)
		}
	}
	return out
}

const (
	whoPath        = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
	configMapPath  = "/api/v1/namespaces/doppel/configmaps/traffic-manager"
	attachPath     = "/api/v1/namespaces/doppel/services/http:traffic-manager:api/proxy/attach"
	sessionsPath   = "/apis/doppel.dev/v1alpha1/namespaces/doppel/sessions"
	interceptsPath = "/apis/doppel.dev/v1alpha1/namespaces/shop/intercepts"
)

func forbidden() *apierrors.StatusError {
	return apierrors.NewForbidden(schema.GroupResource{Resource: "things"}, "x", errors.New("RBAC says no"))
}

func unauthorized() *apierrors.StatusError { return apierrors.NewUnauthorized("token expired") }

func TestWhoAmI(t *testing.T) {
	s := newAPIServer(t, map[string]any{"POST " + whoPath: map[string]any{"kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1", "status": map[string]any{"userInfo": map[string]any{"username": "ada"}}}})
	if who, err := s.c.WhoAmI(t.Context()); err != nil || who != "ada" {
		t.Errorf("%s, %v", who, err)
	}
}

// The first request is where an API server that cannot be used shows.
func TestUnusableAPIServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := "http://" + l.Addr().String()
	_ = l.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts (the kernel does) and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	strange := httptest.NewUnstartedServer(http.NotFoundHandler())
	strange.Config.ErrorLog = log.New(io.Discard, "", 0)
	strange.StartTLS()
	defer strange.Close()
	answer := func(a any) string { return newAPIServer(t, map[string]any{"POST " + whoPath: a}).URL }
	plugin := strings.Replace(twoContexts, "token: secret", "exec: {apiVersion: client.authentication.k8s.io/v1, command: /nonexistent/aws, interactiveMode: Never}", 1)

	for name, tt := range map[string]struct {
		config    string
		url       string
		kind      uerr.Kind
		msg, hint string
	}{
		"refused":           {twoContexts, closed, uerr.Cluster, "ask who you are: the API server at " + closed + " cannot be reached", "is a VPN needed? Try: kubectl --context prod version"},
		"unknown host":      {twoContexts, "http://k8s.invalid", uerr.Cluster, "cannot be reached", "is a VPN needed"},
		"silent":            {twoContexts, "http://" + silent.Addr().String(), uerr.Cluster, "does not answer", "is a VPN needed"},
		"unknown authority": {twoContexts, strange.URL, uerr.Cluster, "certificate", "is a VPN needed"},
		"401":               {twoContexts, answer(unauthorized()), uerr.Denied, "does not accept your credentials", "log in to the cluster again"},
		"403":               {twoContexts, answer(forbidden()), uerr.Denied, "RBAC says no", "ask an administrator"},
		"500":               {twoContexts, answer(apierrors.NewInternalError(errors.New("etcd"))), uerr.Cluster, "etcd", ""},
		"not an API server": {twoContexts, answer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>It works!") })), uerr.Cluster, "ask who you are", ""},
		"credential plugin": {plugin, strings.Replace(closed, "http:", "https:", 1), uerr.Denied, "the kubeconfig's credential plugin failed", "log in to the cluster again"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Load(Options{Kubeconfig: kubeconfig(t, fmt.Sprintf(tt.config, "prod", tt.url))})
			if err != nil {
				t.Fatal(err)
			}
			ctx := t.Context()
			if name == "silent" { // instead of requestTimeout
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 200*time.Millisecond)
				defer cancel()
			}
			_, err = c.WhoAmI(ctx)
			wantError(t, err, tt.kind, tt.msg, tt.hint)
		})
	}
}

func TestManager(t *testing.T) {
	cm := func(data map[string]string) any { return &corev1.ConfigMap{Data: data} }
	for name, tt := range map[string]struct {
		answer    any
		kind      uerr.Kind // "" is no error
		msg, hint string
	}{
		"there":       {cm(map[string]string{"key": "sha256:k", "version": "1.0", "protocol": "1", "pod": "traffic-manager-7"}), "", "", ""},
		"none":        {nil, uerr.NoManager, "no traffic-manager in namespace doppel", "doppel helm install"},
		"not started": {cm(nil), uerr.Cluster, "has not started yet", "kubectl -n doppel get pods"},
		"of old":      {cm(map[string]string{"key": "sha256:k"}), uerr.Cluster, "ConfigMap doppel/traffic-manager", "doppel helm upgrade"},
		"forbidden":   {forbidden(), uerr.Denied, "you may not use doppel in namespace doppel", "an administrator"},
		"500":         {apierrors.NewInternalError(errors.New("etcd")), uerr.Cluster, "look for the traffic-manager in namespace doppel", ""},
	} {
		t.Run(name, func(t *testing.T) {
			answers := map[string]any{}
			if tt.answer != nil {
				answers["GET "+configMapPath] = tt.answer
			}
			s := newAPIServer(t, answers)
			m, err := s.c.Manager(t.Context(), "doppel")
			if tt.kind != "" {
				wantError(t, err, tt.kind, tt.msg, tt.hint)
				if errors.Is(err, ErrNoManager) != (name == "none") {
					t.Errorf("ErrNoManager: %v", err)
				}
				return
			}
			if want := (ManagerInfo{Key: "sha256:k", Version: "1.0", Protocol: 1, Pod: "traffic-manager-7"}); err != nil || !reflect.DeepEqual(m, want) {
				t.Errorf("%+v, %v", m, err)
			}
		})
	}
}

// A hint's command is for the manager that was asked for.
func TestManagerFlag(t *testing.T) {
	gone := http.HandlerFunc(http.NotFound)
	s := newAPIServer(t, map[string]any{
		"GET /api/v1/namespaces/tools/services/http:traffic-manager:api/proxy/attach": gone,
		"GET /api/v1/namespaces/old/configmaps/traffic-manager":                       &corev1.ConfigMap{Data: map[string]string{"key": "sha256:k"}},
	})
	_, err := s.c.Manager(t.Context(), "tools")
	wantError(t, err, uerr.NoManager, "namespace tools", "doppel helm install --manager-namespace tools")
	_, err = s.c.Manager(t.Context(), "old")
	wantError(t, err, uerr.Cluster, "ConfigMap old/traffic-manager", "doppel helm upgrade --manager-namespace old")
	_, err = s.c.Attach(t.Context(), "tools", ServiceProxy)
	wantError(t, err, uerr.Cluster, "namespace tools", "doppel helm install --manager-namespace tools")
	_, err = s.c.CreateSession(t.Context(), "tools", v1alpha1.SessionSpec{})
	wantError(t, err, uerr.NoManager, "resources", "doppel helm install --manager-namespace tools")
	if _, err = s.c.Manager(t.Context(), "doppel"); strings.Contains(uerr.From(err).Hint, "--") {
		t.Errorf("of the usual one: %s", uerr.From(err).Hint)
	}
}

// The hint lets one more person in: it takes no list of subjects that would replace another. Names are put through a shell, as the administrator will.
func TestLettingIn(t *testing.T) {
	for user, name := range map[string]string{"ada": "ada", "o'hara": "o'hara", "https://issuer.example#a$b": "https:--issuer.example#a$b", "system:serviceaccount:build:ci": "system:serviceaccount:build:ci"} {
		c := &Cluster{Namespace: "shop", user: user}
		_, command, _ := strings.Cut(c.lettingIn("tools"), ": ")
		command, _, _ = strings.Cut(command, " (")
		out, err := exec.Command("sh", "-c", `kubectl() { printf '%s|' "$@"; echo; }; `+command).Output()
		if err != nil {
			t.Fatal(err)
		}
		want := "-n|tools|create|rolebinding|doppel-connect-" + name + "|--role=doppel-connect|--user=" + user + "|\n" +
			"-n|shop|create|rolebinding|doppel-intercept-" + name + "|--clusterrole=doppel-intercept|--user=" + user + "|\n"
		if string(out) != want {
			t.Errorf("%s:\n%swant\n%s", user, out, want)
		}
	}
}

// A connection is stranded when the address that it was made from is another machine's by now.
func TestStranded(t *testing.T) {
	s := newAPIServer(t, map[string]any{"GET " + attachPath: http.HandlerFunc(tunnel.UpgradeHandler(func(c net.Conn) { _ = c.Close() }).ServeHTTP)})
	if s.c.Stranded() {
		t.Error("before there was one")
	}
	conn, err := s.c.Attach(t.Context(), "doppel", ServiceProxy)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if s.c.Stranded() || s.c.from.Load() == nil {
		t.Error("from this machine's loopback")
	}
	elsewhere := netip.MustParseAddr("192.0.2.1") // RFC 5737: nobody's
	s.c.from.Store(&elsewhere)
	if !s.c.Stranded() {
		t.Error("from an address that nobody has")
	}
}

func TestAttach(t *testing.T) {
	upgrade := tunnel.UpgradeHandler(func(c net.Conn) {
		defer c.Close()
		_, _ = io.Copy(c, c)
	})
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "words of the server", code) }
	}
	for name, tt := range map[string]struct {
		answer    http.HandlerFunc
		kind      uerr.Kind
		msg, hint string
	}{
		"101": {answer: upgrade.ServeHTTP},
		"401": {status(401), uerr.Denied, "does not let you through", "services/proxy of http:traffic-manager:api in namespace doppel"},
		"403": {status(403), uerr.Denied, "words of the server", "services/proxy"},
		"404": {status(404), uerr.Cluster, "no service traffic-manager in namespace doppel", "doppel helm install"},
		"503": {status(503), uerr.Cluster, "the traffic-manager is not running", "kubectl -n doppel get pods"},
		"502": {status(502), uerr.Cluster, "the traffic-manager is not running", "kubectl -n doppel get pods"},
		"200": {status(200), uerr.Cluster, "does not carry HTTP upgrades", "may strip the Upgrade header"},
		"426": {status(426), uerr.Cluster, "does not carry HTTP upgrades", "may strip the Upgrade header"},
		"418": {status(418), uerr.Cluster, "HTTP 418", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newAPIServer(t, map[string]any{"GET " + attachPath: tt.answer})
			conn, err := s.c.Attach(t.Context(), "doppel", ServiceProxy)
			if tt.kind != "" {
				wantError(t, err, tt.kind, tt.msg, tt.hint)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, "ping"); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 4)
			if _, err := io.ReadFull(conn, b); err != nil || string(b) != "ping" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
	silent := newAPIServer(t, map[string]any{"GET " + attachPath: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond) // instead of attachTimeout
	defer cancel()
	_, err := silent.c.Attach(ctx, "doppel", ServiceProxy)
	wantError(t, err, uerr.Cluster, "the API server does not get through to the traffic-manager", "port 10250 of the pods in namespace doppel")
	if !Obstructed(err) {
		t.Error("another transport is not tried")
	}
	c := load(t, "http://127.0.0.1:1")
	_, err = c.Attach(t.Context(), "doppel", ServiceProxy)
	wantError(t, err, uerr.Cluster, "reach the traffic-manager: the API server at http://127.0.0.1:1 cannot be reached", "is a VPN needed")
}

func TestSessions(t *testing.T) {
	created := &v1alpha1.Session{ObjectMeta: metav1.ObjectMeta{Name: "session-x", Namespace: "doppel", UID: "uid-1"}}
	s := newAPIServer(t, map[string]any{
		"POST " + sessionsPath: created, "PATCH " + sessionsPath + "/session-x": created, "DELETE " + sessionsPath + "/session-x": &metav1.Status{Status: "Success"},
	})
	got, err := s.c.CreateSession(t.Context(), "doppel", v1alpha1.SessionSpec{User: "ada", Key: "sha256:k"})
	if err != nil || got.UID != "uid-1" || got.Namespace != "doppel" {
		t.Fatalf("%+v, %v", got, err)
	}
	if sent := s.saw("POST " + sessionsPath); len(sent) != 1 || !strings.Contains(sent[0], `"generateName":"session-"`) || !strings.Contains(sent[0], `"user":"ada"`) {
		t.Errorf("sent %q", sent)
	}
	if err := s.c.RenewSession(t.Context(), got); err != nil {
		t.Fatal(err)
	}
	var patch v1alpha1.Session
	if sent := s.saw("PATCH " + sessionsPath + "/session-x"); len(sent) != 1 || json.Unmarshal([]byte(sent[0]), &patch) != nil || patch.UID != "uid-1" || time.Since(patch.Spec.RenewTime.Time).Abs() > time.Minute {
		t.Errorf("sent %q", sent)
	}
	if err := s.c.DeleteSession(t.Context(), got); err != nil {
		t.Fatal(err)
	}
	if sent := s.saw("DELETE " + sessionsPath + "/session-x"); len(sent) != 1 || !strings.Contains(sent[0], `"uid":"uid-1"`) {
		t.Errorf("sent %q: the name may be another's by now", sent)
	}

	none := newAPIServer(t, nil)
	_, err = none.c.CreateSession(t.Context(), "doppel", v1alpha1.SessionSpec{})
	wantError(t, err, uerr.NoManager, "the cluster does not know doppel's resources", "doppel helm install")
	if err := none.c.DeleteSession(t.Context(), got); err != nil {
		t.Errorf("a session that is gone: %v", err)
	}
	denied := newAPIServer(t, map[string]any{"POST " + sessionsPath: forbidden(), "PATCH " + sessionsPath + "/session-x": unauthorized(), "DELETE " + sessionsPath + "/session-x": apierrors.NewConflict(schema.GroupResource{}, "x", errors.New("uid"))})
	_, err = denied.c.CreateSession(t.Context(), "doppel", v1alpha1.SessionSpec{})
	wantError(t, err, uerr.Denied, "create a session", "administrator")
	wantError(t, denied.c.RenewSession(t.Context(), got), uerr.Denied, "renew the session", "log in")
	if err := denied.c.DeleteSession(t.Context(), got); err != nil {
		t.Errorf("a name that is another's by now: %v", err)
	}
}

func TestIntercepts(t *testing.T) {
	in := v1alpha1.Intercept{ObjectMeta: metav1.ObjectMeta{Name: "web-x", Namespace: "shop", UID: "uid-2"}, Spec: v1alpha1.InterceptSpec{User: "eve", Name: "web", Workload: v1alpha1.WorkloadRef{Kind: "Deployment", Name: "web"}}}
	s := newAPIServer(t, map[string]any{
		"POST " + interceptsPath: &in, "GET " + interceptsPath: &v1alpha1.InterceptList{Items: []v1alpha1.Intercept{in}},
		"GET /apis/doppel.dev/v1alpha1/intercepts": &v1alpha1.InterceptList{Items: []v1alpha1.Intercept{in, in}},
	})
	got, err := s.c.CreateIntercept(t.Context(), "shop", v1alpha1.InterceptSpec{Workload: v1alpha1.WorkloadRef{Name: "web"}})
	if err != nil || got.UID != "uid-2" {
		t.Errorf("%+v, %v", got, err)
	}
	if sent := s.saw("POST " + interceptsPath); !strings.Contains(sent[0], `"generateName":"web-"`) {
		t.Errorf("sent %q", sent)
	}
	for ns, want := range map[string]int{"shop": 1, "": 2} {
		if list, err := s.c.Intercepts(t.Context(), ns); err != nil || len(list) != want {
			t.Errorf("namespace %q: %d, %v", ns, len(list), err)
		}
	}
	wantError(t, s.c.RefuseIntercepted(t.Context(), "shop", "web"), uerr.Conflict, "web in namespace shop is intercepted by eve", "doppel leave web")
	wantError(t, s.c.RefuseIntercepted(t.Context(), "", ""), uerr.Conflict, "intercepted by eve", "doppel leave web")
	if err := s.c.RefuseIntercepted(t.Context(), "shop", "db"); err != nil {
		t.Error(err)
	}
	if err := s.c.DeleteIntercept(t.Context(), &in); err != nil {
		t.Errorf("an intercept that is gone: %v", err)
	}
	older := newAPIServer(t, map[string]any{"POST " + interceptsPath: apierrors.NewBadRequest(`strict decoding error: unknown field "spec.http.cookies"`)})
	_, err = older.c.CreateIntercept(t.Context(), "shop", v1alpha1.InterceptSpec{})
	wantError(t, err, uerr.Conflict, "older than this one", "doppel helm upgrade")
	_, err = s.c.CreateIntercept(t.Context(), "nowhere", v1alpha1.InterceptSpec{})
	wantError(t, err, uerr.NotFound, "no namespace nowhere", "kubectl get ns")
}

func deployment(name string) appsv1.Deployment {
	d := appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", UID: types.UID(name)}}
	d.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}
	return d
}

// replicaSet is the one of a Deployment.
func replicaSet(app string) appsv1.ReplicaSet {
	return *controlled(&appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Name: app + "-rs", Namespace: "shop", UID: types.UID(app + "-rs")}}, "Deployment", app, types.UID(app))
}

func agentPod(app string) corev1.Pod {
	return *controlled(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: app + "-1", Namespace: "shop", Annotations: map[string]string{agentcfg.Annotation: "{}"}}}, "ReplicaSet", app+"-rs", types.UID(app+"-rs"))
}

const (
	deploymentsPath  = "/apis/apps/v1/namespaces/shop/deployments"
	statefulSetsPath = "/apis/apps/v1/namespaces/shop/statefulsets"
	daemonSetsPath   = "/apis/apps/v1/namespaces/shop/daemonsets"
	replicaSetsPath  = "/apis/apps/v1/namespaces/shop/replicasets"
	podsPath         = "/api/v1/namespaces/shop/pods"
)

// appsLists answer the lists of a namespace's controllers; those not given are empty.
func appsLists(given map[string]any) map[string]any {
	answers := map[string]any{
		"GET " + deploymentsPath: &appsv1.DeploymentList{}, "GET " + statefulSetsPath: &appsv1.StatefulSetList{}, "GET " + daemonSetsPath: &appsv1.DaemonSetList{},
		"GET " + replicaSetsPath: &appsv1.ReplicaSetList{}, "GET " + podsPath: &corev1.PodList{},
	}
	maps.Copy(answers, given)
	return answers
}

// controlled gives an object a controller.
func controlled[T metav1.Object](o T, kind, name string, uid types.UID) T {
	yes := true
	o.SetOwnerReferences([]metav1.OwnerReference{{Kind: kind, Name: name, UID: uid, Controller: &yes}})
	return o
}

func TestWorkloads(t *testing.T) {
	forbids, host := deployment("forbids"), deployment("host")
	forbids.Spec.Template.Annotations = map[string]string{agentcfg.AnnotationInject: "false"}
	host.Spec.Template.Spec.HostNetwork = true
	now := metav1.Now()
	ending := agentPod("plain")
	ending.DeletionTimestamp = &now
	done := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "done"}, Status: corev1.PodStatus{Phase: corev1.PodSucceeded}}
	evicted := agentPod("plain")
	evicted.Status.Phase = corev1.PodFailed
	alone := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "alone", Namespace: "shop", UID: "alone"}}
	ofDB, three := *controlled(ptr(agentPod("db")), "StatefulSet", "db", "db"), int32(3)
	db := appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: "shop", UID: "db"}, Spec: appsv1.StatefulSetSpec{Replicas: &three}}
	logs := appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "logs", Namespace: "shop", UID: "logs"}, Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 1}}
	bare := appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Name: "bare", Namespace: "shop", UID: "bare"}}
	s := newAPIServer(t, appsLists(map[string]any{
		"GET " + deploymentsPath:  &appsv1.DeploymentList{Items: []appsv1.Deployment{deployment("web"), deployment("plain"), forbids, host}},
		"GET " + statefulSetsPath: &appsv1.StatefulSetList{Items: []appsv1.StatefulSet{db}},
		"GET " + daemonSetsPath:   &appsv1.DaemonSetList{Items: []appsv1.DaemonSet{logs}},
		"GET " + replicaSetsPath:  &appsv1.ReplicaSetList{Items: []appsv1.ReplicaSet{replicaSet("web"), replicaSet("plain"), bare}},
		"GET " + podsPath:         &corev1.PodList{Items: []corev1.Pod{agentPod("web"), ending, evicted, ofDB, done, alone}},
	}))
	got, err := s.c.Workloads(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"Deployment web agent:true ", "Deployment plain agent:false ",
		"Deployment forbids agent:false its annotation doppel.dev/inject forbids it",
		"Deployment host agent:false it uses the node's network",
		"StatefulSet db agent:true ",
		"DaemonSet logs agent:false not without --recreate: it runs on one node, where its pod ends before the next one starts",
		"ReplicaSet bare agent:false not without --recreate: it has no Deployment",
		"Pod alone agent:false not without --recreate: it has no controller that would replace it",
	}
	var lines []string
	for _, w := range got {
		lines = append(lines, fmt.Sprintf("%s %s agent:%v %s", w.Kind, w.Name, w.Agent, w.NotReady))
	}
	if d := cmp.Diff(want, lines); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	_, err = newAPIServer(t, appsLists(map[string]any{"GET " + deploymentsPath: forbidden()})).c.Workloads(t.Context(), "shop")
	wantError(t, err, uerr.Denied, "list the workloads of namespace shop", "administrator")
	_, err = newAPIServer(t, appsLists(map[string]any{"GET " + podsPath: forbidden()})).c.Workloads(t.Context(), "shop")
	wantError(t, err, uerr.Denied, "list the pods of namespace shop", "administrator")
}

func TestKindOf(t *testing.T) {
	db := &appsv1.StatefulSet{}
	s := newAPIServer(t, map[string]any{
		"GET " + deploymentsPath + "/web": ptr(deployment("web")), "GET " + statefulSetsPath + "/db": db, "GET " + statefulSetsPath + "/web": db,
		"GET /api/v1/namespaces/shop":                  &corev1.Namespace{},
		"GET /apis/batch/v1/namespaces/shop/jobs/nope": forbidden(),
		"GET " + daemonSetsPath + "/db":                forbidden(), // one who may not see a kind has none of it
	})
	if kind, err := s.c.KindOf(t.Context(), "shop", "db"); err != nil || kind != "StatefulSet" {
		t.Errorf("%s, %v", kind, err)
	}
	_, err := s.c.KindOf(t.Context(), "shop", "web")
	wantError(t, err, uerr.Usage, "web in namespace shop is a Deployment and a StatefulSet", "-w deployment/web")
	denied := newAPIServer(t, map[string]any{"GET " + deploymentsPath + "/web": forbidden()})
	_, err = denied.c.KindOf(t.Context(), "shop", "web")
	wantError(t, err, uerr.Denied, "look for web", "administrator")
	_, err = s.c.KindOf(t.Context(), "elsewhere", "web")
	wantError(t, err, uerr.NotFound, "no namespace elsewhere", "kubectl get ns")
	_, err = s.c.KindOf(t.Context(), "shop", "nope")
	wantError(t, err, uerr.NotFound, `no workload "nope" in namespace shop`, "doppel list -n shop")
}

// onePod is an API server's namespace with one pod, which takes a while to end.
type onePod struct {
	*apiServer
	pod    *corev1.Pod // nil: none
	ending int         // so often it is still there when it is looked at
	refuse func(dryRun bool, tries int) error
	tries  int // to make it
}

func newOnePod(t *testing.T, p *corev1.Pod) *onePod {
	o := &onePod{pod: p, refuse: func(bool, int) error { return nil }}
	name := "/" + p.Name
	gone := apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, p.Name)
	o.apiServer = newAPIServer(t, map[string]any{
		"GET " + podsPath + name: func() any {
			if o.pod != nil && o.pod.DeletionTimestamp != nil {
				if o.ending--; o.ending < 0 {
					o.pod = nil
				}
			}
			if o.pod == nil {
				return gone
			}
			return o.pod
		},
		"DELETE " + podsPath + name: func() any {
			o.pod.DeletionTimestamp, o.ending = ptr(metav1.Now()), 2
			return o.pod
		},
		"POST " + podsPath: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			dryRun := r.URL.Query().Get("dryRun") != ""
			if !dryRun {
				o.tries++
			}
			err := o.refuse(dryRun, o.tries)
			if err == nil && o.pod != nil {
				err = apierrors.NewAlreadyExists(schema.GroupResource{Resource: "pods"}, p.Name)
			}
			w.Header().Set("Content-Type", "application/json")
			if e, ok := errors.AsType[*apierrors.StatusError](err); ok {
				w.WriteHeader(int(e.ErrStatus.Code))
				e.ErrStatus.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
				_ = json.NewEncoder(w).Encode(e.ErrStatus)
				return
			}
			o.pod = o.last(t)
			o.pod.UID = types.UID(fmt.Sprint("u", o.tries+1))
			_ = json.NewEncoder(w).Encode(o.pod)
		}),
	})
	return o
}

// last is the pod of the last request to make one.
func (o *onePod) last(t *testing.T) *corev1.Pod {
	t.Helper()
	sent := o.saw("POST " + podsPath)
	got, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(sent[len(sent)-1]), nil, nil) // protobuf
	if err != nil {
		t.Fatal(err)
	}
	return got.(*corev1.Pod)
}

func alonePod() *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "alone", Namespace: "shop", UID: "u1", Labels: map[string]string{"app": "alone"}}, Spec: corev1.PodSpec{NodeName: "node-1", Containers: []corev1.Container{{Name: "app"}}}}
}

// A pod without a controller is made again with the mark that lets an agent in, and later as it was.
func TestReplacePod(t *testing.T) {
	s := newOnePod(t, alonePod())
	if err := s.c.ReplacePod(t.Context(), "shop", "alone", "another"); err != nil || len(s.saw("DELETE "+podsPath+"/alone")) != 0 {
		t.Errorf("a pod that is another by now: %v", err)
	}
	if err := s.c.ReplacePod(t.Context(), "shop", "alone", "u1"); err != nil {
		t.Fatal(err)
	}
	if sent := s.saw("DELETE " + podsPath + "/alone"); len(sent) != 1 || !strings.Contains(sent[0], "u1") {
		t.Errorf("deleted with %q", sent)
	}
	if s.tries != 1 {
		t.Errorf("quotas have counted %d pods", s.tries)
	}
	made := s.last(t)
	if made.Annotations[agentcfg.AnnotationInject] != "enabled" || made.Spec.NodeName != "" || made.UID != "" || made.Labels["app"] != "alone" {
		t.Errorf("made %+v", made)
	}
	s.pod.Spec.Containers = append(s.pod.Spec.Containers, corev1.Container{Name: agentcfg.Container})
	if err := s.c.ReplacePod(t.Context(), "shop", "alone", s.pod.UID); err != nil {
		t.Fatal(err)
	}
	if back := s.last(t); s.tries != 2 || len(back.Annotations) != 0 || len(back.Spec.Containers) != 1 || back.Labels["app"] != "alone" {
		t.Errorf("made again %+v", back)
	}
}

// A pod is not lost on the way: what would not be let in is not deleted, and what may pass is waited for.
func TestReplacePodRefused(t *testing.T) {
	pod := schema.GroupResource{Resource: "pods"}
	quota := apierrors.NewForbidden(pod, "alone", errors.New("exceeded quota: tight, requested: pods=1, used: pods=1, limited: pods=1"))
	denied := apierrors.NewForbidden(pod, "alone", errors.New("violates PodSecurity"))
	lag := quotaLag
	quotaLag = 300 * time.Millisecond
	defer func() { quotaLag = lag }()
	marked := func(s *onePod) bool { return s.last(t).Annotations[agentcfg.AnnotationInject] != "" }
	real := func(err func(s *onePod, tries int) error) func(*onePod, bool, int) error { // beside a dry run in which all is well
		return func(s *onePod, dryRun bool, tries int) error {
			if dryRun {
				return nil
			}
			return err(s, tries)
		}
	}
	always := func(err error) func(*onePod, bool, int) error {
		return func(*onePod, bool, int) error { return err }
	}
	for name, tt := range map[string]struct {
		refuse  func(s *onePod, dryRun bool, tries int) error
		wantErr string // "": the pod with the mark is there
		left    bool   // the pod was not touched
		asItWas bool
		tries   int
	}{
		"not let in":                    {refuse: always(denied), wantErr: "left alone", left: true},
		"not let in, without a reason":  {refuse: always(apierrors.NewBadRequest("admission webhook denied the request")), wantErr: "left alone", left: true},
		"API server in trouble, before": {refuse: always(apierrors.NewInternalError(errors.New("etcd"))), wantErr: "left alone", left: true},
		"a webhook without dry runs": {refuse: func(_ *onePod, dryRun bool, _ int) error {
			if dryRun {
				return apierrors.NewBadRequest("admission webhook does not support dry run")
			}
			return nil
		}, tries: 1},
		"quota until it has ended": {refuse: func(s *onePod, _ bool, _ int) error {
			if s.pod != nil {
				return quota
			}
			return nil
		}, tries: 1},
		"quota for longer": {refuse: func(_ *onePod, dryRun bool, tries int) error {
			if dryRun || tries < 2 {
				return quota
			}
			return nil
		}, tries: 2},
		"quota without room for an agent": {refuse: func(s *onePod, _ bool, _ int) error {
			if marked(s) {
				return quota
			}
			return nil
		}, wantErr: "made again as it was", asItWas: true},
		"not let in any more": {refuse: real(func(s *onePod, _ int) error {
			if marked(s) {
				return denied
			}
			return nil
		}), wantErr: "made again as it was", asItWas: true, tries: 2},
		"API server in trouble": {refuse: real(func(_ *onePod, tries int) error {
			if tries < 2 {
				return apierrors.NewInternalError(errors.New("etcd"))
			}
			return nil
		}), tries: 2},
		"answer lost": {refuse: real(func(s *onePod, _ int) error {
			s.pod = alonePod()
			s.pod.UID = "u9"
			return apierrors.NewInternalError(errors.New("etcd"))
		}), tries: 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newOnePod(t, alonePod())
			s.refuse = func(dryRun bool, tries int) error { return tt.refuse(s, dryRun, tries) }
			err := s.c.ReplacePod(t.Context(), "shop", "alone", "u1")
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("%v", err)
				}
			} else if err != nil {
				t.Error(err)
			}
			if deleted := len(s.saw("DELETE "+podsPath+"/alone")) > 0; deleted == tt.left {
				t.Errorf("deleted: %v", deleted)
			}
			if s.pod == nil || tt.left != (s.pod.UID == "u1") || !tt.left && s.pod.UID != "u9" && tt.asItWas != (s.pod.Annotations[agentcfg.AnnotationInject] == "") {
				t.Errorf("there is %+v", s.pod)
			}
			if tt.tries != 0 && s.tries != tt.tries {
				t.Errorf("%d tries", s.tries)
			}
		})
	}
	s := newOnePod(t, alonePod())
	ctx, cancel := context.WithCancel(t.Context())
	s.refuse = func(bool, int) error { cancel(); return nil }
	if err := s.c.ReplacePod(ctx, "shop", "alone", "u1"); err == nil || len(s.saw("DELETE "+podsPath+"/alone")) > 0 {
		t.Errorf("interrupted before: %v", err)
	}
}

// Agents leave by a rolling restart, which is waited for.
func TestRemoveAgents(t *testing.T) {
	looks := 0
	answers := appsLists(map[string]any{
		"GET " + deploymentsPath:            &appsv1.DeploymentList{Items: []appsv1.Deployment{deployment("web"), deployment("db")}},
		"GET " + replicaSetsPath:            &appsv1.ReplicaSetList{Items: []appsv1.ReplicaSet{replicaSet("web")}},
		"PATCH " + deploymentsPath + "/web": ptr(deployment("web")),
	})
	answers["GET "+podsPath] = func() any { // gone at the third look
		if looks++; looks > 2 {
			return &corev1.PodList{}
		}
		return &corev1.PodList{Items: []corev1.Pod{agentPod("web")}}
	}
	s := newAPIServer(t, answers)
	var steps []string
	if err := s.c.RemoveAgents(t.Context(), "shop", nil, func(p string) { steps = append(steps, p) }); err != nil {
		t.Fatal(err)
	}
	if sent := s.saw("PATCH " + deploymentsPath + "/web"); len(sent) != 1 || !strings.Contains(sent[0], "kubectl.kubernetes.io/restartedAt") {
		t.Errorf("sent %q", sent)
	}
	if len(steps) != 1 || !strings.Contains(steps[0], "Deployment web in namespace shop") {
		t.Errorf("said %q", steps)
	}

	// One that its template asks for stays while there is a manager.
	keeps := deployment("web")
	keeps.Spec.Template.Annotations = map[string]string{agentcfg.AnnotationInject: agentcfg.InjectEnabled}
	s = newAPIServer(t, appsLists(map[string]any{
		"GET " + deploymentsPath: &appsv1.DeploymentList{Items: []appsv1.Deployment{keeps}},
		"GET " + replicaSetsPath: &appsv1.ReplicaSetList{Items: []appsv1.ReplicaSet{replicaSet("web")}},
		"GET " + podsPath:        &corev1.PodList{Items: []corev1.Pod{agentPod("web")}},
	}))
	if err := s.c.RemoveAgents(t.Context(), "shop", func(Workload) bool { return true }, func(string) {}); err != nil {
		t.Error(err)
	}
	wantError(t, s.c.RefuseKept(t.Context(), "shop", "web"), uerr.Conflict, "doppel.dev/inject: enabled", "annotation")

	// One that does not go is named when the time is up; one that is not meant is left alone.
	answers["GET "+podsPath] = &corev1.PodList{Items: []corev1.Pod{agentPod("web")}}
	s = newAPIServer(t, answers)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	err := s.c.RemoveAgents(ctx, "shop", nil, func(string) {})
	wantError(t, err, uerr.Cluster, "", "kubectl")
	if err := s.c.RemoveAgents(t.Context(), "shop", func(w Workload) bool { return w.Name == "db" }, func(string) {}); err != nil {
		t.Error(err)
	}
}

func ptr[T any](v T) *T { return &v }

func TestEndAll(t *testing.T) {
	in := v1alpha1.Intercept{ObjectMeta: metav1.ObjectMeta{Name: "web-x", Namespace: "shop", UID: "uid-2"}}
	sess := v1alpha1.Session{ObjectMeta: metav1.ObjectMeta{Name: "session-x", Namespace: "doppel", UID: "uid-1"}}
	ok := &metav1.Status{Status: "Success"}
	s := newAPIServer(t, map[string]any{
		"GET /apis/doppel.dev/v1alpha1/intercepts": &v1alpha1.InterceptList{Items: []v1alpha1.Intercept{in}}, "DELETE " + interceptsPath + "/web-x": ok,
		"GET " + sessionsPath: &v1alpha1.SessionList{Items: []v1alpha1.Session{sess}}, "DELETE " + sessionsPath + "/session-x": ok,
	})
	if err := s.c.EndAll(t.Context(), "doppel", []string{""}); err != nil {
		t.Fatal(err)
	}
	if len(s.saw("DELETE "+interceptsPath+"/web-x")) != 1 || len(s.saw("DELETE "+sessionsPath+"/session-x")) != 1 {
		t.Error("not deleted")
	}
	if err := newAPIServer(t, nil).c.EndAll(t.Context(), "doppel", []string{""}); err != nil {
		t.Errorf("a cluster without doppel: %v", err)
	}
	err := newAPIServer(t, map[string]any{"GET /apis/doppel.dev/v1alpha1/intercepts": forbidden()}).c.EndAll(t.Context(), "doppel", []string{""})
	wantError(t, err, uerr.Denied, "list intercepts", "administrator")
}

func TestServerAddrs(t *testing.T) {
	for server, want := range map[string]string{"https://192.0.2.7:6443": "192.0.2.7", "https://[2001:db8::1]:6443/k8s/c-1": "2001:db8::1"} {
		got, err := (&Cluster{Server: server, config: &rest.Config{}}).ServerAddrs(t.Context())
		if err != nil || len(got) != 1 || got[0] != netip.MustParseAddr(want) {
			t.Errorf("%s: %v, %v", server, got, err)
		}
	}
	got, err := (&Cluster{Server: "https://localhost:6443", config: &rest.Config{}}).ServerAddrs(t.Context())
	if err != nil || len(got) == 0 || !got[0].IsLoopback() || got[0].Is4In6() {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := (&Cluster{Server: "https://k8s.invalid", config: &rest.Config{}}).ServerAddrs(t.Context()); err == nil {
		t.Error("a name without address")
	}
	// Behind a proxy only the proxy need know the name, and its own address is what must not be routed away.
	proxied := &rest.Config{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: "192.0.2.8:3128"})}
	got, err = (&Cluster{Server: "https://k8s.invalid", config: proxied}).ServerAddrs(t.Context())
	if err != nil || len(got) != 1 || got[0] != netip.MustParseAddr("192.0.2.8") {
		t.Errorf("behind a proxy: %v, %v", got, err)
	}
}

func TestSubnets(t *testing.T) {
	const cidrs, nodes = "GET /apis/networking.k8s.io/v1/servicecidrs", "GET /api/v1/nodes"
	list := &corev1.NodeList{Items: []corev1.Node{{Spec: corev1.NodeSpec{PodCIDRs: []string{"10.244.0.0/24", "fd00:244::/64"}}}, {}, {Spec: corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24"}}}}}
	services := &networkingv1.ServiceCIDRList{Items: []networkingv1.ServiceCIDR{{Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "nonsense"}}}}}
	for name, tt := range map[string]struct {
		answers map[string]any
		want    string
		msg     string
	}{
		"all":         {map[string]any{cidrs: services, nodes: list}, "[10.96.0.0/16] [10.244.0.0/24 fd00:244::/64 10.244.1.0/24]", ""},
		"before 1.33": {map[string]any{nodes: list}, "[] [10.244.0.0/24 fd00:244::/64 10.244.1.0/24]", ""},
		"no services": {map[string]any{cidrs: forbidden(), nodes: list}, "", "list the service subnets"},
		"no nodes":    {map[string]any{cidrs: services, nodes: forbidden()}, "", "list the nodes"},
	} {
		t.Run(name, func(t *testing.T) {
			s, p, err := newAPIServer(t, tt.answers).c.Subnets(t.Context())
			if tt.msg != "" {
				wantError(t, err, uerr.Denied, tt.msg, "ask an administrator")
			} else if got := fmt.Sprint(s, " ", p); err != nil || strings.Join(strings.Fields(got), " ") != tt.want {
				t.Errorf("%s, %v", got, err)
			}
		})
	}
}

// A renewal by a clock that was set since the last answer is refused, as the policy does; the refusal tells the time, and the next one is good.
func TestRenewWhenTheClockJumps(t *testing.T) {
	for _, jump := range []time.Duration{3 * time.Hour, -3 * time.Hour} {
		path := "PATCH " + sessionsPath + "/session-x"
		var s *apiServer
		s = newAPIServer(t, map[string]any{path: func() any {
			var patch v1alpha1.Session
			sent := s.saw(path)
			if err := json.Unmarshal([]byte(sent[len(sent)-1]), &patch); err != nil || time.Since(patch.Spec.RenewTime.Time).Abs() > 5*time.Minute {
				return forbidden()
			}
			return patch
		}})
		o := &v1alpha1.Session{ObjectMeta: metav1.ObjectMeta{Namespace: "doppel", Name: "session-x", UID: "uid-1"}}
		if err := s.c.RenewSession(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		s.c.clock.skew.Store(int64(jump)) // what the machine's clock is off by is not known yet
		wantError(t, s.c.RenewSession(t.Context(), o), uerr.Denied, "renew the session", "administrator")
		if err := s.c.RenewSession(t.Context(), o); err != nil {
			t.Errorf("after a jump of %v: %v", jump, err)
		}
	}
}
