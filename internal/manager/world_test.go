package manager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"go.uber.org/goleak"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/meta/testrestmapper"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	goleak.VerifyTestMain(m)
}

// deadline bounds every wait of a test.
const deadline = 20 * time.Second

// whole are the rules of an intercept of all connections.
var whole = []match.Rule{{}}

// world is a manager in front of a fake API server.
type world struct {
	*Manager
	t  *testing.T
	kc client.WithWatch // the API server

	mu sync.Mutex
	// guarded by mu
	policyErr error                                           // what a forged object gets; nil: it is accepted
	deaf      bool                                            // the API server does not reach the webhook
	reachErr  error                                           // what a session gets that wants too much; nil: it is accepted
	narrow    bool                                            // pods may be listed in namespaces only
	fail      func(verb string, o runtime.Object) (err error) // nil: nothing fails
	patched   []client.Object
}

// fakeCtrl is as much of controller-runtime's manager as ours uses outside its controllers.
type fakeCtrl struct {
	ctrl.Manager
	client, live client.Client
}

func (f fakeCtrl) GetClient() client.Client    { return f.client }
func (f fakeCtrl) GetAPIReader() client.Reader { return f.live }
func (f fakeCtrl) GetCache() cache.Cache       { return nil }

// scheme and mapper are made once: they are most of a fake API server's cost.
var (
	scheme = sync.OnceValue(func() *runtime.Scheme {
		s := runtime.NewScheme()
		if err := errors.Join(clientgoscheme.AddToScheme(s), v1alpha1.AddToScheme(s)); err != nil {
			panic(err)
		}
		return s
	})
	mapper = sync.OnceValue(func() apimeta.RESTMapper { return testrestmapper.TestOnlyStaticRESTMapper(scheme()) })
)

// newWorld starts a manager in namespace doppel with the objects in the cluster.
func newWorld(t *testing.T, objs ...client.Object) *world {
	t.Helper()
	w := &world{t: t, policyErr: refusedByPolicy(), reachErr: refusedByReach()}
	objs = append(objs,
		&corev1.Secret{ObjectMeta: meta("doppel", objectName)}, &corev1.ConfigMap{ObjectMeta: meta("doppel", objectName)},
		&corev1.Service{ObjectMeta: meta("doppel", objectName), Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.99", Ports: []corev1.ServicePort{{Name: "api", Port: 80}}}},
	)
	b := fake.NewClientBuilder().WithScheme(scheme())
	for _, k := range ipIndexes {
		b = b.WithIndex(k.object, ipIndex, k.ips)
	}
	b = b.WithIndex(&corev1.Pod{}, podIP, func(o client.Object) []string { return append(podIPs(o.(*corev1.Pod)), "")[:1] }).
		WithIndex(&corev1.Pod{}, "spec.nodeName", func(o client.Object) []string { return []string{o.(*corev1.Pod).Spec.NodeName} })
	b = b.WithIndex(&v1alpha1.Intercept{}, holderIndex, holderOf).WithIndex(&v1alpha1.Intercept{}, workloadIndex, workloadOfIntercept).
		WithIndex(&v1alpha1.Intercept{}, declaredIndex, declaredOf).WithIndex(&v1alpha1.Session{}, uidIndex, uidOf)
	b = b.WithIndex(&corev1.Event{}, "involvedObject.uid", func(o client.Object) []string { return []string{string(o.(*corev1.Event).InvolvedObject.UID)} }).
		WithIndex(&corev1.Event{}, "reason", func(o client.Object) []string { return []string{o.(*corev1.Event).Reason} })
	w.kc = b.WithRESTMapper(mapper()).WithObjects(objs...).
		WithStatusSubresource(&v1alpha1.Session{}, &v1alpha1.Intercept{}, &appsv1.Deployment{}, &corev1.Pod{}).
		WithInterceptorFuncs(w.funcs()).Build()
	resolvConf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolvConf, []byte("nameserver 127.0.0.1\nsearch doppel.svc.cluster.test svc.cluster.test cluster.test\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Namespace: "doppel", PodName: "traffic-manager-1", PodIP: "10.0.0.1", AgentImage: "agent:1", ResolvConf: resolvConf,
		Kube: &rest.Config{}, Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	m, err := assemble(t.Context(), cfg, fakeCtrl{client: w.kc, live: w.kc}, newElection(w.kc, cfg.Namespace, cfg.PodName, cfg.Log), new(clock))
	if err != nil {
		t.Fatal(err)
	}
	w.Manager = m
	m.tokens.fetch = jwks("k", signKey())
	return w
}

func refusedByPolicy() error {
	return apierrors.NewForbidden(schema.GroupResource{Group: "doppel.dev", Resource: "sessions"}, "",
		errors.New("ValidatingAdmissionPolicy 'doppel-identity-sessions' with binding 'doppel-identity-sessions' denied request: spec.user must be the name by which this cluster knows you"))
}

func refusedByReach() error {
	return apierrors.NewForbidden(schema.GroupResource{Group: "doppel.dev", Resource: "sessions"}, "",
		errors.New("ValidatingAdmissionPolicy 'doppel-reach-0' with binding 'doppel-reach-0' denied request: a namespace in spec.reach.namespaces (number 0 or 1) needs the right to connect to networks.doppel.dev there"))
}

func refusedByRBAC() error {
	return apierrors.NewForbidden(schema.GroupResource{Group: "doppel.dev", Resource: "sessions"}, "",
		errors.New(`User "system:serviceaccount:doppel:traffic-manager" cannot create resource "sessions" in API group "doppel.dev"`))
}

// funcs puts the world between the manager and the fake API server.
func (w *world) funcs() interceptor.Funcs {
	broken := func(verb string, o runtime.Object) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.fail == nil {
			return nil
		}
		return w.fail(verb, o)
	}
	return interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if err := errors.Join(ctx.Err(), broken("create", o)); err != nil {
				return err
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			if slices.Contains(opts, client.CreateOption(client.DryRunAll)) {
				if text := o.GetAnnotations()[agentcfg.AnnotationProbe]; text != "" && !w.deaf {
					w.questions.answer(fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q}}}`, agentcfg.AnnotationProbe, text))
				}
				if s, ok := o.(*v1alpha1.Session); ok && s.Spec.User != forgedUser {
					return w.reachErr
				}
				return w.policyErr
			}
			return c.Create(ctx, o, opts...)
		},
		Get: func(ctx context.Context, c client.WithWatch, k client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			return errors.Join(broken("get", o), c.Get(ctx, k, o, opts...))
		},
		List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
			var o client.ListOptions
			if _, pods := l.(*corev1.PodList); pods && w.narrow && o.ApplyOptions(opts).Namespace == "" {
				return apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, "", errors.New("cannot list pods at the cluster scope"))
			}
			return errors.Join(broken("list", l), c.List(ctx, l, opts...))
		},
		Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			if err := broken("delete", o); err != nil {
				return err
			}
			return c.Delete(ctx, o, opts...)
		},
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption) error {
			if err := broken("patch", o); err != nil {
				return err
			}
			w.mu.Lock()
			w.patched = append(w.patched, o)
			w.mu.Unlock()
			return c.Patch(ctx, o, p, opts...)
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
			if err := broken("patch "+sub, o); err != nil {
				return err
			}
			w.mu.Lock()
			w.patched = append(w.patched, o)
			w.mu.Unlock()
			return c.SubResource(sub).Patch(ctx, o, p, opts...)
		},
	}
}

// set changes the world under its lock.
func (w *world) set(fn func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fn()
}

// restarts counts the rollouts that were asked for.
func (w *world) restarts() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, o := range w.patched {
		if d, ok := o.(*appsv1.Deployment); ok && d.Spec.Template.Annotations[restartedAt] != "" {
			n++
		}
	}
	return n
}

func (w *world) get(o client.Object) bool {
	w.t.Helper()
	err := w.kc.Get(w.t.Context(), client.ObjectKeyFromObject(o), o)
	if client.IgnoreNotFound(err) != nil {
		w.t.Fatal(err)
	}
	return err == nil
}

func (w *world) create(o client.Object) {
	w.t.Helper()
	if err := w.kc.Create(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) delete(o client.Object) {
	w.t.Helper()
	if err := w.kc.Delete(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
}

// until polls a condition.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(deadline); !ok(); {
		if time.Now().After(end) {
			w.t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // polling, not synchronisation
	}
}

// The objects of tests: their UID is their name.

const restartedAt = "kubectl.kubernetes.io/restartedAt"

func meta(ns, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(name), CreationTimestamp: metav1.Now()}
}

func session(name, user, key string) *v1alpha1.Session {
	return &v1alpha1.Session{ObjectMeta: meta("doppel", name), Spec: v1alpha1.SessionSpec{User: user, Key: key, Client: "doppel on " + user + "'s laptop", RenewTime: metav1.NowMicro()}}
}

func intercept(name, user, session string) *v1alpha1.Intercept {
	return &v1alpha1.Intercept{ObjectMeta: meta("shop", name), Spec: v1alpha1.InterceptSpec{
		User: user, Session: session, Name: "web", Workload: v1alpha1.WorkloadRef{Kind: "Deployment", Name: "web"},
	}}
}

func tcp(numbers ...uint16) (out []control.Port) {
	for _, n := range numbers {
		out = append(out, control.Port{Protocol: "TCP", Number: n})
	}
	return out
}

func owned(m metav1.ObjectMeta, kind, name string) metav1.ObjectMeta {
	yes := true
	api := map[string]string{"Deployment": "apps/v1", "ReplicaSet": "apps/v1", "StatefulSet": "apps/v1", "Job": "batch/v1", "Rollout": "argoproj.io/v1alpha1"}[kind]
	m.OwnerReferences = []metav1.OwnerReference{{APIVersion: api, Kind: kind, Name: name, UID: types.UID(name), Controller: &yes}}
	return m
}

// laptop is a laptop's end of a tunnel.
type laptop struct {
	id *tunnel.Identity
	t  *testing.T
}

func newLaptop(t *testing.T) *laptop {
	t.Helper()
	id, err := tunnel.NewIdentity("laptop")
	if err != nil {
		t.Fatal(err)
	}
	return &laptop{id, t}
}

// attach connects the laptop to the manager; the tunnel ends with the test.
func (l *laptop) attach(w *world, h wire.Hello) (*mux.Session, error) {
	return l.resume(w, h, nil)
}

// resume is attach with a tunnel that is to go on.
func (l *laptop) resume(w *world, h wire.Hello, old *mux.Session) (*mux.Session, error) {
	return dial(w, l.id, h, old, func(ctx context.Context, c net.Conn) { w.laptops.serve(ctx, c) })
}

// dial makes a tunnel to what serves the other end of a loopback connection.
func dial(w *world, id *tunnel.Identity, h wire.Hello, old *mux.Session, serve func(context.Context, net.Conn)) (*mux.Session, error) {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() {
		defer close(served)
		c, err := l.Accept()
		if err == nil {
			serve(ctx, c)
		}
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		cancel()
		_ = c.Close()
		select {
		case <-served:
		case <-time.After(deadline):
			w.t.Error("a tunnel does not end")
		}
	})
	dctx, stop := context.WithTimeout(context.Background(), deadline)
	defer stop()
	s, _, err := tunnel.Client(dctx, c, tunnel.ClientConfig{Identity: id, Peer: w.identity.Fingerprint(), Hello: h, Resume: old})
	if err == nil {
		w.t.Cleanup(func() { _ = s.Close() })
	}
	return s, err
}

// racingClient is a replica's client whose first Update meets another replica's, which writes identity before.
type racingClient struct {
	client.WithWatch
	identity []byte
}

func (c racingClient) Update(ctx context.Context, o client.Object, opts ...client.UpdateOption) error {
	if sec, ok := o.(*corev1.Secret); ok {
		theirs := &corev1.Secret{}
		if err := c.WithWatch.Get(ctx, client.ObjectKeyFromObject(sec), theirs); err != nil {
			return err
		}
		theirs.Data = map[string][]byte{secretIdentity: c.identity}
		if err := c.WithWatch.Update(ctx, theirs); err != nil {
			return err
		}
	}
	return c.WithWatch.Update(ctx, o, opts...)
}
