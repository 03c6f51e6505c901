package userd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/sftpd"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"),
		goleak.IgnoreTopFunction("internal/poll.runtime_pollWait"), // client-go's cached transports keep idle connections
		goleak.IgnoreTopFunction("net/http.(*persistConn).writeLoop"))
}

// deadline bounds every wait of a test.
const deadline = 20 * time.Second

// cluster is an API server with a traffic-manager behind its service proxy, in one process.
type cluster struct {
	*httptest.Server
	t  *testing.T
	id *tunnel.Identity

	mu sync.Mutex
	// guarded by mu
	sessions   map[string]*v1alpha1.Session
	intercepts map[string]*v1alpha1.Intercept
	keep       bool                         // the manager goes on with what was deleted
	states     map[string]control.Intercept // what the manager says of intercepts, by UID; nil: it is silent
	relay      *control.Relay
	mute       bool // says nothing of intercepts
	count      int
	refuse     string       // methods that are forbidden, such as "POST intercepts"
	hold       chan bool    // answers to created intercepts wait for it; false: there is none
	reject     error        // what the manager says to a laptop that attaches
	gone       string       // why it does not know a session; "": no such session
	version    string       // the manager's
	tunnel     *mux.Session // the last one
	may        map[string]bool
	changed    chan struct{}
	key        string // that the API server says is the manager's

	news   chan control.Cluster // what the manager says next of the cluster
	asked  func()               // is called when the laptop asks for an app's environment and volumes; nil: that is refused
	env    *control.Environment // what it is told; nil: nothing, for as long as it waits
	volume string               // the directory of the files
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	id, err := tunnel.NewIdentity("traffic-manager")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, id: id, sessions: map[string]*v1alpha1.Session{}, intercepts: map[string]*v1alpha1.Intercept{}, states: map[string]control.Intercept{}, changed: make(chan struct{}), key: id.Fingerprint(), news: make(chan control.Cluster)}
	api := http.NewServeMux()
	api.Handle("GET /api/v1/namespaces/doppel/services/http:traffic-manager:api/proxy/attach", tunnel.UpgradeHandler(c.serveTunnel))
	api.HandleFunc("GET /api/v1/namespaces/doppel/configmaps/traffic-manager", func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"apiVersion":"v1","kind":"ConfigMap","data":{"key":%q,"protocol":"%d"}}`, c.key, wire.Version)
	})
	api.HandleFunc("POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews", c.rights)
	api.HandleFunc("/apis/doppel.dev/v1alpha1/namespaces/{ns}/{resource}", c.objects)
	api.HandleFunc("/apis/doppel.dev/v1alpha1/namespaces/{ns}/{resource}/{name}", c.objects)
	api.HandleFunc("GET /apis/apps/v1/namespaces/{ns}/deployments/web", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"web","namespace":%q}}`, r.PathValue("ns"))
	})
	c.Server = httptest.NewServer(api)
	t.Cleanup(func() {
		c.set(func() {
			if c.tunnel != nil {
				_ = c.tunnel.Close()
			}
		})
		c.Close()
	})
	return c
}

func (c *cluster) set(fn func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn()
	close(c.changed)
	c.changed = make(chan struct{})
}

// rights says yes to whatever is in c.may ("" is the whole cluster), and to everything while that is nil.
func (c *cluster) rights(w http.ResponseWriter, r *http.Request) {
	var review authorizationv1.SelfSubjectAccessReview
	_ = json.NewDecoder(r.Body).Decode(&review)
	c.set(func() {
		a := review.Spec.ResourceAttributes
		review.Status.Allowed = c.may == nil || c.may[a.Resource+" "+a.Namespace]
	})
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(review)
}

func (c *cluster) objects(w http.ResponseWriter, r *http.Request) {
	var hold chan bool
	defer func() {
		if hold == nil {
			return
		}
		select {
		case answer := <-hold:
			if !answer {
				panic(http.ErrAbortHandler)
			}
		case <-r.Context().Done():
		}
	}()
	c.set(func() {
		w.Header().Set("Content-Type", "application/json")
		fail := func(code int, reason metav1.StatusReason) {
			w.WriteHeader(code)
			_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: reason, Message: string(reason)})
		}
		resource, name := r.PathValue("resource"), r.PathValue("name")
		if c.refuse == r.Method+" "+resource {
			fail(http.StatusForbidden, metav1.StatusReasonForbidden)
			return
		}
		switch r.Method {
		case http.MethodPost:
			c.count++
			name = fmt.Sprintf("%s-%d", resource, c.count)
			meta := metav1.ObjectMeta{Name: name, Namespace: r.PathValue("ns"), UID: types.UID(name), CreationTimestamp: metav1.Now()}
			if resource == "sessions" {
				s := &v1alpha1.Session{}
				_ = json.NewDecoder(r.Body).Decode(s)
				s.ObjectMeta = meta
				c.sessions[name] = s
				_ = json.NewEncoder(w).Encode(s)
				return
			}
			in := &v1alpha1.Intercept{}
			_ = json.NewDecoder(r.Body).Decode(in)
			in.ObjectMeta = meta
			c.intercepts[name] = in
			hold = c.hold
			_ = json.NewEncoder(w).Encode(in)
		case http.MethodGet:
			list := v1alpha1.InterceptList{Items: []v1alpha1.Intercept{}}
			for _, in := range c.intercepts {
				list.Items = append(list.Items, *in)
			}
			_ = json.NewEncoder(w).Encode(list)
		case http.MethodPatch:
			s := c.sessions[name]
			if s == nil {
				fail(http.StatusNotFound, metav1.StatusReasonNotFound)
				return
			}
			_ = json.NewDecoder(r.Body).Decode(s)
			_ = json.NewEncoder(w).Encode(s)
		case http.MethodDelete:
			delete(c.sessions, name)
			delete(c.intercepts, name)
			if !c.keep {
				delete(c.states, name)
			}
			_ = json.NewEncoder(w).Encode(metav1.Status{Status: "Success"})
		}
	})
}

func (c *cluster) serveTunnel(raw net.Conn) {
	c.mu.Lock()
	id := c.id
	c.mu.Unlock()
	s, _, err := tunnel.Server(context.Background(), raw, tunnel.ServerConfig{
		Identity: id,
		Authorize: func(_ context.Context, h wire.Hello, fingerprint string) (wire.HelloReply, error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.reject != nil {
				return wire.HelloReply{}, c.reject
			}
			if o := c.sessions[h.Session]; o == nil || o.Spec.Key != fingerprint {
				return wire.HelloReply{}, &mux.RejectError{Code: wire.CodeGone, Msg: cmp.Or(c.gone, "no such session")}
			}
			return wire.HelloReply{Product: c.version, Info: json.RawMessage(`{"renewInterval":"10m"}`)}, nil
		},
	})
	if err != nil {
		return
	}
	c.set(func() { c.tunnel = s })
	_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{Intercept: func(r *mux.Request, h wire.InterceptHeader) {
		st, err := r.Accept(nil) // the pod says what it was asked for
		if err != nil {
			return
		}
		_, _ = fmt.Fprintf(st, "%s %s", h.Intercept, h.Dst)
		_ = st.Close()
	}, Files: c.serveFiles, Control: func(ctx context.Context, method string, _ []byte) (any, error) {
		c.mu.Lock()
		asked, env := c.asked, c.env
		c.mu.Unlock()
		if method == control.LaptopEnvironment && env != nil {
			return env, nil
		}
		if method != control.LaptopEnvironment || asked == nil {
			return nil, &mux.RejectError{Code: wire.CodeDenied, Msg: "not here"}
		}
		asked()
		<-ctx.Done()
		return nil, ctx.Err()
	}, Watch: func(ctx context.Context, method string, body []byte, send func(any) error) error {
		if method == control.LaptopCluster {
			return c.tell(ctx, body, send)
		}
		for {
			c.mu.Lock()
			m, changed, mute := control.Intercepts{Items: []control.Intercept{}, Relay: c.relay}, c.changed, c.mute
			for _, st := range c.states {
				m.Items = append(m.Items, st)
			}
			c.mu.Unlock()
			if !mute {
				if err := send(m); err != nil {
					return err
				}
			}
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			}
		}
	}})
}

// serveFiles serves the one volume of c.env.
func (c *cluster) serveFiles(r *mux.Request, _ string) {
	c.mu.Lock()
	dir := c.volume
	c.mu.Unlock()
	if st, err := r.Accept(nil); err == nil {
		_ = sftpd.Serve(st, []sftpd.Export{{Path: "/data", Dir: dir, ReadOnly: true}}, slog.New(slog.DiscardHandler))
	}
}

// tell answers who follows the cluster: nothing is there at first, then what the test says.
func (c *cluster) tell(ctx context.Context, body []byte, send func(any) error) error {
	if string(body) != `{"changes":true}` {
		return fmt.Errorf("asked for with %q", body)
	}
	for m := (control.Cluster{Domain: "cluster.test", Services: map[string][]control.Service{}}); ; {
		if err := send(m); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case m = <-c.news:
		}
	}
}

// say has the manager say how an intercept stands.
func (c *cluster) say(uid, state, reason, msg string) {
	c.set(func() {
		c.states[uid] = control.Intercept{UID: uid, Namespace: "shop", State: state, Reason: reason, Message: msg, Kind: "Deployment", Workload: "web", Ports: []control.Port{{Protocol: "TCP", Number: 8080}}}
	})
}

// names lists the objects that are there.
func (c *cluster) names() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for n := range c.sessions {
		out = append(out, n)
	}
	for n := range c.intercepts {
		out = append(out, n)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (c *cluster) until(what string, ok func() bool) {
	c.t.Helper()
	for end := time.Now().Add(deadline); !ok(); {
		if time.Now().After(end) {
			c.t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // polling, not synchronisation
	}
}

// connect opens a session without a network of the laptop: that takes root and is the end-to-end tests'.
func (c *cluster) connect() *session {
	c.t.Helper()
	s := c.session()
	c.start(s)
	return s
}

// session makes one that does not dial yet.
func (c *cluster) session() *session {
	c.t.Helper()
	file := filepath.Join(c.t.TempDir(), "config")
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: x, clusters: [{name: c, cluster: {server: %q}}],
users: [{name: u, user: {token: t}}], contexts: [{name: x, context: {cluster: c, user: u, namespace: shop}}]}`, c.URL)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	kc, err := kube.Load(kube.Options{Kubeconfig: file})
	if err != nil {
		c.t.Fatal(err)
	}
	log := slog.New(noErrors{slog.NewTextHandler(c.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}), c.t})
	s := &session{
		cfg:     sessionConfig{cluster: kc, managerNS: "doppel", points: &points{}, log: log, progress: func(string, ...any) {}},
		cluster: kc, log: log, user: "ada", manager: kube.ManagerInfo{Key: c.id.Fingerprint(), Version: "test"}, info: make(chan control.Cluster, 1),
	}
	s.entrance.attach = func(ctx context.Context, t kube.Transport) (net.Conn, error) { return kc.Attach(ctx, "doppel", t) }
	s.intercepts = newIntercepts(s)
	if s.identity, err = tunnel.NewIdentity("laptop"); err != nil {
		c.t.Fatal(err)
	}
	if err := s.createObject(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	return s
}

// noErrors fails a test in which an error is logged, but for the end of the session itself: what these tests do, a tunnel that is lost, say, happens to
// a daemon that has no defect.
type noErrors struct {
	slog.Handler
	t *testing.T
}

func (h noErrors) Handle(ctx context.Context, r slog.Record) error {
	session := false
	r.Attrs(func(a slog.Attr) bool {
		session = session || a.Key == "goroutine" && a.Value.String() == "tunnel"
		return true
	})
	if r.Level >= slog.LevelError && !session {
		h.t.Errorf("logged as an error: %s", r.Message)
	}
	return h.Handler.Handle(ctx, r)
}

func (h noErrors) WithAttrs(attrs []slog.Attr) slog.Handler {
	return noErrors{h.Handler.WithAttrs(attrs), h.t}
}

func (c *cluster) start(s *session) {
	s.group = lifecycle.New(context.Background(), s.log)
	s.link = tunnel.NewLink(tunnel.LinkConfig{Dial: s.dial, Serve: s.serve, OnUp: s.onUp, OnDown: s.onDown, OnRetry: s.onRetry, Permanent: s.permanent, Log: s.log})
	s.group.Go("tunnel", s.link.Run)
	c.t.Cleanup(func() { s.close() })
}

// last is the tunnel that was made last.
func (c *cluster) last() *mux.Session {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tunnel
}

func (c *cluster) up(s *session) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), deadline)
	defer cancel()
	if _, err := s.link.Wait(ctx); err != nil {
		c.t.Fatal(err)
	}
}

type outcome struct {
	in    localapi.Intercept
	err   error
	steps []string
}

// create makes an intercept in the background.
func create(ctx context.Context, s *session, req localapi.InterceptRequest) chan outcome {
	done := make(chan outcome, 1)
	go func() {
		var o outcome
		o.in, o.err = s.intercepts.create(ctx, req, func(format string, args ...any) { o.steps = append(o.steps, fmt.Sprintf(format, args...)) })
		done <- o
	}()
	return done
}

func wantError(t *testing.T, err error, kind uerr.Kind, msg, hint string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s %q", kind, msg)
	}
	if e := uerr.From(err); e.Kind != kind || !strings.Contains(e.Msg, msg) || !strings.Contains(e.Hint, hint) {
		t.Errorf("got %s %q, hint %q; want %s %q, hint %q", e.Kind, e.Msg, e.Hint, kind, msg, hint)
	}
}

// activeWeb has the first session of a cluster intercept web, as intercepts-2.
func (c *cluster) activeWeb(s *session) {
	c.t.Helper()
	done := create(c.t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}})
	c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	c.say("intercepts-2", "Active", "", "")
	if o := <-done; o.err != nil {
		c.t.Fatal(o.err)
	}
}

func leave(t *testing.T, s *session, name string) error {
	return s.intercepts.leave(t.Context(), name, func(string, ...any) {})
}

// An intercept is there when the manager says so, with its steps on the way, and gone when left.
func TestIntercept(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000:http"}, Service: "web", Container: "app"})
	c.until("the object is there", func() bool { return strings.Contains(c.names(), "intercepts-2") })
	c.mu.Lock()
	spec := c.intercepts["intercepts-2"].Spec
	c.mu.Unlock()
	want := v1alpha1.InterceptSpec{User: "ada", Session: "sessions-1", Name: "web", Workload: v1alpha1.WorkloadRef{Kind: "Deployment", Name: "web"}, Ports: []v1alpha1.WantedPort{{Port: "http", Target: "127.0.0.1:3000"}}, Service: "web", Container: "app"}
	if !reflect.DeepEqual(spec, want) {
		t.Errorf("created %+v", spec)
	}
	wantError(t, leave(t, s, "nope"), uerr.NotFound, `no intercept "nope" of yours`, "doppel list -i")
	c.say("intercepts-2", "Pending", "", "restarting the workload to install the traffic-agent")
	c.until("the step was seen", func() bool { list, _ := s.intercepts.all(); return len(list) == 1 && list[0].Message != "" })
	c.say("intercepts-2", "Active", "", "")
	o := <-done
	if o.err != nil || o.in.State != "ACTIVE" || !slices.Equal(o.in.Ports, []localapi.InterceptPort{{Port: 8080, Protocol: "TCP", Target: "127.0.0.1:3000"}}) || !o.in.Mine || o.in.User != "ada" {
		t.Errorf("%+v, %v", o.in, o.err)
	}
	if got := strings.Join(o.steps, "; "); !strings.HasPrefix(got, "Creating intercept web in namespace shop") {
		t.Errorf("steps %q", got)
	}

	// The name and the local port are taken now.
	o = <-create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3001"}})
	wantError(t, o.err, uerr.Conflict, "there is an intercept web already", "doppel leave web")
	o = <-create(t.Context(), s, localapi.InterceptRequest{Name: "api", Workload: "deployment/api", Ports: []string{"3000"}})
	wantError(t, o.err, uerr.Conflict, "127.0.0.1:3000 is taken by intercept web already", "-p")
	if err := leave(t, s, "web"); err != nil {
		t.Fatal(err)
	}
	if got := c.names(); got != "sessions-1" {
		t.Errorf("there is still %s", got)
	}
	wantError(t, leave(t, s, "web"), uerr.NotFound, "no intercept", "")
}

// Who names an intercept or a session by its UID ends that one, and no later one of its name; one that was made anew is still the same.
func TestEndByUID(t *testing.T) {
	d, _ := newDaemon(t)
	c := newCluster(t)
	s := c.connect()
	if err := d.keep(s); err != nil {
		t.Fatal(err)
	}
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}})
	c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	c.say("intercepts-2", "Active", "", "")
	o := <-done
	if o.err != nil || o.in.UID != "intercepts-2" {
		t.Fatalf("%+v, %v", o.in, o.err)
	}
	_, err := d.leave(t.Context(), localapi.LeaveRequest{Name: "web", UID: "intercepts-1"}, quiet)
	wantError(t, err, uerr.NotFound, "intercept web had ended already", "")
	s.intercepts.mu.Lock()
	in := s.intercepts.byName["web"]
	s.intercepts.mu.Unlock()
	if in == nil || s.intercepts.other("web", o.in.UID) {
		t.Error("another one was left")
	}
	if _, err := d.leave(t.Context(), localapi.LeaveRequest{Name: "web", UID: o.in.UID}, quiet); err != nil {
		t.Error(err)
	}
	use := localapi.Choice{Use: s.cfg.name}
	_, err = d.quit(t.Context(), localapi.QuitRequest{Choice: use, UID: "sessions-0"}, quiet)
	wantError(t, err, uerr.NotFound, "had ended already", "")
	if len(d.all()) != 1 {
		t.Fatal("another session was ended")
	}
	if _, err := d.quit(t.Context(), localapi.QuitRequest{Choice: use, UID: "sessions-1"}, quiet); err != nil || len(d.all()) != 0 {
		t.Errorf("%v, %d sessions", err, len(d.all()))
	}
}

// What the manager says again on the way is not told again: an app that crashes in a loop has two texts by turns.
func TestInterceptSaysOnce(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	steps, done := make(chan string, 10), make(chan error, 1)
	go func() {
		_, err := s.intercepts.create(t.Context(), localapi.InterceptRequest{Name: "web", Ports: []string{"3000:http"}}, func(format string, args ...any) { steps <- fmt.Sprintf(format, args...) })
		done <- err
	}()
	expect := func(want string) {
		t.Helper()
		select {
		case got := <-steps:
			if got != want {
				t.Errorf("told %q, want %q", got, want)
			}
		case <-time.After(deadline):
			t.Fatalf("nothing told, want %q", want)
		}
	}
	expect("Creating intercept web in namespace shop")
	c.until("the object is there", func() bool { return strings.Contains(c.names(), "intercepts-2") })
	say := func(msg string) {
		c.say("intercepts-2", "Pending", "", msg)
		c.until("it was heard", func() bool { list, _ := s.intercepts.all(); return len(list) == 1 && list[0].Message == msg })
	}
	say("waiting for the app")
	expect("Waiting for the app")
	say("the app does not start")
	expect("The app does not start")
	say("waiting for the app")
	say("the app does not start")
	say("waiting for the agent")
	expect("Waiting for the agent")
	c.say("intercepts-2", "Active", "", "")
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A session knows the whole cluster, whether it hears all of it or what has changed; a manager of before says all of it at each change.
func TestClusterNews(t *testing.T) {
	c := newCluster(t)
	s := c.session()
	c.start(s)
	web, db := []control.Service{{Name: "web"}}, []control.Service{{Name: "db"}}
	expect := func(services map[string][]control.Service) {
		t.Helper()
		select {
		case info := <-s.info:
			if !reflect.DeepEqual(info.Services, services) || info.Domain != "cluster.test" {
				t.Errorf("got %v, want %v", info, services)
			}
		case <-time.After(deadline):
			t.Fatal("nothing heard")
		}
	}
	expect(map[string][]control.Service{})
	c.news <- control.Cluster{Domain: "cluster.test", Partial: true, Services: map[string][]control.Service{"shop": web}}
	expect(map[string][]control.Service{"shop": web})
	c.news <- control.Cluster{Domain: "cluster.test", Partial: true, Services: map[string][]control.Service{"data": db}}
	expect(map[string][]control.Service{"shop": web, "data": db})
	c.news <- control.Cluster{Domain: "cluster.test", Partial: true, Services: map[string][]control.Service{"shop": nil}}
	expect(map[string][]control.Service{"data": db})
	c.news <- control.Cluster{Domain: "cluster.test", Services: map[string][]control.Service{"shop": web}}
	expect(map[string][]control.Service{"shop": web})
}

// The time-out counts from the last news: a long rolling restart that goes on is waited for, two messages that take turns are not.
func TestInterceptProgress(t *testing.T) {
	const patience = time.Second
	c := newCluster(t)
	s := c.connect()
	say := func(uid, msg string) {
		c.say(uid, "Pending", "", msg)
		c.until("the step was seen", func() bool { list, _ := s.intercepts.all(); return len(list) == 1 && list[0].Message == msg })
	}
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}, Timeout: patience})
	c.until("the object was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	for i, begin := 0, time.Now(); time.Since(begin) < 2*patience; i++ {
		say("intercepts-2", fmt.Sprintf("waiting for %d old pods", i))
	}
	c.say("intercepts-2", "Active", "", "")
	if o := <-done; o.err != nil {
		t.Fatal(o.err)
	}
	if err := leave(t, s, "web"); err != nil {
		t.Fatal(err)
	}

	done = create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}, Timeout: patience})
	c.until("the object was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 3 })
	for i := 0; ; i++ {
		select {
		case o := <-done:
			wantError(t, o.err, uerr.Cluster, "did not become active in time: waiting, time", "--timeout")
			return
		default:
			c.say("intercepts-3", "Pending", "", fmt.Sprintf("waiting, time %d", i%2))
		}
	}
}

func TestInterceptUsage(t *testing.T) {
	s := newCluster(t).connect()
	for _, tt := range []struct{ port, address, msg string }{
		{"", "", `port "": want LOCAL[:REMOTE]`},
		{"http", "", "want LOCAL[:REMOTE]"},
		{"0", "", "want LOCAL[:REMOTE]"},
		{"65536", "", "want LOCAL[:REMOTE]"},
		{"-1", "", "want LOCAL[:REMOTE]"},
		{"80:", "", "nothing after the colon"},
		{":80", "", "want LOCAL[:REMOTE]"},
		{"80", "localhost", `address "localhost" is not an IP address`},
	} {
		o := <-create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"8000", tt.port}, Address: tt.address})
		wantError(t, o.err, uerr.Usage, tt.msg, "for example")
	}
	o := <-create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"80"}, Match: match.Rule{Methods: []string{"G T"}}})
	wantError(t, o.err, uerr.Usage, "the match cannot be used", "--http-match")
	o = <-create(t.Context(), s, localapi.InterceptRequest{Name: "web"})
	wantError(t, o.err, uerr.Usage, "no port", "for example")
	o = <-create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"80:http", "80:grpc"}})
	wantError(t, o.err, uerr.Usage, "local port 80 is there twice", "another local port")
	spec, targets, _, err := s.intercepts.plan(localapi.InterceptRequest{Name: "a", Workload: "b", Ports: []string{"80:8080", "80:53/udp"}, Address: "::1"})
	at := netip.MustParseAddrPort("[::1]:80")
	if err != nil || !slices.Equal(targets, []target{{at, false}, {at, true}}) || !slices.Equal(spec.Ports, []v1alpha1.WantedPort{{Port: "8080", Target: "[::1]:80"}, {Port: "53/udp", Target: "[::1]:80"}}) {
		t.Errorf("%+v, %v, %v", spec, targets, err)
	}
}

// Whatever ends the wait removes what was created, and says why.
func TestInterceptFails(t *testing.T) {
	for name, tt := range map[string]struct {
		req       localapi.InterceptRequest
		then      func(*cluster, *session, context.CancelFunc)
		kind      uerr.Kind
		msg, hint string
	}{
		"no workload": {then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Failed", "NoWorkload", "no Deployment")
		}, kind: uerr.NotFound, msg: "no Deployment", hint: "doppel list -n shop"},
		"no port": {then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Failed", "NoPort", "no TCP port")
		}, kind: uerr.NotFound, msg: "no TCP port", hint: "containerPort"},
		"several": {then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Failed", "AmbiguousPort", "several")
		}, kind: uerr.Usage, msg: "several", hint: "LOCAL:REMOTE"},
		"service": {then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Failed", "NoSuchService", "no service")
		}, kind: uerr.NotFound, msg: "no service"},
		"held": {then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Failed", "PortHeld", "by eve")
		}, kind: uerr.Conflict, msg: "by eve", hint: "talk to them"},
		"not injected": {then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Failed", "NotInjected", "no agent")
		}, kind: uerr.Cluster, msg: "no agent", hint: "10250"},
		"image": {then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Failed", "AgentNotStarted", "ErrImagePull")
		}, kind: uerr.Cluster, msg: "ErrImagePull", hint: "kubectl -n shop get pods"},
		"a new reason": {then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Failed", "Teapot", "short and stout")
		}, kind: uerr.Cluster, msg: "short and stout"},
		"time is up": {req: localapi.InterceptRequest{Timeout: 200 * time.Millisecond}, then: func(c *cluster, _ *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Pending", "", "waiting for pods")
		}, kind: uerr.Cluster, msg: "did not become active in time: waiting for pods", hint: "--timeout"},
		"silence": {req: localapi.InterceptRequest{Timeout: 50 * time.Millisecond}, then: func(*cluster, *session, context.CancelFunc) {}, kind: uerr.Cluster, msg: "the traffic-manager has not answered", hint: "--timeout"},
		"Ctrl-C":  {then: func(_ *cluster, _ *session, cancel context.CancelFunc) { cancel() }, kind: uerr.Canceled, msg: "interrupted; the intercept was removed"},
		"removed by somebody": {then: func(c *cluster, s *session, _ context.CancelFunc) {
			c.say("intercepts-2", "Pending", "", "waiting")
			c.until("the laptop was told", func() bool { return seen(s, "intercepts-2") })
			c.set(func() { delete(c.states, "intercepts-2"); delete(c.intercepts, "intercepts-2") })
		}, kind: uerr.Conflict, msg: "removed in the cluster by somebody else"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			s := c.connect()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			tt.req.Name, tt.req.Ports = "web", []string{"3000"}
			done := create(ctx, s, tt.req)
			c.until("the object was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
			tt.then(c, s, cancel)
			o := <-done
			wantError(t, o.err, tt.kind, tt.msg, tt.hint)
			if got := c.names(); got != "sessions-1" {
				t.Errorf("left behind: %s", got)
			}
			if list, _ := s.intercepts.all(); len(list) != 0 {
				t.Errorf("still known: %v", list)
			}
		})
	}
}

// An interrupt while the volumes are asked for ends an intercept that is active already: nobody would hear of it.
func TestInterruptedWhileMounting(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c.set(func() { c.asked = cancel })
	done := create(ctx, s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}})
	c.until("the object was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	c.say("intercepts-2", "Active", "", "")
	wantError(t, (<-done).err, uerr.Canceled, "interrupted; the intercept was removed", "")
	if got := c.names(); got != "sessions-1" {
		t.Errorf("left behind: %s", got)
	}
}

// seen says whether the laptop has been told of the intercept.
func seen(s *session, uid string) bool {
	x := s.intercepts
	x.mu.Lock()
	defer x.mu.Unlock()
	_, ok := x.states[uid]
	return ok
}

// A refusal of the API server leaves the name free.
func TestInterceptForbidden(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	c.set(func() { c.refuse = "POST intercepts" })
	for range 2 {
		o := <-create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}})
		wantError(t, o.err, uerr.Denied, "create an intercept in namespace shop", "administrator")
	}
}

// Of two commands that want the same name at once, one creates; what is being created can not be left.
func TestInterceptAtOnce(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	var all []chan outcome
	for range 5 {
		all = append(all, create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}}))
	}
	c.until("one was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	c.say("intercepts-2", "Active", "", "")
	good := 0
	for _, ch := range all {
		if o := <-ch; o.err == nil {
			good++
		} else {
			wantError(t, o.err, uerr.Conflict, "there is an intercept web already", "")
		}
	}
	if good != 1 || c.names() != "intercepts-2 sessions-1" {
		t.Errorf("%d succeeded, there are %s", good, c.names())
	}

	s.intercepts.byName["half"] = &intercept{name: "half", object: &v1alpha1.Intercept{}}
	wantError(t, leave(t, s, "half"), uerr.Conflict, "is just being created", "wait for it")
	if _, _, ok := s.intercepts.target("", control.Port{}); ok {
		t.Error("a flow without an intercept has a target")
	}
}

// An ingest needs no port, and says whose environment and files it is about.
func TestIngest(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Mode: localapi.ModeIngest, Mount: localapi.MountRequest{None: true}})
	c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	c.set(func() {
		c.states["intercepts-2"] = control.Intercept{UID: "intercepts-2", Namespace: "shop", State: "Active", Container: "app"}
	})
	if o := <-done; o.err != nil || o.in.Mode != localapi.ModeIngest || o.in.Container != "app" || len(o.in.Ports) != 0 {
		t.Errorf("%+v, %v", o.in, o.err)
	}
}

// A replaced container's traffic still comes until the manager says that the app is back.
func TestLeaveReplaced(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Mode: localapi.ModeReplace, Address: "127.0.0.2", Ports: []string{"3000:http"}})
	c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	state := func(state string) {
		c.set(func() {
			c.states["intercepts-2"] = control.Intercept{UID: "intercepts-2", Namespace: "shop", State: state, Container: "app", Ports: []control.Port{{Protocol: "TCP", Number: 8080}, {Protocol: "TCP", Number: 9090}}}
		})
	}
	state("Active")
	o := <-done
	want := []localapi.InterceptPort{{Port: 8080, Protocol: "TCP", Target: "127.0.0.2:3000"}, {Port: 9090, Protocol: "TCP", Target: "127.0.0.2:9090"}}
	if o.err != nil || !slices.Equal(o.in.Ports, want) || o.in.Mode != localapi.ModeReplace || o.in.Container != "app" {
		t.Errorf("%+v, %v", o.in, o.err)
	}
	left := make(chan error, 1)
	c.mu.Lock()
	c.keep = true
	c.mu.Unlock()
	go func() { left <- leave(t, s, "web") }()
	c.until("the object is deleted", func() bool { return c.names() == "sessions-1" })
	state(control.StateEnding)
	c.until("it is ending", func() bool { list, _ := s.intercepts.all(); return len(list) == 1 && list[0].State == "ENDING" })
	if at, _, ok := s.intercepts.target("intercepts-2", control.Port{Protocol: "TCP", Number: 9090}); !ok || at.String() != "127.0.0.2:9090" {
		t.Errorf("while it ends the traffic goes to %s, %v", at, ok)
	}
	wantError(t, leave(t, s, "web"), uerr.Conflict, "is just being left", "wait for it")
	c.set(func() { delete(c.states, "intercepts-2") })
	if err := <-left; err != nil {
		t.Fatal(err)
	}
	if list, problems := s.intercepts.all(); len(list) != 0 || len(problems) != 0 {
		t.Errorf("left behind %v %v", list, problems)
	}
}

// Who interrupts a leave has left: only the waiting ends.
func TestLeaveInterrupted(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	c.activeWeb(s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.intercepts.leave(ctx, "web", func(string, ...any) {}); err != nil {
		t.Error(err)
	}
	if got := c.names(); got != "sessions-1" {
		t.Errorf("there is %s", got)
	}
}

// While a replaced container's traffic still comes, what answers it keeps the app's files and its pod's ports, also when nobody waits for the end.
func TestLeaveReplacedKeepsFiles(t *testing.T) {
	for name, waits := range map[string]bool{"waited for": true, "interrupted": false, "interrupted, and once more": false} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
			c := newCluster(t)
			c.env, c.volume, c.keep = &control.Environment{Container: "app", Volumes: []control.Volume{{Path: "/data", ReadOnly: true}}}, t.TempDir(), true
			s := c.connect()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			_ = l.Close()
			port := l.Addr().String()
			_, number, _ := net.SplitHostPort(port)
			done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Mode: localapi.ModeReplace, ToPod: []string{number}, Mount: localapi.MountRequest{Copy: true}})
			c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
			c.say("intercepts-2", "Active", "", "")
			o := <-done
			if o.err != nil {
				t.Fatal(o.err)
			}
			has := func() (files, toPod bool) {
				free, err := s.cfg.points.take(o.in.Mount.Point, "other")
				if err == nil {
					free()
				}
				conn, dialErr := net.Dial("tcp", port)
				if dialErr == nil {
					_ = conn.Close()
				}
				return err != nil, dialErr == nil
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			left := make(chan error, 1)
			restarting := make(chan struct{})
			go func() {
				left <- s.intercepts.leave(ctx, "web", func(string, ...any) { close(restarting) })
			}()
			<-restarting
			if !waits {
				cancel()
				wantError(t, <-left, uerr.Cluster, "the app of web is not back yet", "")
			}
			if files, toPod := has(); !files || !toPod {
				t.Errorf("while it ends: files %v, --to-pod %v", files, toPod)
			}
			if again := func() error { return s.intercepts.leave(t.Context(), "web", func(string, ...any) {}) }; waits {
				wantError(t, again(), uerr.Conflict, "just being left", "wait for it")
				if files, toPod := has(); !files || !toPod {
					t.Errorf("asked again while somebody waits: files %v, --to-pod %v", files, toPod)
				}
			} else if strings.Contains(name, "once more") {
				wantError(t, again(), uerr.Cluster, "the app of web is not back yet", "")
				if files, toPod := has(); files || toPod {
					t.Errorf("asked again: files %v, --to-pod %v", files, toPod)
				}
			}
			c.set(func() { delete(c.states, "intercepts-2") })
			if waits {
				if err := <-left; err != nil {
					t.Fatal(err)
				}
				if files, toPod := has(); files || toPod {
					t.Errorf("after the end: files %v, --to-pod %v", files, toPod)
				}
			}
			c.until("nothing is left", func() bool { files, toPod := has(); return !files && !toPod })
		})
	}
}

// Each port of an intercept has its own place here: the manager says which of them a container port is.
func TestTargets(t *testing.T) {
	s := newCluster(t).connect()
	x := s.intercepts
	if err := x.told(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, targets, _, err := x.plan(localapi.InterceptRequest{Name: "web", Ports: []string{"3000:http", "9000:grpc", "5353:dns/udp"}})
	if err != nil {
		t.Fatal(err)
	}
	x.mu.Lock()
	in := &intercept{name: "web", targets: targets, object: &v1alpha1.Intercept{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Spec: v1alpha1.InterceptSpec{Mode: v1alpha1.ModeReplace}}}
	x.byName["web"] = in
	x.states["u"] = control.Intercept{UID: "u", Ports: []control.Port{{Protocol: "TCP", Number: 8080}, {Protocol: "TCP", Number: 53}, {Protocol: "UDP", Number: 53}, {Protocol: "TCP", Number: 7000}}}
	x.mu.Unlock()
	for want, p := range map[string]control.Port{
		"127.0.0.1:3000": {Protocol: "TCP", Number: 8080}, "127.0.0.1:9000": {Protocol: "TCP", Number: 53}, "127.0.0.1:5353": {Protocol: "UDP", Number: 53},
		"127.0.0.1:7000": {Protocol: "TCP", Number: 7000}, // nobody said where
	} {
		if got, _, ok := x.target("u", p); !ok || got.String() != want {
			t.Errorf("%v goes to %s, %v, want %s", p, got, ok, want)
		}
	}
	if got, _, ok := x.target("u", control.Port{Protocol: "UDP", Number: 8080}); ok {
		t.Errorf("a port that is not of the intercept goes to %s", got)
	}
	in.object.Spec.Mode = v1alpha1.ModeIntercept // of which a manager may say that it takes more
	if got, _, ok := x.target("u", control.Port{Protocol: "TCP", Number: 7000}); ok {
		t.Errorf("a port that nobody has asked for goes to %s", got)
	}
}

// A flow goes to the local process; where none listens the app in the cluster answers.
func TestTake(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "local")
			_ = conn.Close()
		}
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{port}})
	c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	c.say("intercepts-2", "Active", "", "")
	if o := <-done; o.err != nil {
		t.Fatal(o.err)
	}
	open := func(uid string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		c.mu.Lock()
		m := c.tunnel
		c.mu.Unlock()
		st, err := tunnel.DialIntercept(ctx, m, wire.InterceptHeader{Intercept: uid, Proto: 6, Port: 8080})
		if err != nil {
			return "", err
		}
		defer st.Close()
		b, err := io.ReadAll(st)
		return string(b), err
	}
	if _, _, ok := s.intercepts.target("intercepts-2", control.Port{Protocol: "UDP", Number: 8080}); ok {
		t.Error("a port that the intercept does not have leads somewhere")
	}
	if got, err := open("intercepts-2"); err != nil || got != "local" {
		t.Errorf("%q, %v", got, err)
	}
	var re *mux.RejectError
	if _, err := open("intercepts-9"); !errors.As(err, &re) || re.Code != wire.CodeNotFound {
		t.Errorf("unknown intercept: %v", err)
	}
	_ = l.Close()
	if _, err := open("intercepts-2"); !errors.As(err, &re) || re.Code != wire.CodeRefused {
		t.Errorf("nobody listens: %v", err)
	}
}

// The tunnel comes back by itself; when the manager does not know the session any more, a new one takes its place with all its intercepts.
func TestResume(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	c.activeWeb(s)
	c.mu.Lock()
	first := c.tunnel
	c.mu.Unlock()
	_ = first.Close()
	c.until("another tunnel is up", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.tunnel != first })
	c.up(s)
	if got := c.names(); got != "intercepts-2 sessions-1" {
		t.Errorf("after a short loss there is %s", got)
	}

	c.set(func() { // a long sleep: the manager has ended the session
		c.sessions, c.intercepts, c.states = map[string]*v1alpha1.Session{}, map[string]*v1alpha1.Intercept{}, map[string]control.Intercept{}
		_ = c.tunnel.Close()
	})
	c.until("session and intercept are there again", func() bool { return c.names() == "intercepts-4 sessions-3" })
	c.say("intercepts-4", "Active", "", "")
	c.until("it is active", func() bool {
		list, _ := s.intercepts.all()
		return seen(s, "intercepts-4") && len(list) == 1 && list[0].State == "ACTIVE" && list[0].Name == "web" && list[0].Mine
	})
	if st, _ := s.status(); st.UID != "sessions-3" || st.Tunnel != "up" {
		t.Errorf("%+v", st)
	}

	// Somebody deletes it in the cluster: it is forgotten.
	c.set(func() { delete(c.states, "intercepts-4") })
	c.until("it is forgotten", func() bool { list, _ := s.intercepts.all(); return len(list) == 0 })
}

// A session that somebody deleted in the cluster takes its intercepts with it, whether the laptop was there or comes back later.
func TestRevoked(t *testing.T) {
	for name, end := range map[string]func(*cluster){
		"there": func(c *cluster) { _ = c.tunnel.CloseWith(wire.CodeGone, control.SessionDeleted) },
		"away": func(c *cluster) {
			c.gone = control.SessionDeleted
			_ = c.tunnel.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			s := c.connect()
			c.activeWeb(s)
			c.set(func() { // the manager lists it until its agents know
				c.sessions, c.intercepts = map[string]*v1alpha1.Session{}, map[string]*v1alpha1.Intercept{}
				end(c)
			})
			c.until("another session is there", func() bool { return c.names() == "sessions-3" })
			c.up(s)
			list, problems := s.intercepts.all()
			if len(list) != 0 || len(problems) != 1 || !strings.Contains(problems[0], "intercept web has ended: its session was deleted in the cluster at ") {
				t.Errorf("%+v, %q", list, problems)
			}
			if got := c.names(); got != "sessions-3" {
				t.Errorf("there is %s", got)
			}
		})
	}
}

// asleep connects with an active intercept, and then has the manager end the session, as after a long sleep. after runs at that moment.
func asleep(t *testing.T, after func(*cluster)) (*cluster, *session) {
	c := newCluster(t)
	s := c.connect()
	c.activeWeb(s)
	c.set(func() {
		c.sessions, c.intercepts, c.states = map[string]*v1alpha1.Session{}, map[string]*v1alpha1.Intercept{}, map[string]control.Intercept{}
		_ = c.tunnel.Close()
		after(c)
	})
	return c, s
}

// answer lets the API server answer, or not, to who has an intercept created.
func (c *cluster) answer(yes bool) {
	c.t.Helper()
	select {
	case c.hold <- yes:
	case <-time.After(deadline):
		c.t.Fatal("nobody waits for an answer")
	}
}

// resumed waits until the one intercept is there again and ours.
func resumed(c *cluster, s *session) {
	c.t.Helper()
	c.until("the intercept is ours", func() bool {
		s.intercepts.mu.Lock()
		defer s.intercepts.mu.Unlock()
		return s.intercepts.knows("intercepts-4") && !s.intercepts.resuming
	})
	if got := c.names(); got != "intercepts-4 sessions-3" {
		c.t.Errorf("there is %s", got)
	}
	c.say("intercepts-4", "Active", "", "")
	c.until("it is active", func() bool {
		list, _ := s.intercepts.all()
		return len(list) == 1 && list[0].State == "ACTIVE" && list[0].Message == ""
	})
}

// An intercept that could not be created again at first is tried again, and says so until then.
func TestResumeTriedAgain(t *testing.T) {
	c, s := asleep(t, func(c *cluster) { c.refuse = "POST intercepts" })
	c.until("it was refused, and says so", func() bool {
		list, _ := s.intercepts.all()
		return len(list) == 1 && list[0].State == "PENDING" && strings.Contains(list[0].Message, "not created again")
	})
	c.set(func() { c.refuse = "" })
	resumed(c, s)
}

// One whose creation got no answer is not created twice.
func TestResumeWithoutAnswer(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *cluster, *session){
		"connection cut": func(_ *testing.T, c *cluster, _ *session) {
			c.answer(false)
		},
		"tunnel lost meanwhile": func(_ *testing.T, c *cluster, s *session) {
			lost := c.last()
			_ = lost.Close()
			c.until("another tunnel is up", func() bool { m := s.link.Session(); return m != nil && m.Err() == nil && c.last() != lost })
			c.answer(true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, s := asleep(t, func(c *cluster) { c.hold = make(chan bool) })
			c.until("it is being created", func() bool { return c.names() == "intercepts-4 sessions-3" })
			c.up(s)
			end(t, c, s)
			resumed(c, s)
		})
	}
}

// One that is left while it is created again stays away, also where nobody knows whether it was created.
func TestResumeLeft(t *testing.T) {
	for _, answered := range []bool{true, false} {
		t.Run(fmt.Sprintf("answered %v", answered), func(t *testing.T) {
			c, s := asleep(t, func(c *cluster) { c.hold = make(chan bool) })
			c.until("it is being created", func() bool { return c.names() == "intercepts-4 sessions-3" })
			if err := leave(t, s, "web"); err != nil {
				t.Error(err)
			}
			c.answer(answered)
			c.until("it is gone", func() bool { return c.names() == "sessions-3" })
			if list, problems := s.intercepts.all(); len(list)+len(problems) != 0 {
				t.Errorf("%+v, %q", list, problems)
			}
		})
	}
}

// A manager with another key is one when the API server says so.
func TestKeyExchanged(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	c.up(s)
	other, err := tunnel.NewIdentity("traffic-manager")
	if err != nil {
		t.Fatal(err)
	}
	var first *mux.Session
	c.until("the manager has the tunnel", func() bool { c.mu.Lock(); defer c.mu.Unlock(); first = c.tunnel; return first != nil })
	c.set(func() { c.id, c.version = other, "2.0.0" }) // an upgrade, say
	_ = first.Close()
	c.until("it is told that the key is wrong", func() bool {
		st, _ := s.status()
		return strings.Contains(st.Tunnel, tunnel.ErrPin.Error())
	})
	c.set(func() { c.key = other.Fingerprint() })
	c.up(s)
	if got := c.names(); got != "sessions-1" {
		t.Errorf("it is another session: %s", got)
	}
	if st, _ := s.status(); st.ManagerVersion != "2.0.0" {
		t.Errorf("the manager's version is that of the one before: %s", st.ManagerVersion)
	}
}

// What a manager says decides whether trying again makes sense.
func TestRejected(t *testing.T) {
	for name, tt := range map[string]struct {
		reject error
		ends   bool
	}{
		"denied": {&mux.RejectError{Code: wire.CodeDenied, Msg: "the admission policy is not in force"}, true},
		"busy":   {&mux.RejectError{Code: wire.CodeBusy, Msg: "etcd is away"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			c.set(func() { c.reject = tt.reject })
			s := c.connect()
			if tt.ends {
				<-s.group.Context().Done()
				wantError(t, s.whyDown(context.Cause(s.group.Context())), uerr.Cluster, "refused the session: ", "kubectl -n doppel logs")
				return
			}
			c.until("it is told why", func() bool { st, _ := s.status(); return strings.Contains(st.Tunnel, "etcd is away") })
			c.set(func() { c.reject = nil })
			c.up(s)
		})
	}
}

// A local process reaches ports of the pod's loopback as long as the intercept lasts.
func TestToPod(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := int32(busy.Addr().(*net.TCPAddr).Port)
	req := localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}, ToPod: []string{fmt.Sprint(port)}}
	o := <-create(t.Context(), s, req)
	wantError(t, o.err, uerr.Conflict, fmt.Sprintf("--to-pod %d", port), "something listens on 127.0.0.1")
	if c.names() != "sessions-1" {
		t.Errorf("created %s", c.names())
	}
	_ = busy.Close()
	done := create(t.Context(), s, req)
	c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	c.say("intercepts-2", "Active", "", "")
	if o := <-done; o.err != nil || len(o.in.ToPod) != 1 {
		t.Fatalf("%+v", o)
	}
	conn, err := net.Dial("tcp", busy.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if b, err := io.ReadAll(conn); err != nil || string(b) != "intercepts-2 "+busy.Addr().String() {
		t.Errorf("%q, %v", b, err)
	}
	if err := leave(t, s, "web"); err != nil {
		t.Fatal(err)
	}
	if _, err := net.Dial("tcp", busy.Addr().String()); err == nil {
		t.Error("the port is still open after the intercept's end")
	}
}

// An intercept that somebody ends is told of, until its name is used again or it is left.
func TestInterceptEnded(t *testing.T) {
	for name, tt := range map[string]struct {
		then func(*cluster)
		why  string
	}{
		"taken over": {func(c *cluster) {
			c.say("intercepts-2", "Failed", "TakenOver", "port 8080 of web was taken over by mary")
		}, "port 8080 of web was taken over by mary"},
		"deleted": {func(c *cluster) {
			c.set(func() { delete(c.states, "intercepts-2"); delete(c.intercepts, "intercepts-2") })
		}, "it was removed in the cluster at "},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			s := c.connect()
			c.activeWeb(s)
			tt.then(c)
			var problems []string
			c.until("status tells", func() bool { st, _ := s.status(); problems = st.Problems; return len(problems) > 0 })
			if want := "intercept web has ended: " + tt.why; !strings.HasPrefix(problems[0], want) {
				t.Errorf("told %q", problems)
			}
			c.until("the object is gone", func() bool { return c.names() == "sessions-1" })
			wantError(t, leave(t, s, "web"), uerr.Conflict, "intercept web had ended already: "+tt.why, "nothing is left to do")
			if st, _ := s.status(); len(st.Problems) != 0 {
				t.Errorf("still told %q", st.Problems)
			}
		})
	}
}

// Ending removes the objects, intercepts first.
func TestClose(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}})
	c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	s.close() // while another command still waits for its intercept
	o := <-done
	wantError(t, o.err, uerr.NotConnected, "the session ended", "doppel connect")
	if got := c.names(); got != "" {
		t.Errorf("left behind: %s", got)
	}
	s.close() // again
}

// A session that ends by itself leaves no more behind than one that was ended: neither in the cluster nor on the laptop.
func TestForget(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}})
	c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count == 2 })
	d := &Daemon{log: slog.New(slog.DiscardHandler), sessions: []*session{s}}
	d.forget(s, errors.New("the root daemon is gone"))
	<-done
	if got := c.names(); got != "" {
		t.Errorf("left behind: %s", got)
	}
	if s.intercepts.byName["web"] != nil || len(d.sessions) > 0 {
		t.Error("not forgotten")
	}
}

// While the network is being set up the last news of the cluster are kept, not the first.
func TestClusterNewsMeanwhile(t *testing.T) {
	s := &session{info: make(chan control.Cluster, 1)}
	for _, d := range []string{"one", "two", "three"} {
		s.onCluster(control.Cluster{Domain: d})
	}
	if c := <-s.info; c.Domain != "three" {
		t.Errorf("got %s", c.Domain)
	}
}

// An API server that has just started may refuse what it allows a moment later: a session that was connected waits for that.
func TestDeniedPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		no := uerr.New(uerr.Denied, "", "forbidden")
		if s := (&session{}); !s.permanent(no) {
			t.Error("a connect that is not allowed goes on trying")
		}
		s := &session{renew: time.Minute}
		if s.permanent(no) {
			t.Error("the first no ends a session")
		}
		time.Sleep(deniedPatience + time.Second)
		if !s.permanent(no) {
			t.Error("a lasting no does not end a session")
		}
		if s.permanent(&mux.RejectError{Code: wire.CodeBusy}) {
			t.Error("a busy manager ends a session")
		}
	})
}

// Nothing narrows what a session reaches, and whether there is more than it may name it does not know.
func TestReachLimit(t *testing.T) {
	r := v1alpha1.Reach{Namespaces: make([]string, v1alpha1.MaxReach)}
	r.Namespaces[0] = "shop"
	if p := reachProblem(r, "shop", nil); !strings.Contains(p, "if you may reach more") || !strings.Contains(p, "ClusterRoleBinding") {
		t.Error(p)
	}
	r.Namespaces = r.Namespaces[:v1alpha1.MaxReach-1]
	if p := reachProblem(r, "shop", nil); p != "" {
		t.Error(p)
	}
}
